"""What a capture is: a function as an ATen graph, and what was answered while it ran.

`capture.py` makes them, `worlds.py` compares them, `analysis.py` reads them.  A capture decides nothing: each answer in
it is an obligation that detection has to meet.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from moe_compile.detect.values import Each
from moe_compile.host_reads import Locals
from moe_compile.region import EXAMPLE_ROWS
from moe_compile.series import State
from moe_compile.visits import MOST, Visit

EXAMPLE = EXAMPLE_ROWS
SYMBOLIC = -1
ROWS = "rows"  # the last placeholders: vectors as long as the selections
NAME = "qualified_name"  # what an input stands for, in its meta: two names may be spelled alike in a graph
VISIT = "visit"  # and those as long as the index of a visit, plus `OFFSET`


@dataclass
class Capture:
    """A function as a graph: `gm(*tensors, *state)`, tensors as they stand in its arguments, state by name, and series
    of it (series.py) where a visit stands for many modules.

    `iterated`, `answered`, `counted` and `selected` are the nodes behind data-dependent answers, `questions` what was
    asked in all captures alike, with its node; `sees_rows`: whether the program looked at a number of rows; `guards()`:
    what was assumed of sizes so far, as sympy expressions over the caller's symbols.
    `classes`: loops over chosen experts visited the classes below it only; `fails_at`: the last class that they visited
    where the program raised an IndexError, at which the graph ends and returns nothing.  `open_counts`: E of a
    `bincount(ids, minlength=E)` that has more numbers where an id is E or more.
    """

    gm: GraphModule
    state: State  # the parameters and buffers that follow the tensors
    out_spec: Any
    iterated: list[Node] = field(default_factory=list)
    answered: list[tuple[Node, bool]] = field(default_factory=list)
    counted: list[Node] = field(default_factory=list)
    decided: list[Node] = field(default_factory=list)  # numbers of rows that were compared with zero
    empty: frozenset[Node] = frozenset()  # numbers of rows that are zero in this capture
    locals: Locals = field(default_factory=Locals)
    questions: dict[tuple[str, Any], Node] = field(default_factory=dict)
    sees_rows: bool = False
    reads_length: bool = False  # of a list that is as long as the largest id
    selections: int = 0  # how many were made
    lengths: int = 0  # placeholders at the end that hold the selections' numbers of rows
    classes: int | None = None
    bound: int | None = None  # ids that are not below it are shown to be an error
    unbound: str | None = None  # why nothing is known of what becomes of greater ids
    fails_at: int | None = None
    open_counts: int | None = None
    guards: Callable[[], list[Any]] = list
    constants: dict[str, Tensor] = field(default_factory=dict)
    tables: frozenset[Node] = frozenset()  # arguments that are shown to be tables (`Facts.tables`)
    sizes: frozenset[Node] = frozenset()  # arguments that may be numbers of rows (`Facts.sizes`)
    visits: list[Visit] = field(default_factory=list)  # iterations that stand for many; their inputs are the last ones
    by_number: bool = False  # they are those of a loop over numbers
    kept: tuple[str, ...] = ()  # attributes whose values follow the results (kept.py)
    same_if_alone: bool = False  # `contiguous()` copied rows, where of one row it gives the tensor itself

    @property
    def asks(self) -> bool:
        """Whether Python asked anything of the data."""
        return bool(self.answered or self.sees_rows or self.iterated or self.decided or self.reads_length)

    def each(self) -> dict[Node, Each]:
        """The experts behind the inputs that hold the indices of visits."""
        inputs = self.gm.graph.find_nodes(op="placeholder")[-MOST:]
        return {n: Each(tuple(v.numbers)) for n, v in zip(inputs, self.visits, strict=False)}
