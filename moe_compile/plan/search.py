"""Every layout of a number of GPUs, with what it needs and takes, and the one to take."""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_compile.errors import MoeCompileError
from moe_compile.plan import hardware
from moe_compile.plan.layouts import Layout, layouts
from moe_compile.plan.memory import Memory, Setup, memory
from moe_compile.plan.shapes import Shape
from moe_compile.plan.step import Cluster, Step, Ways, step

ALIKE = 1.03  # times that differ by less are one: then what sends least is taken


@dataclass(frozen=True)
class Option:
    """One layout.  tokens_s: of one GPU, in a second.  fits: in what is usable of its memory."""

    layout: Layout
    memory: Memory
    step: Step
    tokens_s: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """options: the best of each (ep, tp), those that fit first, the fastest first, but for `best`: of those within
    `ALIKE` of the fastest the one that sends least.
    """

    shape: Shape
    ranks: int
    cluster: Cluster
    setup: Setup
    options: tuple[Option, ...]

    @property
    def best(self) -> Option | None:
        """What to take; None if nothing fits."""
        return self.options[0] if self.options and self.options[0].fits else None


def predict(shape: Shape, layout: Layout, cluster: Cluster, setup: Setup, ways: Ways | None = None) -> Option:
    """Memory and time of one layout."""
    ways = ways or Ways()
    needs, takes = memory(shape, layout, setup), step(shape, layout, cluster, setup, ways)
    fits = needs.total <= hardware.USABLE * cluster.gpu.memory_gb * 1e9
    return Option(layout, needs, takes, setup.tokens / takes.total_us * 1e6, fits)


def plan(shape: Shape, ranks: int, cluster: Cluster, setup: Setup, most_tp: int = 1) -> Plan:
    """What each division of the ranks needs and takes.

    Raises `MoeCompileError` if there is none: a number of ranks that does not fill its nodes.
    """
    if setup.tokens < 1 or setup.length < 1:
        raise MoeCompileError(f"{setup.tokens} tokens a GPU, sequences of {setup.length}: both should be above zero")
    found = layouts(ranks, cluster.ranks_a_node, shape.E, shape.heads, most_tp)
    best: dict[tuple[int, int], Option] = {}
    for option in (predict(shape, layout, cluster, setup) for layout in found):
        key = option.layout.ep, option.layout.tp
        if key not in best or _rank(option) < _rank(best[key]):
            best[key] = option
    return Plan(shape, ranks, cluster, setup, tuple(_sorted(best.values())))


def _sorted(options: Iterable[Option]) -> list[Option]:
    found = sorted(options, key=_rank)
    near = [o for o in found if o.fits and o.step.total_us <= ALIKE * found[0].step.total_us]
    if near:
        least = min(near, key=lambda o: o.step.sent)
        found.remove(least)
        found.insert(0, least)
    return found


def _rank(option: Option) -> tuple[float, ...]:
    """What fits by time, what does not by how much is missing."""
    if option.fits:
        return 0.0, option.step.total_us, option.memory.total
    return 1.0, option.memory.total, option.step.total_us
