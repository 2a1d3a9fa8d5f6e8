"""moe_compile/cuda.py: each op by its kernel, where the kernel takes the arguments, else by its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile import cuda, expert_mlp, ops
from moe_compile.activations import ACTIVATIONS
from moe_compile.kernels import dispatch as dispatch_file
from moe_compile.kernels import gated_gemm, grouped_gemm, settings

from .conftest import DEVICE, DTYPES, random

E, K, T, D, F = 3, 2, 7, 16, 32


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    ids = torch.tensor([[0, 2], [2, 1], [5, 0], [2, 0], [0, 2], [-1, 2], [2, 0]], device=DEVICE)
    x, w, weights = random(T, D, dtype=dtype), random(E, F, D, dtype=dtype), random(T, K, dtype=dtype, seed=1)
    x_RD, offsets, order = ops.dispatch_reference(x, ids, E)
    y = random(T * K, F, dtype=dtype, seed=2)
    return {
        "dispatch": (x, ids, E),
        "grouped_gemm": (x_RD, [w], offsets),
        "grouped_gemm_dw": (y, x_RD, offsets),
        "combine": (y, weights, order, offsets, K),
        "combine_backward": (random(T, F, dtype=dtype, seed=3), y, weights, order, offsets),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", arguments(torch.float32))
def test_values(op: str, dtype: torch.dtype) -> None:
    args = arguments(dtype)[op]
    want = getattr(ops, f"{op}_reference")(*args)
    torch.testing.assert_close(getattr(cuda, op)(*args), want, rtol=1e-5, atol=1e-5)


def test_separate_weights() -> None:
    x, (w,), offsets = arguments(torch.float32)["grouped_gemm"]
    torch.testing.assert_close(cuda.grouped_gemm(x, list(w), offsets), cuda.grouped_gemm(x, [w], offsets))


def test_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for f32; the definition for f64, which no kernel takes."""
    kernels: list[torch.dtype] = []
    run = grouped_gemm.launch
    monkeypatch.setattr(grouped_gemm, "launch", lambda x, *more: (kernels.append(x.dtype), run(x, *more))[1])
    for dtype in (torch.float32, torch.float64):
        cuda.grouped_gemm(*arguments(dtype)["grouped_gemm"])
    assert kernels == [torch.float32]


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU: the ops' own kernels are those of the CPU")
@pytest.mark.parametrize("op", arguments(torch.float32))
def test_registered(op: str) -> None:
    args = arguments(torch.float32)[op]
    torch.testing.assert_close(getattr(ops, op)(*args), getattr(ops, f"{op}_reference")(*args), rtol=1e-5, atol=1e-5)


# -- expert_mlp -----------------------------------------------------------------------------

IDS = {
    "mixed": torch.tensor([[0, 2], [2, 1], [5, 0], [2, 0], [0, 2], [-1, 2], [2, 0]]),
    "empty experts": torch.tensor([[2, 2]] * 7),
    "nobody": torch.full((7, 2), 9),
    "no tokens": torch.empty(0, 2, dtype=torch.int64),
}
FORMS = {"one stack": True, "two stacks": True, "separate": True, "plain": False, "plain separate": False}
GPT_OSS = "silu alpha=1.702 limit=1.0 shift=1.0 pairs"


def mlp_arguments(
    ids: str,
    form: str,
    dtype: torch.dtype,
    of_weights: torch.dtype | None,
    activation: str = "silu",
    biased: bool = False,
) -> tuple[Any, ...]:
    """What `expert_mlp` takes; down is [E, 24, F], so that its result is not as wide as the tokens."""
    gated = FORMS[form]
    i = IDS[ids].to(DEVICE)
    x, up, down = (
        0.5 * random(*size, dtype=dtype, seed=seed)
        for seed, size in enumerate(((i.shape[0], D), (E, 2 * F if gated else F, D), (E, 24, F)))
    )
    weights = None if of_weights is None else random(*i.shape, seed=4).abs().to(of_weights)
    groups = [[], [up], [down]]
    if form != "one stack":
        halves = list(up.chunk(2, 1)) if gated else [up]
        groups = [halves[:-1], halves[-1:], [down]]
    if form.endswith("separate"):
        groups = [[v.contiguous() for w in group for v in w] for group in groups]
    biases = [random(*w.shape[:2], dtype=dtype, seed=6) for w in (up, down)] if biased else []
    return x, i, weights, *groups, E, activation, gated, *biases


def everything(forward: Any, backward: Any, args: tuple[Any, ...], wide: bool = False) -> list[Tensor]:
    """out, h and all gradients, from the same numbers in f64 if `wide`."""

    def widened(v: Any) -> Any:
        return v.double() if wide and isinstance(v, Tensor) and v.is_floating_point() else v

    args = tuple([widened(v) for v in a] if isinstance(a, list) else widened(a) for a in args)
    x, _, weights, gate, up, down, _, activation, gated, *biases = args
    out, h, offsets, order = forward(*args)
    dout = widened(random(*out.shape, dtype=out.dtype if not wide else torch.float32, seed=9))
    back = (dout, x, h, weights, offsets, order, gate, up, down, activation, gated)
    return [out, h, *backward(*back, True, True, *biases)]


