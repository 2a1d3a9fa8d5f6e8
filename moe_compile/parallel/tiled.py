"""An optimizer's step in tiles: `tile_optimizer`.

A step has temporaries as large as what it works on: whole parameters, with `foreach` whole lists of them.  The experts
of a rank are most of its parameters, so those temporaries are a peak of memory.  DeepSpeed-TED's tiled optimizer works
on a tile at a time.
"""

import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, optim
from torch.distributed.tensor import DTensor

from moe_compile.errors import MoeCompileError

# What these do to a number depends on that number's own gradient and state, and on counters, alone.
ELEMENTWISE = (
    optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Adamax, optim.NAdam,
    optim.RAdam,
)  # fmt: skip
ALIGN = 64  # tiles begin at multiples, so that vectors of numbers are the same ones as without tiles


def tile_optimizer(optimizer: optim.Optimizer, tile: int = 2**24) -> optim.Optimizer:
    """The optimizer, whose `step` now works on at most `tile` numbers at a time, and so has temporaries of no more.

    The same results bit by bit, the same state and state dict; hooks run once a step.  Small parameters share a tile.
    Of a DTensor each rank's own part is tiled.  Stepped whole are parameters that are not contiguous, or whose gradient
    or state is not laid out as they are; those of 16 bits by a fused step on a CPU; and all of a group in a step in
    which some have a gradient for the first time and others had one before.

    tile: numbers, a multiple of 64.
    Raises `MoeCompileError` for an optimizer that is not elementwise, a differentiable one, and a tile that does not
    fit.
    """
    if type(optimizer) not in ELEMENTWISE:
        known = ", ".join(cls.__name__ for cls in ELEMENTWISE)
        raise MoeCompileError(
            f"a step of {type(optimizer).__name__} is not known to be elementwise, as those of {known}"
        )
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < ALIGN or tile % ALIGN:
        raise MoeCompileError(f"tile={tile!r}: it is a number of numbers, a multiple of {ALIGN}")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise MoeCompileError("a differentiable step keeps its temporaries: tiles would save nothing")
    if hasattr(optimizer.step, "_moe_ep_tile"):
        raise MoeCompileError("the optimizer is tiled already")
    whole: Any = type(optimizer).step
    whole = getattr(whole, "__wrapped__", whole) if getattr(whole, "hooked", False) else whole  # hooks: once, below

    def step(self: optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        self._opt_called = True  # type: ignore[attr-defined]  # for a scheduler that was here before
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for batch in _batches(self, group, tile):
                    _step_of(self, whole, group, batch)
        return loss

    hooked: Any = optim.Optimizer.profile_hook_step(step)
    hooked._moe_ep_tile = tile
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        hooked._wrapped_by_lr_sched = True
    optimizer.step = types.MethodType(hooked, optimizer)  # type: ignore[method-assign]
    return optimizer


@dataclass
class _Parameter:
    """One parameter in a step: flat, where it is tiled.

    flat: its numbers, and those of the gradient.  old: the state before the step.  fresh: what the step adds to it.
    """

    parameter: Tensor
    numbers: Tensor
    gradient: Tensor
    old: dict[str, Any]
    tiled: bool
    fresh: dict[str, Any] = field(default_factory=dict)


Piece = tuple[_Parameter, slice]


def _batches(optimizer: optim.Optimizer, group: dict[str, Any], tile: int) -> Iterator[list[Piece]]:
    """The parameters of a group that have gradients, in pieces; of each batch no more than `tile` numbers in all."""
    given = [p for p in group["params"] if p.grad is not None]
    if group.get("foreach") is not False and len({not optimizer.state.get(p) for p in given}) > 1:
        yield [(_whole(optimizer, p), slice(0, 0)) for p in given]  # a list of which some are new has sums of its own
        return
    batch, room = list[Piece](), tile
    for parameter in given:
        one = _of(optimizer, parameter)
        if group.get("fused") and parameter.is_cpu and parameter.dtype in (torch.bfloat16, torch.float16):
            one.tiled = False  # torch's kernel gives other numbers at the ends of a tensor (2.13, SGD with momentum)
        number, start = (one.numbers.numel() if one.tiled else 0), 0
        if not one.tiled:  # behind those before it, so that states come in the same order
            if batch:
                yield batch
                batch, room = [], tile
            yield [(one, slice(0, 0))]
        while start < number:
            stop = min(number, start + room)
            batch.append((one, slice(start, stop)))
            room -= -(-(stop - start) // ALIGN) * ALIGN
            start = stop
            if room <= 0:
                yield batch
                batch, room = [], tile
    if batch:
        yield batch


def _whole(optimizer: optim.Optimizer, parameter: Tensor) -> _Parameter:
    assert parameter.grad is not None
    return _Parameter(parameter, parameter, parameter.grad, dict(optimizer.state.get(parameter, {})), False)


def _of(optimizer: optim.Optimizer, parameter: Tensor) -> _Parameter:
    whole = _whole(optimizer, parameter)
    old = whole.old
    like = [whole.gradient, *(v for v in old.values() if isinstance(v, Tensor) and v.dim())]
    if not parameter.numel() or not parameter.dim() or any(v.shape != parameter.shape for v in like):
        return whole
    if isinstance(parameter, DTensor) and any(
        not isinstance(v, DTensor) or v.placements != parameter.placements or v.device_mesh != parameter.device_mesh
        for v in like
    ):
        return whole
    local = [_local(v) for v in (parameter, *like)]
    if any(v.layout != torch.strided or v.is_complex() or not v.is_contiguous() or not v.numel() for v in local):
        return whole
    return _Parameter(parameter, local[0].detach().view(-1), local[1].detach().view(-1), old, True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _step_of(optimizer: optim.Optimizer, whole: Any, group: dict[str, Any], batch: list[Piece]) -> None:
    """The optimizer's own step, of pieces in the place of the parameters."""
    pieces, states = list[Tensor](), defaultdict[Any, dict[str, Any]](dict)
    for one, part in batch:
        if not one.tiled:
            piece = one.parameter
            if piece in optimizer.state:
                states[piece] = optimizer.state[piece]
        else:
            piece = one.numbers[part]
            piece.grad = one.gradient[part]
            if one.old:
                states[piece] = {k: _part(v, part) for k, v in one.old.items()}
        pieces.append(piece)
    groups, state = optimizer.param_groups, optimizer.state
    settings = {**group, "params": pieces}
    if any(isinstance(one.parameter, DTensor) for one, _ in batch) and not (group.get("foreach") or group.get("fused")):
        settings |= {k: False for k in ("foreach",) if k in group}  # as it is for DTensors, where nothing is said
    try:
        optimizer.param_groups, optimizer.state = [settings], states
        whole(optimizer)
    finally:
        optimizer.param_groups, optimizer.state = groups, state
    for piece, (one, part) in zip(pieces, batch, strict=True):
        if one.tiled and piece in states:
            _keep(optimizer, one, part, states[piece])
        elif piece in states:
            optimizer.state[piece] = states[piece]


def _part(value: Any, part: slice) -> Any:
    """What a piece has of the state: its own numbers, or a counter, which each piece counts for itself."""
    if not isinstance(value, Tensor):
        return value
    return _local(value).view(-1)[part] if value.dim() else value.clone()


def _keep(optimizer: optim.Optimizer, one: _Parameter, part: slice, state: dict[str, Any]) -> None:
    """Put the state of a piece where the whole parameter has it."""
    last = part.stop == one.numbers.numel()
    kept = optimizer.state[one.parameter]
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.dim():
            if not last and name in kept:
                continue
            if isinstance(value, Tensor) and isinstance(kept.get(name), Tensor):
                kept[name].copy_(value)
            else:
                kept[name] = value
            continue
        if not isinstance(one.old.get(name), Tensor):
            if name not in one.fresh:
                one.fresh[name] = torch.empty_like(_local(one.parameter), dtype=value.dtype)
                kept[name] = _like(one.parameter, one.fresh[name])
            there = one.fresh[name]
        else:
            there = _local(kept[name])
        there = there.view(-1)[part]
        if there.data_ptr() != value.data_ptr():
            there.copy_(value)


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
