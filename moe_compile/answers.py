"""What Python asks of data while a function is traced, answered.

    iterating over mask.nonzero()     all indices; it must be the list of experts that somebody chose, and where the
                                      last one raises an error (a class without an expert), it must always do so
    where(mask), x[mask], nonzero     r rows; where the program looks at r a symbol, another one for each selection
    if mask.any(), if count == 0      one way, then the other: the empty way must add nothing
    counts.tolist(), count.item()     numbers that may say where rows lie and if there are any (host_reads.py)

What is a question is for `questions.py` to say; what has no answer here is a `Refusal`.  Tensors that were asked about
are kept, for `capture.py` to name their nodes.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from moe_compile.errors import Refusal
from moe_compile.host_reads import HostReads, Locals
from moe_compile.numbers import EQUAL, long_enough, numbers_in
from moe_compile.questions import (
    COPIES,
    HOOKS,
    LAYOUT,
    LOOKS,
    NONZERO,
    PARTS,
    SAME_LIST,
    SIZES,
    TRANSPOSES,
    fills_by_mask,
    has_mask,
    has_rows,
    is_index,
    is_mask,
    is_unknown,
    parted_dim,
    parted_size,
    too_long,
)
from moe_compile.ranges import READS, Bounded, Numbers, Unsized, number_of_classes, until_the_end, walked
from moe_compile.stand_ins import watched
from moe_compile.visits import Visits

_lib = torch.library.Library("moe_ep_capture", "DEF")
_lib.define("nonzero(Tensor mask, SymInt rows) -> Tensor")
torch.library.register_fake(  # its columns lie one behind the other, as those of aten's do: Python can see that
    "moe_ep_capture::nonzero",
    lambda mask, rows: mask.new_empty_strided((rows, mask.dim()), (1, rows), dtype=torch.int64),
    lib=_lib,
)


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
        if func in LOOKS:
            raise Refusal(f"Python looks at where a tensor lies, or makes text of it ({func.__name__})")
        if self.visits is not None and func is torch.Tensor.__getitem__ and self.visits.has_index(args[1]):
            selected, rest = self.visits.select(*args)
            return selected[rest] if rest else selected
        if func in EQUAL and numbers_in(args):
            assert self.visits is not None
            return self.visits.equal(*args)
        if func is torch.where and len(args) == 1 and not kwargs:
            return self._nonzero(args[0]).unbind(1)
        if func in NONZERO and args[0].dim():
            table = self._nonzero(args[0])
            return table.unbind(1) if kwargs.get("as_tuple") else table
        if func in (torch.Tensor.unique, torch.unique) and (listed := self._unique(args, kwargs)) is not None:
            return listed
        if func in (torch.Tensor.bincount, torch.bincount):
            return self._count(*args, **kwargs) if is_unknown(args[0]) else func(*args, **kwargs)
        if func in READS and self.unsized.counts(args[0]) is not None:
            return self.entries(func, args[0])
        if func in PARTS and (vectors := self._transposed(args)):
            return vectors
        if func is torch.Tensor.__getitem__ and has_mask(args[1]):
            return args[0][self._indices(args[1])]
        if func is torch.Tensor.__setitem__ and fills_by_mask(*args):
            return args[0].masked_fill_(args[1], float(args[2]))
        if func is torch.Tensor.__setitem__ and (has_mask(args[1]) or is_index(args[1])):
            return _put(args[0], self._indices(args[1]), args[2])
        if func in PARTS and (found := self._source(args, kwargs)):
            return self._all_indices(args[0], found)
        if func in PARTS and has_rows(parted_size(args, kwargs), self.rows):
            raise Refusal("a Python loop runs over the rows of an expert")
        if func in PARTS and too_long(args, kwargs):
            raise Refusal(f"a Python loop runs over {max(args[0].shape)} rows or numbers")
        if func is torch.Tensor.tolist and (found := self._source(args, kwargs)):
            return _Visited(t.tolist() for t in self._all_indices(args[0], found))
        if func in (torch.Tensor.__bool__, torch.Tensor.is_nonzero, torch.is_nonzero) and is_unknown(args[0]):
            if self.visits is not None and (about := self.visits.truth(args[0])) is not None:
                return about
            self.answered.append(args[0])
            self.answers.append(self._answer("truth", args[0], self.truth))
            return self.answers[-1]
        if (reply := self.host.reply(func, args, kwargs)) is not NotImplemented:
            return reply
        if func in (torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__) and is_unknown(args[0]):
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
        if func in HOOKS:
            raise Refusal("it puts a hook on a tensor, which a trace would lose")
        if func is torch.Tensor.__len__ and not isinstance(self.rows, int) and has_rows(args[0].shape, self.rows):
            raise Refusal("Python takes len() of an expert's rows, which cannot be followed as shape[0] or numel() can")
        if func in LAYOUT and has_rows(args[0].shape, self.rows):
            if func is not torch.Tensor.is_contiguous or not (whole := func(*args, **kwargs)):
                raise Refusal(
                    f"Python looks at how an expert's rows lie in memory ({func.__name__}): one row may lie otherwise"
                )
            return whole
        if func in SIZES:
            result = func(*args, **kwargs)
            self.sees_rows |= has_rows(result, self.rows)
            return result
        result = func(*args, **kwargs)
        if func in COPIES and result is not args[0]:
            self.same_if_alone |= has_rows(args[0].shape, self.rows)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], slice) and id(args[0]) in self._chosen:
            if args[1] != slice(None):
                raise Refusal("Python takes a part of the list of chosen experts")
            self._chosen[id(result)] = (result, self._chosen[id(args[0])][1])
        if func in TRANSPOSES and id(args[0]) in self._chosen and result.dim() == 2:
            self._columns[id(result)] = (result, self._chosen[id(args[0])][0])
        if func in SAME_LIST and id(args[0]) in self._chosen and isinstance(result, Tensor):
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
        if not is_unknown(ids):
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
            parts += self._nonzero(i).unbind(1) if is_mask(i) else [i]
        return tuple(parts)

    def _transposed(self, args: Any) -> Any:
        """t, k = mask.nonzero().t(): the same vectors as those of the table."""
        if id(args[0]) not in self._columns or (len(args) > 1 and args[1] != 0):
            return None
        return self._columns[id(args[0])][1].unbind(1)

    def _source(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The (table, mask) behind a list of found indices that is iterated over."""
        return self._chosen.get(id(args[0])) if parted_dim(args, kwargs) == 0 else None

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


def _ends_in_rows(node: Node) -> bool:
    """Whether the last argument is how many rows this capture gives a selection."""
    schema = getattr(node.target, "_schema", None)
    return "moe_ep_capture" in str(node.target) and schema.arguments[-1].name == "rows"  # type: ignore[union-attr]


def _put(target: Tensor, index: tuple[Tensor, ...], value: Any) -> None:
    """target[index] = value.  Written so, a value of one row stays a row, as it is with more."""
    alike = isinstance(value, Tensor) and value.dtype == target.dtype and value.dim() and is_index(index)
    if alike and value.dim() <= target.dim() - len(index) + 1:
        target.index_put_(index, value)
    else:
        target[index] = value


def _formatted(tensor: Tensor, spec: str) -> str:
    """f"expert_{e}" of an expert's number; any other text has data in it."""
    known = tensor.constant if isinstance(tensor, FakeTensor) else None
    if known is None or tensor.dim():
        raise Refusal("Python makes a text of a tensor")
    with _disable_current_modes():
        return format(known.item(), spec)
