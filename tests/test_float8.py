"""Experts with float8 weights: outputs and gradients of the unmodified model, with and without fold_weight_scales."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_compile
from tests.detect.loops import Proof, differences, outcome
from tests.float8_models import BY_FEATURE, LAYERS, D, E, Experts, F, frozen, interleaved, routed
from tests.tiny import compiled, original, regions

SCALED = torch.ops.moe_ep.grouped_gemm_scaled.default
# f32: sums in another order.  bf16: on either side s * w, each product, its weighted row and the sum over k are rounded,
# by 2**-9 each at most, before sums that cancel by some factor: so only norms over many tokens are compared.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-5}


def scaled_products(graph: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=SCALED))


def inputs(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Some expert is nobody's; one has all tokens, the others none; one token; none."""
    x, ids, weights = routed(dtype)
    all_to_one = torch.tensor([[2, 1]]).expand(9, 2).contiguous()
    return {
        "some": (x, ids, weights),
        "crowded": (x, all_to_one, weights),
        "no tokens": (x[:0], ids[:0], weights[:0]),
    } | ({"one token": (x[:1], ids[:1], weights[:1])} if dtype == torch.float32 else {})


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_the_model(name: str, dtype: torch.dtype) -> None:
    module, cases = LAYERS[name](), inputs(dtype)
    for skip, number in ((frozenset({"fold_weight_scales"}), 0), (frozenset[str](), 2)):
        run = Proof(module, cases["some"], True, skip=skip)
        assert scaled_products(run.gm.graph) == number, [str(r) for r in run.reports]
        for case, args in cases.items():
            got, want = outcome(run, module, args), outcome(module, module, args)
            assert not differences(got, want, RTOL[dtype]), (case, number)
            assert args[0].shape[0] < 9 or want["gradient of argument 0"].any()  # type: ignore[union-attr]


# -- what asks for gradients ----------------------------------------------------------------


def test_trained_scales_keep_their_gradients() -> None:
    module = Experts(BY_FEATURE)
    module.up_ef1.requires_grad_()
    args = routed(torch.float32)
    run = Proof(module, args, True)
    assert scaled_products(run.gm.graph) == 1
    assert "scales (to_dtype_1) may need a gradient" in "\n".join(map(str, run.reports))
    got, want = outcome(run, module, args), outcome(module, module, args)
    assert want["gradient of up_ef1"] is not None and not differences(got, want, 1e-5)


def test_parameters_that_nobody_trains_now() -> None:
    """nn.Parameter(w) asks for a gradient, under no_grad it gets none."""
    module, args = Experts(BY_FEATURE), routed(torch.float32)
    module.up = nn.Parameter(module.up.data)
    assert scaled_products(Proof(module, args, True).gm.graph) == 1
    with torch.no_grad():
        run = Proof(module, args, True)
        assert scaled_products(run.gm.graph) == 2
        torch.testing.assert_close(run(*args), module(*args))


def test_scales_made_of_something_trained() -> None:
    class Learned(Experts):
        def __init__(self) -> None:
            super().__init__(BY_FEATURE)
            self.log = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out, scale = torch.zeros_like(x), self.up_ef1 * self.log.exp()
            for e in range(E):
                t, k = torch.where(ids == e)
                h = torch.relu(nn.functional.linear(x[t], self.up[e].to(x.dtype) * scale[e]))
                down = self.down[e].to(x.dtype) * self.down_ef1[e]
                out.index_add_(0, t, nn.functional.linear(h, down) * weights[t, k, None])
            return out

    module, args = Learned(), routed(torch.float32)
    run = Proof(module, args, True)
    assert scaled_products(run.gm.graph) == 1
    got, want = outcome(run, module, args), outcome(module, module, args)
    assert want["gradient of log"] is not None and not differences(got, want, 1e-5)


# -- what must stay as it is ----------------------------------------------------------------


def along_inputs(m: Any, x: Tensor, e: int) -> Tensor:
    h = torch.relu(nn.functional.linear(x, m.up[e].to(x.dtype) * m.down_ef[e]))
    return nn.functional.linear(h, m.down[e].to(x.dtype) * m.up_ef[e])


def of_another_expert(m: Any, x: Tensor, e: int) -> Tensor:
    h = torch.relu(nn.functional.linear(x, m.up[e].to(x.dtype) * m.up_e[(e + 1) % E]))
    return nn.functional.linear(h, m.down[e].to(x.dtype) * m.down_e[e])


def with_an_offset(m: Any, x: Tensor, e: int) -> Tensor:
    h = torch.relu(nn.functional.linear(x, (m.up[e].to(x.dtype) - 3) * m.up_e[e]))
    return nn.functional.linear(h, m.down[e].to(x.dtype) / m.down_e[e])


def twice(m: Any, x: Tensor, e: int) -> Tensor:
    w = m.up[e].to(x.dtype) * m.up_e[e]
    return nn.functional.linear(torch.relu(nn.functional.linear(x, w)), m.down[e].to(x.dtype) * m.down_e[e]) + w.mean()


def of_blocks(scale: Any) -> Any:
    """scale(weight, scales of its blocks) for the first product; the second one is taken."""

    def run(m: Any, x: Tensor, e: int) -> Tensor:
        h = torch.relu(nn.functional.linear(x, m.up[e].to(x.dtype) * scale(m.up[e], m.up_b[e])))
        return nn.functional.linear(h, m.down[e].to(x.dtype) * m.down_e[e])

    return run


