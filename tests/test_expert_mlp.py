"""`expert_mlp` (moe_compile/expert_mlp.py): its definition against one expert after another, its CPU form against both."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_compile  # noqa: F401  registers the CPU forms
from moe_compile import cpu, expert_mlp, native
from moe_compile.activations import ACTIVATIONS, activate, between, between_backward, described, why_not

D, F = 24, 37
# (T, K, E)
# in pairs, with limits that some numbers are beyond, as OpenAI's gpt-oss has it; and parts of that
FORMS = (
    *ACTIVATIONS, "silu alpha=1.702 limit=0.2 shift=1.0 pairs", "silu limit=0.1", "gelu pairs", "relu_squared shift=-0.5",
)  # fmt: skip
PLAIN = (*ACTIVATIONS, "silu alpha=1.702", "gelu_tanh limit=0.1")
EITHER = [*((form, True) for form in FORMS), *((form, False) for form in PLAIN)]
ROUTINGS = {"even": (64, 2, 8), "few": (3, 2, 16), "one": (1, 1, 1), "crowded": (400, 1, 4), "odd": (77, 3, 5)}
LAYOUTS = ("stacked", "two stacks", "separate", "transposed", "strided")


def routing(name: str) -> tuple[Tensor, int]:
    T, K, E = ROUTINGS[name]
    return (torch.zeros(T, K, dtype=torch.int64) if name == "crowded" else torch.rand(T, E).argsort(1)[:, :K]), E


def leaves(name: str, gated: bool, dtype: torch.dtype, biased: bool = False) -> list[Tensor]:
    """x, routing weights, up (the gate's rows first), down; and biases, if asked for."""
    T, K, E = ROUTINGS[name]
    g, G = torch.Generator().manual_seed(1), 2 * F if gated else F
    shapes = [(T, D), (T, K), (E, G, D), (E, D, F), *[(E, G), (E, D)] * biased]
    return [(0.3 * torch.randn(*s, generator=g)).to(dtype).requires_grad_() for s in shapes]


def laid_out(w: Tensor, layout: str) -> list[Tensor]:
    if layout == "transposed":
        return [w.transpose(1, 2).contiguous().transpose(1, 2)]
    if layout == "strided":
        return [torch.stack([w, w], -1)[..., 0]]
    return list(w.unbind(0)) if layout == "separate" else [w]


def run(
    values: Sequence[Tensor], ids: Tensor, layout: str, activation: str, gated: bool, weighted: bool
) -> list[Tensor]:
    """The output and all gradients, from the op."""
    x, weights, up, down, *biases = values
    gate: list[Tensor] = []
    parts = [up]
    if gated and layout in ("separate", "two stacks"):
        parts = [half.contiguous() for half in up.chunk(2, 1)]
        gate = laid_out(parts[0], layout)
    out, *_ = torch.ops.moe_ep.expert_mlp(
        x, ids, weights if weighted else None, gate, laid_out(parts[-1], layout), laid_out(down, layout),
        up.shape[0], activation, gated, *biases,
    )  # fmt: skip
    return with_gradients(out, [x, *([weights] if weighted else []), up, down, *biases])


def one_after_another(
    values: Sequence[Tensor], ids: Tensor, activation: str, gated: bool, weighted: bool
) -> list[Tensor]:
    """The same from a loop over tokens and their experts."""
    x, weights, up, down, *biases = values
    rows = []
    for t, k in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        e = int(ids[t, k])
        if not 0 <= e < up.shape[0]:
            rows.append(torch.zeros_like(x[t]))
            continue
        h = up[e] @ x[t] + (biases[0][e] if biases else 0)
        y = down[e] @ one_activated(activation, h, gated) + (biases[1][e] if biases else 0)
        rows.append(y * (weights[t, k] if weighted else 1))
    out = torch.stack(rows).view(*ids.shape, D).sum(1)
    return with_gradients(out, [x, *([weights] if weighted else []), up, down, *biases])


def one_activated(activation: str, h: Tensor, gated: bool) -> Tensor:
    """Written again, in other words than the definition's."""
    how, limit = described(activation), described(activation).limit or float("inf")
    g, u = (h.view(F, 2).unbind(1) if how.pairs else h.split(F)) if gated else (h, None)
    g = torch.minimum(g, g.new_tensor(limit)) if how.limit else g
    a = g / (1 + torch.exp(-how.alpha * g)) if how.name == "silu" else activate(how.name, g)
    return a if u is None else a * ((u.clamp(-limit, limit) if how.limit else u) + how.shift)


def with_gradients(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, inputs))), "a second backward differs"
    return [out, *first]


