"""What holds on several ranks of weights that are no stacks, and that the forward views as such."""

import copy
import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import moe_compile
from moe_compile.parallel.checkpoint import model_state, optimizer_state
from tests.parallel import checks, checks_tp
from tests.parallel.checks import agree, own_names, parity, refusal, same, tokens
from tests.parallel.checks_files import contents
from tests.parallel.checks_fsdp import ADAM, equal, in_bfloat16, shared_directory
from tests.parallel.ranks import Ranks
from tests.tiny import FF, Block, D, Net, close, compiled, regions


class Flat(nn.Module):
    """The weights of all experts below each other, as dbrx has them, a bias, and a stack of other sizes."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.ffn = num_experts, FF
        self.w1 = nn.Parameter(0.3 * torch.randn(num_experts * FF, D))
        self.w2 = nn.Parameter(0.3 * torch.randn(num_experts * FF, D))
        self.bias = nn.Parameter(0.3 * torch.randn(num_experts * FF))
        self.last = nn.Parameter(0.3 * torch.randn(num_experts, 2, D * D // 2))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        shape = (self.num_experts, self.ffn, x.shape[-1])
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            h = F.linear(x[t], self.w1.view(shape)[e], self.bias.view(self.num_experts, self.ffn)[e])
            y = F.silu(h) @ self.w2.view(self.num_experts, FF, D)[e]
            out.index_add_(0, t, y @ self.last.view(self.num_experts, D, D)[e] * weights[t, k, None])
        return out


class Chunked(Flat):
    """Pieces of the views, in lists, as transformers 4 writes dbrx; a view of a view; a transposed one."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w1 = [w.squeeze(0) for w in self.w1.view(-1, FF, D).chunk(self.num_experts, dim=0)]
        w2 = self.w2.reshape(self.num_experts, FF, D).flatten(1).unflatten(1, (FF, D)).unbind(0)
        bias = self.pick(self.bias, self.num_experts)
        last = self.last.flatten(1).unflatten(-1, (D, D)).transpose(1, 2)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            y = F.silu(F.linear(x[t], w1[e], bias[e])) @ w2[e]
            out.index_add_(0, t, F.linear(y, last[e]) * weights[t, k, None])
        return out

    def pick(self, flat: Tensor, number: int) -> Tensor:
        return flat.unflatten(0, (number, -1))


def net(cls: type[Flat] = Flat, number: int = 0) -> nn.Module:
    number = number or checks.E
    return Net(1, lambda: Block(cls(number), num_experts=number))


def flat(ranks: Ranks) -> None:
    """As many experts on each rank, and fewer on the last."""
    parity(ranks, net(), tokens(ranks, [6, 9]), inner="aot_eager")
    parity(ranks, net(Chunked), tokens(ranks, [6, 3]), steps=1)
    parity(ranks, net(number=2 * ranks.size), tokens(ranks, [6, 0]), steps=1)
    parity(ranks, net(), tokens(ranks), expect="gather_weights", steps=1)
    parity(ranks, net(), tokens(ranks, [6, 0]), expect="", run=lambda model: model, steps=1)


def flat_once(ranks: Ranks) -> None:
    """On one rank, and on many with one or two experts each."""
    parity(ranks, net(), tokens(ranks, [6, 9, 0, 3]), inner="aot_eager")


def beside_tp(ranks: Ranks) -> None:
    """Two groups of ranks that share their tokens."""
    model = checks_tp.model(1, lambda: Block(Flat(checks.E), num_experts=checks.E))
    checks_tp.split(ranks, model, tokens(ranks, [5, 8]), inner="aot_eager")


def in_chunks(ranks: Ranks) -> None:
    parity(ranks, net(), tokens(ranks, [7, 5]), chunks=2, numerics="fast", inner="aot_eager")


def mixed_precision_of_flat(ranks: Ranks) -> None:
    """Cast for each forward: as they are, then gathered from the ranks that hold parts of the same experts."""
    in_bfloat16(ranks, net, "aot_eager")
    torch._dynamo.reset()
    in_bfloat16(ranks, net, "aot_eager", ep=1, experts="sharded")


