"""Numbers of rows that Python reads: stand-ins that may say where rows begin and end, and whether there are any.

    sizes = counts.tolist()                     # one `HostNumber` an entry; counts.cpu().numpy(), counts[e].item() too
    start + counts[e], counts[e]                # tensors, read only where they are bounds
    x.split(sizes), x[start : start + sizes[e]] # `rows_between`: r rows, and sums of entries for where they lie
    if sizes[e] == 0, if start == end           # a question, answered as those about selections are
    torch.cat(pieces)                           # `cat_rows`: as many rows as were sliced

A `HostNumber` is a sum of entries of tensors.  Python may add and subtract such sums, and ask whether one is zero;
anything else that looks at the number is a refusal.  What the sums mean is for detection to show: detect/counts.py,
detect/sliced_rows.py.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from moe_compile.errors import Refusal
from moe_compile.ranges import HIDDEN, Writes

TRACED = "run_on_fakes"  # the function of capture.py below which the program runs
NUMBER = "Python reads a number that depends on the data"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_lib = torch.library.Library("moe_ep_capture", "FRAGMENT")
_lib.define("host_read(Tensor read) -> Tensor")
_lib.define("host_number(Tensor[] reads, int[] number) -> Tensor")
_lib.define("rows_between(Tensor(a) x, Tensor[] reads, int[] start, int[] end, bool whole, SymInt rows) -> Tensor(a)")
_lib.define("places_between(Tensor[] reads, int[] start, int[] end, SymInt rows) -> Tensor")
_lib.define("cat_rows(Tensor[] pieces, SymInt rows) -> Tensor")
_lib.define("bincount(Tensor flat, int minlength) -> Tensor")


def _rows_between(x: Tensor, reads: list[Tensor], start: list[int], end: list[int], whole: bool, rows: Any) -> Tensor:
    return x.as_strided((rows, *x.shape[1:]), x.stride(), x.storage_offset())  # a view, wherever in x it lies


def _cat_rows(pieces: list[Tensor], rows: Any) -> Tensor:
    out = pieces[0].new_empty((rows, *pieces[0].shape[1:]))
    needs_gradient = [p for p in pieces if p.requires_grad]
    return out + needs_gradient[0].sum() if needs_gradient else out


_lib.impl("rows_between", _rows_between, "CompositeImplicitAutograd")
_lib.impl("cat_rows", _cat_rows, "CompositeImplicitAutograd")
_FAKES: dict[str, Callable[..., Tensor]] = {
    "host_read": lambda read: torch.empty_like(read),
    "host_number": lambda reads, number: reads[0].new_empty((), dtype=torch.int64),
    "places_between": lambda reads, start, end, rows: reads[0].new_empty((rows,), dtype=torch.int64),
    "bincount": lambda flat, minlength: flat.new_empty((minlength,), dtype=torch.int64),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"moe_ep_capture::{_name}", _fake, lib=_lib)


class HostNumber:
    """A constant plus whole multiples of entries of what was read: `terms` by (number of the read, entry)."""

    __slots__ = ("constant", "numpy", "reads", "terms")

    def __init__(self, reads: "HostReads", terms: dict[tuple[int, int], int], constant: int, numpy: bool) -> None:
        self.reads, self.constant, self.numpy = reads, constant, numpy
        self.terms = {place: c for place, c in terms.items() if c}

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance says of the number that it stands for
        return np.int64 if self.numpy else int

    def plus(self, other: Any, sign: int) -> "HostNumber":
        if type(other) is not HostNumber:
            if type(other) is not int and not isinstance(other, np.integer):
                _refuse()
            other = HostNumber(self.reads, {}, int(other), isinstance(other, np.integer))
        terms = dict(self.terms)
        for place, c in other.terms.items():
            terms[place] = terms.get(place, 0) + sign * c
        return HostNumber(self.reads, terms, self.constant + sign * other.constant, self.numpy or other.numpy)

    def item(self) -> "HostNumber":
        return HostNumber(self.reads, self.terms, self.constant, False)

    def is_zero(self) -> bool:
        """For a number that is never negative, which detection has to show of whatever was asked about."""
        return not self.constant if not self.terms else self.reads.ask(self)

    def __hash__(self) -> int:
        raise Refusal("Python puts numbers that it read into a set, or looks them up in a dictionary")

    def __add__(self, other: Any) -> Any:
        return self.plus(other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self.plus(other, -1)

    def __rsub__(self, other: Any) -> Any:
        return HostNumber(self.reads, {}, 0, False).plus(self, -1).plus(other, 1)

    def __bool__(self) -> bool:
        return not self.is_zero()

    def __eq__(self, other: Any) -> bool:
        more = self.plus(other, -1)
        return (0 - more if min(more.terms.values(), default=0) < 0 else more).is_zero()

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __gt__(self, other: Any) -> bool:
        """n > 0, end > start; n >= 1 is the same."""
        more = self.plus(other, -1)
        return not more.is_zero() if more.terms else more.constant > 0

    def __lt__(self, other: Any) -> bool:
        """n < 1, start < end."""
        if type(other) is HostNumber:
            return other > self
        more = self.plus(other, -1)
        return more.plus(1, 1).is_zero() if more.terms else more.constant < 0

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def __le__(self, other: Any) -> bool:
        """n <= 0; end <= start."""
        return not self > other


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise Refusal("Python computes with the number of rows that an expert gets")


for _operator in """
    mul rmul floordiv rfloordiv truediv rtruediv mod rmod pow rpow divmod rdivmod neg pos abs invert and rand or ror
    xor rxor lshift rlshift rshift rrshift int index float complex round trunc floor ceil str repr format
