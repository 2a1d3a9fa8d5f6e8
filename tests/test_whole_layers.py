"""Layers as well-known programs write them, compiled whole: they are found, rewritten, and give the same numbers."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_gshard import Experts
from tests.detect.loops import FF, D, E, weight
from tests.tiny import compiled, regions

pytestmark = pytest.mark.usefixtures("fresh")


class ConditionalFeedForward(nn.Module):
    """As gpt-fast has it: the weights of each token's experts are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = weight(E, FF, D), weight(E, D, FF), weight(E, FF, D)

    def forward(self, x: Tensor, expert_indices: Tensor) -> Tensor:
        w1_weights = self.w1[expert_indices]
        w3_weights = self.w3[expert_indices]
        w2_weights = self.w2[expert_indices]
        x1 = F.silu(torch.einsum("ti,taoi -> tao", x, w1_weights))
        x3 = torch.einsum("ti, taoi -> tao", x, w3_weights)
        return torch.einsum("tao, taio -> tai", (x1 * x3), w2_weights)


class MOEFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.cond_ffn = nn.Linear(D, E, bias=False), ConditionalFeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, D)
        expert_weights = F.softmax(self.gate(x), dim=-1)
        expert_weights, expert_indices = torch.topk(expert_weights, 2, dim=-1)
        expert_weights /= expert_weights.sum(dim=-1, keepdim=True)
        expert_outs = self.cond_ffn(x, expert_indices)
        return torch.einsum("tai,ta -> ti", expert_outs, expert_weights)