def dbrx(ranks: Ranks) -> None:
    """Hugging Face's module."""
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    config = SimpleNamespace(hidden_size=D, ffn_hidden_size=FF, moe_num_experts=checks.E, ffn_act_fn={"name": "silu"})

    def block() -> nn.Module:
        experts = DbrxExperts(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        return Block(experts, num_experts=checks.E)

    parity(ranks, Net(1, block), tokens(ranks, [6, 9]), steps=1)


# -- what is written ------------------------------------------------------------------------

MESHES: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {
    2: ({}, {"ep": 1}),
    4: ({"ep": 2, "dp_shard": 4, "experts": "sharded"}, {"ep": 4}),
}


def placed(model: nn.Module, ep: int | None = None, experts: str = "replicated", **degrees: Any) -> nn.Module:
    return moe_compile.parallelize(model, moe_compile.build_mesh(ep=ep, **degrees), experts=experts)


def saved(ranks: Ranks) -> None:
    """Names and shapes are the model's own; what is saved is read, bit by bit, on another mesh and by one process."""
    here, there = MESHES[ranks.size]
    for number in (checks.E, 2 * ranks.size):
        path = shared_directory(ranks)
        make = functools.partial(net, number=number)
        torch.manual_seed(0)
        reference = make()
        model = placed(copy.deepcopy(reference), **here)
        optimizer, theirs = ADAM(model.parameters()), ADAM(reference.parameters())
        call = compiled(model, strategy="alltoall")
        for _ in range(2):
            assert agree(ranks, model, call, reference, tokens(ranks, [5, 2]))
            assert close(moe_compile.clip_grad_norm_(model, 0.1), nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
            for one in (optimizer, theirs):
                one.step()
                one.zero_grad()
        same(own_names(model, lambda p: p.data), own_names(reference, lambda p: p.data), "weight")
        shapes = {n: t.shape for n, t in reference.state_dict().items()}
        assert {n: t.shape for n, t in model.state_dict().items()} == shapes
        assert {n: t.shape for n, t in get_model_state_dict(model).items()} == shapes
        mine = optimizer_state(model, optimizer)["state"]
        assert {n: v["exp_avg"].shape for n, v in mine.items()} == shapes
        weights, state = copy.deepcopy((model_state(model, full=True), optimizer_state(model, optimizer, full=True)))
        assert {n: t.shape for n, t in weights.items()} == shapes
        if number == 2 * ranks.size:
            options = StateDictOptions(full_state_dict=True)
            equal(get_model_state_dict(model, options=options), weights)
        else:
            rows = model.state_dict()["layers.0.experts.w1"]
            assert "whose experts the ranks do not divide" in refusal(functools.partial(torch.neg, rows))
        moe_compile.save_checkpoint(model, optimizer, path)
        moe_compile.save_safetensors(model, path)
        equal(contents(path), weights)
        for degrees in (there, here):
            torch.manual_seed(ranks.size)
            other = placed(make(), **degrees)
            fresh = ADAM(other.parameters())
            moe_compile.load_checkpoint(other, fresh, path)
            equal(model_state(other, full=True), weights)
            equal(optimizer_state(other, fresh, full=True)["state"], state["state"])
            with torch.device("meta"):
                empty = make()
            moe_compile.load_safetensors(placed(empty, **degrees), path)
            equal(model_state(empty, full=True), weights)
        other.load_state_dict({n: torch.zeros_like(t) for n, t in weights.items()})
        assert not any(t.any() for t in model_state(other, full=True).values())
        other.load_state_dict(model.state_dict())
        equal(model_state(other, full=True), weights)
        one, alone = make(), None
        alone = ADAM(one.parameters())
        moe_compile.load_checkpoint(one, alone, path)
        equal(dict(one.state_dict()), weights)
        equal(optimizer_state(one, alone)["state"], state["state"])


# -- what must not be taken for experts one after the other ---------------------------------


class Halves(Flat):
    """Twice as many matrices as experts, of which each reads two."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w1 = self.w1.view(2 * self.num_experts, FF // 2, D)
        w2 = self.w2.view(self.num_experts, FF, D)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            h = torch.cat([F.linear(x[t], w1[e]), F.linear(x[t], w1[2 * self.num_experts - 1 - e])], -1)
            out.index_add_(0, t, F.silu(h) @ w2[e] * weights[t, k, None])
        return out


class Across(Flat):
    """An expert's rows lie across the weight, not together."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w1 = self.w1.view(FF, self.num_experts, D).transpose(0, 1)
        w2 = self.w2.view(self.num_experts, FF, D)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, F.silu(F.linear(x[t], w1[e])) @ w2[e] * weights[t, k, None])
        return out


class Flipped(Flat):
    """The rows of the last expert first, and in another order."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x) + self.w1.view(self.num_experts, FF, D).shape[0]
        w1 = self.w1.flip(0).view(self.num_experts, FF, D)
        w2 = self.w2.view(self.num_experts, FF, D)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, F.silu(F.linear(x[t], w1[e])) @ w2[e] * weights[t, k, None])
        return out


class Turned(Chunked):
    """Expert e reads the piece of the last but e."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w1, w2 = self.w1.view(-1, FF, D).unbind(0), self.w2.view(-1, FF, D).chunk(self.num_experts)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            y = F.silu(F.linear(x[t], w1[self.num_experts - 1 - e])) @ w2[e].squeeze(0)
            out.index_add_(0, t, y * weights[t, k, None])
        return out


class FirstRows(Flat):
    """A row of the weight an expert, the first ones of all, though it is viewed as matrices too."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x) + self.w1.view(self.num_experts, FF, D).mean()
        w2 = self.w2.view(self.num_experts, FF, D)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            y = (x[t] @ w2[e].T).sum(-1, keepdim=True) * self.w1[e]
            out.index_add_(0, t, y * weights[t, k, None])
        return out


class Watched(Flat):
    """A view that no gradient passes, and one that is used outside too."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        with torch.no_grad():
            w1 = self.w1.view(self.num_experts, FF, D)
        w2 = self.w2.view(self.num_experts, FF, D)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, F.silu(F.linear(x[t], w1[e])) @ w2[e] * weights[t, k, None])
        return out


def near_misses(ranks: Ranks) -> None:
    """Right, whether it is rewritten or not; nothing is taken for another expert's."""
    number = checks.E
    texts: dict[type[Flat], str] = {
        Halves: f"{number} experts are used, view holds {2 * number}",
        Across: "alltoall",  # w1 stays whole on every rank
        Flipped: "flip (aten.flip.default) is not shown to work on every expert's weight alike",
        Turned: "the experts' weights are not sharded in the order of the experts",
        FirstRows: f"{number} experts are used, w1 holds {number * FF}",
        Watched: "alltoall",
    }
    for cls, text in texts.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        reference = net(cls)
        model = moe_compile.parallelize(copy.deepcopy(reference), moe_compile.build_mesh())
        with regions() as found:
            call = compiled(model, strategy="alltoall")
            assert agree(ranks, model, call, reference, tokens(ranks, [6, 9])), cls
        assert {r.reason or r.strategy for r in found} == {text}, [str(r) for r in found]


CHECKS = {
    1: [flat_once],
    2: [flat, dbrx, in_chunks, mixed_precision_of_flat, saved, near_misses],
    4: [saved, beside_tp],
    8: [flat_once],
}
