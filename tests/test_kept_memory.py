"""What a compiled block keeps for its backward: the input, the products before the activation and the routing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import moe_compile.expert_mlp  # noqa: F401  (its op)
from tests.tiny import Block, D, Experts, close, compiled

T, E, WIDTHS = 64, 8, {1: 64, 2: 32, 4: 16}  # K: F
GIB = 2**30


@contextmanager
def kept(*apart: Tensor) -> Iterator[dict[int, int]]:
    """Bytes of each memory that autograd keeps meanwhile, but for that of the tensors `apart`."""
    found: dict[int, int] = {}
    others = {tensor.untyped_storage()._cdata for tensor in apart}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in others:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def block_of(top_k: int) -> Block:
    torch.manual_seed(0)
    block, width = Block(Experts(E), top_k=top_k, num_experts=E), WIDTHS[top_k]
    block.experts.w13 = nn.Parameter(0.3 * torch.randn(E, 2 * width, D))
    block.experts.w2 = nn.Parameter(0.3 * torch.randn(E, D, width))
    return block


def of_routing(top_k: int) -> int:
    """The softmax; of each pair its weight, the int64 id that topk's gradient takes, and its place; the offsets."""
    return 4 * T * E + (4 + 8 + 4) * T * top_k + 4 * E


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_compiled_block(inner: str) -> None:
    """The partition of the joint graph adds nothing.  At fixed K*F the rest does not grow with K, as the plain one's."""
    rest, plain = [], []
    for top_k in WIDTHS:
        torch._dynamo.reset()
        block, x = block_of(top_k), torch.randn(T, D, requires_grad=True)
        run = compiled(block, inner, fullgraph=True, strict=True)
        assert close(run(x), block(x))  # compiles it
        with kept(*block.parameters()) as ours:
            out = run(x)
        with kept(*block.parameters()) as loops:
            block(x)
        out.sum().backward()
        rest.append(sum(ours.values()) - of_routing(top_k))
        plain.append(sum(loops.values()))
    assert rest == [4 * T * D + 4 * T * top_k * 2 * width for top_k, width in WIDTHS.items()]
    assert len(set(rest)) == 1
    assert plain[0] < plain[1] < plain[2]
    assert rest[2] + of_routing(4) < plain[2]


# (T, D, F, E, K): GiB a layer that SonicMoE's authors publish as its peak of activations
PUBLISHED = {(24576, 1536, 256, 128, 8): 0.61, (32768, 4096, 256, 256, 16): 2.45}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_no_more_than_sonic_moe_publishes(shape: tuple[int, ...]) -> None:
    """Of bf16, counted on fakes: 0.26 and 0.75 GiB."""
    tokens, width, inner, experts, top_k = shape
    with FakeTensorMode():
        x = torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        ids, weights = torch.empty(tokens, top_k, dtype=torch.int64), torch.rand(tokens, top_k, requires_grad=True)
        up = torch.empty(experts, 2 * inner, width, dtype=torch.bfloat16, requires_grad=True)
        down = torch.empty(experts, width, inner, dtype=torch.bfloat16, requires_grad=True)
        with kept(up, down) as found:
            torch.ops.moe_ep.expert_mlp(x, ids, weights, [], [up], [down], experts, "silu", True)
    rows = tokens * top_k
    assert sum(found.values()) == 2 * tokens * width + 2 * rows * 2 * inner + 4 * (rows + experts) + 4 * rows
    assert sum(found.values()) <= PUBLISHED[shape] * GIB
