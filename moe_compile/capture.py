"""Capture: a candidate function as an ATen graph, run once in Python on fake tensors.

Every iteration of every loop is traced, so every Python branch on an expert's index is seen.  What Python asks of
data is answered here, and each answer becomes an obligation that detection must meet:

    iterating over mask.nonzero()     all indices; it must be the list of experts that somebody chose, and where the
                                      last one raises an error (a class without an expert), it must always do so
    where(mask), x[mask], nonzero     r rows; where the program looks at r a symbol, another one for each selection
    if mask.any(), if count == 0      one way, then the other: the empty way must add nothing
    counts.tolist(), count.item()     numbers that may say where rows lie and if there are any (host_reads.py)

The function runs with its module's parameters replaced by fake ones.  What would be lost by running it out of band
is a refusal: hooks, changed attributes, random state, prints.
"""

import builtins
import contextlib
import hashlib
import inspect
import itertools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from moe_compile import numbers, opaque, places
from moe_compile.arguments import NOTHING_KNOWN, Known, Sizes
from moe_compile.detect.values import Each
from moe_compile.errors import Refusal
from moe_compile.fakes import Fakes
from moe_compile.flat_ids import as_tables
from moe_compile.host_reads import HostReads, Locals
from moe_compile.kept import kept_attributes, values_of
from moe_compile.numbers import EQUAL, has_loops, long_enough, numbers_in, program
from moe_compile.parallel import gather
from moe_compile.parts import parts
from moe_compile.python_state import Functions, reachable, watch
from moe_compile.ranges import READS, Bounded, Numbers, Unsized, number_of_classes, until_the_end, walked
from moe_compile.region import EXAMPLE_ROWS
from moe_compile.series import State, add_inputs
from moe_compile.stand_ins import Lists, twins, watched
from moe_compile.trained import TRAINED
from moe_compile.visit_checks import check_guards
from moe_compile.visits import MOST, OFFSET, OneByOne, Visit, Visits

_lib = torch.library.Library("moe_ep_capture", "DEF")
_lib.define("nonzero(Tensor mask, SymInt rows) -> Tensor")
torch.library.register_fake(  # its columns lie one behind the other, as those of aten's do: Python can see that
    "moe_ep_capture::nonzero",
    lambda mask, rows: mask.new_empty_strided((rows, mask.dim()), (1, rows), dtype=torch.int64),
    lib=_lib,
)

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


