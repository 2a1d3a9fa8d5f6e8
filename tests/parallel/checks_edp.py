"""What holds when experts are split once more, over the ranks that hold the same ones ("edp"): 2 x 2 ranks, 3 x 1, 2 x 1."""

import copy
import functools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.profiler import ProfilerActivity, profile

import moe_compile
from moe_compile.parallel import expert_shards, gradients
from moe_compile.parallel.checkpoint import model_state, optimizer_state
from tests.parallel import checks
from tests.parallel.checks import (
    Batches,
    Mixing,
    Switched,
    agree,
    language,
    mixtral,
    own_names,
    parity,
    refusal,
    same,
    square,
    stacked,
    tokens,
)  # fmt: skip
from tests.parallel.checks_files import contents
from tests.parallel.checks_fsdp import ADAM, equal, layers, placed, shared_directory
from tests.parallel.ranks import Ranks
from tests.parallel.strategies import WAYS, way
from tests.tiny import FF, Block, D, Net, close, compiled, regions

EP, OVER_ALL = 2, ("checkpoints", "fitting")
SPLIT: dict[str, Any] = {"ep": 2, "dp_shard": 4, "experts": "sharded"}


class Listed(nn.Module):
    """A list of experts with weights, biases, and a number each, which no dimension splits."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, checks.E, bias=False)
        self.experts = nn.ModuleList(Scaled() for _ in range(checks.E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk(F.softmax(self.gate(x), -1), 2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.one = nn.Linear(D, FF), nn.Linear(FF, D), nn.Linear(D, 1)
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))) * self.scale + self.one(x)


def listed() -> nn.Module:
    return Net(1, Listed)


def sharded(make: Any, ep: int = 2, dp_shard: int | None = None, **kwargs: Any) -> Any:
    mesh = moe_compile.build_mesh(ep=ep, dp_shard=dp_shard or dist.get_world_size())
    return moe_compile.parallelize(make if isinstance(make, nn.Module) else make(), mesh, experts="sharded", **kwargs)


def experts_of(model: nn.Module) -> dict[str, DTensor]:
    return {n: p for n, p in model.named_parameters() if "expert" in n and isinstance(p, DTensor)}


def a_part_each(model: nn.Module, ep: int, edp: int) -> None:
    """A rank holds 1 / (ep * edp) of each weight, its gradient and the optimizer's state, if the sizes divide."""
    for name, parameter in experts_of(model).items():
        if parameter.dim() == 1:
            continue
        first, most = parameter.device_mesh["ep"].get_local_rank() == 0, -(-checks.E // ep)
        mine = most if first else checks.E - most
        held = parameter.to_local()
        if parameter.shape[1] > 1:
            assert held.numel() * edp == mine * parameter[0].numel(), (name, held.shape, parameter.shape)
        assert held.untyped_storage().nbytes() == 4 * held.numel(), name


# -- the same numbers -----------------------------------------------------------------------


def stacks(ranks: Ranks) -> None:
    """Losses, gradients, three steps; a full graph a layer, in which the weights are gathered."""
    model = parity(ranks, stacked(2), tokens(ranks, [6, 0, 3, 9]), run=layers, **SPLIT)
    a_part_each(model, 2, 2)
    weight = model.layers[0].experts.w13
    assert weight.placements == (Shard(1), Shard(0)) and weight.device_mesh.mesh_dim_names == ("edp", "ep")
    assert all(isinstance(p, DTensor) for p in model.parameters())


def lists(ranks: Ranks) -> None:
    """Batches of any size or none, gradients accumulated; numbers that each expert has one of are copied."""
    model = parity(ranks, listed(), tokens(ranks, [6, 0, 3, 9]), run=placed, parts=2, steps=2, **SPLIT)
    a_part_each(model, 2, 2)
    assert model.layers[0].experts.scale.placements == (Replicate(), Shard(0))


def transformers(ranks: Ranks) -> None:
    """With activation checkpointing, as the model has it."""
    net = mixtral("eager", num_hidden_layers=1)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    net.train()
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    parity(ranks, net, batches, language, steps=1, run=lambda m: placed(m, "aot_eager"), **SPLIT)


def each_way(ranks: Ranks) -> None:
    for one in (*WAYS, ("gather_weights", "exact")):
        torch.manual_seed(0)
        options = {k: v for k, v in way(*one).items() if k != "expect"}
        run = functools.partial(compiled, inner="eager", **options)
        parity(ranks, stacked(), tokens(ranks, [6]), steps=1, run=run, expect=one[0], **SPLIT)


def uneven(ranks: Ranks) -> None:
    """Sizes that three ranks do not divide, a weight with fewer rows than ranks; one group of experts."""
    whole = {"ep": 1, "dp_shard": 3, "experts": "sharded"}
    model = parity(ranks, stacked(), tokens(ranks, [5, 8, 3]), run=layers, steps=2, **whole)
    held = [p.to_local()[0].shape for p in experts_of(model).values()]
    assert held == ([(11, 8), (8, 6)] if ranks.rank < 2 else [(10, 8), (8, 4)]), held
    model = parity(ranks, listed(), tokens(ranks, [4, 0, 6]), run=placed, steps=2, **whole)
    assert model.layers[0].experts.one_bias.to_local().numel() == (0 if ranks.rank else checks.E)


def inductor(ranks: Ranks) -> None:
    split: dict[str, Any] = {"ep": 1, "dp_shard": ranks.size, "experts": "sharded"}
    parity(ranks, stacked(), tokens(ranks, [6, 4]), steps=2, run=lambda m: placed(m, "inductor"), **split)


def gathered(ranks: Ranks) -> None:
    """Uncompiled, or refused: whole weights are gathered from all ranks, and gradients summed over them."""
    parity(ranks, listed(), tokens(ranks, [6, 0, 3]), run=lambda m: m, expect="", steps=2, **SPLIT)
    model = Net(1, lambda: Block(Mixing(checks.E), num_experts=checks.E))
    parity(ranks, model, tokens(ranks, [2, 3]), run=compiled, expect="", steps=1, **SPLIT)


def frozen(ranks: Ranks) -> None:
    model = stacked()
    model.layers[0].experts.w2.requires_grad_(False)
    model = parity(ranks, model, tokens(ranks), steps=2, run=layers, **SPLIT)
    batch = tokens(ranks)[ranks.rank]
    with torch.no_grad():
        assert close(placed(model)(*batch), model(*batch))


def bitwise(ranks: Ranks) -> None:
    """Outputs are those of one process, a second step like the first has the same gradients, bit by bit."""
    net, (x,) = stacked(), tokens(ranks, [50])[0]
    expected = compiled(copy.deepcopy(net))(x)
    call = placed(sharded(net))
    seen = []
    for _ in range(2):
        net.zero_grad()
        out = call(x)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        seen.append({n: p.grad.to_local().clone() for n, p in net.named_parameters()})
    equal(seen[0], seen[1])


def mixed_precision(ranks: Ranks) -> None:
    """Gathered in bfloat16: the bits of a bfloat16 model.  Gradients are added up in `reduce_dtype`."""
    batches = tokens(ranks, [40, 30])
    seen: list[torch.dtype] = []
    for reduced in (torch.float32, None):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduced)
        torch.manual_seed(0)
        reference = stacked(1)
        model = sharded(copy.deepcopy(reference), ep=1, mp_policy=policy)
        reference.bfloat16()
        call, alone = placed(model), compiled(reference)
        with mock.patch.object(expert_shards, "c10d", Watched(seen)):
            torch._dynamo.reset()
            assert torch.equal(call(*batches[ranks.rank]), alone(batches[ranks.rank][0].bfloat16()))
            square(call, *batches[ranks.rank]).backward()
        for (x,) in batches:
            (square(reference, x.bfloat16()) / ranks.size).backward()
        want = own_names(reference, lambda p: p.grad)
        for name, grad in own_names(model, lambda p: p.grad).items():
            assert grad is not None and grad.dtype == torch.float32
            assert float((grad - want[name].float()).norm() / want[name].float().norm()) < 0.02, name
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2, seen


