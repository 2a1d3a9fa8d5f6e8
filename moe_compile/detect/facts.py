"""What is known of a graph before it is read: by the capture that made it, and by the caller's own graph.

Each fact was shown elsewhere (arguments.py, worlds.py, visits.py) or is guarded; detection relies on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from moe_compile.detect.values import Each

VISIT_OFFSET = 2  # a size is never taken for 0 or 1


@dataclass
class Facts:
    """What the caller knows about the graph's inputs."""

    distinct_ids: frozenset[Node] = frozenset()  # no id twice in a row, as top-k gives
    constants: Mapping[str, Tensor] | None = None  # get_attr targets that are literals of the program
    grad_enabled: bool = True  # the grad mode around the graph
    may_guard: bool = False  # sizes that are equal in the example may be assumed to be: the caller guards it
    classes: int | None = None  # ids outside [0, classes) are shown to be an error
    empty: frozenset[Node] = frozenset()  # numbers of rows that are zero here
    answered: Mapping[Node, bool] = field(default_factory=dict)  # truths that Python was told here
    visits: Mapping[Node, Each] = field(default_factory=dict)  # inputs whose length is an index, plus VISIT_OFFSET
    sizes: frozenset[Node] = frozenset()  # how many rows each expert has, none below zero, of rows sorted by expert
    tables: frozenset[Node] = frozenset()  # of zeros and ones, with one at most in a row [..., E]