def swiglu(x: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    x_glu, x_linear = x[..., ::2], x[..., 1::2]
    x_glu = x_glu.clamp(min=None, max=limit)
    x_linear = x_linear.clamp(min=-limit, max=limit)
    return x_glu * torch.sigmoid(alpha * x_glu) * (x_linear + 1)


class MLPBlock(nn.Module):
    """As OpenAI's gpt-oss has it: biases, one of them added in place, interleaved gates, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.gate = nn.Parameter(torch.ones(D)), nn.Linear(D, E)
        self.mlp1_weight, self.mlp1_bias = weight(E, 2 * FF, D), weight(E, 2 * FF)
        self.mlp2_weight, self.mlp2_bias = weight(E, D, FF), weight(E, D)

    def norm(self, x: Tensor) -> Tensor:
        t, dtype = x.float(), x.dtype
        t = t * torch.rsqrt(torch.mean(t**2, dim=-1, keepdim=True) + 1e-5)
        return (t * self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        t = self.norm(x)
        experts = torch.topk(self.gate(t), k=2, dim=-1, sorted=True)
        expert_weights = F.softmax(experts.values, dim=1)
        expert_indices = experts.indices
        mlp1_weight = self.mlp1_weight[expert_indices, ...]
        mlp1_bias = self.mlp1_bias[expert_indices, ...]
        t = torch.einsum("beck,bk->bec", mlp1_weight, t) + mlp1_bias
        t = swiglu(t)
        mlp2_weight = self.mlp2_weight[expert_indices, ...]
        mlp2_bias = self.mlp2_bias[expert_indices, ...]
        t = torch.einsum("beck,bek->bec", mlp2_weight, t)
        t += mlp2_bias
        t = torch.einsum("bec,be->bc", t, expert_weights)
        return x + t


class MOELayer(nn.Module):
    """As DeepSpeed has it, on one rank: two choices, tables of slots, experts in a list."""

    capacity = 4

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, E, bias=False), Experts()

    def top2gating(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.softmax(logits, dim=1)
        mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=E)
        logits_except1 = logits.masked_fill(mask1.bool(), float("-inf"))
        mask2 = F.one_hot(torch.argmax(logits_except1, dim=1), num_classes=E)
        locations1 = torch.cumsum(mask1, dim=0) - 1
        locations2 = torch.cumsum(mask2, dim=0) - 1
        locations2 += torch.sum(mask1, dim=0, keepdim=True)
        l_aux = torch.mean(torch.mean(gates, dim=0) * torch.mean(mask1.float(), dim=0)) * E * E
        mask1 *= torch.lt(locations1, self.capacity)
        mask2 *= torch.lt(locations2, self.capacity)
        locations1_s = torch.sum(locations1 * mask1, dim=1)
        locations2_s = torch.sum(locations2 * mask2, dim=1)
        mask1_float, mask2_float = mask1.float(), mask2.float()
        gates1_s = torch.einsum("se,se->s", gates, mask1_float)
        gates2_s = torch.einsum("se,se->s", gates, mask2_float)
        denom_s = torch.clamp(gates1_s + gates2_s, min=torch.finfo(gates.dtype).eps)
        gates1_s /= denom_s
        gates2_s /= denom_s
        gates1 = torch.einsum("s,se->se", gates1_s, mask1_float)
        gates2 = torch.einsum("s,se->se", gates2_s, mask2_float)
        locations1_sc = F.one_hot(locations1_s, num_classes=self.capacity).float()
        locations2_sc = F.one_hot(locations2_s, num_classes=self.capacity).float()
        combine1_sec = torch.einsum("se,sc->sec", gates1, locations1_sc)
        combine2_sec = torch.einsum("se,sc->sec", gates2, locations2_sc)
        return l_aux, combine1_sec + combine2_sec

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.top2gating(logits)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        reshaped = x.reshape(-1, D)
        l_aux, combine_weights = self.gating(self.gate(reshaped))
        dispatch_mask = combine_weights.bool()
        dispatched = torch.einsum("sec,sm->ecm", dispatch_mask.type_as(x), reshaped)
        expert_output = self.experts(dispatched.reshape(1, E, -1, D)).reshape(E, -1, D)
        combined = torch.einsum("sec,ecm->sm", combine_weights.type_as(x), expert_output)
        return combined.reshape(x.shape), l_aux


class MOELayerTop1(MOELayer):
    """One choice, and of the tokens that chose an expert some at random, as many as it has slots."""

    use_rts = True

    def top1gating(self, logits: Tensor, min_capacity: int = 3) -> tuple[Tensor, Tensor]:
        gates = F.softmax(logits, dim=1)
        capacity = min(max(2 * gates.shape[0] // E, min_capacity), gates.shape[0])
        indices1_s = torch.argmax(gates, dim=1)
        mask1 = F.one_hot(indices1_s, num_classes=E)
        l_aux = torch.sum(torch.mean(gates, dim=0) * torch.mean(mask1.float(), dim=0)) * E
        mask1_rand = mask1 * torch.rand_like(gates) if self.use_rts else mask1
        top_idx = torch.topk(mask1_rand, k=capacity, dim=0)[1]
        new_mask1 = mask1 * torch.zeros_like(mask1).scatter_(0, top_idx, 1)
        mask1 = new_mask1
        locations1 = torch.cumsum(mask1, dim=0) - 1
        locations1_s = torch.sum(locations1 * mask1, dim=1)
        mask1_float = mask1.float()
        gates = gates * mask1_float
        locations1_sc = F.one_hot(locations1_s, num_classes=capacity).float()
        return l_aux, torch.einsum("se,sc->sec", gates, locations1_sc)

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.top1gating(logits)


class MOELayerTop1First(MOELayerTop1):
    """Not at random: those that come first."""

    use_rts = False


@pytest.mark.parametrize("make", [MOEFeedForward, MLPBlock, MOELayer, MOELayerTop1, MOELayerTop1First])
def test_layer(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = make()
    other = copy.deepcopy(module)
    run = compiled(module, fullgraph=True)
    with regions() as found:
        for tokens in (11, 7, 1):
            x = torch.randn(tokens, D)
            for got, want in zip(numbers(run, module, x), numbers(other, other, x), strict=True):
                torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    assert found and all(r.reason is None for r in found), [(r.where, r.reason) for r in found]


def numbers(run: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and all gradients."""
    module.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = run(x)
    outs = list(out) if isinstance(out, tuple) else [out]
    sum(o.square().sum() for o in outs).backward()  # type: ignore[union-attr]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return [*(o.detach() for o in outs), x.grad, *grads]  # type: ignore[list-item]