class Watched:
    """The collectives, which note what they add up."""

    def __init__(self, seen: list[torch.dtype]) -> None:
        self.seen = seen

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops._c10d_functional, name)

    def reduce_scatter_tensor(self, value: Tensor, *args: Any) -> Tensor:
        self.seen.append(value.dtype)
        return torch.ops._c10d_functional.reduce_scatter_tensor(value, *args)


# -- states ---------------------------------------------------------------------------------


def states(ranks: Ranks) -> None:
    """On meta, then loaded: whole weights, its own, those of one's own initialisation that `broadcast` makes equal."""
    for make in (stacked, listed):
        torch.manual_seed(0)
        reference = make()
        whole = {n: t.clone() for n, t in reference.state_dict().items()}
        with torch.device("meta"):
            model = make()
        sharded(model)
        model.to_empty(device="cpu")
        model.load_state_dict(whole)
        a_part_each(model, 2, 2)
        same(own_names(model, lambda p: p.data), dict(whole), "loaded")
        mine = {n: t.clone() for n, t in model.state_dict().items()}
        assert all(mine[n].shape == whole[n].shape for n in mine)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().zero_()
        model.load_state_dict(mine)
        same(own_names(model, lambda p: p.data), dict(whole), "loaded from its own")
        assert agree(ranks, model, placed(model), reference, tokens(ranks))
    model = sharded(stacked, ep=1, dp_shard=2)  # two copies
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0, 0.1 + ranks.rank)
    assert "differs between ranks" in refusal(lambda: square(model, torch.randn(3, D)).backward())
    gradients.broadcast(model)
    torch.manual_seed(0)
    reference = stacked()
    reference.load_state_dict(own_names(model, lambda p: p.data))
    assert agree(ranks, model, placed(model), reference, tokens(ranks))


