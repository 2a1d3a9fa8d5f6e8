"""Finds two products of all experts with an activation between them, from `combine` backwards: what `expert_mlp` does.

    x_RD, offsets, order = moe_ep.dispatch(x, ids, E)
    gate, up = aten.chunk(moe_ep.grouped_gemm(x_RD, [w13], offsets), 2, -1)
    y_RD     = moe_ep.grouped_gemm(aten.silu(gate) * up, [w2], offsets)
    out      = moe_ep.combine(y_RD, weights, order, offsets, K)

Biases, limits, an alpha, a shift and numbers in pairs are seen too (activations.py).
"""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.activations import Activation
from moe_compile.rewrite import value
from moe_compile.series import series_of

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep

Weights = tuple[Node, ...] | Node  # stacked in one node, one node an expert, or a series (series.py)


@dataclass(frozen=True)
class Mlp:
    """The experts that end in `combine`."""

    combine: Node
    dispatch: Node
    gate: Weights  # as `expert_mlp` takes them
    up: Weights
    down: Weights
    activation: str
    gated: bool
    inside: frozenset[Node]  # what the op replaces
    first_biases: tuple[Node, ...] = ()  # stacks; gate's and up's, if these are two products
    last_bias: Node | None = None


def matched(combine: Node) -> Mlp | None:
    """The experts that end in a `combine`, if nobody uses what is between it and their dispatch."""
    return _Matcher(combine).match()


def fakes(weights: Weights) -> list[Tensor]:
    """The fake of each tensor; of a series one, as all are like it, and no result depends on their number."""
    series = series_of(weights)
    return [series.example] if series is not None else [value(w) for w in weights]  # type: ignore[union-attr]


# -- backwards from combine -------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A grouped GEMM, and the bias that is added to it."""

    rows: Node
    weights: Weights
    bias: Node | None


