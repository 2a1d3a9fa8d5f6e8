"""Golden graphs for passes/fuse_experts.py.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.
"""

import operator
from functools import partial

import torch
from expecttest import TestCase
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile  # noqa: F401
from moe_compile.graph_text import graph_text
from moe_compile.passes.dispatch_experts import DispatchExperts
from moe_compile.passes.fold_routing_weights import FoldRoutingWeights
from moe_compile.passes.fuse_experts import FuseExperts
from moe_compile.series import Series
from tests.golden import D, E, F, Stacked, detected, inputs, run

moe_ep = torch.ops.moe_ep
linear, silu = nn.functional.linear, nn.functional.silu


class Gated(nn.Module):
    """Two gated experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(E, 2 * F, D))
        self.down = nn.Parameter(torch.randn(E, D, F))
        self.other = nn.Parameter(torch.randn(E, F, D))
        self.up_bias = nn.Parameter(torch.randn(E, 2 * F))
        self.down_bias = nn.Parameter(torch.randn(E, D))


def loop_of(body, weighted=True, index_add_dtype=None):
    """A loop over experts that compute `body(self, x, e)`; results are cast before they are added, if asked for."""

    def loop(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = body(self, x[t], e)
            y = y * weights[t, k, None] if weighted else y
            out.index_add_(0, t, y if index_add_dtype is None else y.to(index_add_dtype))
        return out

    return loop


def prepared(module, fn, *args):
    gm, _ = detected(module, fn, *args)
    DispatchExperts()(gm)
    FoldRoutingWeights()(gm)
    return gm


def swiglu(self, x, e):
    gate, up = linear(x, self.up[e]).chunk(2, -1)
    return linear(silu(gate) * up, self.down[e])


class TestFuseExperts(TestCase):
    def fused(self, module, fn):
        """The graph after the pass; outputs and gradients are those of the original."""
        args = inputs()
        gm = prepared(module, fn, *args)
        report = FuseExperts()(gm)
        x, _, weights = args
        leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
        ours, theirs = run(gm, module, *args), fn(module, *args)
        torch.testing.assert_close(ours, theirs)
        weight = torch.linspace(-1, 1, ours.numel()).view_as(ours)
        for a, b in zip(
            torch.autograd.grad((ours * weight).sum(), leaves, allow_unused=True),
            torch.autograd.grad((theirs * weight).sum(), leaves, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        return gm, report

    def calls(self, gm):
        return [
            graph_text(gm.graph).split("moe_ep.expert_mlp(")[1].split("\n")[0].rstrip(")")
            for n in gm.graph.find_nodes(op="call_function", target=torch.ops.moe_ep.expert_mlp.default)
        ]

    def test_writes_one_op(self):
        gm, report = self.fused(Stacked(), Stacked.loop)
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x: f32[5, 4]
ids: i64[5, 2]
weights: f32[5, 2]
up: f32[2, 3, 4]
down: f32[2, 4, 3]
expert_mlp_default: tuple = moe_ep.expert_mlp(x, ids, weights, [], [up], [down], 2, relu, False)
getitem_7: f32[5, 4] = expert_mlp_default[0]
return [getitem_7]""",
        )
        self.assertExpectedInline(
            str(report),
            """\
FuseExperts: 1 applied, 0 refused
  + combine_default_1""",
        )

    def test_both_halves_of_one_product(self):
        def split(self, x, e):
            gate, up = linear(x, self.up[e]).split(F, dim=-1)
            return linear(silu(gate) * up, self.down[e])

        def sliced(self, x, e):
            h = linear(x, self.up[e])
            return linear(h[:, F:] * silu(h[:, :F]), self.down[e])

        for body in (swiglu, split, sliced):
            gm, _ = self.fused(Gated(), loop_of(body))
            self.assertEqual(self.calls(gm), ["x, ids, weights, [], [up], [down], 2, silu, True"])

    def test_two_products(self):
        def body(self, x, e):
            return linear(silu(linear(x, self.other[e])) * linear(x, self.up[e, :F]), self.down[e])

        gm, report = self.fused(Gated(), loop_of(body))
        self.assertEqual(len(self.calls(gm)), 1)
        self.assertIn("1 applied", str(report))

    def test_activations(self):
        bodies = {
            "silu": lambda h: h * torch.sigmoid(h),
            "gelu": nn.functional.gelu,
            "gelu_tanh": lambda h: nn.functional.gelu(h, approximate="tanh"),
            "relu": torch.relu,
            "relu_squared": lambda h: torch.relu(h).square(),
        }
        for name, act in bodies.items():
            gm, _ = self.fused(
                Gated(), loop_of(lambda self, x, e, act=act: linear(act(linear(x, self.other[e])), self.down[e]))
            )
            self.assertEqual(self.calls(gm), [f"x, ids, weights, [], [other], [down], 2, {name}, False"])

    def test_without_weights(self):
        gm, _ = self.fused(Gated(), loop_of(swiglu, weighted=False))
        self.assertEqual(self.calls(gm), ["x, ids, None, [], [up], [down], 2, silu, True"])

    def test_leaves_other_bodies(self):
        """Each is a program that is nearly one of the above."""

        def up_first(self, x, e):
            up, gate = linear(x, self.up[e]).chunk(2, -1)
            return linear(silu(gate) * up, self.down[e])

        def not_halves(self, x, e):
            h = linear(x, self.up[e])
            return linear(silu(h[:, 1 : F + 1]) * h[:, F:], self.down[e])

        def one_half_twice(self, x, e):
            gate, _ = linear(x, self.up[e]).chunk(2, -1)
            return linear(silu(gate) * gate, self.down[e])

        def clamped(self, x, e):
            gate, up = linear(x, self.up[e]).chunk(2, -1)
            return linear(silu(gate).clamp(max=1.0) * up, self.down[e])

        def bias_of_one_product(self, x, e):
            gate = linear(x, self.up[e, :F], self.up_bias[e, :F])
            return linear(silu(gate) * linear(x, self.up[e, F:]), self.down[e])

        def bias_twice(self, x, e):
            return linear(torch.relu(linear(x, self.other[e], self.up_bias[e, :F]) + self.up_bias[e, F:]), self.down[e])

        def one_bias_a_row(self, x, e):
            return linear(torch.relu(linear(x, self.other[e]) + self.up_bias[e, :1]), self.down[e])

        def bias_times_two(self, x, e):
            h = torch.add(linear(x, self.other[e]), self.up_bias[e, :F], alpha=2)
            return linear(torch.relu(h), self.down[e])

        def bias_behind_the_activation(self, x, e):
            return linear(torch.relu(linear(x, self.other[e])) + self.up_bias[e, :F], self.down[e])

        def of_the_product(self, x, e):
            gate, up = linear(x, self.up[e]).chunk(2, -1)
            return linear(silu(gate * up), self.down[e])

        def residual(self, x, e):
            return swiglu(self, x, e) + x

        def used_twice(self, x, e):
            gate, up = linear(x, self.up[e]).chunk(2, -1)
            a = silu(gate) * up
            return linear(a, self.down[e]) * a.sum(1, keepdim=True)

        def of_other_rows(self, x, e):
            gate, up = linear(x * 2, self.other[e]), linear(x, self.other[e])
            return linear(silu(gate) * up, self.down[e])

        def one_number_a_row(self, x, e):
            return linear(silu(linear(x, self.other[e])) * linear(x, self.up[e, :1]), self.down[e])

        def one_gate_a_row(self, x, e):
            return linear(silu(linear(x, self.up[e, :1])) * linear(x, self.other[e]), self.down[e])

        def sigmoid_of_another(self, x, e):
            gate, up = linear(x, self.up[e]).chunk(2, -1)
            return linear(gate * torch.sigmoid(up), self.down[e])

        def cubed(self, x, e):
            return linear(torch.relu(linear(x, self.other[e])) ** 3, self.down[e])

        bodies = (up_first, not_halves, one_half_twice, clamped, bias_of_one_product,
                  bias_twice, one_bias_a_row, bias_times_two, bias_behind_the_activation, of_the_product, residual, used_twice,
                  of_other_rows, one_number_a_row, one_gate_a_row, sigmoid_of_another, cubed)  # fmt: skip
        for body in bodies:
            with self.subTest(body.__name__):
                gm, report = self.fused(Gated(), loop_of(body))
                self.assertEqual(self.calls(gm), [], body.__name__)
                self.assertEqual(str(report), "FuseExperts: 0 applied, 0 refused")

    def test_biases(self):
        def body(self, x, e):
            gate, up = linear(x, self.up[e], self.up_bias[e]).chunk(2, -1)
            return linear(silu(gate) * up, self.down[e], self.down_bias[e])

        def only_the_last(self, x, e):
            return swiglu(self, x, e) + self.down_bias[e]

        def of_two_products(self, x, e):
            gate, up = self.up[e, :F], self.up_bias[e]
            return linear(silu(linear(x, gate, up[:F])) * linear(x, self.other[e], up[F:]), self.down[e])

        calls = []
        for one in (body, only_the_last, of_two_products):
            gm, _ = self.fused(Gated(), loop_of(one))
            calls += self.calls(gm)
        self.assertExpectedInline(
            "\n".join(calls),
            """\
x, ids, weights, [], [up], [down], 2, silu, True, up_bias, down_bias
x, ids, weights, [], [up], [down], 2, silu, True, None, down_bias
x, ids, weights, [slice_tensor], [other], [down], 2, silu, True, cat_default, None""",
        )

    def test_limits_and_pairs(self):
        """As OpenAI's gpt-oss has them, and parts of it."""

        def gpt_oss(self, x, e, alpha=1.702, limit=0.7):
            h = x @ self.up[e].t() + self.up_bias[e]
            gate, up = h[..., ::2].clamp(min=None, max=limit), h[..., 1::2].clamp(min=-limit, max=limit)
            return (up + 1) * (gate * torch.sigmoid(gate * alpha)) @ self.down[e].t() + self.down_bias[e]

        def limits(self, x, e):
            gate, up = linear(x, self.up[e]).chunk(2, -1)
            return linear(silu(torch.clamp_max(gate, 1)) * up.clamp(-1, 1), self.down[e])

        def shift(self, x, e):
            gate, up = linear(x, self.up[e]).chunk(2, -1)
            return linear((up + -2.0) * nn.functional.gelu(gate), self.down[e])

        def quick(self, x, e):
            h = linear(x, self.other[e])
            return linear(h * torch.sigmoid(1.5 * h), self.down[e])

        def limited_relu(self, x, e):
            return linear(torch.relu(linear(x, self.other[e]).clamp(max=0.5)) ** 2, self.down[e])

        calls = []
        for one in (gpt_oss, limits, shift, quick, limited_relu):
            gm, _ = self.fused(Gated(), loop_of(one))
            calls += self.calls(gm)
        self.assertExpectedInline(
            "\n".join(calls),
            """\
x, ids, weights, [], [up], [down], 2, silu alpha=1.702 limit=0.7 shift=1.0 pairs, True, up_bias, down_bias
x, ids, weights, [], [up], [down], 2, silu limit=1.0, True
x, ids, weights, [], [up], [down], 2, gelu shift=-2.0, True
x, ids, weights, [], [other], [down], 2, silu alpha=1.5, False
x, ids, weights, [], [other], [down], 2, relu_squared limit=0.5, False""",
        )

    def test_leaves_what_is_nearly_limited(self):
        def body(gate_limits=(None, 0.7), up_limits=(-0.7, 0.7), pairs=(0, 1, 2, 2), sigmoid_of=1.702, factor=None):
            def one(self, x, e):
                h, (a, b, first, second) = linear(x, self.up[e]), pairs
                gate, up = h[:, a::first], h[:, b::second]
                gate = gate.clamp(*gate_limits) if gate_limits else gate
                up = up.clamp(*up_limits) if up_limits else up
                weight = torch.sigmoid(sigmoid_of(gate, h) if callable(sigmoid_of) else gate * sigmoid_of)
                return linear((factor(up) if factor else up + 1) * (gate * weight), self.down[e])

            return one

        near = [
            body(gate_limits=(-0.7, 0.7)),
            body(gate_limits=(None, 0.8)),
            body(gate_limits=(0.7, None)),
            body(gate_limits=(None, -0.7), up_limits=None),
            body(gate_limits=None),
            body(up_limits=None),
            body(up_limits=(-0.6, 0.7)),
            body(up_limits=(None, 0.7)),
            body(pairs=(1, 0, 2, 2)),
            body(pairs=(0, 0, 2, 2)),
            body(sigmoid_of=lambda gate, h: gate + 1.702),
            body(sigmoid_of=lambda gate, h: h[:, ::2] * 1.702),
            body(gate_limits=(None, 1e-40), up_limits=(-1e-40, 1e-40)),
            body(sigmoid_of=1e35),
            body(factor=lambda up: 2 * up),
            body(factor=lambda up: torch.add(up, 1, alpha=1) * up),
            body(factor=lambda up: (up + 1).clamp(-1, 1)),
        ]
        for number, one in enumerate(near):
            with self.subTest(number):
                gm, _ = self.fused(Gated(), loop_of(one))
                self.assertEqual(self.calls(gm), [])

    def prepared_in(self, dtype, of_weights, body=swiglu):
        module, (x, ids, weights) = Gated().to(dtype), inputs()
        args = x.to(dtype), ids, weights.to(of_weights)
        return module, args, prepared(module, loop_of(body, index_add_dtype=dtype), *args)

    def test_bfloat16(self):
        """With routing weights of bf16 or, as most routers give them, f32; errors against float64."""
        for of_weights in (torch.bfloat16, torch.float32):
            module, (x, ids, weights), gm = self.prepared_in(torch.bfloat16, of_weights)
            FuseExperts()(gm)
            self.assertEqual(len(self.calls(gm)), 1)
            loop, double = loop_of(swiglu, index_add_dtype=x.dtype), Gated().bfloat16().double()
            exact = self.results(double, partial(loop_of(swiglu), double), x.double(), ids, weights.double())
            theirs = self.results(module, partial(loop, module), x, ids, weights)
            ours = self.results(module, partial(run, gm, module), x, ids, weights)
            for mine, other, wanted in zip(ours, theirs, exact, strict=True):
                self.assertEqual(mine.dtype, other.dtype)
                error = (mine - wanted).abs().max() / wanted.abs().max()
                self.assertLess(error, 2.0**-6)
                self.assertGreater(error, 0)

    def results(self, module, call, x, ids, weights):
        """The output and all gradients, of x, the routing weights and the parameters that are used."""
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        out = call(x, ids, weights)
        factor = torch.linspace(-1, 1, out.numel()).view_as(out).bfloat16()
        return [out, *torch.autograd.grad((out * factor).sum(), [x, weights, module.up, module.down])]

    def test_bfloat16_with_casts_between(self):
        """An activation computed in f32 stays one: the general ops say that, `expert_mlp` does not."""

        def wide_activation(self, x, e):
            gate, up = linear(x, self.up[e]).chunk(2, -1)
            return linear(silu(gate.float()).to(x.dtype) * up, self.down[e])

        def wide_product(self, x, e):
            gate, up = linear(x, self.up[e]).chunk(2, -1)
            return linear((silu(gate).float() * up.float()).to(x.dtype), self.down[e])

        def wide_result(self, x, e):
            return swiglu(self, x, e).float()

        def wide_rows(self, x, e):
            gate, up = linear(x.float(), self.up[e].float()).chunk(2, -1)
            return linear((silu(gate) * up).to(x.dtype), self.down[e])

        for body in (wide_activation, wide_product, wide_result, wide_rows):
            with self.subTest(body.__name__):
                _, _, gm = self.prepared_in(torch.bfloat16, torch.bfloat16, body)
                self.assertEqual(str(FuseExperts()(gm)), "FuseExperts: 0 applied, 0 refused")

    def test_declines_other_dtypes(self):
        half, single, double = torch.float16, torch.float32, torch.float64
        reasons = []
        for dtype, of_weights in ((half, half), (double, double), (torch.bfloat16, double), (single, torch.bfloat16)):
            _, _, gm = self.prepared_in(dtype, of_weights)
            reasons.append(str(FuseExperts()(gm)))
        self.assertExpectedInline(
            "\n".join(reasons),
            """\
FuseExperts: 0 applied, 1 refused
  - combine_default_1: no fused kernel for torch.float16 on cpu, routing weights torch.float16
FuseExperts: 0 applied, 1 refused
  - combine_default_1: no fused kernel for torch.float64 on cpu, routing weights torch.float64
FuseExperts: 0 applied, 1 refused
  - combine_default_1: no fused kernel for torch.bfloat16 on cpu, routing weights torch.float64
FuseExperts: 0 applied, 1 refused
  - combine_default_1: no fused kernel for torch.float32 on cpu, routing weights torch.bfloat16""",
        )

    def on_cuda(self, dtype, of_weights, ids=torch.int64, num_experts=E):
        """The report on a graph of fake CUDA tensors, and the calls that it has then."""

        def layer(x, i, up, down, weights):
            rows, offsets, order = moe_ep.dispatch(x, i, num_experts)
            gate, up = moe_ep.grouped_gemm(rows, [up], offsets).chunk(2, -1)
            y = moe_ep.grouped_gemm(silu(gate) * up, [down], offsets)
            return moe_ep.combine(y, weights, order, offsets, 2)

        with FakeTensorMode():
            x, up, down, weights = (
                torch.empty(*s, dtype=t, device="cuda")
                for s, t in (
                    ((5, D), dtype),
                    ((num_experts, 2 * F, D), dtype),
                    ((num_experts, D, F), dtype),
                    ((5, 2), of_weights),
                )
            )
            gm = make_fx(layer)(x, torch.empty(5, 2, dtype=ids, device="cuda"), up, down, weights)
        return str(FuseExperts()(gm)), self.calls(gm)

    def test_on_cuda(self):
        half, single, bf16 = torch.float16, torch.float32, torch.bfloat16
        for pair in ((bf16, bf16), (bf16, single), (half, half), (single, single)):
            report, calls = self.on_cuda(*pair)
            self.assertEqual(calls, ["x_1, i_1, weights_1, [], [up_1], [down_1], 2, silu, True"])
            self.assertEqual(report, "FuseExperts: 1 applied, 0 refused\n  + combine")

    def test_a_series_on_cuda(self):
        """One input for like tensors of like modules (series.py): as many as it has, which must be the experts."""

        def layer(x, i, gate, up, down):
            rows, offsets, order = moe_ep.dispatch(x, i, 5)
            h = silu(moe_ep.grouped_gemm(rows, [gate], offsets)) * moe_ep.grouped_gemm(rows, [up], offsets)
            return moe_ep.combine(moe_ep.grouped_gemm(h, [down], offsets), None, order, offsets, 2)

        for count, fused in ((5, 1), (4, 0)):
            with FakeTensorMode():
                one = [torch.empty(*s, device="cuda") for s in ((F, D), (F, D), (D, F))]
                x, ids = torch.empty(5, D, device="cuda"), torch.empty(5, 2, dtype=torch.int64, device="cuda")
                gm = make_fx(layer)(x, ids, *(w.expand(5, -1, -1) for w in one))
            for node in gm.graph.find_nodes(op="call_function", target=moe_ep.grouped_gemm.default):
                (weight,) = node.args[1]
                weight.meta["val"] = Series(one[2 if node.args[1][0].name.startswith("down") else 0], ("w",) * count)
                node.args = (node.args[0], weight, node.args[2])
            self.assertIn(f"{fused} applied, {1 - fused} refused", str(FuseExperts()(gm)))

    def test_declines_on_cuda_what_no_kernel_takes(self):
        half, single, double = torch.float16, torch.float32, torch.float64
        cases = ((half, single), (double, double), (torch.bfloat16, double), (single, torch.bfloat16))
        declined = [self.on_cuda(*pair) for pair in cases]
        declined += [self.on_cuda(single, single, num_experts=1023), self.on_cuda(single, single, ids=torch.uint16)]
        self.assertEqual([calls for _, calls in declined], [[]] * 6)
        self.assertExpectedInline(
            "\n".join(report.splitlines()[1] for report, _ in declined),
            """\
  - combine: no fused kernel for torch.float16 on cuda: rows are torch.float16, routing weights torch.float32
  - combine: no fused kernel for torch.float64 on cuda: x is torch.float64 and up is torch.float64, expected one of bf16, f16, f32
  - combine: no fused kernel for torch.bfloat16 on cuda: rows are torch.bfloat16, routing weights torch.float64
  - combine: no fused kernel for torch.float32 on cuda: rows are torch.float32, routing weights torch.bfloat16
  - combine: no fused kernel for torch.float32 on cuda: 2 of 1023 experts, expected at least one of 1 to 1022
  - combine: no fused kernel for torch.float32 on cuda: ids are torch.uint16 with 2 dimensions, expected integers with 2""",
        )

    def test_declines_rows_that_others_read(self):
        """A second region on the same dispatch, as a graph written by hand may have it."""
        args = inputs()
        gm = prepared(Gated(), loop_of(swiglu), *args)
        (dispatch,) = gm.graph.find_nodes(op="call_function", target=torch.ops.moe_ep.dispatch.default)
        rows = next(n for n in dispatch.users if n.args[1] == 0)
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            total = gm.graph.call_function(operator.neg, (rows,))
        output.args = ([*output.args[0], total],)
        self.assertEqual(str(FuseExperts()(gm)), "FuseExperts: 0 applied, 0 refused")