class Answers(TorchFunctionMode):
    """Answers what Python asks of data, and keeps the tensors that it asked about.

    `script`: the answers by question (worlds.py); a question that is not in it is a refusal.
    """

    def __init__(
        self,
        rows: Any,
        truth: bool,
        script: Mapping[Hashable, Any] | None = None,
        classes: int | None = None,
        visited: Sequence[int] | None = None,
        widths: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.widths, self.unsized = widths or {}, Unsized()
        self.rows, self.truth, self.script, self.classes, self.visited = rows, truth, script, classes, visited
        self.visits: Visits | None = None
        self.by_number = False  # the loop that visits some experts alone runs over numbers
        self.last_class: int | None = None  # of those that a loop over chosen experts would visit
        self.open_counts: int | None = None
        self.longer = False  # by one number than `open_counts`
        self.bounded = False  # nobody may see how many there are
        self.asked: dict[tuple[str, Any], Tensor] = {}
        self._place: dict[Hashable, int] = {}  # selections, in the order in which they were first made
        self._spellings: dict[Node, str] = {}
        self.iterated: list[Tensor] = []
        self.answered: list[Tensor] = []
        self.answers: list[bool] = []
        self.counted: list[Tensor] = []
        self.empty: list[Tensor] = []
        self.locals = Locals()
        self.host = HostReads(lambda number: self._rows("count", number))
        self.sees_rows = False
        self.same_if_alone = False
        self.reads_length = False
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}  # nonzero table -> its mask
        self._columns: dict[int, tuple[Tensor, Tensor]] = {}  # transposed nonzero table -> the table
        self._found: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.visits is not None:
            self.visits.check_call(func, args, kwargs)
        self.unsized.look(func, args, kwargs)
        result = self._answered(func, args, kwargs)
        self.unsized.follow(func, args, result)
        self.host.follow(func, args, kwargs, result)
        if self.visits is not None:
            self.visits.follow(func, args, result)
        return result

    def _answered(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _LOOKS:
            raise Refusal(f"Python looks at where a tensor lies, or makes text of it ({func.__name__})")
        if self.visits is not None and func is torch.Tensor.__getitem__ and self.visits.has_index(args[1]):
            selected, rest = self.visits.select(*args)
            return selected[rest] if rest else selected
        if func in EQUAL and numbers_in(args):
            assert self.visits is not None
            return self.visits.equal(*args)
        if func is torch.where and len(args) == 1 and not kwargs:
            return self._nonzero(args[0]).unbind(1)
        if func in _NONZERO and args[0].dim():
            table = self._nonzero(args[0])
            return table.unbind(1) if kwargs.get("as_tuple") else table
        if func in (torch.Tensor.unique, torch.unique) and (listed := self._unique(args, kwargs)) is not None:
            return listed
        if func in (torch.Tensor.bincount, torch.bincount):
            return self._count(*args, **kwargs) if _unknown(args[0]) else func(*args, **kwargs)
        if func in READS and self.unsized.counts(args[0]) is not None:
            return self.entries(func, args[0])
        if func in _PARTS and (vectors := self._transposed(args)):
            return vectors
        if func is torch.Tensor.__getitem__ and _has_mask(args[1]):
            return args[0][self._indices(args[1])]
        if func is torch.Tensor.__setitem__ and _fills(*args):
            return args[0].masked_fill_(args[1], float(args[2]))
        if func is torch.Tensor.__setitem__ and (_has_mask(args[1]) or _is_index(args[1])):
            return _put(args[0], self._indices(args[1]), args[2])
        if func in _PARTS and (found := self._source(args, kwargs)):
            return self._all_indices(args[0], found)
        if func in _PARTS and _has_rows(_parted(args, kwargs), self.rows):
            raise Refusal("a Python loop runs over the rows of an expert")
        if func in _PARTS and _longer(args, kwargs):
            raise Refusal(f"a Python loop runs over {max(args[0].shape)} rows or numbers")
        if func is torch.Tensor.tolist and (found := self._source(args, kwargs)):
            return _Visited(t.tolist() for t in self._all_indices(args[0], found))
        if func in (torch.Tensor.__bool__, torch.Tensor.is_nonzero, torch.is_nonzero) and _unknown(args[0]):
            if self.visits is not None and (about := self.visits.truth(args[0])) is not None:
                return about
            self.answered.append(args[0])
            self.answers.append(self._answer("truth", args[0], self.truth))
            return self.answers[-1]
        if (reply := self.host.reply(func, args, kwargs)) is not NotImplemented:
            return reply
        if func in (torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__) and _unknown(args[0]):
            if args[0].dtype.is_floating_point:
                raise Refusal("Python reads a number that depends on the data")
            if self.visits is not None and self.visits.truth(args[0]) is not None:
                raise self.visits.fail("an index becomes a number")
            self.counted.append(args[0])
            self.sees_rows = True
            return self._rows("count", args[0])
        if func is torch.Tensor.__format__:
            return _formatted(*args)
        if func is torch.Tensor.requires_grad_:
            raise Refusal("it changes whether a tensor needs a gradient")
        if func in _HOOKS:
            raise Refusal("it puts a hook on a tensor, which a trace would lose")
        if func is torch.Tensor.__len__ and not isinstance(self.rows, int) and _has_rows(args[0].shape, self.rows):
            raise Refusal("Python takes len() of an expert's rows, which cannot be followed as shape[0] or numel() can")
        if func in _LAYOUT and _has_rows(args[0].shape, self.rows):
            if func is not torch.Tensor.is_contiguous or not (whole := func(*args, **kwargs)):
                raise Refusal(
                    f"Python looks at how an expert's rows lie in memory ({func.__name__}): one row may lie otherwise"
                )
            return whole
        if func in _SIZES:
            result = func(*args, **kwargs)
            self.sees_rows |= _has_rows(result, self.rows)
            return result
        result = func(*args, **kwargs)
        if func in _COPIES and result is not args[0]:
            self.same_if_alone |= _has_rows(args[0].shape, self.rows)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], slice) and id(args[0]) in self._chosen:
            if args[1] != slice(None):
                raise Refusal("Python takes a part of the list of chosen experts")
            self._chosen[id(result)] = (result, self._chosen[id(args[0])][1])
        if func in _TRANSPOSES and id(args[0]) in self._chosen and result.dim() == 2:
            self._columns[id(result)] = (result, self._chosen[id(args[0])][0])
        if func in _SAME_LIST and id(args[0]) in self._chosen and isinstance(result, Tensor):
            self._chosen[id(result)] = (result, self._chosen[id(args[0])][1])
        return result

    @property
    def selections(self) -> int:
        return len(self._place)

    def _nonzero(self, mask: Tensor) -> Tensor:
        """One table a mask, so that asking twice is the same selection."""
        if id(mask) not in self._found:
            rows = self._rows("rows", mask)
            with torch._C.DisableTorchFunction():
                table = torch.ops.moe_ep_capture.nonzero(mask, rows)
            self.asked[self._question("rows", mask)] = table
            self._found[id(mask)] = table
            self._chosen[id(table)] = (table, mask)
        return self._found[id(mask)]

    def _unique(self, args: Any, options: dict[str, Any]) -> Tensor | None:
        """The chosen experts in their order, as those of a mask of all experts; None if they are constants."""
        (ids, *others), plain = args, options.get("sorted", True) and options.get("dim") is None
        if not _unknown(ids):
            return None
        if others or not plain or any(options.get(o) for o in ("return_inverse", "return_counts")):
            raise Refusal("torch.unique gives more than the experts that were chosen: options are not followed")
        classes = number_of_classes(ids, self.widths)
        if classes is None:
            raise Refusal(
                "unique of ids that are not shown to be those of a topk: nobody knows how many there could be"
            )
        with torch._C.DisableTorchFunction():
            mask = torch.ops.moe_ep_capture.chosen(ids, classes)
        table = self._nonzero(mask)
        listed = table.squeeze(1)
        self._chosen[id(listed)] = (listed, mask)
        return listed

    def _count(self, ids: Tensor, weights: Any = None, minlength: int = 0) -> Any:
        """bincount(ids) for all that could be chosen, and at least `minlength`."""
        classes = number_of_classes(ids, self.widths)
        if weights is None and minlength == 0 and classes is not None:
            return self.unsized.add(self.host.bincount(ids, None, classes))
        if classes is None or classes > minlength:
            if self.open_counts not in (None, minlength):
                raise Refusal("bincount with several numbers as minlength, of ids that may be greater")
            self.open_counts = minlength
            counts = self.host.bincount(ids, weights, minlength + self.longer)
            return self.unsized.add(counts) if self.bounded else counts
        return self.host.bincount(ids, weights, minlength)

    def entries(self, func: Any, vector: Tensor) -> Any:
        """The numbers that Python reads of a vector as long as the largest id says: another length in another world."""
        counts = self.unsized.counts(vector)
        assert counts is not None
        length = counts.shape[0] if self.bounded else self._answer("length", counts, counts.shape[0])
        self.reads_length |= not self.bounded
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            entries = self.host.numpy(vector) if func is torch.Tensor.numpy else self.host.entries(vector)
            return (Bounded if self.bounded else Numbers)(itertools.islice(entries, length))
        with torch._C.DisableTorchFunction():
            parts = vector.unbind(0)[:length]
        return (until_the_end if self.bounded else walked)(iter(parts))

    def _indices(self, index: Any) -> Any:
        parts: list[Any] = []
        for i in index if isinstance(index, tuple) else (index,):
            parts += self._nonzero(i).unbind(1) if _is_mask(i) else [i]
        return tuple(parts)

    def _transposed(self, args: Any) -> Any:
        """t, k = mask.nonzero().t(): the same vectors as those of the table."""
        if id(args[0]) not in self._columns or (len(args) > 1 and args[1] != 0):
            return None
        return self._columns[id(args[0])][1].unbind(1)

    def _source(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The (table, mask) behind a list of found indices that is iterated over."""
        return self._chosen.get(id(args[0])) if _along(args, kwargs) == 0 else None

    def _all_indices(self, table: Tensor, source: tuple[Tensor, Tensor]) -> Any:
        mask = source[1]
        if mask.dim() != 1 or not isinstance(mask.shape[0], int):
            raise Refusal("a Python loop runs over chosen rows, not over experts")
        self.iterated.append(table)
        if self.visits is not None:
            self.asked.setdefault(self._question("each", mask), mask)
            return self.visits.over(mask, table, range(mask.shape[0]))
        few = None if self.by_number else self.visited
        every = range(mask.shape[0])[: self.classes] if few is None else few
        visited = self._answer("each", mask, every)
        self.last_class = mask.shape[0] - 1
        return _Visited(torch.tensor([i] if table.dim() > 1 else i) for i in visited)

    def over_numbers(self, frame: Any, head: int, run: Sequence[int], modules: Any) -> Any:
        """What a `for` over numbers runs over (`numbers.program`)."""
        if self.visits is not None:
            return self.visits.over_numbers(frame, head, run, modules)
        if self.visited is None or not long_enough(run):
            return None
        few, self.visited = self.visited, None
        return iter(few if modules is None else [(n, modules[n]) for n in few])

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Notes how the program reaches into lists of modules."""
        return watched(self.visits.reached) if self.visits is not None else contextlib.nullcontext()

    def _answer(self, kind: str, about: Tensor, otherwise: Any) -> Any:
        question = self._question(kind, about)
        self.asked.setdefault(question, about)
        self.locals.look()
        if self.script is None:
            return otherwise
        if question not in self.script:
            raise Refusal("what Python asks of the data depends on which experts have rows")
        return self.script[question]

    def _rows(self, kind: str, about: Tensor) -> Any:
        """How many rows a selection has: another symbol for each, so that no two can be taken for equal."""
        question = self._question(kind, about)
        place = self._answer(kind, about, self._place.setdefault(question, len(self._place)))
        if place is None:
            self.empty += [about] if kind == "count" else []
            return 0
        if isinstance(self.rows, int):
            return self.rows
        if place >= len(self.rows):
            raise Refusal("how many selections it makes depends on the number of their rows")
        return self.rows[place]

    def _question(self, kind: str, about: Tensor) -> tuple[str, Any]:
        """The same for equal questions, in all captures of one function."""
        mode = get_proxy_mode()
        assert mode is not None
        node = get_proxy_slot(about, mode.tracer, None, lambda slot: slot.proxy.node)
        return (kind, id(about) if node is None else self._spelled(node, getattr(mode.tracer, "root", None)))

    def _spelled(self, node: Node, root: Any) -> str:
        """How a value was computed, down to the inputs."""
        if node not in self._spellings:
            if node.op == "placeholder":
                spelling: Any = (node.op, node.name)
            elif node.op == "get_attr":
                literal = getattr(root, str(node.target))
                literal = literal.constant if isinstance(literal, FakeTensor) else literal
                with _disable_current_modes():
                    spelling = (node.op, str(literal.tolist()) if isinstance(literal, Tensor) else node.target)
            else:
                args = node.args[:-1] if _ends_in_rows(node) else node.args
                parts = torch.fx.node.map_arg((args, node.kwargs), lambda n: self._spelled(n, root))
                spelling = (str(node.target), parts)
            self._spellings[node] = hashlib.sha256(repr(spelling).encode()).hexdigest()
        return self._spellings[node]


class _Visited(list):  # type: ignore[type-arg]
    """The experts that somebody chose: a loop may run over them, but nobody may count them."""

    def __len__(self) -> int:
        raise Refusal("Python counts the experts that were chosen")


LONGEST = 4096  # iterations of a loop: more are not over experts, and would take minutes to trace

_HOOKS = {torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook}
_SIZES = {
    torch.Tensor.stride,
    torch.Tensor.nbytes.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.numel,
}
_COPIES = {torch.Tensor.contiguous, torch.Tensor.ravel, torch.ravel}
_LAYOUT = {torch.Tensor.is_contiguous, torch.Tensor.dim_order}
_LOOKS = {
    torch.Tensor.__repr__,
    torch.Tensor.data_ptr,
    torch.Tensor.storage_offset,
    torch.Tensor.untyped_storage,
    torch.Tensor.storage,
    torch.Tensor.is_set_to,
    torch.Tensor._base.__get__,  # type: ignore[union-attr]
    torch.Tensor._version.__get__,  # type: ignore[attr-defined]
}
_NONZERO = {torch.Tensor.nonzero, torch.nonzero, torch.Tensor.argwhere, torch.argwhere}
_PARTS = {torch.Tensor.__iter__, torch.Tensor.unbind, torch.unbind}
_TRANSPOSES = {torch.Tensor.t, torch.t, torch.Tensor.T.__get__}  # type: ignore[attr-defined]
_SAME_LIST = {
    torch.Tensor.squeeze,
    torch.squeeze,
    torch.Tensor.flatten,
    torch.flatten,
    torch.Tensor.view,
    torch.Tensor.reshape,
}


def _ends_in_rows(node: Node) -> bool:
    """Whether the last argument is how many rows this capture gives a selection."""
    schema = getattr(node.target, "_schema", None)
    return "moe_ep_capture" in str(node.target) and schema.arguments[-1].name == "rows"  # type: ignore[union-attr]


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) and index.dim() > 0


