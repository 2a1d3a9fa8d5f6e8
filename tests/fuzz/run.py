"""A part of a run, in a process of its own."""

from tests.fuzz.check import check
from tests.fuzz.grammar import program
from tests.fuzz.tally import Tally


def run(numbers: range) -> Tally:
    """Check the programs of these numbers."""
    found = Tally()
    for number in numbers:
        parts = program(number)
        try:
            result, _, reason = check(parts).partition(": ")
        except Exception as error:
            result, reason = "wrong", f"{type(error).__name__}: {error}"
            found.wrong.append(f"# program {number}, {parts.edits}\n# {reason}\n{parts.source}")
            print(found.wrong[-1], flush=True)
        found.add(parts, result, reason)
    return found
