"""What holds on several ranks.  Each check builds the same model everywhere, and compares with one process.

One process that adds up the losses of the ranks' batches and divides by their number is the reference; on it runs the
model as it was, uncompiled.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import moe_compile
from moe_compile import backend
from moe_compile.parallel import gather, gradients
from moe_compile.parallel.shards import holders
from tests.parallel.ranks import Ranks
from tests.tiny import FF, Block, D, Experts, Net, close, compiled, regions

E = 3  # ranks.py sets it to a number that is no multiple of the ranks
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Batches = list[tuple[Any, ...]]


def mixtral(form: str, **kwargs: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_local_experts=E,
        num_experts_per_tok=2, vocab_size=32, **{"num_key_value_heads": 1, "num_hidden_layers": 2, **kwargs},
    )  # fmt: skip
    config._experts_implementation = form
    return MixtralForCausalLM(config)


def stacked(layers: int = 1) -> nn.Module:
    return Net(layers, lambda: Block(Experts(E), num_experts=E))


class Listed(nn.Module):
    """A mixture of experts as people write it by hand: router, ModuleList, boolean masks, a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D)) for _ in range(E))
        self.shared = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = torch.topk(F.softmax(self.gate(rows), -1), 2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                t, k = torch.where(mask)
                out[t] += expert(rows[t]) * weights[t, k, None]
        return (out + self.shared(rows)).view_as(x)


def listed() -> nn.Module:
    return Net(1, Listed)


# -- the comparison -------------------------------------------------------------------------


def tokens(ranks: Ranks, sizes: list[int] | None = None) -> Batches:
    """A batch for each rank."""
    return [(torch.randn((sizes or [6] * ranks.size)[i % len(sizes or [6])], D),) for i in range(ranks.size)]


def square(model: Callable[..., Any], x: Tensor) -> Tensor:
    return model(x).square().sum() / 8


def language(model: Callable[..., Any], ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def own_names(model: nn.Module, what: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor | None]:
    """Something of every parameter, whole, by the names of the model as it was."""
    found: dict[str, Tensor | None] = {}
    families = {h._parameters[f.name]: f.below(n) for n, h, s in holders(model) for f in s.families}
    for name, parameter in model.named_parameters():
        value = what(parameter)
        value = value.full_tensor() if isinstance(value, DTensor) else value
        family = families.get(parameter)
        members = (name,) if family is None else family.members
        value = value if value is None or family is None else family.own(value)
        parts = [value] * len(members) if value is None or len(members) == 1 else list(value.unbind(0))
        found.update(zip(members, parts, strict=True))
    return found


def same(got: dict[str, Tensor | None], want: dict[str, Tensor | None], what: str) -> None:
    assert got.keys() == want.keys(), (what, got.keys() ^ want.keys())
    for name, value in want.items():
        mine = got[name]
        if value is None or not value.any():
            assert mine is None or not mine.any(), f"{what} of {name} should be zero"
        else:
            assert mine is not None and close(mine, value), f"{what} of {name} differs by {_off(mine, value)}"


def _off(mine: Tensor | None, value: Tensor) -> str:
    return "all of it" if mine is None else f"{float((mine - value).norm() / value.norm()):.1e}"


def parity(
    ranks: Ranks,
    model: nn.Module,
    batches: Batches,
    loss: Callable[..., Tensor] = square,
    *,
    ep: int | None = None,
    dp_shard: int | None = None,
    tp: int = 1,
    plan: dict[str, Any] | None = None,
    inner: str = "eager",
    steps: int = 3,
    parts: int = 1,
    run: Callable[[nn.Module], Any] | None = None,
    expect: str = "alltoall",
    optimizer: Callable[[Any], torch.optim.Optimizer] = SGD,
    experts: str = "replicated",
    chunks: int = 1,
    **options: Any,
) -> nn.Module:
    """Losses, gradients and weights after `steps` steps are those of one process.  Returns the sharded model.

    parts: over how many backwards the gradients of a step are accumulated.  run: what is called instead of the model,
    compiled with fullgraph=True.  experts: as `parallelize` takes it.  expect: the strategy that the reports name, "" if nothing is to be rewritten; asked
    for by name, unless the options do.  tp: so many ranks share a batch, and what `plan`, torch's own, names.
    """
    reference = copy.deepcopy(model)
    mesh = moe_compile.build_mesh(ep=ep, dp_shard=dp_shard, tp=tp)
    if plan:
        parallelize_module(model, mesh["tp"], plan)
    moe_compile.parallelize(model, mesh, experts=experts)
    batches = batches[: ranks.size // tp]
    options = {"strategy": expect or "auto", **({"chunks": chunks} if chunks > 1 else {}), **options}
    call = run(model) if run else compiled(model, inner, fullgraph=True, **options)
    mine, theirs = (optimizer(m.parameters()) for m in (model, reference))
    with regions() as found:
        for step in range(steps):
            for _ in range(parts):
                got = loss(call, *batches[ranks.rank // tp])
                want = sum(loss(reference, *batch) for batch in batches) / len(batches)  # type: ignore[misc]
                got.backward()
                want.backward()
                total = got.detach().clone()
                dist.all_reduce(total)
                assert close(total / ranks.size, want), f"loss of step {step}: {total / ranks.size}, not {want}"
            same(own_names(model, lambda p: p.grad), own_names(reference, lambda p: p.grad), f"step {step}: gradient")
            for steps_of in (mine, theirs):
                steps_of.step()
                steps_of.zero_grad()
        same(own_names(model, lambda p: p.data), own_names(reference, lambda p: p.data), "weight after the last step")
    assert {r.chunks for r in found if r.matched} <= {chunks}, [str(r) for r in found]
    strategies = {r.strategy for r in found if r.matched}
    wanted = {"grouped" if mesh["ep"].size() == 1 and expect else expect} - {""}
    assert strategies == wanted, (strategies, [str(r) for r in found])
    return model


# -- forms ----------------------------------------------------------------------------------


def stacked_loop(ranks: Ranks) -> None:
    few = ranks.size <= 2
    parity(ranks, stacked(2 if few else 1), tokens(ranks), inner="aot_eager" if few else "eager")


def module_list(ranks: Ranks) -> None:
    model = parity(ranks, listed(), tokens(ranks))
    held = [p.to_local().shape[0] for n, p in model.named_parameters() if isinstance(p, DTensor)]
    assert max(held) <= -(-E // ranks.size), "a rank holds experts of others"


def mixtral_eager(ranks: Ranks) -> None:
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    parity(ranks, mixtral("eager"), batches, language)


def mixtral_grouped(ranks: Ranks) -> None:
    """With an optimizer that divides by the gradients: `eps` above their rounding."""
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    adam = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)
    parity(ranks, mixtral("grouped_mm", num_hidden_layers=1), batches, language, optimizer=adam)


def inductor(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks), inner="inductor", steps=2)


# -- data -----------------------------------------------------------------------------------


def unequal_batches(ranks: Ranks) -> None:
    parity(ranks, listed(), tokens(ranks, [3, 11, 1, 8]))


def a_rank_without_tokens(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks, [6, 0]))


class Fixed(nn.Module):
    """Experts whose ids are given, one for all tokens of a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(E)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        weights = x[:, :2].sigmoid()
        return self.experts(x, ids, weights)


def experts_nobody_chose(ranks: Ranks) -> None:
    batches: Batches = [(torch.randn(4, D), torch.tensor([[E - 1, 1]] * 4)) for _ in range(ranks.size)]
    parity(ranks, Fixed(), batches, lambda model, x, ids: model(x, ids).square().sum())


def everybody_chose_one(ranks: Ranks) -> None:
    """Each token chose one expert twice, and ranks choose different ones."""
    batches: Batches = [(torch.randn(4, D), torch.full((4, 2), (3 * r) % E)) for r in range(ranks.size)]
    parity(ranks, Fixed(), batches, lambda model, x, ids: model(x, ids).square().sum())


# -- ways to run ----------------------------------------------------------------------------


def gradient_accumulation(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks), parts=3, steps=2)


def without_gradients(ranks: Ranks) -> None:
    model, batches = stacked(), tokens(ranks, [6, 9])
    reference = copy.deepcopy(model)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    call = compiled(model, fullgraph=True, strategy="alltoall")
    for context in (torch.no_grad, torch.inference_mode):
        with context(), regions() as found:
            assert close(call(*batches[ranks.rank]), reference(*batches[ranks.rank]))
        assert all(r.matched for r in found)


def generates(ranks: Ranks) -> None:
    """Prompts of other lengths on each rank, as many tokens for all, as every rank takes part in every forward."""
    model = mixtral("eager", num_hidden_layers=1).eval()
    prompt = torch.randint(0, 32, (2, 5 + ranks.rank))
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = copy.deepcopy(model).generate(prompt, **settings)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    model.compile(backend="moe_ep", options={"inner": "eager", "strategy": "alltoall"})
    with regions() as found:
        assert torch.equal(model.generate(prompt, **settings), want)
    assert found and {r.strategy for r in found} == {"alltoall"}


def sizes_that_vary(ranks: Ranks) -> None:
    """One compiled function, batches of other sizes in every call: sizes become symbols, on each rank on its own."""
    model = stacked()
    reference = copy.deepcopy(model)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    call = compiled(model, "aot_eager", fullgraph=True, strategy="alltoall")
    for size in (6, 9, 12, 1):
        assert agree(ranks, model, call, reference, tokens(ranks, [size, size + 3])), size


def autocast(ranks: Ranks) -> None:
    """Products in bfloat16, and what each rank gets is what one process gets, bit by bit."""
    model, (x,) = stacked(), tokens(ranks)[0]
    alone = compiled(copy.deepcopy(model), fullgraph=True)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    with torch.autocast("cpu", torch.bfloat16), regions() as found:
        assert torch.equal(compiled(model, fullgraph=True, strategy="alltoall")(x), alone(x))
    assert {r.strategy for r in found} == {"alltoall", "grouped"}


def autocast_with_gradients(ranks: Ranks) -> None:
    under_autocast(ranks, stacked(), tokens(ranks, [20, 13]))


def under_autocast(ranks: Ranks, model: nn.Module, batches: Batches) -> None:
    """Loss and gradients are as near to float32's as those of one process under autocast; weights stay float32.

    Both round to bfloat16, at other places: of the few tokens here that is half as much again at most, and one rounding.
    """
    reference, single = copy.deepcopy(model), copy.deepcopy(model)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    call = compiled(model, "aot_eager", fullgraph=True, strategy="alltoall")

    def wide(model: Callable[..., Any], x: Tensor) -> Tensor:
        """The loss in float32: in bfloat16 it would be rounded itself."""
        return model(x).float().square().sum() / 8

    with torch.autocast("cpu", torch.bfloat16):
        got = wide(call, *batches[ranks.rank])
        want = sum(wide(reference, *b) for b in batches) / ranks.size
    exact = sum(wide(single, *b) for b in batches) / ranks.size
    for loss in (got, want, exact):
        loss.backward()
    total = got.detach().float()
    dist.all_reduce(total)
    assert close(total / ranks.size, want, 4e-3), (total / ranks.size, want)
    grads = own_names(model, lambda p: p.grad)
    for name, parameter in reference.named_parameters():
        mine, theirs, true = grads[name], parameter.grad, single.get_parameter(name).grad
        assert mine is not None and theirs is not None and true is not None
        off, allowed = (float((g - true).norm() / true.norm()) for g in (mine, theirs))
        assert mine.dtype == torch.float32 and off <= 1.5 * allowed + 2**-9, (
            f"{name}: {off:.1e}, the model's {allowed:.1e}"
        )
        assert not close(mine, true, 1e-4), f"{name}: autocast is not seen"


def frozen_experts(ranks: Ranks) -> None:
    model = stacked()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    parity(ranks, model, tokens(ranks))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def activation_checkpointing(ranks: Ranks) -> None:
    parity(ranks, Net(1, lambda: Checkpointed(Experts(E), num_experts=E)), tokens(ranks), inner="aot_eager", steps=1)


def mixtral_checkpointing(ranks: Ranks) -> None:
    model = mixtral("eager", num_hidden_layers=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    parity(ranks, model, batches, language, steps=1, inner="aot_eager")


def layer_by_layer(ranks: Ranks) -> None:
    """Each layer compiled on its own, the rest of the model not."""

    def run(model: nn.Module) -> nn.Module:
        for layer in model.layers:
            layer.compile(backend="moe_ep", fullgraph=True, options={"inner": "aot_eager", "strategy": "alltoall"})
        return model

    parity(ranks, stacked(), tokens(ranks), run=run)


def weights_travel(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks), expect="gather_weights")


def copies_of_experts(ranks: Ranks) -> None:
    """Half as many ranks hold all experts, and there are two of each."""
    parity(ranks, listed(), tokens(ranks, [6, 3]), ep=ranks.size // 2)


def bitwise(ranks: Ranks) -> None:
    """The same rows give the same bits on any number of ranks."""
    model, (x,) = stacked(), tokens(Ranks(0, 1), [50])[0]
    expected = compiled(copy.deepcopy(model), fullgraph=True)(x)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    part = x[: 50 - ranks.rank]  # other rows beside them
    got = compiled(model, fullgraph=True)(part)
    assert torch.equal(got, expected[: len(part)]), (got - expected[: len(part)]).abs().max()


# -- gathered -------------------------------------------------------------------------------


def uncompiled(ranks: Ranks) -> None:
    for make in (stacked, listed):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            gather._warned = False
            parity(ranks, make(), tokens(ranks, [6, 0, 3]), run=lambda model: model, expect="")
        texts = [str(w.message) for w in said if "gathers the weights" in str(w.message)]
        assert len(texts) == (ranks.size > 1), texts


class Mixing(Experts):
    """An expert reads the mean of its rows: a region that is refused."""

    def gate(self, x: Tensor) -> Tensor:
        return self.act(x) + x.mean()


def refused(ranks: Ranks) -> None:
    """A mean over an expert's rows: not rewritten, and right all the same, though ranks choose different experts."""

    model = Net(1, lambda: Block(Mixing(E), num_experts=E))
    parity(ranks, model, tokens(ranks, [2, 3]), run=functools.partial(compiled, inner="aot_eager"), expect="")


def one_refused(ranks: Ranks) -> None:
    """A layer that is refused between layers that are not."""
    model = Net(3, lambda: Block(Experts(E), num_experts=E))
    model.layers[1].experts = Mixing(E)
    parity(ranks, model, tokens(ranks), run=functools.partial(compiled, strategy="alltoall"))


def another_backend(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks), run=lambda m: torch.compile(m, backend="aot_eager"), expect="")


# -- what travels, and what must not ---------------------------------------------------------


class Biased(nn.Module):
    """Weights, biases and a scale for each expert, a scale for all, and routing weights before the last product."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, FF, D))
        self.down = nn.Parameter(torch.randn(E, FF, D))
        self.bias = nn.Parameter(torch.randn(E, FF))
        self.last = nn.Parameter(torch.randn(E, D))
        self.scale = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            h = F.gelu(F.linear(x[t] * self.scale, self.up[e], self.bias[e])) * weights[t, k, None]
            out.index_add_(0, t, h @ self.down[e] + self.last[e])
        return out


def everything_of_an_expert(ranks: Ranks) -> None:
    parity(ranks, Net(1, lambda: Block(Biased(), num_experts=E)), tokens(ranks, [7, 5]))


class Centred(Experts):
    """What the experts read of all tokens is another value on each rank."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mean = torch.zeros_like(x), x.mean(0)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            y = F.linear(torch.relu(F.linear(x[t] - mean, self.w13[e, :FF])), self.w2[e])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


def a_value_of_each_rank(ranks: Ranks) -> None:
    """Tokens must not travel, so weights do."""
    model = Net(1, lambda: Block(Centred(E), num_experts=E))
    parity(ranks, model, tokens(ranks, [7, 5]), expect="gather_weights", strategy="auto")


class Backwards(nn.Module):
    """Expert e has the weights of the last but e."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == E - 1 - e)
            out.index_add_(0, t, torch.tanh(self.experts[e](x[t])) * weights[t, k, None])
        return out


def experts_in_another_order(ranks: Ranks) -> None:
    model = Net(1, lambda: Block(Backwards(), num_experts=E))
    parity(ranks, model, tokens(ranks, [7, 5]), run=lambda m: compiled(m, "eager"), expect="")


class PerBatch(Experts):
    """An expert divides by the number of tokens of the batch, which is another one on each rank."""

    def number(self, x: Tensor) -> Any:
        return x.shape[0]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, number = torch.zeros_like(x), self.number(x)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            y = F.linear(torch.relu(F.linear(x[t], self.w13[e, :FF]) / number), self.w2[e])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


class PerBatchTensor(PerBatch):
    def number(self, x: Tensor) -> Any:
        return torch.full((), float(x.shape[0]))


class PerBatchWeight(PerBatch):
    """Large batches use the other half of a weight."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.scales = nn.ParameterList(torch.rand(FF) for _ in range(2))

    def number(self, x: Tensor) -> Any:
        return self.scales[0] if x.shape[0] > 6 else self.scales[1]


def ranks_that_compute_something_else(ranks: Ranks) -> None:
    """Where batches are of one size the experts are the same function; where not, it is an error, not a wrong number."""
    for cls in (PerBatch, PerBatchTensor, PerBatchWeight):
        torch.manual_seed(0)
        model = Net(1, lambda cls=cls: Block(cls(E), num_experts=E))  # type: ignore[misc]
        sharded = parity(ranks, model, tokens(ranks), steps=1)
        call = compiled(sharded, fullgraph=True, dynamic=False, strategy="alltoall")
        try:
            call(torch.randn(6 + ranks.rank, D))
        except RuntimeError as error:
            assert f"something else on ranks [{1 - ranks.rank}]" in str(error), error
        else:
            raise AssertionError(f"{cls.__name__}: rows were treated as those of another rank")


def ids_of_no_expert(ranks: Ranks) -> None:
    """A loop over all experts leaves ids out that none has; rows of nobody come home as zeros."""
    ids = torch.tensor([[0, 99], [-3, 2], [E, -1], [E - 1, 1]])
    batches: Batches = [(torch.randn(4, D), ids) for _ in range(ranks.size)]

    class All(Experts):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e in range(self.num_experts):
                t, k = torch.where(ids == e)
                gate, up = F.linear(x[t], self.w13[e]).chunk(2, -1)
                out.index_add_(0, t, F.linear(F.silu(gate) * up, self.w2[e]) * weights[t, k, None])
            return out

    model = Fixed()
    model.experts = All(E)
    parity(ranks, model, batches, lambda model, x, ids: model(x, ids).square().sum())


# -- states ---------------------------------------------------------------------------------


def states(ranks: Ranks) -> None:
    """Names and shapes are the model's own; a model on meta is loaded from them and trains."""
    for make in (stacked, listed):
        torch.manual_seed(0)
        model = make()
        whole = {n: t.clone() for n, t in model.state_dict().items()}
        sharded = moe_compile.parallelize(copy.deepcopy(model), moe_compile.build_mesh())
        mine = sharded.state_dict()
        assert all(mine[n].shape == whole[n].shape for n in mine)
        names: list[Any] = [None] * ranks.size
        dist.all_gather_object(names, list(mine))
        assert set().union(*names) == whole.keys()
        with torch.device("meta"):
            empty = make()
        moe_compile.parallelize(empty, moe_compile.build_mesh())
        empty.to_empty(device="cpu")
        empty.load_state_dict(whole)
        same(own_names(empty, lambda p: p.data), whole, "loaded")
        empty.load_state_dict({n: t.clone() for n, t in mine.items()})
        same(own_names(empty, lambda p: p.data), whole, "loaded from its own")
        assert agree(ranks, empty, compiled(empty, fullgraph=True), model, tokens(ranks))


def agree(ranks: Ranks, model: nn.Module, call: Any, reference: nn.Module, batches: Batches, **kwargs: Any) -> bool:
    """Whether losses and gradients are those of one process, on all ranks."""
    loss = kwargs.get("loss", square)
    for m in (model, reference):
        m.zero_grad()
    got = loss(call, *batches[ranks.rank])
    want = sum(loss(reference, *batch) for batch in batches) / ranks.size
    got.backward()
    want.backward()
    total = got.detach().clone()
    dist.all_reduce(total)
    right = close(total / ranks.size, want)
    grads = own_names(model, lambda p: p.grad)
    for name, parameter in reference.named_parameters():
        mine = grads[name]
        right &= (mine is None) == (parameter.grad is None) and (mine is None or close(mine, parameter.grad))
    bad = torch.tensor(float(not right))
    dist.all_reduce(bad)
    return not bad.item()


def misfits(ranks: Ranks) -> None:
    """Meshes and models that do not fit are refused with the numbers, and nothing is changed."""
    texts = {
        "ep=3 x dp_replicate=1 is 3 ranks, there are 4; the nearest that fits: ep=4 with dp_replicate=1": {"ep": 3},
        "tp=3 does not divide the 4 ranks; the nearest that fits is tp=4": {"tp": 3},
        "ep=4 x dp_replicate=1 x tp=2 is 8 ranks, there are 4; the nearest that fits: ep=2 with dp_replicate=1 and "
        "tp=2": {"ep": 4, "tp": 2},
        "dp_shard=4 x dp_replicate=1 x tp=2 is 8 ranks, there are 4; the nearest that fits: dp_shard=2 with "
        "dp_replicate=1 and tp=2": {"dp_shard": 4, "tp": 2},
        "tp=0: it is a number of ranks, 1 to 4": {"tp": 0},
        "dp_replicate=0: it is a number of ranks, 1 to 4": {"dp_replicate": 0},
    }
    for text, degrees in texts.items():
        assert text in refusal(functools.partial(moe_compile.build_mesh, **degrees)), text
    mesh = moe_compile.build_mesh()
    few = Net(1, lambda: Block(Experts(5), num_experts=5))
    text = "5 experts over ep=4 ranks: shards of 2 leave 1 ranks without an expert; the nearest that fits is ep=5"
    assert text in refusal(lambda: moe_compile.parallelize(few, mesh))
    assert not any(isinstance(p, DTensor) for p in few.parameters())
    assert "no experts found in Linear" in refusal(lambda: moe_compile.parallelize(nn.Linear(2, 2), mesh))
    other = torch.distributed.device_mesh.init_device_mesh("cpu", (4,), mesh_dim_names=("model",))
    assert 'parallelize takes "ep"' in refusal(lambda: moe_compile.parallelize(stacked(), other))
    turned = torch.distributed.device_mesh.DeviceMesh("cpu", [1, 0, 2, 3], mesh_dim_names=("ep",))
    assert "another order than 0..3" in refusal(lambda: moe_compile.parallelize(stacked(), turned))
    twice = moe_compile.parallelize(stacked(), mesh)
    assert "parallelized already" in refusal(lambda: moe_compile.parallelize(twice, mesh))


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except moe_compile.MoeCompileError as error:
        return str(error)
    raise AssertionError("not refused")


def different_dense_weights(ranks: Ranks) -> None:
    """Ranks that initialised a model on meta for themselves hear of it; `broadcast` makes it right."""
    with torch.device("meta"):
        model = stacked()
    moe_compile.parallelize(model, moe_compile.build_mesh())
    model.to_empty(device="cpu")
    torch.manual_seed(ranks.rank)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.normal_(0, 0.3)
    text = refusal(lambda: square(model, torch.randn(3, D)).backward())
    assert "layers.0.router.weight differs between ranks" in text, text
    gradients.broadcast(model)
    torch.manual_seed(0)
    reference = stacked()
    reference.load_state_dict(own_names(model, lambda p: p.data))
    assert agree(ranks, model, compiled(model, fullgraph=True), reference, tokens(ranks))


# -- sabotage -------------------------------------------------------------------------------


class Four(nn.Module):
    """Experts 0 to 3, by ids that are given: both ranks send as many rows to each, for other experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.scale = Experts(4), nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.experts(x * self.scale, ids, x[:, :2].sigmoid())


FOUR_IDS = torch.tensor([[0, 2], [0, 3], [1, 3]])


class Switched:
    """The inner compiler "eager", with a switch at each op of some names: one compilation for many sabotages.

    found: those ops, in the order of the graphs.  instead: what is called in place of the one with that number.
    """

    def __init__(self, *names: str) -> None:
        self.names, self.found = names, list[str]()
        self.instead: dict[int, Callable[..., Any]] = {}

    def __call__(self, gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        for node in gm.graph.nodes:
            if node.op == "call_function" and any(name in str(node.target) for name in self.names):
                node.target = self.switch(len(self.found), node.target)
                self.found.append(str(node.target.__doc__))
        gm.recompile()
        return gm.forward

    def switch(self, number: int, op: Any) -> Callable[..., Any]:
        def switch(*args: Any) -> Any:
            return self.instead.get(number, op)(*args)

        switch.__doc__ = str(op)
        return switch

    @contextlib.contextmanager
    def without(self, *numbers: int, other: Callable[..., Any]) -> Iterator[None]:
        self.instead = dict.fromkeys(numbers, other)
        yield
        self.instead = {}

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        with mock.patch.object(backend, "lookup_backend", lambda inner: self):
            yield


def kept(rows: Tensor, *_: Any) -> Tensor:
    """A rank keeps what it should have sent."""
    return rows.clone()


@torch.no_grad()
def exchange(ranks: Ranks, experts: nn.Module) -> None:
    """Give each of two ranks the experts of the other."""
    for parameter in experts.parameters():
        local = parameter.to_local()  # type: ignore[operator]
        both = [torch.empty_like(local) for _ in range(2)]
        dist.all_gather(both, local.contiguous())
        local.copy_(both[1 - ranks.rank])


def sabotage(ranks: Ranks) -> None:
    """A collective that is missing, a gradient that is not averaged, experts on the wrong rank: each is noticed."""
    batches: Batches = [(torch.randn(3, D), FOUR_IDS) for _ in range(ranks.size)]
    reference = Four()
    model = moe_compile.parallelize(copy.deepcopy(reference), moe_compile.build_mesh())
    call, switched = compiled(model, "eager", fullgraph=True, strategy="alltoall"), Switched("all_to_all_single")

    def right() -> bool:
        return agree(ranks, model, call, reference, batches, loss=lambda m, x, ids: m(x, ids).square().sum())

    with switched.compiling():
        assert right()
    assert len(switched.found) == 3
    for number in range(3):
        with switched.without(number, other=kept):
            assert not right(), f"without collective {number}"
    with mock.patch.object(gradients, "_all_reduce", lambda parameters, group: None):
        assert not right(), "without the average of dense gradients"

    exchange(ranks, model.experts)
    assert not right(), "with exchanged experts"
    exchange(ranks, model.experts)
    assert right()
    vars(model)[gradients.ATTRIBUTE].ep = 1
    assert not right(), "with experts' gradients that are sums"


CHECKS = {
    1: [stacked_loop, module_list, uncompiled, bitwise],
    2: [
        stacked_loop, module_list, mixtral_eager, mixtral_grouped, inductor, a_rank_without_tokens,
        experts_nobody_chose, everybody_chose_one, gradient_accumulation, without_gradients, generates, frozen_experts,
        sizes_that_vary, autocast, autocast_with_gradients,
        activation_checkpointing, mixtral_checkpointing, layer_by_layer, weights_travel, bitwise, uncompiled, refused,
        one_refused, another_backend, everything_of_an_expert, a_value_of_each_rank, experts_in_another_order,
        ids_of_no_expert, states, different_dense_weights, sabotage, ranks_that_compute_something_else,
    ],
    4: [misfits, stacked_loop, unequal_batches, copies_of_experts, bitwise],
    8: [stacked_loop, module_list, bitwise],
}  # fmt: skip
