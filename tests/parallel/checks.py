"""What holds on several ranks.  Each check builds the same model everywhere, and compares with one process.

One process that adds up the losses of the ranks' batches and divides by their number is the reference; on it runs the
model as it was, uncompiled.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import moe_compile
from moe_compile.parallel import gather
from moe_compile.parallel.shards import holders
from tests.parallel.ranks import Ranks
from tests.tiny import FF, Block, D, Experts, Net, close, compiled, regions

E = 7  # not divisible by 2 or 4
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Batches = list[tuple[Any, ...]]


def mixtral(form: str, **kwargs: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=E, num_experts_per_tok=2, vocab_size=32, **kwargs,
    )  # fmt: skip
    config._experts_implementation = form
    return MixtralForCausalLM(config)


def stacked() -> nn.Module:
    return Net(2, lambda: Block(Experts(E), num_experts=E))


class Listed(nn.Module):
    """A mixture of experts as people write it by hand: router, ModuleList, boolean masks, a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D)) for _ in range(E))
        self.shared = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = torch.topk(F.softmax(self.gate(rows), -1), 3)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                t, k = torch.where(mask)
                out[t] += expert(rows[t]) * weights[t, k, None]
        return (out + self.shared(rows)).view_as(x)


def listed() -> nn.Module:
    return Net(2, Listed)


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
        members = families[parameter].members if parameter in families else (name,)
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
    inner: str = "aot_eager",
    steps: int = 3,
    parts: int = 1,
    run: Callable[[nn.Module], Any] | None = None,
    expect: str = "alltoall",
    optimizer: Callable[[Any], torch.optim.Optimizer] = SGD,
    **options: Any,
) -> nn.Module:
    """Losses, gradients and weights after `steps` steps are those of one process.  Returns the sharded model.

    parts: over how many backwards the gradients of a step are accumulated.  run: what is called instead of the model,
    compiled with fullgraph=True.  expect: the strategy that the reports name, "" if nothing is to be rewritten.
    """
    reference = copy.deepcopy(model)
    moe_compile.parallelize(model, moe_compile.build_mesh(ep=ep))
    call = run(model) if run else compiled(model, inner, fullgraph=True, **options)
    mine, theirs = (optimizer(m.parameters()) for m in (model, reference))
    with regions() as found:
        for step in range(steps):
            for _ in range(parts):
                got = loss(call, *batches[ranks.rank])
                want = sum(loss(reference, *batch) for batch in batches) / ranks.size  # type: ignore[misc]
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
    strategies = {r.strategy for r in found if r.matched}
    wanted = {("grouped" if ranks.size // _copies(ranks, ep) == 1 and expect == "alltoall" else expect)} - {""}
    assert strategies == wanted, (strategies, [str(r) for r in found])
    return model


def _copies(ranks: Ranks, ep: int | None) -> int:
    return ranks.size // (ep or ranks.size)


# -- forms ----------------------------------------------------------------------------------


def stacked_loop(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks))


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
    parity(ranks, mixtral("grouped_mm"), batches, language, optimizer=adam)


def inductor(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks, [6, 4]), inner="inductor")


# -- data -----------------------------------------------------------------------------------


def unequal_batches(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks, [3, 11, 1, 8]))


def a_rank_without_tokens(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks, [5, 0]))


class Fixed(nn.Module):
    """Experts whose ids are given, one for all tokens of a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(E)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        weights = x[:, :2].sigmoid()
        return self.experts(x, ids, weights)


def experts_nobody_chose(ranks: Ranks) -> None:
    batches: Batches = [(torch.randn(4, D), torch.tensor([[6, 2]] * 4)) for _ in range(ranks.size)]
    parity(ranks, Fixed(), batches, lambda model, x, ids: model(x, ids).square().sum())


def everybody_chose_one(ranks: Ranks) -> None:
    """Each token chose one expert twice, and ranks choose different ones."""
    batches: Batches = [(torch.randn(4, D), torch.full((4, 2), (3 * r) % E)) for r in range(ranks.size)]
    parity(ranks, Fixed(), batches, lambda model, x, ids: model(x, ids).square().sum())


# -- ways to run ----------------------------------------------------------------------------


def gradient_accumulation(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks), parts=3, steps=2)


def without_gradients(ranks: Ranks) -> None:
    model, batches = stacked(), tokens(ranks, [4, 9])
    reference = copy.deepcopy(model)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    call = compiled(model, "aot_eager", fullgraph=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), regions() as found:
            assert close(call(*batches[ranks.rank]), reference(*batches[ranks.rank]))
        assert all(r.matched for r in found)


def frozen_experts(ranks: Ranks) -> None:
    model = stacked()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    parity(ranks, model, tokens(ranks))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def activation_checkpointing(ranks: Ranks) -> None:
    parity(ranks, Net(2, lambda: Checkpointed(Experts(E), num_experts=E)), tokens(ranks))


def mixtral_checkpointing(ranks: Ranks) -> None:
    model = mixtral("eager")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parity(ranks, model, [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)], language, steps=2)


def layer_by_layer(ranks: Ranks) -> None:
    """Each layer compiled on its own, the rest of the model not."""

    def run(model: nn.Module) -> nn.Module:
        for layer in model.layers:
            layer.compile(backend="moe_ep", fullgraph=True, options={"inner": "aot_eager"})
        return model

    parity(ranks, stacked(), tokens(ranks), run=run)


def weights_travel(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks), strategy="gather_weights", expect="gather_weights")


def copies_of_experts(ranks: Ranks) -> None:
    """Half as many ranks hold all experts, and there are two of each."""
    parity(ranks, listed(), tokens(ranks, [6, 3]), ep=ranks.size // 2)


def bitwise(ranks: Ranks) -> None:
    """The same rows give the same bits on any number of ranks."""
    model, (x,) = stacked(), tokens(Ranks(0, 1), [50])[0]
    expected = compiled(copy.deepcopy(model), "aot_eager", fullgraph=True)(x)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    got = compiled(model, "aot_eager", fullgraph=True)(x)
    assert torch.equal(got, expected), (got - expected).abs().max()
    half = x[: 25 + ranks.rank]
    assert torch.equal(compiled(model, "aot_eager")(half), expected[: 25 + ranks.rank])


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

    def net() -> nn.Module:
        torch.manual_seed(0)
        return Net(2, lambda: Block(Mixing(E), num_experts=E))

    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        parity(ranks, net(), tokens(ranks, [2, 3]), run=functools.partial(compiled, inner=inner), expect="")


def one_refused(ranks: Ranks) -> None:
    """A layer that is refused between layers that are not."""
    model = Net(3, lambda: Block(Experts(E), num_experts=E))
    model.layers[1].experts = Mixing(E)
    parity(ranks, model, tokens(ranks, [4, 3]), run=lambda model: compiled(model, "aot_eager"))


def another_backend(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks), run=lambda m: torch.compile(m, backend="aot_eager"), expect="")


CHECKS = {
    1: [stacked_loop, module_list, mixtral_eager, uncompiled, bitwise],
    2: [
        stacked_loop, module_list, mixtral_eager, mixtral_grouped, inductor, a_rank_without_tokens,
        experts_nobody_chose, everybody_chose_one, gradient_accumulation, without_gradients, frozen_experts,
        activation_checkpointing, mixtral_checkpointing, layer_by_layer, weights_travel, bitwise, uncompiled, refused,
        one_refused, another_backend,
    ],
    4: [stacked_loop, module_list, mixtral_eager, unequal_batches, copies_of_experts, bitwise, uncompiled],
}  # fmt: skip
