"""What holds on several ranks when some of them share their tokens: experts over "ep", attention over "tp"."""

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.profiler import ProfilerActivity, profile

import moe_compile
from moe_compile import kinds, pipeline
from moe_compile.parallel import gradients, shared_tokens
from moe_compile.parallel.checkpoint import model_state
from moe_compile.rewrite import PassReport
from tests.parallel import checks
from tests.parallel.checks import (
    Batches,
    Biased,
    Centred,
    Checkpointed,
    Listed,
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
from tests.parallel.checks_fsdp import equal, layers, shared_directory
from tests.parallel.ranks import Ranks
from tests.parallel.strategies import WAYS, way
from tests.tiny import Block, D, Experts, Net, close, compiled

EP, OVER_ALL = 2, ("clip_and_states", "clip_and_states_with_fsdp", "misfits")


class Attention(nn.Module):
    """Two heads, one for each rank along "tp"; queries are normed as they are in Qwen."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=n != "k") for n in "qkvo")
        self.norm = nn.LayerNorm(D // 2) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, D // 2)) for f in (self.q, self.k, self.v))
        q, k, v = (y.transpose(0, 1) for y in (self.norm(q), k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self, moe: nn.Module | None = None, norm: bool = False) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), Attention(norm)
        self.moe = moe or Block(Experts(checks.E), num_experts=checks.E)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.moe(x)


def model(layers: int = 1, moe: Any = lambda: None, norm: bool = False) -> nn.Module:
    return Net(layers, lambda: Layer(moe(), norm))


PLAN = {f"layers.*.attention.{n}": ColwiseParallel() for n in "qkv"} | {"layers.*.attention.o": RowwiseParallel()}


def mesh_of(ranks: Ranks) -> DeviceMesh:
    """Pairs share their tokens; experts over two pairs, if there are as many."""
    return moe_compile.build_mesh(ep=min(2, ranks.size // 2), tp=2)


def split(ranks: Ranks, *args: Any, **kwargs: Any) -> Any:
    return parity(ranks, *args, **{"ep": min(2, ranks.size // 2), "tp": 2, "plan": PLAN, **kwargs})


def placed(ranks: Ranks, net: nn.Module, plan: dict[str, Any] | None = None, **degrees: int) -> nn.Module:
    mesh = moe_compile.build_mesh(tp=2, **degrees) if degrees else mesh_of(ranks)
    if plan:
        parallelize_module(net, mesh["tp"], plan)
    return moe_compile.parallelize(net, mesh)


# -- the same numbers -----------------------------------------------------------------------


def two_layers(ranks: Ranks) -> None:
    """Losses, gradients and three steps; a number of tokens that two does not divide."""
    held = split(ranks, model(2), tokens(ranks, [5, 8]), inner="aot_eager", steps=2)
    assert held.layers[0].attention.q.weight.to_local().shape == (D // 2, D)
    assert held.layers[0].moe.experts.w2.to_local().shape[0] <= -(-checks.E // 2)


def one_layer(ranks: Ranks) -> None:
    """The same with copies of the experts, for other batches."""
    split(ranks, model(), tokens(ranks, [5, 8, 3, 4]))


def each_way(ranks: Ranks) -> None:
    for one in (*WAYS, ("gather_weights", "exact")):
        torch.manual_seed(0)
        split(ranks, model(), tokens(ranks, [5]), steps=1, **way(*one))


def few_tokens(ranks: Ranks) -> None:
    """A rank that shares one token with another has none of its own."""
    split(ranks, model(), tokens(ranks, [1, 3]), steps=2)


def inductor(ranks: Ranks) -> None:
    split(ranks, model(), tokens(ranks, [5, 4]), inner="inductor", steps=1)


def module_list(ranks: Ranks) -> None:
    """A shared expert besides, in the plan or not: then the weights are gathered."""
    split(ranks, model(1, Listed), tokens(ranks, [5, 8]), steps=2)
    torch._dynamo.reset()
    plan = PLAN | {"layers.*.moe.shared": ColwiseParallel(output_layouts=Replicate())}
    split(ranks, model(1, Listed), tokens(ranks, [5, 8]), steps=2, plan=plan, expect="", run=compiled)


def what_all_experts_read(ranks: Ranks) -> None:
    """A scale for all and biases, replicated; the mean of all tokens: their gradients are sums over the parts."""
    split(ranks, model(1, lambda: Block(Biased(), num_experts=checks.E)), tokens(ranks, [5, 8]), steps=2)
    moe = functools.partial(Block, num_experts=checks.E)
    split(
        ranks, model(1, lambda: moe(Centred(checks.E))), tokens(ranks, [5, 8]), steps=2, expect="gather_weights",
        strategy="auto",
    )  # fmt: skip


def uncompiled(ranks: Ranks) -> None:
    """Gathered, each rank runs all tokens, and so it does where a compiled layer is beside."""
    split(ranks, model(), tokens(ranks, [5, 4]), steps=2, run=lambda m: m, expect="")

    def first_layer(m: Any) -> Any:
        m.layers[0].compile(backend="moe_ep", fullgraph=True, options={"inner": "eager", "strategy": "alltoall"})
        return m

    split(ranks, model(2), tokens(ranks, [5, 4]), steps=2, run=first_layer)


def without_a_plan(ranks: Ranks) -> None:
    """Dense layers that nothing splits; activation checkpointing."""
    moe = functools.partial(Checkpointed, num_experts=checks.E)
    net = Net(1, lambda: moe(Experts(checks.E)))
    split(ranks, net, tokens(ranks, [5, 4]), plan=None, inner="aot_eager", steps=2)


def norms_of_heads(ranks: Ranks) -> None:
    """What is read where ranks have a part of the heads belongs into the plan; else it is an error."""
    whole = SequenceParallel(sequence_dim=1, use_local_output=True)
    split(ranks, model(1, norm=True), tokens(ranks, [5, 4]), plan=PLAN | {"layers.*.attention.norm": whole}, steps=2)
    torch._dynamo.reset()
    text = refusal(lambda: split(ranks, model(1, norm=True), tokens(ranks, [5, 4]), run=lambda m: m, expect=""))
    assert "the gradient of layers.0.attention.norm.weight differs between ranks that share" in text, text


def transformers(ranks: Ranks) -> None:
    """The plan of the model, without its experts."""
    net = mixtral("eager", num_key_value_heads=2, num_hidden_layers=1)
    styles = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
    plan = {f"model.{n}": styles[s] for n, s in net.config.base_model_tp_plan.items() if "expert" not in n}
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    split(ranks, net, batches, language, plan=plan, steps=2)


def bitwise(ranks: Ranks) -> None:
    """The same rows give the same bits, shared or not."""
    net, (x,) = stacked(), tokens(ranks, [50])[0]
    expected = compiled(copy.deepcopy(net), fullgraph=True)(x)
    placed(ranks, net)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert torch.equal(compiled(net, fullgraph=True)(x), expected)


# -- with FSDP ------------------------------------------------------------------------------


def with_fsdp(ranks: Ranks) -> None:
    """Dense weights over "tp" by the plan and over "dp_shard" by fully_shard."""
    held = split(ranks, model(2), tokens(ranks, [5, 8]), run=layers, ep=2, dp_shard=2, steps=2)
    weight = held.layers[0].attention.q.weight
    assert weight.to_local().numel() == weight.numel() // 4
    assert held.layers[0].norm.weight.to_local().numel() == D // 2
    torch._dynamo.reset()
    split(
        ranks,
        model(1, Listed),
        tokens(ranks, [5, 0]),
        ep=1,
        dp_shard=2,
        experts="sharded",
        steps=1,
        expect="grouped",
        run=compiled,
    )
    torch._dynamo.reset()
    text = refusal(
        lambda: split(ranks, model(1, norm=True), tokens(ranks, [5, 4]), run=lambda m: m, expect="", dp_shard=2)
    )
    assert "the gradient of layers.0.attention.norm.weight differs between ranks that share" in text, text


def three_ways(ranks: Ranks) -> None:
    """Experts over "ep" and "edp" beside "tp", 2 x 2 x 2; then two copies of all (HSDP)."""
    batches = tokens(ranks, [5, 8, 3, 4])
    held = split(ranks, model(), batches, run=layers, ep=2, dp_shard=4, experts="sharded", steps=1)
    weight, experts = held.layers[0].attention.q.weight, held.layers[0].moe.experts.w2
    assert weight.to_local().numel() == weight.numel() // 8
    assert experts.to_local().shape == (checks.E // 2 + (ranks.rank // 2 % 2 == 0), D // 2, 16), experts.shape
    torch._dynamo.reset()
    split(ranks, model(), batches, run=layers, ep=2, dp_shard=2, steps=1)


# -- what travels ---------------------------------------------------------------------------


def rows_that_travel(ranks: Ranks) -> None:
    """A shared token crosses the all-to-all once, there and back, forward and backward."""
    net, number = placed(ranks, model(), PLAN), 6
    x = tokens(ranks, [number])[ranks.rank // 2][0]
    call = compiled(net, fullgraph=True, strategy="alltoall")
    square(call, x).backward()
    rows = torch.zeros(2)
    losses: list[Any] = []
    steps: list[Any] = [lambda: square(call, x), lambda: losses[0].backward()]
    for i, step in enumerate(steps):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            losses.append(step())
        for event in profiled.events():
            if event.name.endswith("::all_to_all_single") and len(event.input_shapes[0]) == 2:
                rows[i] += event.input_shapes[0][0]
    dist.all_reduce(rows)
    batches, top_k = ranks.size // 2, 2
    assert rows.tolist() == [2 * batches * number * top_k] * 2, rows  # twice as many, if all ranks sent all


# -- what is refused ------------------------------------------------------------------------


def fails(call: Any, text: str) -> None:
    try:
        call()
    except (RuntimeError, moe_compile.MoeCompileError) as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not noticed: {text}")


def other_tokens(ranks: Ranks) -> None:
    """Ranks that do not share their tokens hear of it: another batch, other sizes, a part of the sequence."""
    net = placed(ranks, stacked())
    call = compiled(net, fullgraph=True, strategy="alltoall")
    for x in (torch.randn(4, D), torch.zeros(4, D), torch.randn(0, D)):
        assert call(x).shape == x.shape
    text = "ranks [1] of the tensor-parallel group have other tokens"
    odd = ranks.rank % 2
    x = torch.randn(6, D)
    for mine in (x + odd * torch.randn(6, D), x[: 6 - odd], x.flip(0) if odd else x, x * (1 + odd), x.roll(odd, 1)):
        with torch.no_grad():
            fails(lambda mine=mine: call(mine), text)  # type: ignore[misc]
    assert call(x * (1 + 1e-5 * odd)).shape == x.shape  # rounding
    torch._dynamo.reset()
    net = placed(ranks, stacked())
    fails(lambda: square(net, x * (1 + odd)).backward(), "differs between ranks that share")


def another_routing(ranks: Ranks) -> None:
    """Routers that draw random numbers of their own would give each other's gradients."""
    net = placed(ranks, checks.Fixed())
    call = compiled(net, fullgraph=True, strategy="alltoall")
    ids = torch.stack([torch.arange(6) % 2, 2 + torch.arange(6) % (checks.E - 2)], 1)
    x = torch.randn(6, D)
    mine = ids.flip(1) if ranks.rank % 2 else ids
    fails(lambda: call(x.clone().requires_grad_(), mine), "or another routing of them")


def misfits(ranks: Ranks) -> None:
    mesh = moe_compile.build_mesh(ep=2, tp=2)
    assert (mesh.mesh_dim_names, tuple(mesh.shape)) == (("dp_replicate", "ep", "tp"), (1, 2, 2))
    net = Net(1, lambda: Block(Experts(checks.E), num_experts=checks.E))
    net.head = nn.Linear(D, 5)
    parallelize_module(net, mesh["tp"], {"head": ColwiseParallel()})
    text = "head.weight has 5 numbers along dimension 0, which tp=2 does not divide; the nearest that fits is tp=1"
    assert text in refusal(lambda: moe_compile.parallelize(net, mesh))
    net = model()
    parallelize_module(net, mesh["ep"], PLAN)
    assert "parallelize_module takes mesh" in refusal(lambda: moe_compile.parallelize(net, mesh))
    net = model()
    parallelize_module(net, mesh["tp"], PLAN)
    text = "layers.0.attention.q.weight is a DTensor on"
    assert text in refusal(lambda: moe_compile.parallelize(net, moe_compile.build_mesh()))
    net = stacked()
    experts = net.layers[0].experts
    experts.w2 = nn.Parameter(DTensor.from_local(experts.w2.detach(), mesh["tp"], [Shard(2)]))
    assert "w2 of Experts is split by a plan already" in refusal(lambda: moe_compile.parallelize(net, mesh))


# -- norms, states --------------------------------------------------------------------------


def clip_and_states(ranks: Ranks, **degrees: int) -> None:
    """The norm of one process; whole weights are loaded into parts; checkpoints come back on another mesh."""
    reference = model()
    whole = copy.deepcopy(reference.state_dict())
    net = placed(ranks, model(), PLAN, **degrees)
    net.load_state_dict(whole)
    same(own_names(net, lambda p: p.data), whole, "loaded")
    batches = tokens(ranks, [5, 4])
    square(compiled(net, strategy="alltoall"), *batches[ranks.rank // 2]).backward()
    (sum(square(reference, *b) for b in batches[: ranks.size // 2]) / (ranks.size // 2)).backward()
    want = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    assert close(moe_compile.clip_grad_norm_(net, 0.1), want)
    same(own_names(net, lambda p: p.grad), own_names(reference, lambda p: p.grad), "clipped")
    path = shared_directory(ranks)
    moe_compile.save_checkpoint(net, None, path)
    other = moe_compile.parallelize(model(), moe_compile.build_mesh())
    moe_compile.load_checkpoint(other, None, path)
    equal(model_state(other, full=True), {n: p.detach() for n, p in whole.items()})


def clip_and_states_with_fsdp(ranks: Ranks) -> None:
    clip_and_states(ranks, dp_shard=2)
    net, path = placed(ranks, model(), PLAN, dp_shard=2), shared_directory(ranks)
    want = model_state(net, full=True)
    moe_compile.save_safetensors(net, path)
    with torch.device("meta"):
        other = model()
    moe_compile.load_safetensors(placed(ranks, other, PLAN, dp_shard=2), path)
    equal(model_state(other, full=True), want)


def weights_of_ones_own(ranks: Ranks) -> None:
    """On meta, then initialised on each rank: copies that differ are noticed, and `broadcast` makes them one."""
    with torch.device("meta"):
        net = model()
    placed(ranks, net, PLAN)
    net.to_empty(device="cpu")
    torch.manual_seed(ranks.rank)
    with torch.no_grad():
        for parameter in net.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).normal_(0, 0.3)
    torch.manual_seed(0)
    x = torch.randn(4, D)
    fails(lambda: square(net, x).backward(), "differs between ranks")
    gradients.broadcast(net)
    torch.manual_seed(0)
    reference = model()
    reference.load_state_dict(own_names(net, lambda p: p.data))
    net.zero_grad()
    square(compiled(net, strategy="alltoall"), x).backward()
    square(reference, x).backward()
    same(own_names(net, lambda p: p.grad), own_names(reference, lambda p: p.grad), "gradient")


# -- sabotage -------------------------------------------------------------------------------


class Uncut(pipeline.SplitTokens):
    """Every rank runs all tokens, as it would without the pass."""

    def __call__(self, gm: Any) -> Any:
        return PassReport("SplitTokens")


class Twice(pipeline.SplitTokens):
    def __call__(self, gm: Any) -> Any:
        super().__call__(gm)
        return super().__call__(gm)


def own_only(rows: Tensor, ranks: int, group: str) -> Tensor:
    return rows.repeat(ranks, *[1] * (rows.dim() - 1))


def sabotage(ranks: Ranks) -> None:
    """A gather that is missing forward or backward, parts of parts, sums that are not: each is noticed."""
    batches = [b for b in tokens(ranks, [4])[: ranks.size // 2] for _ in range(2)]
    reference = model(1, lambda: Block(Biased(), num_experts=checks.E))

    def compile_it() -> Callable[[], bool]:
        torch._dynamo.reset()
        kinds.forget()
        net = placed(ranks, copy.deepcopy(reference), PLAN)
        return functools.partial(
            agree, ranks, net, compiled(net, fullgraph=True, strategy="alltoall"), reference, batches
        )

    right, switched = compile_it(), Switched("_c10d_functional.all_gather")
    with switched.compiling():
        assert right()
    assert len(switched.found) == 2, switched.found  # what is told of the tokens; results
    with mock.patch.object(shared_tokens, "TOLERANCE", 1e9), mock.patch.object(gradients, "TOLERANCE", 1e9):
        with switched.without(0, 1, other=own_only):
            assert not right(), "gather"
        real = {n: getattr(shared_tokens.c10d, n) for n in ("all_gather_into_tensor", "all_reduce", "wait_tensor")}
        for name, other in (("all_gather_into_tensor", own_only), ("all_reduce", lambda value, *_: value.clone())):
            with mock.patch.object(shared_tokens, "c10d", SimpleNamespace(**{**real, name: other})):
                assert not right(), f"gradients without {name}"
    assert right()
    with mock.patch.object(shared_tokens, "TOLERANCE", 1e9), mock.patch.object(gradients, "TOLERANCE", 1e9):
        for name, cls in (("twice", Twice), ("uncut", Uncut)):
            with mock.patch.object(pipeline, "SplitTokens", cls):
                assert not compile_it()(), name
        with mock.patch.object(gradients, "tp_mesh", lambda mesh: None):
            assert not compile_it()(), "gradients of experts that are means over the parts"


CHECKS = {
    2: [
        few_tokens, inductor, module_list, uncompiled, without_a_plan, norms_of_heads, bitwise, other_tokens,
        another_routing, weights_of_ones_own, what_all_experts_read,
    ],
    4: [
        two_layers, each_way, what_all_experts_read, transformers, rows_that_travel, misfits, clip_and_states, sabotage,
        with_fsdp, clip_and_states_with_fsdp,
    ],
    8: [one_layer, three_ways],
}  # fmt: skip