MESHES: list[dict[str, Any]] = [{"ep": 4}, SPLIT]


def checkpoints(ranks: Ranks) -> None:
    """Norms are clipped as by one process; what is saved is read, bit by bit, on other meshes and by one process."""
    for make in (stacked, listed):
        path = shared_directory(ranks)
        torch.manual_seed(0)
        reference = make()
        model = sharded(copy.deepcopy(reference))
        optimizer, theirs = ADAM(model.parameters()), ADAM(reference.parameters())
        for _ in range(2):
            batches = tokens(ranks, [5, 2])
            assert agree(ranks, model, model, reference, batches)
            want = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            assert want > 0.2 and close(moe_compile.clip_grad_norm_(model, 0.1), want)
            same(own_names(model, lambda p: p.grad), own_names(reference, lambda p: p.grad), "clipped")
            for one in (optimizer, theirs):
                one.step()
                one.zero_grad()
        same(own_names(model, lambda p: p.data), own_names(reference, lambda p: p.data), "weight")
        moe_compile.save_checkpoint(model, optimizer, path)
        weights, state = copy.deepcopy((model_state(model, full=True), optimizer_state(model, optimizer, full=True)))
        for degrees in MESHES:
            options = {k: v for k, v in degrees.items() if k == "experts"}
            mesh = moe_compile.build_mesh(**{k: v for k, v in degrees.items() if k != "experts"})
            other = moe_compile.parallelize(make(), mesh, **options)
            fresh = ADAM(other.parameters())
            moe_compile.load_checkpoint(other, fresh, path)
            equal(model_state(other, full=True), weights)
            equal(optimizer_state(other, fresh, full=True)["state"], state["state"])
        one = make()
        alone = ADAM(one.parameters())
        moe_compile.load_checkpoint(one, alone, path)
        equal(one.state_dict(), weights)
        equal(optimizer_state(one, alone)["state"], state["state"])


def files(ranks: Ranks) -> None:
    """Hugging Face's layout: one tensor an expert on disk and stacks in the model, stacks in both, lists."""
    for make in (functools.partial(mixtral, "eager"), stacked, listed):
        path = shared_directory(ranks)
        torch.manual_seed(0)
        reference = make()
        model = sharded(make)
        model.load_state_dict(reference.state_dict())
        moe_compile.save_safetensors(model, path, 20_000)
        if make in (stacked, listed):
            equal(contents(path), dict(reference.state_dict()))
        else:
            assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in contents(path)
        with torch.device("meta"):
            model = make()
        moe_compile.load_safetensors(sharded(model), path)
        a_part_each(model, 2, 2)
        equal(model_state(model, full=True), dict(reference.state_dict()))
        one = make()
        moe_compile.load_safetensors(one, path)
        equal(dict(one.state_dict()), dict(reference.state_dict()))
        dist.barrier()