def assert_near(ours: Sequence[Tensor], exact: Sequence[Tensor], roundings: float = 16) -> None:
    for a, b in zip(ours, exact, strict=True):
        bound = roundings * torch.finfo(a.dtype).eps * b.abs().max().item()
        assert (a.double() - b.double()).abs().max().item() <= bound + 1e-12


@pytest.mark.parametrize(("weighted", "biased"), [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize(("activation", "gated"), EITHER)
def test_the_definition(activation: str, gated: bool, weighted: bool, biased: bool) -> None:
    torch.manual_seed(0)
    ids, _ = routing("odd")
    ids[3, 1], ids[5] = 5, -1  # nobody's
    values = leaves("odd", gated, torch.float64, biased)
    exact = one_after_another(values, ids, activation, gated, weighted)
    assert_near(run(values, ids, "stacked", activation, gated, weighted), exact, 100)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_any_routing_and_layout(name: str, layout: str, gated: bool) -> None:
    torch.manual_seed(0)
    ids, _ = routing(name)
    exact = run(leaves(name, gated, torch.float64), ids, layout, "silu", gated, True)
    assert_near(run(leaves(name, gated, torch.float32), ids, layout, "silu", gated, True), exact)


@pytest.mark.parametrize(("weighted", "biased"), [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize(("activation", "gated"), EITHER)
def test_the_kernels(activation: str, gated: bool, weighted: bool, biased: bool) -> None:
    torch.manual_seed(0)
    ids, _ = routing("odd")
    ids[3, 1] = 5
    ids[ids == 2] = 3  # an expert without rows
    exact = run(leaves("odd", gated, torch.float64, biased), ids, "stacked", activation, gated, weighted)
    assert_near(run(leaves("odd", gated, torch.float32, biased), ids, "stacked", activation, gated, weighted), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_biases_in_any_routing_and_layout(name: str, layout: str) -> None:
    torch.manual_seed(0)
    ids, _ = routing(name)
    form = "silu alpha=1.702 limit=7.0 shift=1.0" + ("" if layout in ("separate", "two stacks") else " pairs")
    exact = run(leaves(name, True, torch.float64, True), ids, layout, form, True, True)
    for dtype, roundings in ((torch.float32, 16), (torch.bfloat16, 32)):
        values = leaves(name, True, dtype, True)
        values[4:] = [b.detach().t().contiguous().t().requires_grad_() for b in values[4:]]
        assert_near(run(values, ids, layout, form, True, True), exact, roundings)


@pytest.mark.parametrize(("activation", "gated"), EITHER)
def test_the_gradient_between(activation: str, gated: bool) -> None:
    """By hand against autograd, also at the limits, beyond them and from a NaN."""
    limit = described(activation).limit or 1.0
    h = torch.cat([0.3 * torch.randn(40, 2 * F).double(), *(torch.full((1, 2 * F), v) for v in (limit, -limit, 1e3))])
    h[3, 5] = h[4, 6] = float("nan")
    h.requires_grad_()
    a = between(h, activation, gated)
    da = torch.randn_like(a)
    (dh,) = torch.autograd.grad(a, h, da)
    torch.testing.assert_close(between_backward(da, h.detach(), activation, gated), dh, equal_nan=True)


def test_what_describes_an_activation() -> None:
    for text in (*FORMS, *PLAIN):
        assert str(described(text)) == text and why_not(text, True) is None
    for text in (
        "elu",
        "silu limit=-1",
        "silu limit=inf",
        "silu limit=1e-40",
        "silu shift=nan",
        "gelu alpha=2",
        "silu beta=1",
        "silu limit=1 limit=2",
        "silu limit=x",
    ):
        assert why_not(text, True) is not None, text
    assert why_not("silu pairs", False) is not None and why_not("silu shift=1", False) is not None
    x, ids, up, down = torch.randn(3, D), torch.zeros(3, 1).long(), torch.randn(1, 2 * F, D), torch.randn(1, D, F)
    for bias in ((torch.zeros(1, F), None), (None, torch.zeros(1, F)), (torch.zeros(2 * F), None)):
        with pytest.raises(ValueError, match="a bias of shape"):
            torch.ops.moe_ep.expert_mlp(x, ids, None, [], [up], [down], 1, "silu", True, *bias)
    with pytest.raises(ValueError, match="activation elu"):
        torch.ops.moe_ep.expert_mlp(x, ids, None, [], [up], [down], 1, "elu", True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_narrow_dtypes(name: str, layout: str, gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ids, _ = routing(name)
    exact = run(leaves(name, gated, torch.float64), ids, layout, "silu", gated, True)
    assert_near(run(leaves(name, gated, dtype), ids, layout, "silu", gated, True), exact, 32)


WIDE = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("of_weights", [*WIDE, None], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_is_as_precise_as_one_product_after_another(
    activation: str, gated: bool, of_weights: torch.dtype | None
) -> None:
    """Errors in the mean square, the definition's in bf16 and ours, against the definition of the same in float64."""
    torch.manual_seed(0)
    T, K, E, width, inner = 200, 2, 4, 64, 96
    ids = torch.rand(T, E).argsort(1)[:, :K]
    ids[3, 1], ids[5] = 5, -1  # nobody's
    x, up, down = (
        torch.randn(T, width),
        torch.randn(E, inner * (2 if gated else 1), width) / 8,
        torch.randn(E, width, inner) / 10,
    )
    x, up, down, dout = (v.bfloat16() for v in (x, up, down, torch.randn(T, width)))
    weights = None if of_weights is None else torch.rand(T, K).to(of_weights)

    def results(forward, backward, change) -> list[Tensor]:
        a, u, d, w = (v if v is None else change(v) for v in (x, up, down, weights))
        out, *kept = forward(a, ids, w, [], [u], [d], E, activation, gated)
        grads = backward(
            change(dout).to(out.dtype), a, kept[0], w, *kept[1:], [], [u], [d], activation, gated, True, True
        )
        return [out, *(g for g in grads if g.numel())]

    definition = expert_mlp.reference, expert_mlp.backward_reference
    exact = results(*definition, lambda v: v.double())
    theirs = results(*definition, lambda v: v)
    assert cpu.why_not_mlp(x, weights, [], [up], [down]) is None
    ours = results(cpu.mlp, cpu.mlp_backward, lambda v: v)
    assert [v.dtype for v in ours] == [v.dtype for v in theirs]
    for mine, other, wanted in zip(ours, theirs, exact, strict=True):
        mine, other = (((v - wanted).square().mean() / wanted.square().mean()).sqrt() for v in (mine, other))
        assert 0 < mine <= 1.1 * other and mine < 1e-2


@pytest.mark.parametrize("of_weights", WIDE, ids=str)
def test_what_the_compiler_is_told_of_bf16(of_weights: torch.dtype) -> None:
    """Shapes, dtypes and strides of the fakes, of the definition and of the kernels are the same."""
    torch.manual_seed(0)
    ids, E = routing("odd")
    x, weights, up, down = (v.detach().bfloat16() for v in leaves("odd", True, torch.float32))
    args: tuple[Any, ...] = x, ids, weights.to(of_weights), [], [up], [down], E, "silu", True

    def described(values: Sequence[Tensor]) -> list[object]:
        return [(v.shape, v.dtype, v.stride()) for v in values]

    with FakeTensorMode() as fakes:
        fake = torch.ops.moe_ep.expert_mlp(*torch.utils._pytree.tree_map_only(Tensor, fakes.from_tensor, args))
    out, h, offsets, order = cpu.mlp(*args)
    assert described(fake) == described((out, h, offsets, order)) == described(expert_mlp.reference(*args))
    assert out.dtype == of_weights and h.dtype == torch.bfloat16
    back: tuple[Any, ...] = torch.ones_like(out), x, h, args[2], offsets, order, [], [up], [down], "silu", True
    for asked in ((True, True), (True, False), (False, True)):
        with FakeTensorMode() as fakes:
            given = torch.utils._pytree.tree_map_only(Tensor, fakes.from_tensor, (*back, *asked))
            fake = torch.ops.moe_ep.expert_mlp_backward(*given)
        assert described(fake) == described(cpu.mlp_backward(*back, *asked))
        assert described(fake) == described(expert_mlp.backward_reference(*back, *asked))


def test_f16_scales_a_gradient_before_the_product() -> None:
    """Else a gradient that a loss scale has made large overflows where the definition's does not."""
    x, ids = torch.full((1, 64), 0.1).half().requires_grad_(), torch.zeros(1, 1, dtype=torch.int64)
    up, down = torch.full((1, 64, 64), 0.1).half(), torch.full((1, 64, 64), 1.0).half()
    out, *_ = torch.ops.moe_ep.expert_mlp(x, ids, torch.full((1, 1), 1e-3).half(), [], [up], [down], 1, "relu", False)
    (dx,) = torch.autograd.grad(out, x, torch.full_like(out, 4e4))
    assert dx.isfinite().all() and cpu.why_not_mlp(x, None, [], [up], [down]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_torchs(activation: str, dtype: torch.dtype) -> None:
    """Value and slope, from -inf to inf and on NaN, by kernels that take `tail` numbers beside whole vectors."""
    kernels = native.library(dtype)
    assert kernels is not None
    bound = {"rtol": 4e-7, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 2.0**-8, "atol": 3e-6}
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e18, -200.0, -89.0, -0.0, 0.0, 89.0, 1e4])])
    for tail in (0, 1, 15):
        h = x[: x.numel() - tail].clone()[None].to(dtype)
        a, dh, again = torch.empty_like(h), torch.empty_like(h), torch.empty_like(h)
        how, n = ACTIVATIONS.index(activation), h.numel()
        kernels.gate(how, 1, 0, 0, h.data_ptr(), n, 0, 0, a.data_ptr(), 1, n, 1)
        ones = torch.ones_like(h)
        kernels.gate_backward(
            how, 1, 0, 0, h.data_ptr(), n, 0, 0, ones.data_ptr(), None, dh.data_ptr(), again.data_ptr(), None, 1, n, 1
        )
        exact = h.double().requires_grad_()
        value = activate(activation, exact)
        (slope,) = torch.autograd.grad(value.sum(), exact)
        assert torch.equal(a, again)
        torch.testing.assert_close(a.double(), value.detach(), **bound)
        torch.testing.assert_close(dh.double(), slope, **bound)
    for special in (float("nan"), *([float("inf")] if activation != "gelu" else [])):  # torch's gelu(inf) is NaN
        h = torch.full((1, 3), special, dtype=dtype)
        a = torch.empty_like(h)
        kernels.gate(ACTIVATIONS.index(activation), 1, 0, 0, h.data_ptr(), 3, 0, 0, a.data_ptr(), 1, 3, 1)
        torch.testing.assert_close(a, activate(activation, h), equal_nan=True)


@pytest.mark.parametrize("of_weights", WIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype, of_weights: torch.dtype) -> None:
    """Output and gradient of a token: whatever other tokens there are, and for any number of threads."""
    torch.manual_seed(0)
    ids, _ = routing("odd")
    x, weights, up, down = leaves("odd", True, dtype)
    weights = weights.detach().to(torch.promote_types(dtype, of_weights))

    def part(rows: slice) -> tuple[Tensor, Tensor]:
        mine = x[rows].detach().requires_grad_()
        out, *_ = torch.ops.moe_ep.expert_mlp(mine, ids[rows], weights[rows], [], [up], [down], 5, "silu", True)
        return out, torch.autograd.grad(out.sum(), mine)[0]

    threads = torch.get_num_threads()
    whole, again = part(slice(None)), part(slice(None))
    torch.set_num_threads(1)
    few = part(slice(7, 12))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, whole, again))
    assert torch.equal(whole[0][7:12], few[0]) and torch.equal(whole[1][7:12], few[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    sizes = (0, D), (0, 2), (4, 2 * F, D), (4, D, F)
    x, weights, up, down = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in sizes)
    ids = torch.empty(0, 2, dtype=torch.int64)
    out, *_ = torch.ops.moe_ep.expert_mlp(x, ids, weights, [], [up], [down], 4, "silu", True)
    grads = torch.autograd.grad(out.sum(), [x, weights, up, down])
    assert out.shape == (0, D)
    assert [tuple(g.shape) for g in grads] == [(0, D), (0, 2), (4, 2 * F, D), (4, D, F)]
    assert not grads[2].any() and not grads[3].any()


@pytest.mark.parametrize("frozen", ["x", "params", "weights"])
def test_only_what_needs_a_gradient_gets_one(frozen: str) -> None:
    torch.manual_seed(0)
    ids, _ = routing("odd")
    x, weights, up, down = leaves("odd", True, torch.float32)
    everything = run([x, weights, up, down], ids, "stacked", "silu", True, True)
    kept = {"x": [1, 2, 3], "params": [0, 1], "weights": [0, 2, 3]}[frozen]
    values = [v.detach().requires_grad_(i in kept) for i, v in enumerate([x, weights, up, down])]
    out, *_ = torch.ops.moe_ep.expert_mlp(values[0], ids, values[1], [], [values[2]], [values[3]], 5, "silu", True)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    for got, i in zip(torch.autograd.grad(loss, [values[i] for i in kept]), kept, strict=True):
        assert torch.equal(got, everything[1 + i])


@pytest.mark.parametrize("biased", [False, True])
def test_it_keeps_the_input_the_products_and_the_routing(biased: bool) -> None:
    """Bytes kept for the backward do not grow with K at fixed K*F."""
    T, E = 64, 8
    kept = {}
    for K, width in ((1, 64), (2, 32), (4, 16)):
        x, weights = torch.randn(T, D, requires_grad=True), torch.rand(T, K, requires_grad=True)
        up, down = torch.randn(E, 2 * width, D, requires_grad=True), torch.randn(E, D, width, requires_grad=True)
        ids = torch.rand(T, E).argsort(1)[:, :K]
        sizes: list[int] = []
        biases = torch.randn(E, 2 * width, requires_grad=True), torch.randn(E, D, requires_grad=True)
        params = {v.untyped_storage().data_ptr() for v in (up, down, *biases)}

        def pack(v: Tensor, sizes=sizes, params=params) -> Tensor:
            if v.untyped_storage().data_ptr() not in params:
                sizes.append(v.numel() * v.element_size())
            return v

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            how = FORMS[-4] if biased else "silu"
            torch.ops.moe_ep.expert_mlp(x, ids, weights, [], [up], [down], E, how, True, *(biases if biased else ()))
        routing = 4 * (T * K + E) + 4 * T * K  # order, offsets, weights
        assert sum(sizes) == 4 * T * D + 4 * T * K * 2 * width + routing
        kept[K] = sum(sizes) - routing
    assert len(set(kept.values())) == 1


@pytest.mark.parametrize("biased", [False, True])
def test_the_backward_holds_no_row_longer_than_it_is_read(biased: bool) -> None:
    """Beside its results: the gradients of the products, and once the rows of the input; K rows a token."""
    T, K, E, G = 1500, 2, 4, 2 * F
    x, weights, ids = torch.randn(T, D), torch.rand(T, K), torch.rand(T, E).argsort(1)[:, :K]
    up, down = torch.randn(E, G, D), torch.randn(E, D, F)
    biases = (torch.randn(E, G), torch.randn(E, D)) if biased else ()
    out, *kept = torch.ops.moe_ep.expert_mlp(x, ids, weights, [], [up], [down], E, "silu", True, *biases)
    h, offsets, order = kept
    with torch.profiler.profile(profile_memory=True) as seen:
        found = cpu.mlp_backward(
            torch.ones_like(out), x, h, weights, offsets, order, [], [up], [down], "silu", True, True, True, *biases
        )
    now = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    results, routed = sum(v.nbytes for v in found), 8 * 8 * T * K  # indices, in 64 bits where torch wants them
    first = 4 * T * K * (D + 2 * F + G)  # those of the results, both sides of the activation: before it is known
    assert peak < max(first, results + 4 * T * K * (G + D)) + routed, (peak, first, results, routed)
    assert peak >= first


def test_without_a_compiler_the_numbers_are_the_same(monkeypatch) -> None:
    torch.manual_seed(0)
    ids, _ = routing("odd")
    values = leaves("odd", True, torch.float32)
    ours = run(values, ids, "stacked", "gelu_tanh", True, True)
    monkeypatch.setattr(native, "library", lambda dtype: None)
    assert native.why_not(values[0]) is not None
    assert_near(ours, run(values, ids, "stacked", "gelu_tanh", True, True), 64)


def test_compiled() -> None:
    """Under Inductor with a symbolic number of tokens."""
    torch.manual_seed(0)
    _, weights, up, down = leaves("odd", True, torch.float32)

    @torch.compile(dynamic=True, fullgraph=True)
    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.moe_ep.expert_mlp(x, ids, weights, [], [up], [down], 5, "silu", True)[0]

    for T in (9, 30):
        ids = torch.rand(T, 5).argsort(1)[:, :3]
        x = torch.randn(T, D, requires_grad=True)
        mine = layer(x, ids, weights[:T])
        exact, *_ = expert_mlp.expert_mlp(x, ids, weights[:T], [], [up], [down], 5, "silu", True)
        assert_near([mine], [exact])
        assert_near(torch.autograd.grad(mine.sum(), [x, up, down]), torch.autograd.grad(exact.sum(), [x, up, down]))


def test_widths_that_do_not_fit() -> None:
    x, ids, weights = torch.randn(3, D), torch.zeros(3, 1, dtype=torch.int64), torch.rand(3, 1)
    narrow, up, down = torch.randn(4, 1, D), torch.randn(4, F, D), torch.randn(4, D, F)
    for gate, second in (([narrow], up), ([up], narrow), ([], up)):
        with pytest.raises(ValueError, match="before an activation, the last weight takes 37"):
            torch.ops.moe_ep.expert_mlp(x, ids, weights, gate, [second], [down], 4, "silu", True)