def assert_near(ours: list[Tensor], exact: list[Tensor]) -> None:
    """f32 sums in another order; half: some roundings of the largest number."""
    for mine, wanted in zip(ours, exact, strict=True):
        assert mine.shape == wanted.shape
        roundings = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}[mine.dtype]
        bound = roundings * torch.finfo(mine.dtype).eps * wanted.abs().max().item() if wanted.numel() else 0
        assert not mine.numel() or (mine.double() - wanted.double()).abs().max().item() <= bound + 1e-12


DEFINITION = expert_mlp.reference, expert_mlp.backward_reference
OURS = cuda.mlp, cuda.mlp_backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("ids", "form"), [*(("mixed", form) for form in FORMS), *((ids, "two stacks") for ids in [*IDS][1:])]
)
def test_mlp(ids: str, form: str, dtype: torch.dtype) -> None:
    args = mlp_arguments(ids, form, dtype, dtype)
    ours = everything(*OURS, args)
    assert_near(ours, everything(*DEFINITION, args, wide=True))
    assert all(map(torch.equal, ours, everything(*OURS, args)))
    theirs = everything(*DEFINITION, args)
    assert [(v.dtype, v.stride()) for v in ours] == [(v.dtype, v.stride()) for v in theirs]


@pytest.mark.parametrize(
    ("ids", "form", "dtype"),
    [
        *(("mixed", "one stack", dtype) for dtype in DTYPES),
        *(("mixed", form, torch.float32) for form in ("two stacks", "plain separate")),
        *((ids, "one stack", torch.float32) for ids in [*IDS][1:]),
    ],
)
def test_mlp_with_biases(ids: str, form: str, dtype: torch.dtype) -> None:
    activation = {"one stack": GPT_OSS, "two stacks": "silu limit=1.0 shift=1.0"}.get(form, "gelu")
    if dtype != torch.float32:  # a rounding may cross a limit
        activation = activation.replace("limit=1.0", "limit=99.0")
    args = mlp_arguments(ids, form, dtype, dtype if form == "one stack" else None, activation, biased=True)
    ours = everything(*OURS, args)
    exact = everything(*DEFINITION, args, wide=True)
    assert_near(ours, exact)
    assert [v.shape for v in ours] == [v.shape for v in exact] and len(ours) == 9


def test_mlp_with_one_bias() -> None:
    args = mlp_arguments("mixed", "one stack", torch.float32, torch.float32, GPT_OSS, biased=True)
    for biases in ((args[-2], None), (None, args[-1])):
        some = (*args[:-2], *biases)
        assert_near(everything(*OURS, some), everything(*DEFINITION, some, wide=True))


