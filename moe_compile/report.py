"""What happened to a model: a record for each expert region found, printed as a table."""

from dataclasses import dataclass, field

from moe_compile.advice import advice
from moe_compile.cost import Gain
from moe_compile.parallel.costs import Estimate


@dataclass(frozen=True)
class RegionReport:
    """One place where experts were looked for.

    matched: rewritten.  module: qualified name.  location: "file.py:line" of the function that holds it.
    form: how it was written ("loop", "grouped", "batched", "dense"), "" if unknown.  top_k: None if unknown.
    reason: the first thing that could not be shown, if not matched.  before, after: the graphs, "" if there are none.
    body: the ops that an expert runs on its rows.  strategy: how experts meet tokens now, "" if not rewritten.
    gain: what the rewrite is estimated to save, None if not rewritten.
    estimates: if experts are sharded, what each strategy would cost this rank a forward (parallel/costs.py), with so
    many chunks.  chunks: of the tokens that travel.
    """

    matched: bool
    module: str
    location: str
    form: str
    num_experts: int
    top_k: int | None
    reason: str | None = None
    before: str = field(default="", repr=False)
    after: str = field(default="", repr=False)
    passes: tuple[str, ...] = field(default=(), repr=False)
    body: tuple[str, ...] = field(default=(), repr=False)
    strategy: str = ""
    gain: Gain | None = field(default=None, repr=False)
    estimates: tuple[Estimate, ...] = field(default=(), repr=False)
    chunks: int = 1

    @property
    def advice(self) -> str | None:
        """What would let a refused region be rewritten, where that is known."""
        return advice(self.reason) if self.reason else None


@dataclass
class Report:
    """All regions, in the order in which the model calls them.  `str(report)` is a table, with notes below it."""

    regions: list[RegionReport] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.regions:
            return "no expert region found"
        done = sum(r.matched for r in self.regions)
        notes = [line for note, names in self._notes().items() for line in (f"{_some(names)}:", *note)]
        return "\n".join([*_table(self.regions), *notes, f"{done} of {len(self.regions)} regions rewritten"])

    def _notes(self) -> dict[tuple[str, ...], list[str]]:
        """What there is to say beyond the table, and of which regions."""
        notes: dict[tuple[str, ...], list[str]] = {}
        for region in self.regions:
            if note := _note(region):
                notes.setdefault(note, []).append(region.module or "(root)")
        return notes


def _table(regions: list[RegionReport]) -> list[str]:
    head = ("module", "location", "form", "experts", "top-k", "result")
    rows = [
        (r.module or "(root)", r.location, r.form or "-", str(r.num_experts or "-"), str(r.top_k or "-"), _result(r))
        for r in regions
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def _result(region: RegionReport) -> str:
    return "rewritten" if region.matched else f"left as it is: {region.reason}"


def _note(region: RegionReport) -> tuple[str, ...]:
    if not region.matched:
        return (f"  would help: {region.advice}",) if region.advice else ()
    lines = [f"  an expert runs {', '.join(region.body)}"] if region.body else []
    if region.gain is not None:
        chunks = f" in {region.chunks} chunks" if region.chunks > 1 else ""
        lines.append(f"  strategy {region.strategy}{chunks}; estimated forward: {region.gain}")
    lines += [f"    {'*' if e.strategy == region.strategy else ' '} {e}" for e in region.estimates]
    return tuple(lines)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