def _is_index(index: Any) -> bool:
    """Whether an index is vectors of numbers and no more."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(i, Tensor) and i.dim() == 1 and i.dtype == torch.int64 for i in parts)


def _put(target: Tensor, index: tuple[Tensor, ...], value: Any) -> None:
    """target[index] = value.  Written so, a value of one row stays a row, as it is with more."""
    alike = isinstance(value, Tensor) and value.dtype == target.dtype and value.dim() and _is_index(index)
    if alike and value.dim() <= target.dim() - len(index) + 1:
        target.index_put_(index, value)
    else:
        target[index] = value


def _fills(tensor: Any, index: Any, value: Any) -> bool:
    """x[mask] = number, with a truth for each number in x: no rows are selected."""
    whole = _is_mask(index) and isinstance(tensor, Tensor) and index.dim() > 1 and index.shape == tensor.shape
    return whole and isinstance(value, float | int) and tensor.is_floating_point() and index.dtype == torch.bool


def _has_mask(index: Any) -> bool:
    return any(map(_is_mask, index if isinstance(index, tuple) else (index,)))


def _unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _formatted(tensor: Tensor, spec: str) -> str:
    """f"expert_{e}" of an expert's number; any other text has data in it."""
    known = tensor.constant if isinstance(tensor, FakeTensor) else None
    if known is None or tensor.dim():
        raise Refusal("Python makes a text of a tensor")
    with _disable_current_modes():
        return format(known.item(), spec)


