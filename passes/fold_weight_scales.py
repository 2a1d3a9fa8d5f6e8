"""Multiply rows with float8 weights as they are stored, and scale behind the product.

Before:
    wide  = aten.to.dtype(w_EFD, torch.bfloat16)                   # w: float8_e4m3fn or float8_e5m2
    w     = aten.mul(wide, scales_EF1)                             # or [E, 1, 1], or no scale, or one of blocks,
                                                                   # repeated in any form of scale_blocks.py
    y_RF  = moe_ep.grouped_gemm(x_RD, [w], offsets_E)

After:
    s_EF  = aten.reshape(scales_EF1, [E, F])                       # or [E], or [E, blocks of F, blocks of D]
    y_RF  = moe_ep.grouped_gemm_scaled(x_RD, [w_EFD], s_EF, offsets_E)

Stage      canonicalise; needs what dispatch_experts makes, before fuse_experts would take it.
Numerics   x @ (s * w).T = s * (x @ w.T), of blocks part by part: s * w is not rounded to the type of x, the scale is
           applied in f32; one rounding fewer.
Why        no stack of wider weights in each call, and none kept for the backward: a weight costs one byte of traffic,
           where cast, scale and product move nine in bf16, or five if cast and scale are one kernel.
Refuses    weights or scales that may need a gradient; a scale that varies along the inner width other than in blocks;
           a stack that something else reads too, or of which a part changes in place before the product; types or a
           device without a kernel.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_compile import cuda
from moe_compile.grouped_gemm_scaled import FLOAT8, SCALES
from moe_compile.rewrite import RewritePass, emit, value
from moe_compile.scale_blocks import Blocks, blocks_of, is_cast
from moe_compile.series import series_of
from moe_compile.trained import may_need_gradient

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep
GROUPED = moe_ep.grouped_gemm.default
VIEWS = (aten.reshape.default, aten.view.default)
TRANSPOSES = (aten.transpose.int, aten.t.default)
COPIES_OR_NOT = (aten.reshape, aten.contiguous, aten.to, aten.flatten)  # some say nothing of aliases
WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # hold each number of float8


@dataclass(frozen=True)
class Widened:
    """Weights of a product that were made of float8 numbers: a stack [E, F, D], or the matrix [F, D] of one expert.

    source: these numbers, the last two dimensions in turn if `swapped`.  scale: what they were multiplied by; shape:
    its sizes as it meets the weights.  blocks: what it is if it has the scales of blocks; in turn if `turned`.  chain:
    the nodes between, the last first.
    """

    source: Node
    swapped: bool = False
    scale: Node | None = None
    shape: tuple[Any, ...] = ()
    blocks: Blocks | None = None
    turned: bool = False
    chain: tuple[Node, ...] = ()

    def in_blocks(self) -> Blocks | None:
        """The blocks, if the scale varies along the inner width."""
        return self.blocks if self.scale is not None and self.shape[-1] != 1 else None

    def scales(self) -> Node | None:
        """What the scales are made of."""
        return self.scale if (blocks := self.in_blocks()) is None else blocks.source

    def form(self) -> Any:
        """What is the same for all experts if their matrices are one by one."""
        scale = None if self.scale is None else (value(self.scale).dtype, self.shape)
        blocks = None if (found := self.in_blocks()) is None else (found[1:5], self.turned)
        return value(self.source).dtype, value(self.source).shape, self.swapped, scale, blocks


@dataclass(frozen=True)
class Product:
    """A product with such weights: one stack, or a matrix an expert."""

    product: Node
    weights: tuple[Widened, ...]


class FoldWeightScales(RewritePass[Product]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Product]]:
        for node in graph.find_nodes(op="call_function", target=moe_ep.grouped_gemm.default):
            weights: Any = node.args[1]
            if isinstance(weights, Node):  # a series: matrices as they are
                continue
            found = [_widened(w) for w in weights]
            if all(f is not None and f.chain for f in found):
                yield node, Product(node, tuple(f for f in found if f is not None))

    def refuse(self, found: Product) -> str | None:
        first, rows = found.weights[0], value(found.product.args[0])  # type: ignore[arg-type]
        source, (F, D) = value(first.source), value(first.chain[0]).shape[-2:]
        if source.dtype not in FLOAT8:
            return f"weights are {source.dtype}, expected float8_e4m3fn or float8_e5m2"
        if any(w.form() != first.form() for w in found.weights):
            return "experts' weights are made in different ways"
        if first.scale is not None and value(first.scale).dtype not in SCALES:
            return f"scales are {value(first.scale).dtype}, expected f32, bf16 or f16"
        blocks = first.in_blocks()
        if first.scale is not None and first.shape[-1] != 1 and blocks is None:
            return f"scales {first.shape} vary along the inner width of weights {tuple(value(first.chain[0]).shape)}"
        chain = {n for w in found.weights for n in w.chain}
        if others := {u.name for n in chain for u in n.users if u not in chain and u.target is not GROUPED}:
            return f"the wider weights are used elsewhere too ({', '.join(sorted(others))})"
        sources, scales = [w.source for w in found.weights], [s for w in found.weights if (s := w.scales()) is not None]
        for name, nodes in (("weights", sources), ("scales", scales)):
            if trained := [n.name for n in nodes if may_need_gradient(n)]:
                return f"{name} ({trained[0]}) may need a gradient"
        repeated = {n for w in found.weights if (b := w.in_blocks()) for n in b.chain}
        roots = {*map(_root, sources), *map(_root, scales), *map(_root, repeated)}
        if changed := _changed(found.product, chain | repeated, roots):
            return f"{changed.name} changes in place before the product"
        if rows.device.type == "cuda":
            offsets = value(found.product.args[2])  # type: ignore[arg-type]
            stack, scale = source.new_empty((offsets.shape[0], F, D)), None
            if first.scale is not None:
                sizes: tuple[Any, ...] = (offsets.shape[0], F)[: 1 + (first.shape[-2] != 1)]
                if blocks is not None:
                    sizes = offsets.shape[0], *(blocks[2:4][::-1] if first.turned else blocks[2:4])
                scale = value(first.scale).new_empty(sizes)
            reason = cuda.why_not_scaled(rows, stack, scale, offsets)
            return reason and f"no kernel: {reason}"
        return None if rows.device.type == "cpu" else f"no kernel on {rows.device.type}"

    def rewrite(self, graph: Graph, found: Product) -> None:
        node = found.product
        rows, _, offsets = node.args

        def call(target: Any, *args: Any) -> Node:
            return emit(graph, target, *args, like=node)

        with graph.inserting_before(node):
            weights: Any = _matrices([w.source for w in found.weights])
            if found.weights[0].swapped:
                sources = [w.source for w in found.weights] if isinstance(weights, Node) else weights
                weights = [call(aten.transpose.int, w, -2, -1) for w in sources]
            num_experts = value(offsets).shape[0]  # type: ignore[arg-type]
            scales = _scales(call, found.weights, num_experts) if found.weights[0].scale is not None else None
            new = call(moe_ep.grouped_gemm_scaled.default, rows, weights, scales, offsets)
        node.replace_all_uses_with(new)


# -- what the weights were made of ------------------------------------------------------------


def _widened(node: Any) -> Widened | None:
    """How weights were made of float8 numbers, if they were: by casts, transposes and one scale."""
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.Tensor) or value(node).dim() < 2:
        return None
    if value(node).dtype.is_floating_point and value(node).dtype.itemsize == 1:
        return Widened(node)
    rank = value(node).dim()
    if is_cast(node) and value(node).dtype in WIDE:
        found = _widened(node.args[0])
        return found and replace(found, chain=(node, *found.chain))
    if node.kwargs or node.op != "call_function":
        return None
    if node.target in TRANSPOSES and {d % rank for d in node.args[1:] or (0, 1)} == {rank - 2, rank - 1}:  # type: ignore[operator]
        if (found := _widened(node.args[0])) is None:
            return None
        shape = (*found.shape[:-2], *found.shape[:-3:-1])
        turned = not found.turned if found.scale is not None else False
        return replace(found, swapped=not found.swapped, shape=shape, turned=turned, chain=(node, *found.chain))
    if node.target in VIEWS:
        return _scaled_in_parts(node)
    if node.target is aten.mul.Tensor:
        for stack, scale in (node.args, node.args[::-1]):
            found = _widened(stack)
            if found is None or found.scale is not None or not found.chain or not isinstance(scale, Node):
                continue
            if value(node).shape == value(stack).shape:  # type: ignore[arg-type]
                shape = (1,) * (rank - value(scale).dim()) + tuple(value(scale).shape)
                blocks = blocks_of(scale, value(node).shape, value(node).shape)
                return replace(found, scale=scale, shape=shape, blocks=blocks, chain=(node, *found.chain))
    return None


def _scaled_in_parts(node: Node) -> Widened | None:
    """The same of weights whose dimensions were split, then scaled, then put together again."""
    inner: Any = node.args[0]
    if not isinstance(inner, Node) or inner.target is not aten.mul.Tensor or inner.kwargs:
        return None
    for parts, scale in (inner.args, inner.args[::-1]):
        if not isinstance(parts, Node) or not isinstance(scale, Node) or parts.target not in VIEWS:
            continue
        whole: Any = parts.args[0]
        if value(whole).shape != value(node).shape or value(parts).shape != value(inner).shape:
            continue
        if 1 in value(node).shape[-2:]:
            continue
        found = _widened(whole)
        blocks = blocks_of(scale, value(inner).shape, value(node).shape)
        if found is not None and found.scale is None and found.chain and blocks is not None:
            shape, chain = tuple(value(node).shape), (node, inner, parts, *found.chain)
            return replace(found, scale=scale, shape=shape, blocks=blocks, chain=chain)
    return None


def _changed(product: Node, chain: set[Node], roots: set[Node]) -> Node | None:
    """One of the roots that an op writes to after some of the chain was computed, and before the product."""
    begun = False
    for node in product.graph.nodes:
        begun = begun or node in chain
        if node is product:
            return None
        if not begun or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for given, argument in zip(node.args, node.target._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for n in given if isinstance(given, (list, tuple)) else [given]:
                    if isinstance(n, Node) and _root(n) in roots:
                        return _root(n)
    raise AssertionError("the product is in its graph")


def _root(node: Node) -> Node:
    """Whose memory a value may be."""
    while isinstance(node.target, torch._ops.OpOverload) and node.args:
        aliases = any(r.alias_info is not None for r in node.target._schema.returns)
        if not aliases and node.target.overloadpacket not in COPIES_OR_NOT:
            break
        source: Any = node.args[0]
        if not isinstance(source, Node):
            break
        node = source
    return node


def _matrices(sources: Sequence[Node]) -> Any:
    """The same as a product takes them: a stack, a list of matrices, or a series (series.py)."""
    first = sources[0]
    source: Any = first.args[0] if first.args else None
    if value(first).dim() == 3:
        if first.target is aten.stack.default and tuple(first.args[1:]) in ((), (0,)) and not first.kwargs:
            return source if series_of(source) is not None else list(source)
    elif first.target is aten.select.int and value(source).dim() == 3 and value(source).shape[0] == len(sources):
        if all(n.target is aten.select.int and n.args == (source, 0, e) for e, n in enumerate(sources)):
            return [source]
    return list(sources)


def _scales(call: Any, weights: Sequence[Widened], num_experts: int) -> Node:
    """The scales as [E], or [E, F] if they vary within an expert, or [E, blocks of F, blocks of D]."""
    first = weights[0]
    if first.in_blocks() is not None:
        each = [_block_scales(call, w) for w in weights]
        return each[0] if len(first.shape) == 3 else call(aten.stack.default, each)
    width = first.shape[-2]
    if len(first.shape) == 3:
        scales = call(aten.reshape.default, first.scale, [first.shape[0], width])
        if first.shape[0] != num_experts:
            scales = call(aten.expand.default, scales, [num_experts, -1])
    else:
        scales = call(aten.stack.default, [call(aten.reshape.default, w.scale, [width]) for w in weights])
    return scales if width != 1 else call(aten.reshape.default, scales, [num_experts])


def _block_scales(call: Any, weights: Widened) -> Node:
    """[rows, columns] of blocks, or all experts'."""
    source, lead, rows, columns, casts, _ = weights.in_blocks()  # type: ignore[misc]
    scales = call(aten.reshape.default, source, [*lead, rows, columns])
    for dtype in casts:
        scales = call(aten.to.dtype, scales, dtype)
    return call(aten.transpose.int, scales, -2, -1) if weights.turned else scales  # type: ignore[no-any-return]