""".split():
    setattr(HostNumber, f"__{_operator}__", _refuse)


class Locals:
    """What the program's variables held whenever it asked something: sums of numbers of rows, tensors that are none,
    or anything else.
    """

    def __init__(self) -> None:
        self.offsets: set[tuple[CodeType, str]] = set()
        self.tensors: set[tuple[CodeType, str]] = set()
        self.others: set[tuple[CodeType, str]] = set()

    def look(self) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != TRACED:
            for name, value in frame.f_locals.items():
                offset = type(value) is HostNumber or (type(value) is int and value == 0) or _is_unread(value)
                tensor = isinstance(value, Tensor) and value.dim() and value.is_floating_point()
                (self.offsets if offset else self.tensors if tensor else self.others).add((frame.f_code, name))
            frame = frame.f_back

    def only_offsets(self, code: CodeType, name: str) -> bool:
        return (code, name) in self.offsets - self.others - self.tensors

    def only_tensors(self, code: CodeType, name: str) -> bool:
        return (code, name) in self.tensors - self.others - self.offsets


def _is_unread(value: Any) -> bool:
    """Whether a value is a number in a tensor that Python does not know."""
    return isinstance(value, FakeTensor) and not value.dim() and value.dtype in INTEGERS[:2] and not _is_known(value)


class HostReads:
    """What Python read in one trace.  `rows(number)`: how many rows a slice of that length gets, 0 for none."""

    def __init__(self, rows: Callable[[Tensor], Any]) -> None:
        self.rows = rows
        self.decided: list[Tensor] = []
        self._tensors: list[Tensor] = []
        self._sums: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}  # a tensor that adds two numbers, and these
        self._read: dict[int, tuple[Tensor, HostNumber]] = {}  # numbers in tensors that nobody wrote to, once read
        self._writes = Writes()
        self._sliced: dict[Node, Any] = {}

    def reply(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the call gives; `NotImplemented` if it has nothing to do with numbers that Python read."""
        handler = _HANDLERS.get(func)
        return NotImplemented if handler is None else handler(self, *args, **kwargs)

    def ask(self, number: HostNumber) -> bool:
        """Whether the number is zero."""
        node = self._number(number)
        self.decided.append(node)
        rows = self.rows(node)
        return isinstance(rows, int) and rows == 0

    # -- reading ----------------------------------------------------------------------------

    def item(self, tensor: Tensor) -> Any:
        if _is_known(tensor) or tensor.dtype == torch.bool or tensor.numel() != 1:
            return NotImplemented
        return self._number_in(tensor.reshape(()) if tensor.dim() else tensor)

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note that a tensor is the sum of two numbers."""
        if func not in _ADDS or kwargs or len(args) != 2 or not isinstance(result, Tensor) or _is_known(result):
            return
        if not result.dim() and result.dtype in INTEGERS[:2] and all(_is_number(a, result.dtype) for a in args):
            self._sums[id(result)] = result, tuple(args)

    def _number_in(self, tensor: Tensor) -> HostNumber:
        """The number in a tensor: a sum of others, if it was made so and nobody wrote to any of them since."""
        if self._writes.may_reach(_node(tensor), tensor):
            return self._entries(tensor, numpy=False)  # type: ignore[no-any-return]
        if id(tensor) not in self._read:
            _, parts = self._sums.get(id(tensor), (None, ()))
            if parts and not any(isinstance(p, Tensor) and self._writes.may_reach(_node(p), p) for p in parts):
                number = HostNumber(self, {}, 0, False)
                for part in parts:
                    number = number.plus(self._number_in(part) if isinstance(part, Tensor) else part, 1)
            else:
                number = self._entries(tensor, numpy=False)
            self._read[id(tensor)] = tensor, number
        return self._read[id(tensor)][1]

    def numpy(self, tensor: Tensor, **kwargs: Any) -> Any:
        if _is_known(tensor):
            return NotImplemented
        entries = self._entries(tensor, numpy=True)
        array = np.empty(tuple(tensor.shape), dtype=object)
        array[...] = entries
        return array

    def entries(self, tensor: Tensor) -> Any:
        return self._entries(tensor, numpy=False)

    def _entries(self, tensor: Tensor, numpy: bool) -> Any:
        if tensor.dtype not in INTEGERS:
            raise Refusal(NUMBER)
        if tensor.dim() > 1 or not all(isinstance(s, int) for s in tensor.shape):
            raise Refusal(f"Python reads a whole tensor of shape {tuple(tensor.shape)}")
        with torch._C.DisableTorchFunction():
            self._tensors.append(torch.ops.moe_ep_capture.host_read(tensor))
        read = len(self._tensors) - 1
        entries = [HostNumber(self, {(read, i): 1}, 0, numpy) for i in range(tensor.numel())]
        return entries if tensor.dim() else entries[0]

    def bincount(self, flat: Tensor, weights: Any = None, minlength: int = 0) -> Any:
        if _is_known(flat):
            return NotImplemented
        if weights is not None or type(minlength) is not int or minlength < 1:
            raise Refusal(HIDDEN)
        with torch._C.DisableTorchFunction():
            return torch.ops.moe_ep_capture.bincount(flat, minlength)

    # -- slicing ----------------------------------------------------------------------------

    def getitem(self, tensor: Tensor, index: Any) -> Any:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        if any(type(i) is HostNumber for i in _leaves(rest)) or type(first) is HostNumber:
            _refuse()
        bounds = self._bounds(first)
        if bounds is None:
            return NotImplemented
        piece = self._slice(tensor, *bounds)
        return piece[(slice(None), *rest)] if rest else piece

    def setitem(self, tensor: Tensor, index: Any, value: Any) -> Any:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        bounds = self._bounds(first)
        if bounds is None:
            return NotImplemented
        if rest:
            raise Refusal("Python sets a part of the columns of an expert's rows")
        start, end = bounds
        reads, (low, high) = self._spelled(start, end)
        with torch._C.DisableTorchFunction():
            tensor[torch.ops.moe_ep_capture.places_between(reads, low, high, self._length(start, end))] = value
        return None

    def _bounds(self, index: Any) -> tuple[HostNumber, HostNumber] | None:
        """Start and end of a slice, if Python read one of them."""
        if not isinstance(index, slice):
            return None
        ends = [self.item(i) if isinstance(i, Tensor) and not _is_known(i) else i for i in (index.start, index.stop)]
        if not any(type(i) is HostNumber for i in ends):
            return None
        if index.step not in (None, 1) or ends[1] is None:
            raise Refusal("Python slices rows up to the last, or in steps")
        start, end = (
            HostNumber(self, {}, 0, False).plus(i or 0 if type(i) is int or i is None else i, 1) for i in ends
        )
        return start, end

    def split(self, tensor: Tensor, sizes: Any, dim: int = 0) -> Any:
        if type(sizes) is HostNumber:
            _refuse()
        if not (isinstance(sizes, Sequence) and any(type(s) is HostNumber for s in sizes)):
            return NotImplemented
        if dim % tensor.dim() != 0:
            raise Refusal("Python splits features by numbers of rows")
        ends = list(itertools.accumulate(sizes, initial=HostNumber(self, {}, 0, False)))
        return tuple(self._slice(tensor, start, end, True) for start, end in itertools.pairwise(ends))

    def _slice(self, tensor: Tensor, start: HostNumber, end: HostNumber, whole: bool = False) -> Tensor:
        """Rows of a tensor.  whole: it is an error if those of this slice and its like are not all."""
        reads, (low, high) = self._spelled(start, end)
        with torch._C.DisableTorchFunction():
            return torch.ops.moe_ep_capture.rows_between(tensor, reads, low, high, whole, self._length(start, end))

    def _length(self, start: HostNumber, end: HostNumber) -> Any:
        length = end - start
        if not length.terms:
            raise Refusal("Python slices as many rows as the program says, not as an expert gets")
        return self.rows(self._number(length))

    def cat(self, pieces: Any, dim: int = 0, *, axis: int = 0) -> Any:
        """Pieces of rows one below the other: as many rows as were sliced, which detection has to show."""
        if (dim or axis) and dim % max(pieces[0].dim(), 1):
            return NotImplemented
        totals = [self._rows_sliced(p) for p in pieces] if self._tensors else []
        if not totals or any(t is None for t in totals):
            return NotImplemented
        if len({(p.dtype, tuple(p.shape[1:])) for p in pieces}) != 1:
            raise Refusal("pieces of rows of several dtypes or widths are joined")
        with torch._C.DisableTorchFunction():
            return torch.ops.moe_ep_capture.cat_rows(list(pieces), totals[0])

    def _rows_sliced(self, piece: Tensor) -> Any:
        """How many rows the tensor has that the piece was made from slices of; None if from none."""
        node = _node(piece)
        if node is None:
            return None
        todo = [node]
        while todo:
            n = todo[-1]
            if n in self._sliced:
                todo.pop()
                continue
            if n.target is torch.ops.moe_ep_capture.rows_between.default:
                self._sliced[n] = n.args[0].meta["val"].shape[0]  # type: ignore[union-attr]
            elif missing := [m for m in n.all_input_nodes if m not in self._sliced]:
                todo += missing
            else:
                self._sliced[n] = next((s for m in n.all_input_nodes if (s := self._sliced[m]) is not None), None)
        return self._sliced[node]

    # -- spelling ---------------------------------------------------------------------------

    def _number(self, number: HostNumber) -> Tensor:
        reads, (spelled,) = self._spelled(number)
        with torch._C.DisableTorchFunction():
            return torch.ops.moe_ep_capture.host_number(reads, spelled)

    def _spelled(self, *numbers: HostNumber) -> tuple[list[Tensor], list[list[int]]]:
        """The reads behind some numbers, and each number as [constant, read, first, last + 1, times, ...]."""
        used = sorted({read for n in numbers for read, _ in n.terms})
        position = {read: i for i, read in enumerate(used)}
        return [self._tensors[r] for r in used], [[n.constant, *_runs(n, position)] for n in numbers]


def _runs(number: HostNumber, position: dict[int, int]) -> Iterator[int]:
    places = sorted(number.terms)
    while places:
        (read, first), times = places[0], number.terms[places[0]]
        size = 1
        while size < len(places) and places[size] == (read, first + size) and number.terms[places[size]] == times:
            size += 1
        yield from (position[read], first, first + size, times)
        places = places[size:]


def _node(tensor: Tensor) -> Node | None:
    mode = get_proxy_mode()
    assert mode is not None
    return get_proxy_slot(tensor, mode.tracer, None, lambda slot: slot.proxy.node)


def _is_known(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) or tensor.constant is not None


def _is_number(value: Any, dtype: torch.dtype) -> bool:
    return type(value) is int or (isinstance(value, Tensor) and not value.dim() and value.dtype == dtype)


def _leaves(index: Iterable[Any]) -> list[Any]:
    return [x for i in index for x in ((i.start, i.stop) if isinstance(i, slice) else (i,))]


_ADDS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.item: HostReads.item,
    torch.Tensor.numpy: HostReads.numpy,
    torch.Tensor.bincount: HostReads.bincount,
    torch.bincount: HostReads.bincount,
    torch.Tensor.__getitem__: HostReads.getitem,
    torch.Tensor.__setitem__: HostReads.setitem,
    torch.Tensor.split: HostReads.split,
    torch.split: HostReads.split,
    **{op: HostReads.cat for op in (torch.cat, torch.concat, torch.concatenate)},
}
