"""parallel/tiled.py: the same bits as a plain step, with temporaries of one tile."""

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_compile
from moe_compile import MoeCompileError

SHAPES = ((3, 50, 7), (129,), (64,), (), (1,), (40, 33), (0, 4))
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "momentum foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "momentum fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.1),
    "adamw amsgrad": lambda p: optim.AdamW(p, lr=0.1, amsgrad=True, maximize=True),
    "adamw foreach": lambda p: optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return [*made, nn.Parameter(torch.randn(30, 20).to(dtype).t())]


def gradients(params: list[nn.Parameter], seed: int, absent: int | None = None) -> None:
    """Another one has none in each step, or always the same."""
    torch.manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape).to(p.dtype)
        p.grad = (
            None
            if i == (seed % 4 if absent is None else absent)
            else distribute_tensor(grad, p.device_mesh, p.placements)
            if isinstance(p, DTensor)
            else grad
        )


def bits(a: Any, b: Any) -> bool:
    if isinstance(a, DTensor):
        return a.placements == b.placements and a.stride() == b.stride() and bits(a.to_local(), b.to_local())
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(bits, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_same_bits(name: str, dtype: torch.dtype) -> None:
    """Weights and the whole state dict, in every step; a state dict that was saved goes on in the other."""
    if name == "momentum fused" and dtype == torch.bfloat16:
        pytest.skip("torch's fused 16-bit SGD on a CPU gives other momenta at the ends of equal tensors")
    plain, tiled = parameters(dtype), parameters(dtype)
    theirs = OPTIMIZERS[name](plain)
    ours = moe_compile.tile_optimizer(OPTIMIZERS[name](tiled), tile=128)
    absent = 2 if name == "momentum fused" else None  # which takes no parameter that is new
    for step in range(6):
        for params, optimizer in ((plain, theirs), (tiled, ours)):
            gradients(params, step, absent)
            optimizer.step()
        assert bits(plain, tiled), step
        assert bits(theirs.state_dict(), ours.state_dict()), step
    for params, optimizer, wrap in ((plain, ours, lambda o: o), (tiled, theirs, moe_compile.tile_optimizer)):
        again = wrap(OPTIMIZERS[name](params))  # what one saved, the other reads
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        gradients(params, 9, absent)
        again.step()
    assert bits(plain, tiled)


@pytest.fixture
def one_of_two() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_of_two")
@pytest.mark.parametrize("name", ["momentum", "adamw", "adamw fused", "adamw foreach"])
def test_sharded_parameters(name: str) -> None:
    """Each rank's own part; the state is of DTensors, as without tiles."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(5, 30, 7), torch.randn(4, 64)]
    plain, tiled = ([nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in whole] for _ in range(2))
    theirs, ours = OPTIMIZERS[name](plain), moe_compile.tile_optimizer(OPTIMIZERS[name](tiled), tile=128)
    for step in range(4, 7):
        for params, optimizer in ((plain, theirs), (tiled, ours)):
            gradients(params, step)
            optimizer.step()
        assert bits(plain, tiled) and bits(theirs.state_dict(), ours.state_dict())


class Peak(TorchDispatchMode):
    """The most bytes of new memory that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.known.add(tensor.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        size, key = storage.nbytes(), storage._cdata
        self.alive += size
        self.most = max(self.most, self.alive)

        def freed() -> None:
            self.alive -= size
            self.known.discard(key)

        weakref.finalize(storage, freed)


@pytest.mark.parametrize("name", ["adamw", "adamw foreach", "adamw amsgrad"])
def test_peak_of_memory(name: str) -> None:
    """Of what a step adds, once there is state: some tensors of a tile, where the plain one has as many of everything."""
    tile, most = 1024, []
    for wrap in (False, True):
        params = [nn.Parameter(torch.randn(8, 64, 64)) for _ in range(3)]
        optimizer = OPTIMIZERS[name](params)
        if wrap:
            moe_compile.tile_optimizer(optimizer, tile=tile)
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
        with Peak() as peak:
            optimizer.step()
        most.append(peak.most)
    plain, tiled = most
    assert 0 < tiled <= 3 * 4 * tile + 1024, (plain, tiled)
    assert plain >= 10 * tiled, (plain, tiled)


def test_hooks_closures_and_schedulers() -> None:
    """Hooks and the closure run once a step, and a scheduler finds what it needs, before or after."""
    for first in (True, False):
        weight = nn.Parameter(torch.ones(500))
        optimizer: Any = optim.SGD([weight], lr=1.0)
        if first:
            moe_compile.tile_optimizer(optimizer, tile=64)
        scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if not first:
            moe_compile.tile_optimizer(optimizer, tile=64)
        seen: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))

        def closure(weight: nn.Parameter = weight, optimizer: Any = optimizer, seen: list[str] = seen) -> Tensor:
            optimizer.zero_grad()
            loss = weight.sum()
            loss.backward()
            seen.append("closure")
            return loss

        assert optimizer.step(closure).item() == 500
        scheduler.step()
        optimizer.step(closure)
        assert seen == ["before", "closure", "after"] * 2
        assert torch.equal(weight, torch.full((500,), -0.5))


def test_an_error_leaves_the_optimizer_as_it_was() -> None:
    weight = nn.Parameter(torch.ones(500))
    optimizer = moe_compile.tile_optimizer(optim.SGD([weight], lr=1.0), tile=64)
    weight.grad = torch.ones(500)
    optimizer.param_groups[0]["lr"] = "much"
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == [weight] and not optimizer.state
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert not weight.any()


def test_refusals() -> None:
    weight = nn.Parameter(torch.ones(4))

    class Mine(optim.SGD):
        """May do anything in its step."""

    for optimizer, text in (
        (optim.LBFGS([weight]), "a step of LBFGS is not known to be elementwise"),
        (optim.Adafactor([weight]), "a step of Adafactor is not known to be elementwise"),
        (Mine([weight]), "a step of Mine is not known to be elementwise"),
        (optim.Adam([weight], differentiable=True), "a differentiable step keeps its temporaries"),
        (moe_compile.tile_optimizer(optim.SGD([weight])), "tiled already"),
    ):
        with pytest.raises(MoeCompileError, match=text):
            moe_compile.tile_optimizer(optimizer)
    for tile in (0, 63, 100, -64, True, 64.0):
        with pytest.raises(MoeCompileError, match="a multiple of 64"):
            moe_compile.tile_optimizer(optim.SGD([weight]), tile=tile)  # type: ignore[arg-type]
