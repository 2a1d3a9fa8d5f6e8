"""The CPU forms of the ops (moe_compile/cpu.py) against the definitions in ops.py, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import moe_compile  # noqa: F401  registers the CPU forms
from moe_compile import cpu, native, ops
from moe_compile.activations import between

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (T, K, E): empty experts, one expert takes all, more experts than rows, crowded, odd sizes
ROUTINGS = {"even": (64, 2, 8), "few": (3, 2, 16), "one": (1, 1, 1), "crowded": (400, 1, 4), "odd": (77, 3, 5)}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"rtol": 8 * eps, "atol": 60 * eps}


def routing(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T, K, E = ROUTINGS[name]
    ids = torch.zeros(T, K, dtype=torch.int64) if name == "crowded" else torch.rand(T, E).argsort(1)[:, :K]
    return ids, *ops.sort_by_expert(ids, E)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("layout", ["stacked", "separate", "transposed", "strided"])
def test_grouped_gemm(name: str, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    ids, order, offsets = routing(name)
    (E,), D, F = offsets.shape, 12, 20
    x = torch.randn(order.shape[0], D, dtype=dtype)
    w = torch.randn(E, F, 2 * D, dtype=dtype)[:, :, ::2] if layout == "strided" else torch.randn(E, F, D, dtype=dtype)
    if layout == "transposed":
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    weights = list(w.unbind(0)) if layout == "separate" else [w]
    expected = ops.grouped_gemm_reference(x.double(), [v.double() for v in weights], offsets)
    torch.testing.assert_close(cpu.grouped_gemm(x, weights, offsets).double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
def test_gradients_of_a_layer(name: str, dtype: torch.dtype) -> None:
    """dispatch, grouped_gemm, combine: outputs and all gradients, twice the same."""
    torch.manual_seed(0)
    T, K, E = ROUTINGS[name]
    ids, _, _ = routing(name)
    leaves = [torch.randn(T, 12), torch.randn(E, 20, 12), torch.rand(T, K)]

    def run(dtype):
        x, w, weights = [v.to(dtype).requires_grad_() for v in leaves]
        rows, offsets, order = torch.ops.moe_ep.dispatch(x, ids, E)
        y = torch.ops.moe_ep.grouped_gemm(rows, [w], offsets)
        out = torch.ops.moe_ep.combine(y, weights, order, offsets, K)
        first = torch.autograd.grad(out.sum(), [x, w, weights], retain_graph=True)
        second = torch.autograd.grad(out.sum(), [x, w, weights])
        assert all(map(torch.equal, first, second))
        return out, *first

    for ours, exact in zip(run(dtype), run(torch.float64), strict=True):
        # rounded inputs differ from the exact ones, beside the rounding of the sums
        bound = 4 * torch.finfo(dtype).eps * exact.abs().max().item() * 8
        assert (ours.double() - exact).abs().max().item() <= bound + 1e-12


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pairs_that_nobody_takes_add_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[0, 5], [-1, 1], [9, 9]])
    order, offsets = ops.sort_by_expert(ids, 4)
    y, weights, dout = torch.randn(6, 8, dtype=dtype), torch.rand(3, 2, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    y[int(offsets[-1]) :] = float("nan")
    out = cpu.combine(y, weights, order, offsets, 2)
    dy, dweights = cpu.combine_backward(dout, torch.nan_to_num(y), weights, order, offsets)
    assert torch.isfinite(out).all() and torch.equal(out[2], torch.zeros(8, dtype=dtype))
    assert not dy[int(offsets[-1]) :].any() and not dweights[2].any()


ODD_IDS = torch.tensor([[0, 5, 2], [-1, 1, 1], [9, 9, 9], [3, 0, 2], [2**40, -(2**63), 3]])


@pytest.mark.parametrize("wide", [False, True], ids=["weights as rows", "weights f32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weighted_sums_and_their_gradients(dtype: torch.dtype, wide: bool) -> None:
    """Sums of f32 products in the order of k, rounded once; rows of nobody stay out, whatever their weight is."""
    torch.manual_seed(0)
    order, offsets = ops.sort_by_expert(ODD_IDS, 4)
    kept, of = int(offsets[-1]), torch.float32 if wide else dtype
    close = {"rtol": torch.finfo(of).eps, "atol": 1e-6}
    for D in (1, 15, 16, 40, 64, 100, 130):
        y, weights, dout = torch.randn(15, D).to(dtype), torch.randn(5, 3).to(of), torch.randn(5, D).to(of)
        y[kept:] = float("nan")
        weights[2] = float("inf")
        args = weights.t().contiguous().t(), order, offsets
        got, expected = cpu.combine(y, *args, 3), ops.combine_reference(y, *args, 3)
        assert got.dtype == expected.dtype == of
        torch.testing.assert_close(got, expected, **close)
        assert not got[2].any()
        ones = cpu.combine(y, None, order, offsets, 3)
        torch.testing.assert_close(ones, ops.combine_reference(y, None, order, offsets, 3), rtol=1e-2, atol=1e-2)
        weights[2] = 0
        (dy, dw), theirs = (f(dout, y, *args) for f in (cpu.combine_backward, ops.combine_backward_reference))
        assert dy.dtype == dtype and dw.dtype == of and not dy[kept:].any() and not dw[2].any()
        torch.testing.assert_close(dy, theirs[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(dw, theirs[1], rtol=torch.finfo(of).eps, atol=2e-5)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize(("T", "K", "E"), [(0, 2, 4), (1, 1, 1), (3, 2, 16), (77, 3, 5), (5000, 3, 7), (3000, 8, 200)])
def test_pairs_are_sorted_as_defined(T: int, K: int, E: int, ids_dtype: torch.dtype) -> None:
    """Also by several threads, and where some ids are of nobody, and others strided."""
    torch.manual_seed(0)
    ids = torch.randint(0 if ids_dtype == torch.uint8 else -2, E + 2, (K, T)).to(ids_dtype).t()
    x = torch.randn(T, 9)
    expected = ops.dispatch_reference(x, ids, E)
    for got, want in zip(torch.ops.moe_ep.dispatch(x, ids, E), expected, strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype
    with one_thread():
        assert all(map(torch.equal, cpu.dispatch(x.t().contiguous().t(), ids, E), expected))
    if K == 3:
        assert all(map(torch.equal, cpu.dispatch(x[:5], ODD_IDS, E), ops.dispatch_reference(x[:5], ODD_IDS, E)))


def test_mixed_dtypes_go_to_the_definition() -> None:
    ids, order, offsets = routing("even")
    y, weights = torch.randn(128, 8), torch.rand(64, 2).bfloat16()
    assert cpu.why_not_combine(y, weights) == "rows are torch.float32, weights torch.bfloat16"
    expected = ops.combine_reference(y, weights, order, offsets, 2)
    assert expected.dtype == torch.float32
    assert torch.equal(cpu.combine(y, weights, order, offsets, 2), expected)


def test_says_why_not_in_one_call() -> None:
    assert native.why_not(torch.empty(2, 2)) is None and native.why_not(torch.empty(2).bfloat16()) is None
    assert native.why_not(torch.empty(2).double()) == "no C++ product of torch.float64"
    mixed = torch.empty(2), torch.empty(2).bfloat16()
    assert native.why_not(*mixed) == "no C++ product of torch.bfloat16 and torch.float32"
    assert native.layout([torch.empty(4, 6)[:, ::2]]) is None
    assert native.layout([torch.empty(4, 6), torch.empty(6, 4).t()]) is None
    assert native.layout([torch.empty(3, 6, 4).transpose(1, 2)]) == (True, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_compiler_the_numbers_are_the_same(dtype, monkeypatch, caplog) -> None:
    """And one warning says so."""

    def missing() -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(native, "prepare", lambda dtype: missing)
    native.library.cache_clear()
    ids, order, offsets = routing("odd")
    x, w = torch.randn(order.shape[0], 33).to(dtype), torch.randn(5, 17, 33).to(dtype)
    weights = torch.rand(77, 3)

    def results():
        y = cpu.grouped_gemm(x, [w], offsets)
        return y, cpu.grouped_gemm_dw(x[:, :17], x, offsets), cpu.combine(x, weights, order, offsets, 3)

    got = results()
    native.library.cache_clear()
    monkeypatch.undo()
    for mine, other in zip(got, results(), strict=True):
        torch.testing.assert_close(mine, other)
    assert caplog.text.count("No working C++ compiler found") == 1


SIZES = [(1, 1), (3, 15), (16, 17), (63, 64), (65, 130), (130, 1030), (1030, 65)]
NARROW = [torch.bfloat16, torch.float16]


# f, d around the sizes of tiles, panels and blocks; rows around those of tiles, tasks and blocks of k
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 7, 10, 11, 241, 300])
@pytest.mark.parametrize(("f", "d"), SIZES)
def test_products_of_any_size(rows: int, f: int, d: int, dtype: torch.dtype) -> None:
    check_products(rows, f, d, dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("f", "d"), [(5, 4099), (2100, 40), (40, 2100)])
def test_products_in_several_blocks(f: int, d: int, dtype: torch.dtype) -> None:
    """Sums of narrow numbers wait as f32 for the next block of k; wide rows go by strips of columns."""
    check_products(600, f, d, dtype)


def check_products(rows: int, f: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([rows, 0, 2, rows // 2])
    offsets = counts.cumsum(0).int()
    R = int(offsets[-1]) + 3  # three rows that nobody takes
    x, dy = torch.randn(R, d).to(dtype), torch.randn(R, f).to(dtype)
    x[-3:] = dy[-3:] = float("nan")
    w = torch.randn(4, f, d).to(dtype)
    for weight in (w, w.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_near(cpu.grouped_gemm(x, [weight], offsets), ops.grouped_gemm_reference, x, [w], offsets)
    assert_near(cpu.grouped_gemm_dw(dy, x, offsets), ops.grouped_gemm_dw_reference, dy, x, offsets)


def assert_near(got, definition, first, second, offsets) -> None:
    """Within a few roundings of the sum of the terms' sizes, number by number; and one rounding to a narrower type."""
    exact, size = (
        definition(f(first), [f(w) for w in second] if isinstance(second, list) else f(second), offsets)
        for f in (lambda v: v.double(), lambda v: v.double().abs())
    )
    bound = 8 * torch.finfo(torch.float32).eps * size
    if got.dtype in NARROW:
        info = torch.finfo(got.dtype)
        bound += (info.eps / 2 * exact.abs()).clamp_min(info.smallest_normal * info.eps)
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_columns_of_wider_tensors_are_added_to(transposed: bool, dtype: torch.dtype) -> None:
    """What expert_mlp's backward asks of the product: strided operands, y += ..., other columns and rows untouched."""
    torch.manual_seed(0)
    offsets = torch.tensor([20, 20, 57], dtype=torch.int32)
    wide_x, wide_y = torch.randn(60, 100).to(dtype), torch.randn(60, 90).to(dtype)
    x, w = wide_x[:, 31:64], torch.randn(3, 50, 33).to(dtype)
    if transposed:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    before = wide_y.clone()
    cpu._product(x, [w], offsets, wide_y[:, 7:57], add=True)
    exact = ops.grouped_gemm_reference(x.double(), [w.double()], offsets) + before[:, 7:57].double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(wide_y[:, 7:57].double(), exact, rtol=eps, atol=2e-5)
    assert torch.equal(wide_y[:, :7], before[:, :7]) and torch.equal(wide_y[:, 57:], before[:, 57:])
    assert torch.equal(wide_y[57:], before[57:])
    dw = cpu._weight_gradient(before[:, 7:57], x, offsets)
    expected = ops.grouped_gemm_dw_reference(before[:, 7:57].double(), x.double(), offsets)
    torch.testing.assert_close(dw.double(), expected, rtol=eps, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "lacking"),
    [
        (torch.bfloat16, ["__AVX512BF16__"]),
        (torch.float16, ["__AVX512BF16__", "__AVX512F__"]),
        (torch.bfloat16, ["__AVX512BF16__", "__AVX512F__", "__AVX2__"]),
    ],
    ids=str,
)
def test_other_machines(dtype: torch.dtype, lacking: list[str], monkeypatch) -> None:
    """The text as a machine without these instructions compiles it."""
    undefined = "".join(f"#undef {name}\n" for name in lacking)
    monkeypatch.setitem(native.NUMBERS, dtype, undefined + native.NUMBERS[dtype])
    other = native._load(dtype)
    for name, arguments in native._ARGUMENTS.items():
        getattr(other, name).argtypes = arguments
    monkeypatch.setattr(native, "library", lambda dtype: other)
    for f, d in SIZES:
        check_products(7, f, d, dtype)
        check_products(4, f, d, dtype)
    torch.manual_seed(0)
    h, a = torch.randn(3, 21).to(dtype), torch.empty(3, 21, dtype=dtype)
    h[0, 0], h[1, 20] = float("nan"), float("inf")
    other.gate(3, 1, 0, 0, h.data_ptr(), 21, 0, 0, a.data_ptr(), 3, 21, 1)
    assert torch.equal(a.nan_to_num(7), torch.relu(h).nan_to_num(7)) and a[0, 0].isnan()
    pairs = torch.randn(3, 42).to(dtype)
    other.gate(3, 1, 0.5, 0, pairs.data_ptr(), 42, 0, 1, a.data_ptr(), 3, 21, 1)
    assert torch.equal(a, between(pairs.float(), "relu limit=0.5 pairs", True).to(dtype))
    # sums half way between two numbers of the type go to the even one
    eps = torch.finfo(dtype).eps
    pieces = torch.tensor([[1.0, eps / 2], [1.0, 3 * eps / 2], [1.0, eps], [-1.0, -eps / 2]])
    got = cpu.grouped_gemm(pieces.to(dtype), [torch.ones(1, 1, 2, dtype=dtype)], torch.tensor([4], dtype=torch.int32))
    assert torch.equal(got[:, 0], pieces.sum(1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """Whatever other rows the expert has, and for any number of threads."""
    torch.manual_seed(0)
    for d in (70, 71):
        x, w = torch.randn(500, d).to(dtype), torch.randn(2, 90, d).to(dtype)
        for weight in (w, w.transpose(1, 2).contiguous().transpose(1, 2)):
            all_rows = cpu.grouped_gemm(x, [weight], torch.tensor([400, 500], dtype=torch.int32))
            for rows in range(1, 14):
                start, offsets = 400 - rows, torch.tensor([rows, rows + 3], dtype=torch.int32)
                with one_thread():
                    few = cpu.grouped_gemm(x[start:403], [weight], offsets)
                assert torch.equal(all_rows[start:403], few)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    """And for any number of threads."""
    torch.manual_seed(0)
    ids, order, offsets = routing("odd")
    x, w = torch.randn(order.shape[0], 330).to(dtype), torch.randn(5, 170, 330).to(dtype)
    for call in (lambda: cpu.grouped_gemm(x, [w], offsets), lambda: cpu.grouped_gemm_dw(x[:, :170], x, offsets)):
        first = call()
        assert torch.equal(first, call())
        with one_thread():
            assert torch.equal(first, call())


def test_bf16_is_as_precise_as_one_product_after_another() -> None:
    """Both round a sum of f32 once; errors are compared in the mean square, against the same operands in float64."""
    torch.manual_seed(0)
    ids, order, offsets = routing("odd")
    R = order.shape[0]
    x, dy, w = (torch.randn(*s).bfloat16() for s in ((R, 200), (R, 150), (5, 150, 200)))
    products = (cpu.grouped_gemm, ops.grouped_gemm_reference, x, [w]), (
        cpu.grouped_gemm, ops.grouped_gemm_reference, dy, [w.transpose(1, 2)]), (
        cpu.grouped_gemm_dw, ops.grouped_gemm_dw_reference, dy, x)  # fmt: skip
    for ours, definition, a, b in products:
        wide = [v.double() for v in b] if isinstance(b, list) else b.double()
        exact = definition(a.double(), wide, offsets)
        mine, theirs = ((f(a, b, offsets) - exact).square().mean().sqrt() for f in (ours, definition))
        assert 0 < mine <= 1.01 * theirs


@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    [
        (torch.zeros(3, 2), 4, r"expert ids are torch.float32 \(3, 2\), expected an integer \[T, K\]"),
        (torch.zeros(3, dtype=torch.int64), 4, r"expert ids are torch.int64 \(3,\), expected an integer \[T, K\]"),
        (torch.zeros(3, 0, dtype=torch.int64), 4, "0 experts a token of 4"),
    ],
)
def test_dispatch_names_bad_ids(ids: torch.Tensor, experts: int, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.moe_ep.dispatch(torch.randn(3, 4), ids, experts)


def test_check_ids_raises_as_one_hot_does() -> None:
    assert torch.equal(torch.ops.moe_ep.check_ids(torch.tensor([[0, 3]]), 4), torch.tensor([[0, 3]]))
    with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
        torch.ops.moe_ep.check_ids(torch.tensor([[0, 4]]), 4)


def test_products_ignore_autocast() -> None:
    """A backward inside an autocast block calls the ops there; their dtype is their arguments'."""
    ids, order, offsets = routing("odd")
    x, w = torch.randn(order.shape[0], 33), torch.randn(5, 17, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.grouped_gemm_reference(x, [w], offsets)
        dw = ops.grouped_gemm_dw_reference(inside, x, offsets)
    assert torch.equal(inside, ops.grouped_gemm_reference(x, [w], offsets))
    assert torch.equal(dw, ops.grouped_gemm_dw_reference(inside, x, offsets))
