"""Pointwise ops beside the experts fuse into the kernels that are there without them."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

from tests.tiny import D, E, Experts, K, close, compiled


class Layer(nn.Module):
    """A norm, a router, experts and a residual.  The methods are what the other layer changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.RMSNorm(D), nn.Linear(D, E), Experts()
        self.scale, self.bias = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(E))

    def before(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def logits(self, logits: Tensor) -> Tensor:
        return logits

    def weights(self, weights: Tensor) -> Tensor:
        return weights / weights.sum(-1, keepdim=True)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before(x)
        weights, ids = F.softmax(self.logits(self.router(normed)), -1).topk(K)
        return self.norm(self.after(x, self.experts(normed, ids, self.weights(weights))))


class WithNeighbours(Layer):
    """A scale behind the norm, a bias and a cap on the logits, a factor on the weights, a gate and a bias behind the
    experts.
    """

    def before(self, x: Tensor) -> Tensor:
        return super().before(x) * self.scale + 0.1

    def logits(self, logits: Tensor) -> Tensor:
        return 5 * torch.tanh((logits + self.bias) / 5)

    def weights(self, weights: Tensor) -> Tensor:
        return 2.5 * super().weights(weights).clamp(min=1e-3)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return super().after(x * self.scale, F.gelu(y) * self.scale.sigmoid() + 1)


def kernels(layer: Layer) -> list[str]:
    """What Inductor runs of a layer's forward, in order: its own kernels as "fused", and the experts."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(6, D)
    with fresh_cache(), torch.no_grad():
        out, (code,) = run_and_get_code(compiled(layer, inner="inductor", fullgraph=True, strict=True), x)
        assert close(out, layer(x))
    calls = re.findall(r"^ +(?:buf\d+ = )?(cpp_fused|triton_|extern_kernels|torch\.ops\.\w+\.\w+)", code, re.MULTILINE)
    return ["fused" if call in ("cpp_fused", "triton_") else call.removeprefix("torch.ops.") for call in calls]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("cls", [Layer, WithNeighbours])
def test_one_kernel_between_two_products(cls: type[Layer]) -> None:
    """The norm; the softmax; the weights; the residual with the norm behind it."""
    router = ["extern_kernels", "fused", "aten.topk", "moe_ep.check_ids", "fused"]
    assert kernels(cls()) == ["fused", *router, "moe_ep.expert_mlp", "fused"]
