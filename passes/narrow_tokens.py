"""Cast tokens to bfloat16 once, before they are copied to their experts, not each copy.

Before:
    experts = experts(ids, [x], [weights], [w13, w2], [], body, E)     # body: linear of token_0, under autocast

After:
    to      = aten.to.dtype(x, bf16)
    experts = experts(ids, [to], [weights], [w13, w2], [], body, E)    # body: linear, ...

Stage      place, before all others: what is sent to other ranks is narrow too.
Numerics   the same numbers.  The gradient of a token is a sum over its experts in f32 as before, but rounded to
           bfloat16 before it becomes wide again, as the gradient of any cast is.
Why        under autocast the rows of f32 tokens are half as many bytes to gather, to keep and to send; and without a
           cast between dispatch and product, the whole is one `expert_mlp` (fuse_experts).
Refuses    tokens that the body also reads in another type.  Other narrow types are left: a sum of gradients in float16
           may be too large for it, and float8 rows have no kernels.

A body casts by `aten.to`, or by a product that is narrower than its rows: autocast chose its type.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_compile.region import experts
from moe_compile.rewrite import RewritePass, emit, value

aten = torch.ops.aten


PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default)


@dataclass(frozen=True)
class Cast:
    """A wider token that a body reads as bfloat16; `inside` is its placeholder there."""

    node: Node
    index: int
    inside: Node
    readers: tuple[Node, ...]


class NarrowTokens(RewritePass[Cast]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Cast]]:
        for node in graph.find_nodes(op="call_function", target=experts):
            placeholders = _body(node).graph.find_nodes(op="placeholder")
            for index, inside in enumerate(placeholders[: len(node.args[1])]):
                if readers := tuple(user for user in inside.users if _narrows(user, inside)):
                    yield node, Cast(node, index, inside, readers)

    def refuse(self, found: Cast) -> str | None:
        if others := [user.name for user in found.inside.users if user not in found.readers]:
            return f"{found.inside.name} is read otherwise too, by {', '.join(others)}"
        body: Any = found.node.args[5]
        if len(found.node.graph.find_nodes(op="get_attr", target=body.target)) > 1 or len(body.users) > 1:
            return f"the body {body.target} is that of other experts too"
        return None

    def rewrite(self, graph: Graph, found: Cast) -> None:
        node, inside = found.node, found.inside
        tokens: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        with graph.inserting_before(node):
            tokens[found.index] = emit(graph, aten.to.dtype, tokens[found.index], torch.bfloat16, like=node)
        node.update_arg(1, tokens)
        inside.meta["val"] = value(inside).to(torch.bfloat16)
        for cast in found.readers:
            if cast.target is aten.to.dtype:
                cast.replace_all_uses_with(inside)
                inside.graph.erase_node(cast)
        _body(node).recompile()


def _body(node: Node) -> GraphModule:
    body = getattr(node.graph.owning_module, str(node.args[5].target))  # type: ignore[union-attr]
    assert isinstance(body, GraphModule)
    return body


def _narrows(node: Node, rows: Node) -> bool:
    """Whether a node casts rows of a wider float type to bfloat16, or multiplies them in it by something else."""
    cast = node.target is aten.to.dtype and len(node.args) == 2
    product = node.target in PRODUCTS and node.args[0] is rows and rows not in node.args[1:]
    wide = value(rows).dtype in (torch.float32, torch.float64)
    return (cast or product) and not node.kwargs and wide and value(node).dtype == torch.bfloat16