NO_BLOCKS = {
    "tiled by views": lambda w, s: s[None, :, None, :].expand(2, 3, 4, 2).reshape(6, 8),
    "tiled along rows alone": lambda w, s: s[:, None, None, :].expand(3, 2, 4, 2).reshape(6, 8),
    "cut": lambda w, s: s.repeat_interleave(4, 0).repeat_interleave(4, 1)[1:7],
    "a number each": lambda w, s: s.repeat_interleave(4, 1).repeat_interleave(2, 0) * torch.arange(1, 9),
}


@pytest.mark.parametrize("name", NO_BLOCKS)
def test_scales_that_are_not_of_blocks(name: str) -> None:
    test_other_forms_are_not_taken(of_blocks(NO_BLOCKS[name]), 1)


def test_scales_of_blocks_for_all_experts() -> None:
    """Not taken: they have no dimension of experts."""

    class Shared(Experts):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            up = self.up.to(x.dtype) * interleaved(self.up, self.up_b[1])
            for e in range(E):
                t, k = torch.where(ids == e)
                h = torch.relu(nn.functional.linear(x[t], up[e]))
                h = nn.functional.linear(h, self.down[e].to(x.dtype) * self.down_e[e])
                out.index_add_(0, t, h * weights[t, k, None])
            return out

    module, args = Shared(BY_FEATURE), routed(torch.float32)
    run = Proof(module, args, True)
    assert scaled_products(run.gm.graph) == 1
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-5)


@pytest.mark.parametrize(("form", "number"), [(along_inputs, 0), (with_an_offset, 0), (twice, 1)])
def test_other_forms_are_not_taken(form: Any, number: int) -> None:
    module, args = Experts(form), routed(torch.float32)
    run = Proof(module, args, True)
    assert scaled_products(run.gm.graph) == number
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-5)


def test_a_scale_of_another_expert() -> None:
    """Expert by expert, each with the scale that it names."""
    module, args = Experts(of_another_expert), routed(torch.float32)
    from moe_compile.errors import Refusal

    try:
        run = Proof(module, args, True)
    except Refusal:
        return
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-5)


# -- compiled -------------------------------------------------------------------------------


def compiled_agrees(module: nn.Module, args: tuple[Tensor, Tensor, Tensor], inner: str) -> str:
    """What the passes said."""
    reference = original(module)
    want = outcome(reference, reference, args)
    with regions() as found:
        got = outcome(compiled(module, inner=inner, fullgraph=True), module, args)
    assert not differences(got, want, RTOL[args[0].dtype])
    (region,) = found
    return "\n".join(region.passes)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["chosen", "listed buffers", "adapted"])
def test_one_graph_with_its_backward(name: str) -> None:
    said = compiled_agrees(LAYERS[name](), routed(torch.float32), "aot_eager")
    assert "FoldWeightScales: 2 applied, 0 refused" in said


@pytest.mark.usefixtures("fresh")
def test_under_inductor() -> None:
    said = compiled_agrees(LAYERS["widened before"](), routed(torch.bfloat16), "inductor")
    assert "FoldWeightScales: 2 applied, 0 refused" in said


@pytest.mark.usefixtures("fresh")
def test_buffers_and_a_call_without_gradients() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("w", (40 * torch.randn(E, D, D)).to(torch.float8_e4m3fn))
            self.register_buffer("scale", 0.01 * torch.rand(E))

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e in range(E):
                t, k = torch.where(ids == e)
                w = self.w[e].to(x.dtype) * self.scale[e]
                out.index_add_(0, t, nn.functional.linear(x[t], w) * weights[t, k, None])
            return out

    module, args = Buffers(), routed(torch.float32)
    with torch.no_grad(), regions() as found:
        ours = compiled(module, inner="aot_eager", fullgraph=True)(*args)
    torch.testing.assert_close(ours, module(*args))
    assert "FoldWeightScales: 1 applied, 0 refused" in "\n".join(found[0].passes)


def test_the_models_are_what_they_say() -> None:
    """A control: the weights are float8, frozen, and of a size that bf16 would round."""
    module = Experts(BY_FEATURE)
    assert module.up.shape == (E, F, D) and module.up.dtype == torch.float8_e4m3fn and not module.up.requires_grad
    assert frozen(torch.ones(1)).requires_grad is False
    wide = module.up.float() * module.up_ef1
    assert not torch.equal(wide, wide.bfloat16().float())


def test_an_exported_graph() -> None:
    """Its parameters are attributes, which say whether they are trained."""
    module, args = LAYERS["picked"](), routed(torch.float32)
    module.down_e11.requires_grad_()
    exported = torch.export.export(module, args).module()
    report = moe_compile.rewrite(exported)  # type: ignore[arg-type]
    assert report.regions[0].matched, str(report)
    assert scaled_products(exported.graph) == 1  # type: ignore[arg-type]
    torch.testing.assert_close(exported(*args), module(*args))


def test_what_is_kept_for_the_backward() -> None:
    """No wider stack, which would be four times as large as the float8 weights here; without the pass two are kept."""
    module, (x, ids, weights) = LAYERS["by feature"](), routed(torch.float32)
    x.requires_grad_()
    kept = []
    for skip in (frozenset({"fold_weight_scales"}), frozenset[str]()):
        run = Proof(module, (x, ids, weights), True, skip=skip)
        saved: list[Tensor] = []

        def keep(t: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = run(x, ids, weights)
        kept.append({tuple(t.shape) for t in saved if t.dtype == torch.float32 and t.numel() >= E * F * D})
        out.sum().backward()
    assert kept == [{(E, F, D), (E, D, F)}, set()]
