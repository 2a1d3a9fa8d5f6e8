"""Scales in blocks, as programs write them: a small tensor, repeated by shapes alone until it meets the weights.

    s.repeat_interleave(128, 1).repeat_interleave(128, 2)                   # s: [E, F/128, D/128]
    s[:, :, None, :, None].expand(E, F // 128, 128, D // 128, 128).reshape(E, F, D)
    (w.view(E, F // 128, 128, D // 128, 128) * s[:, :, None, :, None]).view(E, F, D)

Each dimension of a value is a product of atoms, the outermost first: numbers of the source in their order, or
repetitions of them.  A dimension is one of blocks if its repetitions are innermost.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from moe_compile.rewrite import value

aten = torch.ops.aten
SAME = (aten.contiguous.default, aten.clone.default)
REGROUPED = (
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints,
    aten.unflatten.int,
)  # fmt: skip
"""The same numbers in the same order, in other dimensions."""


class Atom(NamedTuple):
    """A factor of a dimension's size: numbers of the source, or one number `size` times."""

    size: int
    repeats: bool


Dims = tuple[tuple[Atom, ...], ...]


class Blocks(NamedTuple):
    """Scales of blocks of a matrix.

    source: numbers that are [*lead, rows, columns], in whatever shape.  casts: what they are rounded to, one after the
    other, before they meet the weights.  chain: the nodes between, with the source's own left out.
    """

    source: Node
    lead: tuple[int, ...]
    rows: int
    columns: int
    casts: tuple[torch.dtype, ...]
    chain: tuple[Node, ...]


def blocks_of(scale: Node, met: Sequence[Any], shape: Sequence[Any]) -> Blocks | None:
    """The blocks of which `scale` has the scales, if it is broadcast to `met` and that is read as `shape`.

    None if it has no such form, or a number for each of a row: nothing is repeated along the inner width then.
    """
    path = [scale]
    while (above := _understood(path[-1])) is not None:
        path.append(above)
    if not all(isinstance(n, int) for node in path for n in (*value(node).shape, *met, *shape)):
        return None
    for i in range(len(path) - 1, -1, -1):  # the farthest has the fewest numbers
        source, chain = path[i], tuple(path[:i])
        dims: Dims | None = tuple(_atoms(n, False) for n in value(source).shape)
        for node in reversed(chain):
            dims = None if dims is None else _after(node, dims)
        dims = None if dims is None else _expanded(dims, met)
        dims = None if dims is None else _regrouped(dims, shape)
        counts = None if dims is None else _counts(dims)
        if counts is not None and counts[-1] < shape[-1]:
            casts = tuple(value(n).dtype for n in reversed(chain) if is_cast(n))
            return Blocks(source, tuple(counts[:-2]), counts[-2], counts[-1], casts, chain)
    return None


def is_cast(node: Node) -> bool:
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and not node.kwargs
    return node.target is aten._to_copy.default and list(node.kwargs) == ["dtype"]


def _understood(node: Node) -> Node | None:
    """What a node only casts, repeats or regroups."""
    source: Any = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if is_cast(node):
        return source if value(source).dtype.is_floating_point and value(node).dtype.is_floating_point else None
    if node.target is aten.repeat_interleave.self_int:
        whole = len(node.args) == 3 and isinstance(node.args[1], int) and isinstance(node.args[2], int)
        return source if whole and not node.kwargs else None
    if node.target is aten.expand.default:
        return None if node.kwargs else source
    return source if node.target in (*SAME, *REGROUPED) else None


def _after(node: Node, dims: Dims) -> Dims | None:
    """The dimensions of a node that is understood, by those of what it reads."""
    if node.target is aten.repeat_interleave.self_int:
        given: Any = node.args
        dim = given[2] % len(dims)
        return (*dims[:dim], (*dims[dim], *_atoms(given[1], True)), *dims[dim + 1 :])
    if node.target is aten.expand.default:
        return _expanded(dims, value(node).shape)
    return _regrouped(dims, value(node).shape) if node.target in REGROUPED else dims


def _atoms(size: Any, repeats: bool) -> tuple[Atom, ...]:
    """One that is no number at all, or none of one number."""
    return () if size == 1 else (Atom(size, repeats),)


def _expanded(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """As broadcasting does it."""
    if len(dims) > len(shape):
        return None
    padded: Dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(d or _atoms(n, True) for d, n in zip(padded, shape, strict=True))


def _regrouped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The same atoms in other dimensions, some of them split; None where a dimension is no product of parts of them."""
    rest, found = [a for dim in dims for a in dim][::-1], []
    for size in shape:
        dim: list[Atom] = []
        while size > 1:
            if not rest:
                return None
            atom = rest.pop()
            if atom.size > size:  # the outer part is here
                if atom.size % size:
                    return None
                rest.append(Atom(atom.size // size, atom.repeats))
                atom = Atom(size, atom.repeats)
            if not atom.size or size % atom.size:
                return None
            size //= atom.size
            dim.append(atom)
        if size == 0:
            return None
        found.append(tuple(dim))
    return None if rest else tuple(found)


def _counts(dims: Dims) -> list[int] | None:
    """How many blocks each dimension has; None unless the first ones have one for each number, and repetitions are
    innermost everywhere."""
    counts = []
    for i, dim in enumerate(dims):
        repeats = [a.repeats for a in dim]
        if repeats != sorted(repeats) or (i < len(dims) - 2 and any(repeats)):
            return None
        count = 1
        for atom in dim:
            count *= 1 if atom.repeats else atom.size
        counts.append(count)
    return counts if len(counts) >= 2 else None
