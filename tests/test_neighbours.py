"""Pointwise ops beside the experts fuse into the kernels that are there without them."""

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

from tests.tiny import D, E, Experts, K, check_same, close, compiled, original

OPS = ("aten.topk", "moe_ep.check_ids", "moe_ep.expert_mlp")


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
    return calls(code)


def calls(code: str) -> list[str]:
    found = re.findall(r"^ +(?:buf\d+ = )?(cpp_fused|triton_|extern_kernels|torch\.ops\.\w+\.\w+)", code, re.MULTILINE)
    return ["fused" if call in ("cpp_fused", "triton_") else call.removeprefix("torch.ops.") for call in found]


def training_kernels(layer: Layer) -> list[list[str]]:
    """The same of a training step's forward and of its backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    run, x = compiled(layer, inner="inductor", fullgraph=True, strict=True), torch.randn(6, D)
    reference = original(layer)
    with fresh_cache():
        _, codes = run_and_get_code(check_same, run, reference, layer, reference, x)
    return [calls(code) for code in codes]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("cls", [Layer, WithNeighbours])
def test_one_kernel_between_two_products(cls: type[Layer]) -> None:
    """The norm; the softmax; the weights; the residual with the norm behind it."""
    router = ["extern_kernels", "fused", "aten.topk", "moe_ep.check_ids", "fused"]
    assert kernels(cls()) == ["fused", *router, "moe_ep.expert_mlp", "fused"]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("cls", "fused"), [(Layer, 4), (WithNeighbours, 3)])
def test_training_has_no_more_kernels(cls: type[Layer], fused: int) -> None:
    """Forward: those of an inference.  Backward: of the norm behind the experts; from them and the weights to the
    logits; of the first norm with the residual; beside the router's two products.  Without neighbours Inductor writes
    one more.
    """
    forward, backward = training_kernels(cls())
    assert Counter(forward) == {"fused": 4, "extern_kernels": 1} | dict.fromkeys(OPS, 1)
    assert forward[-2:] == ["moe_ep.expert_mlp", "fused"]
    assert Counter(backward) == {"fused": fused, "extern_kernels": 2, "moe_ep.expert_mlp_backward": 1}
    assert backward[:3] == ["fused", "moe_ep.expert_mlp_backward", "fused"]
