"""What is asked for a proof, and what is not."""

from torch import Tensor, nn

from moe_compile.candidates import is_candidate
from tests.tiny import Block, D, Experts, Net, Separate


class Cache:
    """Keys of a decoder's layers, reordered for beams."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []

    def reorder(self, beams: Tensor) -> None:
        self.keys = [k.index_select(0, beams) for k in self.keys]


class Decoder(nn.Module):
    """A loop over like layers, beside such a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        cache = cache or Cache()
        for layer in self.layers:
            if layer.bias is not None:
                x = layer(x)
        return x


def test_layers_beside_a_cache_are_none() -> None:
    assert not is_candidate(Decoder.forward, Decoder())


def test_who_runs_experts_is_asked_and_who_calls_them_is_not() -> None:
    assert is_candidate(Experts.forward, Experts()) and is_candidate(Separate.forward, Separate())
    assert not is_candidate(Block.forward, Block()) and not is_candidate(Net.forward, Net(1))
