"""The options of `torch.compile(..., backend="moe_ep", options={...})`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moe_compile.errors import MoeCompileError

INNER = ("inductor", "aot_eager", "eager")
MOVES = ("alltoall", "dedup", "allgather", "gather_weights")
STRATEGIES = ("auto", "grouped", *MOVES)
NUMERICS = ("exact", "fast")
ON_ONE, ON_MANY = ("auto", "grouped"), ("auto", *MOVES)


@dataclass(frozen=True)
class Options:
    """inner     who compiles the rewritten graph: "inductor", "aot_eager" or "eager"
    strict    raise if an expert region is found and not rewritten, or a graph has none (meant with fullgraph=True)
    strategy  how experts meet tokens: "auto" or "grouped" on one process; with sharded experts "auto" (by a cost
              model), "alltoall", "dedup", "allgather" or "gather_weights"
    skip      names of passes to leave out, e.g. ["fold_routing_weights"]; "detect_experts" leaves all as it is
    numerics  "exact": bitwise reproducible, sums over a token's experts in order, in f32; "fast": may reorder
    chunks    in how many parts of its tokens a rank sends them to sharded experts: one travels while another is
              computed.  Above 1, training needs numerics "fast": experts' gradients are sums over the chunks
    """

    inner: str = "inductor"
    strict: bool = False
    strategy: str = "auto"
    skip: frozenset[str] = frozenset()
    numerics: str = "exact"
    chunks: int = 1

    def check_strategy(self, sharded: bool) -> None:
        """Raise if the strategy does not fit experts that are, or are not, sharded over a mesh."""
        if not sharded and self.strategy not in ON_ONE:
            raise MoeCompileError(
                f"strategy {self.strategy!r} moves tokens or weights between processes; this model's experts are "
                f"not sharded over a mesh: use 'auto' or 'grouped'"
            )
        if self.chunks > 1 and (not sharded or self.strategy == "gather_weights"):
            why = "its weights travel" if sharded else "this model's experts are not sharded over a mesh"
            raise MoeCompileError(
                f"option chunks is {self.chunks}: it is about tokens that travel to their experts, and {why}"
            )
        if sharded and (self.strategy, self.numerics) == ("dedup", "exact"):
            raise MoeCompileError(
                "strategy 'dedup' adds a token's results rank by rank, so that the number of ranks shows in the last "
                "bits: it needs numerics 'fast'"
            )
        if sharded and self.strategy not in ON_MANY:
            raise MoeCompileError(
                f"strategy {self.strategy!r} is not one for experts that are sharded over a mesh: use "
                f"{', '.join(map(repr, ON_MANY))}"
            )

    @staticmethod
    def parse(given: Mapping[str, Any] | None, passes: Sequence[str]) -> "Options":
        """Checked options.  Raises `MoeCompileError` with what is known, for anything that is not."""
        given = dict(given or {})
        known = [f.name for f in fields(Options)]
        for name in given:
            if name not in known:
                raise MoeCompileError(f"unknown option {name!r}; moe_ep knows {', '.join(known)}")
        _one_of("inner", given.get("inner", "inductor"), INNER)
        _one_of("strategy", given.get("strategy", "auto"), STRATEGIES)
        _one_of("numerics", given.get("numerics", "exact"), NUMERICS)
        if not isinstance(given.get("strict", False), bool):
            raise MoeCompileError(f"option strict is {given['strict']!r}; it is True or False")
        chunks = given.get("chunks", 1)
        if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1:
            raise MoeCompileError(f"option chunks is {chunks!r}; it is a number, 1 or more")
        skip = given.get("skip", ())
        if isinstance(skip, str) or not isinstance(skip, (list, tuple, set, frozenset)):
            raise MoeCompileError(f"option skip is {skip!r}; it is a list of pass names")
        for name in skip:
            _one_of("skip", name, passes)
        return Options(**{**given, "skip": frozenset(skip)})


def _one_of(option: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise MoeCompileError(f"option {option}: {value!r} is not one of {', '.join(map(repr, known))}")
