"""What happened to a model: a record for each expert region found, printed as a table."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RegionReport:
    """One place where experts were looked for.

    matched: rewritten.  module: qualified name.  location: "file.py:line" of the function that holds it.
    form: how it was written ("loop", "grouped", "batched"), "" if unknown.  top_k: None if unknown.
    reason: the first thing that could not be shown, if not matched.  before, after: the graphs, "" if there are none.
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


@dataclass
class Report:
    """All regions, in the order in which the model calls them.  `str(report)` is a table."""

    regions: list[RegionReport] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.regions:
            return "no expert region found"
        head = ("module", "location", "form", "experts", "top-k", "result")
        rows = [
            (
                r.module or "(root)",
                r.location,
                r.form or "-",
                str(r.num_experts or "-"),
                str(r.top_k or "-"),
                _result(r),
            )
            for r in self.regions
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
        ]
        done = sum(r.matched for r in self.regions)
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(f"{done} of {len(self.regions)} regions rewritten")
        return "\n".join(lines)


def _result(region: RegionReport) -> str:
    return "rewritten" if region.matched else f"left as it is: {region.reason}"
