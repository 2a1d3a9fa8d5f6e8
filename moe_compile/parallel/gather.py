"""A sharded model means the dense model: around a forward that no proof covers, weights are gathered.

Two hooks stand on every module that reads sharded experts.  In the compiled path they do nothing (dynamo_hook.py):
tokens travel instead.  Where a region was refused, or nothing is compiled, the first gathers all experts of the
module once, before any of its Python decides on data, so that all ranks take part alike; the second puts the shards
back.  The gathered weights are leaves: what a rank's backward does with them, if anything, depends on its data, so
their gradients are summed over the ranks at the end of the backward (gradients.py).
"""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from moe_compile.parallel.shards import Shards, holders

UNDO = "_moe_ep_undo"

_warned = False


def watch(reader: nn.Module) -> None:
    """Put the hooks on a module that reads sharded experts."""
    vars(reader)[UNDO] = []
    reader.register_forward_pre_hook(before)
    reader.register_forward_hook(after, always_call=True, with_kwargs=True)


def before(module: nn.Module, args: Any) -> None:
    _gather(module)


def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    return _put_back(module, (args, kwargs), output)


HOOKS = (before, after)


def is_gathered(module: nn.Module) -> bool:
    """Whether compiled code gathers, too: the region was refused."""
    return any(shards.refused is not None for _, _, shards in holders(module))


def fall_back(module: nn.Module, reason: str) -> bool:
    """From now on compiled code gathers the experts of this module; False if it does already, or there are none."""
    todo = [shards for _, _, shards in holders(module) if shards.state == "sharded" and shards.refused is None]
    for shards in todo:
        shards.refused = reason
    return bool(todo)


@torch._dynamo.disable
def _gather(module: nn.Module) -> None:
    undo = contextlib.ExitStack()
    for name, holder, shards in list(holders(module)):
        if shards.state == "sharded":
            _warn(module, name, shards)
            undo.callback(shards.put(holder, "gathered", whole(holder, shards)))
    vars(module)[UNDO].append(undo)


@torch._dynamo.disable
def _put_back(module: nn.Module, inputs: Any, output: Any) -> Any:
    if undo := vars(module).get(UNDO):
        undo.pop().close()
        for averages in {shards.averages for _, _, shards in holders(module)}:
            if averages.dense is not None and torch.is_grad_enabled():
                output = _connected(module, inputs, output)
                averages.expect(output)
    return output


def _connected(module: nn.Module, inputs: Any, output: Any) -> Any:
    """The output, which depends on all that the module reads, whichever of it this rank's data reached.

    FSDP reduces the parameters of a unit that have a gradient, and so they must be the same ones on every rank.
    The output becomes a copy, so one that is a part of the inputs is left alone: others may look at it.
    """
    read = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
    read += [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    storages = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    leaves, spec = tree_flatten(output)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.untyped_storage()._cdata not in storages:
            leaves[i] = _Connect.apply(leaf, *read)
            return tree_unflatten(leaves, spec)
    return output


class _Connect(torch.autograd.Function):
    """The first tensor, and zeros as the gradients of the others."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *read: Tensor) -> Tensor:
        ctx.save_for_backward(*read)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient, *(torch.zeros_like(t) for t in ctx.saved_tensors)


def whole(holder: nn.Module, shards: Shards) -> dict[str, Tensor]:
    """All experts' weights, by the model's own names."""
    values: dict[str, Tensor] = {}
    for family in shards.families:
        packed = holder._parameters[family.name]
        assert isinstance(packed, DTensor)
        full = packed.detach().full_tensor().to(shards.dtype(packed))
        if packed.requires_grad and torch.is_grad_enabled():
            shards.averages.gather(packed, full.requires_grad_())
        parts = full.unbind(0) if family.listed else [family.own(full)]
        values.update(zip(family.members, parts, strict=True))
    return values


def _warn(module: nn.Module, name: str, shards: Shards) -> None:
    global _warned
    if _warned or shards.mesh.size() == 1:
        return
    _warned = True
    why = f"its region is not rewritten: {shards.refused}" if shards.refused else "it is not compiled by moe_ep"
    warnings.warn(
        f"{type(module).__name__} gathers the weights of all its experts from {shards.mesh.size()} ranks in every "
        f"call, since {why}.  The result is right, and slow; this is said once.",
        stacklevel=2,
    )