def _along(args: Any, kwargs: Any) -> int:
    """The dimension along which a tensor is taken apart, from its start."""
    dim, rank = args[1] if len(args) > 1 else kwargs.get("dim", 0), args[0].dim()
    return int(dim % rank if rank else dim)


def _parted(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The size of that dimension."""
    along = _along(args, kwargs)
    return tuple(args[0].shape[along : along + 1])


def _longer(args: Any, kwargs: Any) -> bool:
    """Whether a tensor that is taken apart gives more than `LONGEST` parts."""
    return any(isinstance(size, int) and size > LONGEST for size in _parted(args, kwargs))


def _has_rows(result: Any, rows: Any) -> bool:
    """Whether a size that the program reads could hold the number of rows."""
    sizes = result if isinstance(result, (tuple, list)) else [result]
    if isinstance(rows, int):
        return any(isinstance(s, int) and s and s % rows == 0 for s in sizes) if rows == EXAMPLE else False
    symbols = {row.node.expr for row in rows}
    return any(isinstance(s, torch.SymInt) and s.node.expr.free_symbols & symbols for s in sizes)


# -- the trace ------------------------------------------------------------------------------


def capture(
    fn: Callable[..., Any],
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    rows: int = EXAMPLE,
    selections: int = 0,
    truth: bool = True,
    script: Mapping[Hashable, Any] | None = None,
    classes: int | None = None,
    may_fail: bool = False,
    visited: Sequence[int] | None = None,
    visit: Functions | None = None,
    known: Known = NOTHING_KNOWN,
    by_number: bool = False,
    longer: bool = False,
    bounded: bool = False,
    lines: bool = True,
) -> Capture:
    """Trace `fn(module, *args, **kwargs)`.  Tensors among the arguments say shapes, dtypes and devices only: sizes may
    be symbols of another `ShapeEnv`.  `rows`: how many rows a selection gets, `SYMBOLIC` for numbers that may be
    anything from 2 on and decide nothing, for that many `selections`; `truth`: the answer to every question;
    `classes`: how many classes a loop over chosen experts visits, if not all; `may_fail`: an IndexError after such a
    loop began is noted, not a refusal; `visited`: the experts that such a loop visits, or the first one over numbers if
    `by_number`; `visit`: all functions that can run, if one visit may stand for many experts (visits.py); `known`: what
    the caller's graph shows of the tensors; `longer`: with one more number than `Capture.open_counts`, where an
    IndexError is noted too; `bounded`: it is a refusal to see how many of these numbers there are; `lines`: nodes
    know the user's lines, which nobody reads in a graph that is only compared.

    Raises `Refusal` with the reason if the function cannot be run out of band, `OneByOne` if a visit stands for one.
    """
    check_module(module)
    kept = kept_attributes(fn, module, reachable(fn, module)) if isinstance(fn, types.FunctionType) else ()
    world = Fakes()
    fake_args, spec = tree_flatten((list(args), kwargs))
    lengths_of = {i: a.number for i, a in enumerate(fake_args) if isinstance(a, Sizes)}
    for i, number in lengths_of.items():
        fake_args[i] = torch.empty(number, dtype=torch.int64)
    tensors = [i for i, a in enumerate(fake_args) if isinstance(a, Tensor)]
    inputs = [world.fake(fake_args[i], i) for i in tensors]
    sizes = {*known.sizes, *(tensors.index(i) for i in lengths_of)}
    state = dict(parts(module).tensors)
    by_loop = (visit is not None or by_number) and has_loops(fn)
    lists = Lists(module, numbers.FEW) if by_loop else None
    absent: Mapping[int, Tensor] = {}
    if lists is not None:
        lists.keep([0] if visited is None else visited)
        absent = lists.absent
    present = {n: t for n, t in state.items() if id(t) not in absent}
    unique = {i: world.fake(t, None) for i, t in {id(t): t for t in present.values()}.items()}
    state_fakes = [unique[id(t)] for t in present.values()]
    missing = {i: world.fake(t, None) for i, t in {id(t): t for t in absent.values()}.items()}  # no input: a refusal
    lengths = [world.vector(f"{ROWS}_{i}", EXAMPLE) for i in range(selections if rows == SYMBOLIC else 0)]
    indices = [world.vector(f"{VISIT}_{i}", OFFSET) for i in range(MOST if visit is not None else 0)]
    answers = Answers(rows, truth, script, classes, visited, dict(known.widths))
    answers.by_number, answers.longer, answers.bounded = by_number, longer, bounded
    answers.unsized.longer_only = bounded
    seen: dict[str, Any] = {}

    def run_on_fakes(
        inputs: list[Tensor], state_values: list[Tensor], lengths: list[Tensor], indices: list[Tensor]
    ) -> Any:
        if visit is not None:
            answers.visits = Visits(visit, module, indices, lists)
        answers.rows = [t.shape[0] for t in lengths] if rows == SYMBOLIC else rows
        leaves = list(fake_args)
        for i, t in zip(tensors, inputs, strict=True):
            leaves[i] = answers.host.entries(t) if i in lengths_of else t
        call_args, call_kwargs = tree_unflatten(leaves, spec)
        here = dict(zip(present, state_values, strict=True))
        if lists is not None:
            here |= {n: missing[id(absent[id(t)])] for n, t in state.items() if id(t) in absent}
            lists.begin({id(t): here[n] for n, t in present.items()})
        try:
            hidden = _lengths_hidden(answers, rows == SYMBOLIC)
            functions = opaque.as_calls(module, lambda: answers.visits is None or not answers.visits.is_open)
            with _state_replaced(module, here), hidden, answers, answers.watching(), functions:
                run = program(fn, answers.over_numbers) if by_loop else fn  # type: ignore[arg-type]
                result = places.call(run, module, call_args, call_kwargs)
        except IndexError:
            last = answers.open_counts if longer else answers.last_class if may_fail else None
            if last is None:
                raise
            seen["fails_at"], result = last, ()
        finally:
            if answers.visits is not None:
                answers.visits.calls.stop()
        flat, seen["spec"] = tree_flatten(result)
        if not all(isinstance(t, Tensor) or t is None for t in flat):
            raise Refusal(f"it returns {type(next(t for t in flat if not isinstance(t, Tensor))).__name__}")
        flat += values_of(module, kept, [*inputs, *state_values]) if "fails_at" not in seen else []
        visits = answers.visits.check() if answers.visits is not None else []
        groups = [flat, answers.iterated, answers.answered, answers.counted, answers.host.decided, answers.empty]
        groups.append([t for v in visits for t in (v.begin, v.end)])
        seen["sizes"], seen["visits"] = list(map(len, groups)), visits
        return [*itertools.chain(*groups), *answers.asked.values()]

    like = twins(module, numbers.FEW)
    with watch(module, kept, like), _unset(module, kept), world.mode, _compiling(), _refusals(answers):
        gm = make_fx(run_on_fakes, pre_dispatch=True, record_stack_traces=lines, _allow_non_fake_inputs=True)(
            inputs, state_fakes, lengths, indices
        )
    gm.graph.set_codegen(torch.fx.graph.CodeGen())
    as_tables(gm, len(inputs))
    places_of_state = gm.graph.find_nodes(op="placeholder")[: len(tensors) + len(present)]
    for node, fake in zip(places_of_state, [*inputs, *state_fakes], strict=True):
        node.meta[TRAINED] = fake.requires_grad and torch.is_grad_enabled()
    in_series = add_inputs(gm.graph, lists.columns, state, places_of_state) if lists is not None else []
    named = [*_argument_names(fn, args, kwargs, tensors), *present]
    named += [f"{names[0]}_series" for names in in_series]
    named += [f"{ROWS}_{i}" for i in range(len(lengths))]
    _name_inputs(gm, [*named, *(f"{VISIT}_{i}" for i in range(len(indices)))])
    out = gm.graph.output_node()
    results = list(out.args[0])  # type: ignore[arg-type]
    ends = list(itertools.accumulate(seen["sizes"]))
    out.args = (tuple(results[: ends[0]]),)
    iterated, answered, counted, decided, empty, markers = (results[i:j] for i, j in itertools.pairwise(ends))
    visits = [Visit(v.numbers, *markers[2 * i : 2 * i + 2]) for i, v in enumerate(seen["visits"])]
    constants = {k: v for k, v in vars(gm).items() if k.startswith("_tensor_constant")} | dict(gm.named_buffers())
    if visit is not None and absent and not visits:
        raise OneByOne("no loop over numbers runs over the list of modules")
    with _one_by_one(answers):
        world.guards(lengths, indices)  # a decision on the number of rows is a refusal, here
        literals = _literals(gm, constants)
    if visits:
        check_guards(visits, [t.shape[0] for t in indices], world.all_guards(), world.env.replacements)
    return Capture(
        gm,
        [*present, *in_series],
        seen["spec"],
        iterated=iterated,
        answered=list(zip(answered, answers.answers, strict=True)),
        counted=counted,
        decided=decided,
        empty=frozenset(empty),
        locals=answers.locals,
        questions=dict(zip(list(answers.asked), results[ends[-1] :], strict=True)),
        sees_rows=answers.sees_rows,
        reads_length=answers.reads_length,
        selections=answers.selections,
        lengths=len(lengths) + len(indices),
        classes=classes,
        fails_at=seen.get("fails_at"),
        open_counts=answers.open_counts,
        guards=lambda: world.guards(lengths, indices),
        constants=literals,
        visits=visits,
        tables=frozenset(gm.graph.find_nodes(op="placeholder")[i] for i in known.tables),
        sizes=frozenset(n for i, n in enumerate(gm.graph.find_nodes(op="placeholder")) if i in sizes and _are_sizes(n)),
        by_number=answers.visits is not None and answers.visits.by_number,
        kept=kept,
        same_if_alone=answers.same_if_alone,
    )


def _are_sizes(node: Node) -> bool:
    val = node.meta["val"]
    return val.dim() == 1 and type(val.shape[0]) is int and val.dtype in (torch.int64, torch.int32)


def _argument_names(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], tensors: list[int]
) -> list[str]:
    """A name for each tensor argument: its parameter's, where an argument is one tensor."""
    names = places.parameters_of(list(inspect.signature(fn).parameters), args, kwargs)
    leaves = []
    for i, arg in enumerate(args):
        name = names[i] if i < len(names) else f"arg_{i}"
        leaves += [name] * len(tree_flatten(arg)[0])
    for name, arg in kwargs.items():
        leaves += [name] * len(tree_flatten(arg)[0])
    return [leaves[i] for i in tensors]


def _name_inputs(gm: GraphModule, names: list[str]) -> None:
    """Rename the placeholders, so that graphs read like the program."""
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), names, strict=True):
        node._rename(name.replace(".", "_"))
        node.target, node.meta[NAME] = node.name, name


