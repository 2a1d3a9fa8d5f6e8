"""What stands between the collectives of a placed region: plain functions that Dynamo traces.

Letters    R rows of this rank, S rows that it received, P ranks, L experts of a rank, M the most that a rank has.
Message    What a rank tells each other about the rows to come: [P, M + 2], one line a rank.  M counts, one an expert;
           then how many rows no expert takes: they travel with those of the last rank, behind which they are sorted,
           and come back as zeros; then a fingerprint of what its experts compute, which has to be the same everywhere.
"""

import hashlib

import torch
from torch import Tensor
from torch.library import custom_op


def fingerprint(text: str) -> int:
    """A number of 31 bits for what experts compute."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1


def message(offsets_E: Tensor, rows_RD: Tensor, ranks: int, most: int, mark: int) -> Tensor:
    """What this rank tells the others, flat: [P * (M + 2)]."""
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    counts_PM = torch.nn.functional.pad(counts_E, (0, ranks * most - counts_E.shape[0])).view(ranks, most)
    nobody_P1 = torch.nn.functional.pad(rows_RD.shape[0] - offsets_E[-1:], (ranks - 1, 0)).view(ranks, 1)
    return torch.cat([counts_PM, nobody_P1, torch.full_like(nobody_P1, mark)], 1).reshape(-1)


def host_read(sent: Tensor, received: Tensor, rows_RD: Tensor, ranks: int) -> tuple[list[int], list[int]]:
    """(rows to each rank, rows from each rank): the one read of data by the host."""
    numbers: list[int] = torch.ops.moe_ep.check_messages(torch.cat([sent, received]).to("cpu"), ranks).tolist()
    for n in numbers:
        torch._check(n >= 0)
    send = [*numbers[: ranks - 1], rows_RD.shape[0] - sum(numbers[: ranks - 1])]  # that all rows travel is known
    return send, numbers[ranks:]


@custom_op("moe_ep::check_messages", mutates_args=())
def check_messages(messages: Tensor, ranks: int) -> Tensor:
    """[2P]: rows to each rank, then from each; a line of a rank whose experts compute something else is an error."""
    lines = messages.view(2 * ranks, -1)
    differ = (lines[ranks:, -1] != lines[0, -1]).nonzero().flatten().tolist()
    if differ:
        raise RuntimeError(
            f"experts compute something else on ranks {differ} of the expert-parallel group than on this one: their "
            f"graphs were made for other modes, dtypes or batch sizes that the experts read"
        )
    return lines[:, :-1].sum(1)


@check_messages.register_fake
def _(messages: Tensor, ranks: int) -> Tensor:
    return messages.new_empty(2 * ranks, dtype=torch.int64)


def expert_of_row(received: Tensor, rows_SD: Tensor, ranks: int) -> Tensor:
    """[S, 1]: the expert of this rank that each received row is for; one that it has not, for rows of nobody."""
    counts = received.view(ranks, -1)[:, :-1]
    expert = torch.arange(counts.shape[1], device=received.device).repeat(ranks)
    return torch.repeat_interleave(expert, counts.reshape(-1), output_size=rows_SD.shape[0]).unsqueeze(1)
