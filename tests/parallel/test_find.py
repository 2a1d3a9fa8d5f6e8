"""Which parameters are taken for experts', and which are not."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.parallel.find import about_flat_weights, find_experts
from moe_compile.parallel.flat import experts_of_views
from moe_compile.parallel.shards import Family
from tests.tiny import FF, Block, D, Experts, Net, Separate


def found(model: nn.Module) -> dict[str, list[str]]:
    """Families by the module that holds them."""
    names = {module: name for name, module in model.named_modules()}
    return {names[e.holder]: [f.name for f in e.families] for e in find_experts(model)}


def test_stacked_and_listed() -> None:
    assert found(Net(2)) == {f"layers.{i}.experts": ["w13", "w2"] for i in (1, 0)}
    names = ["0_weight", "0_bias", "2_weight", "2_bias"]
    assert found(Net(1, lambda: Block(Separate()))) == {"layers.0.experts.experts": names}
    experts = find_experts(Separate())[0]
    assert experts.families[0].members == tuple(f"{e}.0.weight" for e in range(4))


class Chosen(nn.Module):
    """A loop over layers, by which rows are selected, too."""

    def __init__(self, layer: type[nn.Module] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x.index_add(0, torch.where(x[:, 0] > 0)[0], layer(x[x[:, 0] > 0]))
        return x


def test_layers_that_hold_experts_are_none() -> None:
    assert sorted(found(Chosen())) == ["layers.0.experts", "layers.1.experts"]


class Stacks(nn.Module):
    """Layers whose results are stacked: no rows are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def test_layers_whose_results_are_stacked_are_none() -> None:
    assert found(Stacks()) == {}


def test_tied_weights_are_left_alone() -> None:
    model = Separate()
    model.experts[1][0].weight = model.experts[0][0].weight
    assert found(model) == {}
    stacked = Net(2)
    stacked.layers[1].experts = stacked.layers[0].experts  # each parameter has two names
    assert found(stacked) == {}


def test_lists_of_unlike_modules_are_none() -> None:
    model = Separate()
    model.experts[2] = nn.Sequential(nn.Linear(D, 5), nn.SiLU(), nn.Linear(5, D))
    assert found(model) == {}
    frozen = Separate()
    frozen.experts[0].requires_grad_(False)
    assert found(frozen) == {}


class Convolution(nn.Module):
    """Three dimensions, and no experts: `conv1d` reads it, in a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_convolutions_are_none() -> None:
    assert found(Convolution()) == {}


def test_other_parameters_of_the_module_are_left_alone() -> None:
    class Routed(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Parameter(torch.randn(4, D))
            self.one = nn.Parameter(torch.randn(1, D, D))

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            weights, ids = (x @ self.router.T @ self.router @ self.one[0]).softmax(-1).topk(2)
            return super().forward(x, ids, weights) + (x @ self.w13[0, :D].T) * self.w2.sum()

    assert found(Routed()) == {"": ["w13", "w2"]}


class Flat(Experts):
    """Weights of all experts one below the other, viewed as one matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = (nn.Parameter(w.detach().flatten(0, 1)) for w in (self.w13, self.w2))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w13, w2 = self.w13.view(self.num_experts, 2 * FF, D), self.w2.view(self.num_experts, D, FF)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            gate, up = F.linear(x[t], w13[e]).chunk(2, -1)
            out.index_add_(0, t, F.linear(F.silu(gate) * up, w2[e]) * weights[t, k, None])
        return out


def test_flat_weights_are_found_by_the_sizes_of_their_views() -> None:
    assert find_experts(Flat())[0].families == (Family("w13", ("w13",), 4, 2 * FF), Family("w2", ("w2",), 4, D))


class Columns(Experts):
    """The weights of all experts beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = (nn.Parameter(w.detach().movedim(-1, 0).flatten(1)) for w in (self.w13, self.w2))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w13, w2 = self.w13.view(D, self.num_experts, 2 * FF), self.w2.view(FF, self.num_experts, D)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            gate, up = (x[t] @ w13[:, e]).chunk(2, -1)
            out.index_add_(0, t, (F.silu(gate) * up) @ w2[:, e] * weights[t, k, None])
        return out


def test_weights_beside_each_other_are_none_and_what_to_do_is_said() -> None:
    columns = Net(1, lambda: Block(Columns()))
    assert found(columns) == {}
    assert "layers.0.experts.w13 is (8, 128)" in about_flat_weights(columns)
    assert "make it a parameter of (experts, rows, columns)" in about_flat_weights(columns)
    assert about_flat_weights(Net()) == about_flat_weights(Convolution()) == ""


class Sizes(nn.Module):
    """How the sizes of a view are written; `known` says what is found."""

    known = (6, 6, 6, 6, 6, 2)
    experts = 6

    def __init__(self) -> None:
        super().__init__()
        self.inner = SimpleNamespace(sizes=(6, 2, 4), wide=24)
        for name in [*"abcdef", *(f"r{i}" for i in range(8))]:
            setattr(self, name, nn.Parameter(torch.randn(12, 4)))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, 2, self.a.shape[1])
        turned = self.r7.view(6, 2, 4)
        twice = 2
        twice = twice + int(x.sum())
        for e in range(6):
            x = x + torch.where(x > 0, self.a.view(shape)[e], self.b.reshape(self.experts, -1, x.shape[1])[e])
            x = x + self.c.unflatten(0, (-1, 2))[e] + self.helper(self.d, 6)[e] + self.e.view(self.inner.sizes)[e]
            x = x + self.f.view([self.inner.wide // 12, 6, 4])[e]
            x = x + self.r0.view(twice, -1, 4)[e] + self.r1.view(x.shape[0], -1)[e] + self.r2.view(5, -1, 4)[e]
            x = x + self.r3.view(6, 2, 4)[e] + self.r3.view(3, 4, 4)[e] + self.r4.t().view(6, -1) + self.r5.view(-1)
            x = x + self.r6.view(6, 2, 4)[:, e] + turned[..., e]
        return x

    def helper(self, flat: Tensor, number: int) -> Tensor:
        return flat.view(number, -1, 4)


def test_sizes_that_the_source_says() -> None:
    """Names set once, attributes, tuples, arithmetic, methods; not what is set again, computed from data or ambiguous."""
    module = Sizes()
    sizes = experts_of_views(Sizes.forward, module)
    named = {n: sizes[id(p)] for n, p in module.named_parameters() if id(p) in sizes}
    assert named == dict(zip("abcdef", Sizes.known, strict=True))