@contextlib.contextmanager
def _unset(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Without these attributes, which `watch` puts back: what is found after a run was set by it."""
    for name in names:
        vars(module).pop(name, None)
    yield


@contextlib.contextmanager
def _state_replaced(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """With other tensors in the place of parameters and buffers; refuse if one of them is replaced meanwhile."""
    held = {(id(table), key): (table, table[key], values[name]) for name, table, key in parts(module).places}
    for (_, key), (table, _, value) in held.items():
        table[key] = value
    try:
        yield
        for (_, key), (table, _, value) in held.items():
            if table.get(key) is not value:
                raise Refusal(f"it replaces {key}, a parameter or buffer, when it runs")
    finally:
        for (_, key), (table, before, _) in held.items():
            table[key] = before


@contextlib.contextmanager
def _lengths_hidden(answers: Answers, symbols: bool) -> Iterator[None]:
    """`len(rows)` is `rows.shape[0]`, where that is a symbol: the built-in takes no other result than a plain number.
    And `counts.tolist()`, which fake tensors have as a loop of their own, hides its length where that is not known."""
    length_of, as_list = builtins.len, FakeTensor.tolist

    def length(obj: Any, /) -> Any:
        if isinstance(obj, FakeTensor) and obj.dim() and not isinstance(size := obj.shape[0], int):
            return size
        return length_of(obj)

    def tolist(tensor: Any) -> Any:
        if answers.unsized.counts(tensor) is None:
            return as_list(tensor)
        with torch._C.DisableTorchFunction():
            return answers.entries(torch.Tensor.tolist, tensor)

    FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
    builtins.len = length if symbols else length_of
    try:
        yield
    finally:
        FakeTensor.tolist, builtins.len = as_list, length_of  # type: ignore[method-assign]


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """`torch.compiler.is_compiling()` says what it says to a program that Dynamo traces: yes."""
    compiler = torch.compiler
    saved = compiler._is_compiling_flag, compiler.is_dynamo_compiling
    compiler._is_compiling_flag, compiler.is_dynamo_compiling = True, lambda: True
    try:
        yield
    finally:
        compiler._is_compiling_flag, compiler.is_dynamo_compiling = saved


@contextlib.contextmanager
def _refusals(answers: Answers) -> Iterator[None]:
    """What can go wrong in a run on fake tensors, as reasons.  What went wrong in a visit need not be wrong in all."""
    with _one_by_one(answers), _reasons():
        yield


@contextlib.contextmanager
def _one_by_one(answers: Answers) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        visits = answers.visits
        if visits is not None and (visits.done or (visits.lists is not None and visits.lists.absent)):
            raise OneByOne(str(refusal)) from refusal
        raise


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        yield
    except Refusal:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        raise Refusal(f"Python decides on data: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the function's own, too: it runs here on other data than it will
        line = (str(error).splitlines() or [""])[0]
        raise Refusal(f"it does not run on fake tensors: {type(error).__name__}: {line}") from error


def _literals(gm: GraphModule, constants: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that the function itself made from numbers; any other tensor constant is state that it reads."""
    found = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = constants.get(str(node.target), getattr(gm, str(node.target), None))
        made_here = all(str(u.target).startswith("aten.lift_fresh") for u in node.users)
        if not made_here:
            raise Refusal("it reads a tensor that is neither an argument nor a parameter or buffer of its module")
        if isinstance(tensor, FakeTensor):
            tensor = tensor.constant
        if isinstance(tensor, Tensor):
            found[str(node.target)] = tensor
            node.meta.setdefault("val", tensor)
    return found


def check_module(module: nn.Module) -> None:
    """Refuse modules that a trace would not show whole."""
    for name, child in parts(module).modules:
        own = vars(child)
        hooks = own["_forward_hooks"], own["_forward_pre_hooks"], own["_backward_hooks"], own["_backward_pre_hooks"]
        if any(hooks) and child is not module and any(h not in gather.HOOKS for held in hooks for h in held.values()):
            raise Refusal(f"module {name or type(module).__name__} has hooks")
        if own.get("_compiled_call_impl") is not None and child is not module:
            raise Refusal(f"module {name or type(module).__name__} is compiled on its own")
    for name, tensor in parts(module).tensors:
        if tensor.dtype.is_complex:
            raise Refusal(f"{name} is {tensor.dtype}")
        if type(tensor) not in PLAIN and torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
            raise Refusal(f"{name} is a {type(tensor).__name__}")


PLAIN = (nn.Parameter, Tensor, nn.Buffer)
