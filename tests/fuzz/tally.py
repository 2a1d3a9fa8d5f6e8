"""What came of a run: counts by form, edits and result, why programs without edits were refused, what was wrong."""

import collections
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

Counter = collections.Counter[str]
_LINE = re.compile(r"  (?:(plain|edited|refused): )(.+?) +(\d+)$")


class Program(Protocol):
    """What a count says of a program: of which form it is, and whether it was edited."""

    @property
    def form(self) -> str: ...
    @property
    def edits(self) -> Sequence[str]: ...


@dataclass
class Tally:
    counts: Counter = field(default_factory=collections.Counter)  # "plain loop rewritten", "edited loop refused"
    reasons: Counter = field(default_factory=collections.Counter)  # of programs without edits
    wrong: list[str] = field(default_factory=list)

    @property
    def programs(self) -> int:
        return sum(self.counts.values())

    def add(self, parts: Program, result: str, reason: str) -> None:
        """One program's result: "invalid", "refused", "rewritten" or "wrong"."""
        self.counts[f"{'edited' if parts.edits else 'plain'} {parts.form} {result}"] += 1
        if not parts.edits and result == "refused":
            self.reasons[f"{parts.form}, {re.sub(r'moe_fuzz_[0-9]+.py:[0-9]+', 'a line', reason)}"] += 1

    def __iadd__(self, other: "Tally") -> "Tally":
        self.counts += other.counts
        self.reasons += other.reasons
        self.wrong += other.wrong
        return self

    def text(self) -> str:
        """The report; `parse` reads it."""
        results = collections.Counter[str]()
        for name, n in self.counts.items():
            results[name.rpartition(" ")[2]] += n
        said = ", ".join(f"{n} {result}" for result, n in sorted(results.items()))
        lines = [f"{self.programs} programs: {said}; {len(self.wrong)} rewritten wrongly", ""]
        for kind in ("plain", "edited"):
            lines.append(f"{kind}: programs {'as the grammar writes them' if kind == 'plain' else 'with edits'}")
            found = sorted((n, c) for n, c in self.counts.items() if n.startswith(kind))
            lines += [f"  {kind}: {name.partition(' ')[2]:24} {count}" for name, count in found]
        lines += ["", "why plain programs were refused:"]
        lines += [f"  refused: {reason:110} {count}" for reason, count in self.reasons.most_common()]
        return "\n".join([*lines, "", *self.wrong]) + "\n"

    @staticmethod
    def parse(text: str) -> "Tally":
        """The counts of a report; of wrong programs only that there were some."""
        found = Tally()
        for line in text.splitlines():
            if match := _LINE.match(line):
                kind, name, count = match.groups()
                if kind == "refused":
                    found.reasons[name.strip()] += int(count)
                else:
                    found.counts[f"{kind} {name.strip()}"] += int(count)
        found.wrong += re.findall(r"^# program \d+.*(?:\n(?!# program ).*)*", text, re.MULTILINE)
        return found
