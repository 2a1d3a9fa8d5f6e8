"""How the ranks of a job may be divided: what `build_mesh` takes, as numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_compile.errors import MoeCompileError
from moe_compile.parallel.mesh import shard_sizes


@dataclass(frozen=True)
class Layout:
    """Ranks as (dp_replicate, edp, ep, tp), neighbours last; dp_shard = edp * ep.

    Dense parameters are split over dp_shard and tp, experts over ep, and over edp if `splits_experts`: that is
    `parallelize(.., experts="sharded")`, and with ep=1 it is FSDP alone.  The ranks of tp share their tokens, and the
    dense work on them.
    """

    ep: int = 1
    tp: int = 1
    dp_shard: int = 1
    dp_replicate: int = 1
    splits_experts: bool = False

    @property
    def edp(self) -> int:
        """Over how many ranks the same experts are split."""
        return self.dp_shard // self.ep if self.splits_experts else 1

    @property
    def dp(self) -> int:
        return self.dp_shard * self.dp_replicate

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def expert_copies(self) -> int:
        return self.ranks // self.ep // self.edp

    def __str__(self) -> str:
        parts = [f"ep={self.ep}", f"dp_shard={self.dp_shard}"]
        parts += [f"dp_replicate={self.dp_replicate}"] if self.dp_replicate > 1 else []
        parts += [f"tp={self.tp}"] if self.tp > 1 else []
        return ", ".join(parts + (['experts="sharded"'] if self.splits_experts else []))


def layouts(ranks: int, ranks_a_node: int, num_experts: int, heads: int, most_tp: int = 1) -> Iterator[Layout]:
    """Every layout of so many ranks: tp inside a node, and a divisor of the heads; experts on every rank of ep."""
    if ranks < 1 or ranks_a_node < 1:
        raise MoeCompileError(f"{ranks} GPUs, {ranks_a_node} a node: both should be above zero")
    if ranks > ranks_a_node and ranks % ranks_a_node:
        raise MoeCompileError(f"{ranks} GPUs do not fill nodes of {ranks_a_node}")
    for tp in _divisors(min(ranks, ranks_a_node)):
        if tp > most_tp or heads % tp or ranks % tp:
            continue
        dp = ranks // tp
        for ep in _divisors(dp):
            if _fits(num_experts, ep):
                for dp_shard in _divisors(dp):
                    if dp_shard % ep == 0:
                        yield Layout(ep, tp, dp_shard, dp // dp_shard)
                        if dp_shard > ep:
                            yield Layout(ep, tp, dp_shard, dp // dp_shard, splits_experts=True)


def _fits(num_experts: int, ep: int) -> bool:
    try:
        shard_sizes(num_experts, ep)
    except MoeCompileError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