class _Matcher:
    def __init__(self, combine: Node) -> None:
        self.combine, self.inside = combine, {combine}
        _, _, self.order, self.offsets, self.top_k = combine.args
        source: Any = self.order
        self.dispatch: Any = source.args[0] if _is(source, operator.getitem) else None

    def match(self) -> Mlp | None:
        """The whole, if the nodes between dispatch and combine are just these and nobody else uses them."""
        dispatch = self.dispatch
        if not _is(dispatch, moe_ep.dispatch.default) or value(dispatch.args[1]).shape[1] != self.top_k:
            return None
        last = self.product(self.combine.args[0])
        if last is None or (between := self.activated(last.rows)) is None:
            return None
        activation, gated, products = between
        if activation.why_not(gated) is not None:
            return None
        routing = (products[0].rows, self.offsets, self.order)
        if [n.args for n in routing if _is(n, operator.getitem)] != [(dispatch, i) for i in range(3)]:  # type: ignore[union-attr]
            return None
        parts: Any = self.inside | {dispatch, *routing}
        if any(user not in parts for n in parts - {self.combine} for user in n.users):
            return None
        biases = tuple(p.bias for p in products if p.bias is not None)
        if len(biases) not in (0, len(products)):
            return None
        gate, up = (products[0].weights if len(products) > 1 else ()), products[-1].weights
        how = str(activation), gated, frozenset(parts), biases, last.bias
        return Mlp(self.combine, dispatch, gate, up, last.weights, *how)

    def see(self, node: Any) -> Any:
        """The node, seen through casts to the dtype that it has."""
        while _is(node, aten.to.dtype) and value(node).dtype == value(node.args[0]).dtype:
            self.inside.add(node)
            node = node.args[0]
        return node

    def product(self, node: Any) -> Product | None:
        """A grouped GEMM, with its bias."""
        node = self.see(node)
        if _is(node, aten.add.Tensor) and not node.kwargs:
            for y, b in (node.args, node.args[::-1]):
                if _is(b, aten.index.Tensor) and (found := self.product(y)) is not None and found.bias is None:
                    if not self.by_expert(b.args[1]) or value(b).shape[1:] != value(node).shape[1:]:
                        return None
                    self.inside |= {node, b}
                    return Product(found.rows, found.weights, b.args[0])
            return None
        if not _is(node, moe_ep.grouped_gemm.default) or node.args[2] is not self.offsets:
            return None
        self.inside.add(node)
        weights = node.args[1]
        return Product(self.see(node.args[0]), weights if isinstance(weights, Node) else tuple(weights), None)

    def by_expert(self, indices: Any) -> bool:
        """Whether these are the experts of the rows, as `dispatch_experts` writes them."""
        ids, num_experts = self.dispatch.args[1:]
        if len(indices) != 1 or not _is(indices[0], aten.clamp.default):
            return False
        (clamped,), (rows, *bounds) = indices, indices[0].args
        if bounds != [0, num_experts - 1] or not _is(rows, aten.index.Tensor) or list(rows.args[1]) != [self.order]:
            return False
        flat = rows.args[0]
        if _is(flat, aten.to.dtype):
            self.inside.add(flat)
            flat = flat.args[0]
        if not _is(flat, aten.reshape.default) or flat.args[0] is not ids or list(flat.args[1]) != [-1]:
            return False
        self.inside |= {clamped, rows, flat}
        return True

    def activated(self, node: Any) -> tuple[Activation, bool, list[Product]] | None:
        """(activation, gated, the products that it takes) of what the last product takes."""
        node = self.see(node)
        known = set(self.inside)
        if (plain := self.activation(node)) is not None and (first := self.product(plain[1])) is not None:
            return plain[0], False, [first]
        self.inside = known
        if not _is(node, aten.mul.Tensor):
            return None
        self.inside.add(node)
        for a, u in (node.args, node.args[::-1]):
            known, before = set(self.inside), self.activation(self.see(a))
            if before is not None and (found := self.gated(*before, u)) is not None:
                return found
            self.inside = known
        return None

    def gated(self, act: Activation, g: Any, u: Any) -> tuple[Activation, bool, list[Product]] | None:
        """The same, of the product of an activated g and u."""
        shift, limit, u = self.factor(self.see(u))
        if limit != act.limit:
            return None
        known = set(self.inside)
        source, low, pairs = self.half(g)
        other, high, alike = self.half(u)
        if source is not None and source is other and (low, high) == (0, 1) and pairs == alike:
            if (first := self.product(source)) is not None:
                return Activation(act.name, act.alpha, limit, shift, pairs), True, [first]
        self.inside = known
        gate, up = self.product(g), self.product(u)
        if gate is not None and up is not None and gate.rows is up.rows and _width(gate.weights) == _width(up.weights):
            return Activation(act.name, act.alpha, limit, shift), True, [gate, up]
        return None

    def factor(self, node: Any) -> tuple[float, float, Any]:
        """(shift, limit, operand) of what the activated gate is multiplied by; 0 and 0 of anything else."""
        shift = limit = 0.0
        if _is(node, aten.add.Tensor) and not node.kwargs and _number(node.args[1]):
            self.inside.add(node)
            shift, node = float(node.args[1]), self.see(node.args[0])
        if _is(node, aten.clamp.default) and not node.kwargs and len(node.args) == 3:
            low, high = node.args[1:]
            if _number(low) and _number(high) and -low == high > 0:
                self.inside.add(node)
                limit, node = float(high), self.see(node.args[0])
        return shift, limit, node

    def activation(self, node: Any) -> tuple[Activation, Any] | None:
        """(activation, operand) of one that `expert_mlp` knows."""
        found = _activation(node)
        if found is None:
            return None
        act, operand, nodes = found
        self.inside |= set(nodes)
        operand = self.see(operand)
        if (limited := _limited(operand)) is not None:
            self.inside.add(operand)
            return Activation(act.name, act.alpha, limited), self.see(operand.args[0])
        return act, operand

    def half(self, node: Any) -> tuple[Node | None, int, bool]:
        """(source, 0 or 1, whether it is each second number) of one half of the last dimension; (None, -1, False) of
        anything else."""
        parts: Any
        step = 1
        if _is(node, aten.slice.Tensor) and len(node.args) in (4, 5):
            (source, dim, start, stop, *more), parts = node.args, node
            width, step = value(source).shape[1], more[0] if more else 1
            if step == 2:
                place = start if start in (0, 1) and stop >= width else -1
            else:
                place = {(0, width // 2): 0, (width // 2, width): 1}.get((start, min(stop, width)), -1)
            whole = place < 0 or step not in (1, 2)
        else:
            parts = node.args[0] if _is(node, operator.getitem) else None
            if not _is(parts, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
                return None, -1, False
            source, sizes, dim = [*parts.args, 0][:3]
            place, width = node.args[1], value(source).shape[-1]
            wanted = {aten.chunk.default: 2, aten.split.Tensor: width // 2}.get(parts.target, [width // 2] * 2)
            whole = (list(sizes) if isinstance(sizes, (list, tuple)) else sizes) != wanted
        if whole or dim not in (1, -1) or width % 2 or value(source).dim() != 2:
            return None, -1, False
        self.inside |= {node, parts}
        return source, place, step == 2


def _width(weights: Weights) -> int:
    """How many numbers a product with these weights gives; a product of one would be spread over all of the other."""
    return int(fakes(weights)[0].shape[-2])


def _activation(node: Any) -> tuple[Activation, Any, tuple[Node, ...]] | None:
    """(activation without limits, operand, nodes)."""
    if _is(node, aten.silu.default, aten.relu.default):
        return Activation(str(node.target).split(".")[1]), node.args[0], (node,)
    if _is(node, aten.gelu.default):
        how = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return Activation({"none": "gelu", "tanh": "gelu_tanh"}[how]), node.args[0], (node,)
    squared = _is(node, aten.square.default) or (_is(node, aten.pow.Tensor_Scalar) and node.args[1] == 2)
    if squared and _is(node.args[0], aten.relu.default):
        return Activation("relu_squared"), node.args[0].args[0], (node, node.args[0])
    if _is(node, aten.mul.Tensor):
        for g, s in (node.args, node.args[::-1]):
            if not _is(s, aten.sigmoid.default):
                continue
            if s.args[0] is g:
                return Activation("silu"), g, (node, s)
            scaled = s.args[0]
            if _is(scaled, aten.mul.Tensor) and scaled.args[0] is g and _number(scaled.args[1]):
                return Activation("silu", float(scaled.args[1])), g, (node, s, scaled)
    return None


def _limited(node: Any) -> float | None:
    """The limit, if the node is a value that is clamped from above alone."""
    if _is(node, aten.clamp_max.default):
        low, high = None, node.args[1]
    elif _is(node, aten.clamp.default):
        low, high = [*node.args[1:], None][0], node.kwargs.get("max", [*node.args, None, None][2])
        low = node.kwargs.get("min", low)
    else:
        return None
    return float(high) if low is None and _number(high) and high > 0 else None


def _number(x: object) -> bool:
    """Whether this is a number, and finite."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.target in targets