@pytest.mark.parametrize("of_weights", [torch.float32, None], ids=str)
@pytest.mark.parametrize("form", ["one stack", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_activations(activation: str, form: str, of_weights: torch.dtype | None) -> None:
    args = mlp_arguments("mixed", form, torch.float32, of_weights, activation)
    assert_near(everything(*OURS, args), everything(*DEFINITION, args, wide=True))


def test_mlp_is_run_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither definition is called, nor `dispatch`, which copies rows."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not a kernel")

    for module, name in ((expert_mlp, "reference"), (expert_mlp, "backward_reference"), (ops, "dispatch_reference")):
        monkeypatch.setattr(module, name, never)
    everything(*OURS, mlp_arguments("mixed", "one stack", torch.float32, torch.float32))


@pytest.mark.parametrize("form", ["one stack", "separate"])
def test_an_inference_writes_no_products_before_the_activation(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits without them."""
    args = mlp_arguments("mixed", form, torch.float32, torch.float32)
    kept: list[bool] = []
    run = gated_gemm.launch
    monkeypatch.setattr(gated_gemm, "launch", lambda *more: (kept.append(more[8]), run(*more))[1])
    assert torch.equal(cuda.mlp_result(*args), cuda.mlp(*args)[0])
    assert kept == [False, True]
    assert torch.equal(torch.ops.moe_ep_triton.expert_mlp_result(*args), cuda.mlp(*args)[0])
    with FakeTensorMode() as fakes:
        fake = torch.utils._pytree.tree_map_only(Tensor, fakes.from_tensor, args)
        assert torch.ops.moe_ep_triton.expert_mlp_result(*fake).shape == (7, 24)


def test_row_tiles_are_made_once(launched: list[str]) -> None:
    """For both products of a forward, by the sort, and for both of a backward; again where tiles have other sizes."""

    def made() -> int:
        number = launched.count("_row_tiles_kernel")
        launched.clear()
        return number

    args = mlp_arguments("mixed", "one stack", torch.float32, torch.float32)
    cuda.mlp(*args)
    assert made() == 0
    wanted = everything(*OURS, args)
    assert made() == 1
    with settings.pinned("grouped_gemm", "d packed", (32, 32, 16, 4, 2)):
        again = everything(*OURS, args)
    assert made() == 2  # in the backward the last weight is packed the other way
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(again, wanted, strict=True))
    x, ids, w = args[0], args[1], args[4][0]
    order, offsets, _, table = dispatch_file.route_rows(ids, E, 16)
    first = gated_gemm.gated_gemm(x, None, w, offsets, order, K, "silu", True, False)[0]
    assert made() == 1
    for rows, count in ((16, 0), (64, 1)):  # of another size: not taken
        how = "silu", True, False, None, table, rows
        assert torch.equal(gated_gemm.gated_gemm(x, None, w, offsets, order, K, *how)[0], first)
        assert made() == count


def test_mlp_only_what_is_asked() -> None:
    args = mlp_arguments("mixed", "two stacks", torch.float32, torch.float32)
    x, _, weights, gate, up, down, _, activation, gated, *_ = args
    out, h, offsets, order = cuda.mlp(*args)
    back = (torch.ones_like(out), x, h, weights, offsets, order, gate, up, down, activation, gated)
    whole = cuda.mlp_backward(*back, True, True)
    for of_x, of_params in ((True, False), (False, True), (False, False)):
        some = cuda.mlp_backward(*back, of_x, of_params)
        for i, asked in enumerate((of_x, True, of_params, of_params, of_params)):
            assert torch.equal(some[i], whole[i]) if asked else some[i].numel() == 0


def test_mlp_in_f16_keeps_small_weights_and_large_gradients() -> None:
    """Routing weights of 1e-4 leave the last weight's gradient its bits; a gradient past 65504 is scaled before."""
    x, ids, weights, *rest = mlp_arguments("mixed", "one stack", torch.float16, torch.float16)
    args = (0.05 * x, ids, torch.full_like(weights, 1e-4), *rest)
    ours, exact = everything(*OURS, args), everything(*DEFINITION, args, wide=True)
    theirs = everything(*DEFINITION, args)
    for mine, other, wanted in zip(ours, theirs, exact, strict=True):
        if wanted.numel():
            mine, other = ((v.double() - wanted).norm() / wanted.norm() for v in (mine, other))
            assert mine <= 1.5 * other + 1e-6
    _, _, _, gate, up, down, _, activation, gated, *_ = args
    out, h, offsets, order = cuda.mlp(*args)
    back = args[0], h, args[2], offsets, order, gate, up, [down[0] * 0 + 1], activation, gated, True, True
    grads = cuda.mlp_backward(torch.full_like(out, 4e4), *back)
    assert grads[0].isfinite().all() and grads[3].isfinite().all()


def test_mlp_goes_to_the_definition() -> None:
    for dtype, of_weights in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        args = mlp_arguments("mixed", "one stack", dtype, of_weights)
        assert all(map(torch.equal, everything(*OURS, args), everything(*DEFINITION, args)))


def test_why_not_mlp() -> None:
    def reason(dtype: torch.dtype, of_weights: torch.dtype | None, form: str = "one stack", **changes: Any) -> str:
        x, ids, weights, gate, up, down, E, activation, gated, *_ = mlp_arguments("mixed", form, dtype, of_weights)
        given = {"gate": gate, "up": up, "down": down, "num_experts": E, "top_k": 2, "activation": activation}
        return str(cuda.why_not_mlp(x, weights, **given | changes, gated=gated))

    half, single, bf16 = torch.float16, torch.float32, torch.bfloat16
    taken = [(half, half), (half, None), (single, single), (bf16, bf16), (bf16, single), (bf16, None)]
    assert [reason(*pair) for pair in taken] == ["None"] * 6
    assert {reason(single, single, form) for form in FORMS} == {"None"}
    assert reason(half, single) == "rows are torch.float16, routing weights torch.float32"
    assert reason(single, bf16) == "rows are torch.float32, routing weights torch.bfloat16"
    assert "x is torch.float64" in reason(torch.float64, torch.float64)
    assert "weights of 3 experts, expected 4" in reason(single, single, num_experts=4)
    assert "65 experts a token" in reason(single, single, top_k=65)
    assert "weights torch.float16" in reason(single, single, down=[torch.zeros(E, 24, F, dtype=half)])
    biases = torch.zeros(E, 24, dtype=half)
    given = mlp_arguments("mixed", "one stack", single, None)
    assert "a bias is of" in str(cuda.why_not_mlp(given[0], *given[2:7], 2, "silu", True, None, biases))
    assert "activation elu" in reason(single, single, activation="elu")


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU: the op's own kernel is that of the CPU")
def test_mlp_registered() -> None:
    args = mlp_arguments("mixed", "one stack", torch.float32, torch.float32)
    ops_ = torch.ops.moe_ep.expert_mlp, torch.ops.moe_ep.expert_mlp_backward
    assert all(map(torch.equal, everything(*ops_, args), everything(*OURS, args)))