# -- what is sent, refused, noticed ---------------------------------------------------------


def counted(ranks: Ranks) -> None:
    """The report says what the gathering of weights sends."""
    x, ids = torch.randn(10, D), torch.tensor([[i % checks.E, (i + 1) % checks.E] for i in range(10)])
    sent, found = {}, {}
    for split in (False, True):
        torch._dynamo.reset()
        mesh = moe_compile.build_mesh(ep=2, dp_shard=4)
        net = moe_compile.parallelize(checks.Fixed(), mesh, experts="sharded" if split else "replicated")
        call = compiled(net, strategy="alltoall")
        with regions() as reports, torch.no_grad():
            call(x, ids)
        found[split] = next(e for e in reports[0].estimates if e.strategy == "alltoall")
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            call(x, ids)
        events = [e for e in seen.events() if e.name == "_c10d_functional::all_gather_into_tensor"]
        numbers = [e.input_shapes[0][0] * e.input_shapes[0][1] * e.input_shapes[0][2] for e in events]
        sent[split] = 4 * sum(numbers)  # to one other rank
    assert sent[False] == 0 and sent[True] == found[True].bytes_sent - found[False].bytes_sent, (sent, found)


def fitting(ranks: Ranks) -> None:
    mesh = moe_compile.build_mesh(ep=2)
    text = 'experts="sharded": over the ranks of "edp"'
    said = refusal(lambda: moe_compile.parallelize(stacked(), mesh, experts="sharded"))
    assert text in said and "make it with moe_compile.build_mesh(ep=2, dp_shard=4)" in said, said
    said = refusal(lambda: moe_compile.parallelize(stacked(), moe_compile.build_mesh(), experts="sharded"))
    assert "there is nothing to split until ep is smaller" in said, said
    said = refusal(lambda: moe_compile.parallelize(stacked(), mesh, experts="split"))
    assert said == "experts='split': known are 'replicated' and 'sharded'", said
    model = sharded(stacked, ep=4)  # nothing to split: one copy
    assert model.layers[0].experts.w2.device_mesh.mesh_dim_names == ("ep",)


def sabotage(ranks: Ranks) -> None:
    """A gather of the wrong parts, a reduce-scatter that is left out, sums that are not divided: each is noticed."""
    batches, reference = tokens(ranks, [5, 2, 3, 4]), stacked()
    model = sharded(copy.deepcopy(reference))
    call, switched = placed(model), Switched("all_gather_into_tensor", "join_shards")

    def right() -> bool:
        return agree(ranks, model, call, reference, batches)

    def turned(flat: Tensor, *args: Any) -> Tensor:
        return expert_shards.JOIN_SHARDS(flat.unflatten(0, (2, -1)).flip(0).flatten(0, 1), *args)

    with switched.compiling():
        assert right()
    joins = [i for i, name in enumerate(switched.found) if "join_shards" in name]
    gathers = [i for i, name in enumerate(switched.found) if "all_gather" in name]
    assert len(joins) == len(gathers) == 2, switched.found
    with switched.without(*gathers, other=lambda shard, number, group: torch.cat([shard] * number)):
        assert not right(), "gathered from itself"
    with switched.without(*joins, other=turned):
        assert not right(), "gathered in another order"

    class Unreduced(Watched):
        def reduce_scatter_tensor(self, value: Tensor, *args: Any) -> Tensor:
            mine = value.unflatten(0, (2, -1))[dist.get_rank() // 2]
            return mine.clone()

    with mock.patch.object(expert_shards, "c10d", Unreduced([])):
        assert not right(), "without the reduce-scatter"
    assert right()
    vars(model)[gradients.ATTRIBUTE].ep = 1
    assert not right(), "gradients that are sums"


CHECKS = {
    2: [mixed_precision, inductor],
    3: [uneven],
    4: [
        stacks, lists, transformers, each_way, gathered, frozen, bitwise, states, checkpoints, files, counted, fitting,
        sabotage,
    ],
}  # fmt: skip
