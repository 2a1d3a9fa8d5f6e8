"""One decision for all ranks, made at compile time: ranks compile on their own, for batches of other sizes."""

import datetime
import hashlib

import torch.distributed as dist

from moe_compile.errors import MoeCompileError

WAIT = datetime.timedelta(minutes=10)  # ranks compile the same region at about the same time: it is in their forwards


def agree(group: str, topic: str, mine: str) -> str:
    """What the first rank of a process group decided about a topic: its `mine`, when it first came here.

    The others wait for it, as they would in the next collective of their forward, which it takes part in.  `topic` must
    be the same text on all ranks.  Nothing but the job's store is used, so a rank that compiles again later, or another
    time than the others, leaves no rank in a collective alone.
    """
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return mine
    ranks = dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(group))  # type: ignore[arg-type]
    store = dist.distributed_c10d._get_default_store()
    digest = hashlib.sha256(topic.encode()).hexdigest()[:16]
    key = f"moe_ep/{'.'.join(map(str, ranks))}/{digest}"
    if dist.get_rank() == ranks[0]:
        return str(store.compare_set(key, "", mine).decode())
    try:
        store.wait([key], WAIT)
    except RuntimeError as error:
        raise MoeCompileError(
            f"rank {ranks[0]} has not compiled these experts within {WAIT.seconds // 60} minutes: every rank takes "
            f"part in every forward, and the first of a group chooses the strategy ({topic})"
        ) from error
    return str(store.get(key).decode())
