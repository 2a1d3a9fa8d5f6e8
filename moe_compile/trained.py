"""Which values of a captured graph may need a gradient: tracers leave fakes that do not say it."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

TRAINED = "moe_ep_trained"  # in the meta of an input: whether gradients are recorded for it


def may_need_gradient(node: Node) -> bool:
    """Whether a value is made of something trained, or of an input of which that is not known."""
    seen: set[Node] = set()
    queue = [node]
    while queue:
        n = queue.pop()
        val = n.meta.get("val")
        if n in seen or n.target is torch.ops.aten.detach.default:
            continue
        if isinstance(val, Tensor) and not val.is_floating_point():
            continue
        seen.add(n)
        if n.op == "placeholder" and n.meta.get(TRAINED, True):
            return True
        if n.op == "get_attr" and getattr(_attribute(n), "requires_grad", False):
            return True
        queue += n.all_input_nodes
    return False


def _attribute(node: Node) -> Any:
    owner: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    return owner
