"""Golden graphs for passes/dispatch_experts.py.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.
"""

import torch
from expecttest import TestCase
from torch import nn

import moe_compile  # noqa: F401
from moe_compile.graph_text import graph_text
from moe_compile.passes.dispatch_experts import DispatchExperts
from tests.golden import Stacked, detected, gradients, inputs, run


class TestDispatchExperts(TestCase):
    def parity(self, gm, module, fn, args) -> None:
        x, _, weights = args
        leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
        ours, theirs = run(gm, module, *args), fn(module, *args)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
            torch.testing.assert_close(a, b)

    def test_writes_ragged_ops(self):
        module, args = Stacked(), inputs()
        gm, _ = detected(module, Stacked.loop, *args)
        report = DispatchExperts()(gm)
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x: f32[5, 4]
ids: i64[5, 2]
weights: f32[5, 2]
up: f32[2, 3, 4]
down: f32[2, 4, 3]
unsqueeze: f32[5, 2, 1] = aten.unsqueeze(weights, 2)
dispatch_default: tuple = moe_ep.dispatch(x, ids, 2)
getitem_4: f32[10, 4] = dispatch_default[0]
getitem_5: i32[2] = dispatch_default[1]
getitem_6: i32[10] = dispatch_default[2]
reshape_default: f32[10, 1] = aten.reshape(unsqueeze, [-1, 1])
index_tensor: f32[10, 1] = aten.index(reshape_default, [getitem_6])
grouped_gemm_default: f32[10, 3] = moe_ep.grouped_gemm(getitem_4, [up], getitem_5)
relu_default: f32[10, 3] = aten.relu(grouped_gemm_default)
grouped_gemm_default_1: f32[10, 4] = moe_ep.grouped_gemm(relu_default, [down], getitem_5)
mul_tensor: f32[10, 4] = aten.mul(grouped_gemm_default_1, index_tensor)
combine_default: f32[5, 4] = moe_ep.combine(mul_tensor, None, getitem_6, getitem_5, 2)
return [combine_default]""",
        )
        self.assertExpectedInline(
            str(report),
            """\
DispatchExperts: 1 applied, 0 refused
  + experts""",
        )
        self.parity(gm, module, Stacked.loop, args)

    def test_gathers_biases_and_norms_by_row(self):
        class Expert(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.up, self.scale = nn.LayerNorm(4), nn.Linear(4, 4), nn.Parameter(torch.rand(4))

            def forward(self, x):
                return x + torch.tanh(self.up(self.norm(x))) * self.scale

        class Listed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.experts = nn.ModuleList(Expert() for _ in range(2))

            def loop(self, x, ids, weights):
                out = torch.zeros_like(x)
                for e, expert in enumerate(self.experts):
                    t, k = torch.where(ids == e)
                    out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
                return out

        module, args = Listed(), inputs()
        gm, _ = detected(module, Listed.loop, *args)
        self.assertEqual(len(DispatchExperts()(gm).applied), 1)
        self.parity(gm, module, Listed.loop, args)

    def test_refuses_an_op_without_a_rule(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                y = (x[t] @ self.up[e].T @ self.down[e].T).lerp(x[t], self.up[e].sum().sigmoid())
                out.index_add_(0, t, y * weights[t, k, None])
            return out

        gm, found = detected(Stacked(), loop, *inputs())
        self.assertEqual(len(found.applied), 1)
        before = graph_text(gm.graph)
        report = DispatchExperts()(gm)
        self.assertEqual(graph_text(gm.graph), before)
        self.assertExpectedInline(
            str(report),
            """\
DispatchExperts: 0 applied, 1 refused
  - experts: no rule for aten.lerp.Tensor on rows and expert weights""",
        )

    def test_experts_without_weights_are_not_grouped(self):
        class Idle(Stacked):
            def loop(self, x, ids, weights):
                out = torch.zeros_like(x)
                for e in range(3):
                    t, k = torch.where(ids == e)
                    y = torch.relu(x[t] @ self.up[0].T) @ self.down[0].T if not e else torch.relu(x[t])
                    out.index_add_(0, t, y * weights[t, k, None])
                return out

        module, (x, _, weights) = Idle(3), inputs()
        args = x, torch.tensor([[0, 1], [2, 1], [2, 7], [-1, 0], [1, 0]]), weights
        gm, _ = detected(module, Idle.loop, *args)
        report = DispatchExperts()(gm)
        self.assertExpectedInline(
            str(report),
            """\
DispatchExperts: 2 applied, 0 refused
  + experts
  + experts_1""",
        )
        written = graph_text(gm.graph)
        assert written.count("moe_ep.dispatch(") == 1
        self.assertExpectedInline(
            "\n".join(written.splitlines()[-12:]),
            """\
reshape_default_2: f32[10, 1] = aten.reshape(unsqueeze, [-1, 1])
relu_default_1: f32[10, 4] = aten.relu(reshape_default_1)
mul_tensor_1: f32[10, 4] = aten.mul(relu_default_1, reshape_default_2)
reshape_default_3: f32[5, 2, 4] = aten.reshape(mul_tensor_1, [-1, 2, 4])
ge_scalar: b8[5, 2] = aten.ge.Scalar(sub_tensor, 0)
lt_scalar: b8[5, 2] = aten.lt.Scalar(sub_tensor, 2)
logical_and_default: b8[5, 2] = aten.logical_and(ge_scalar, lt_scalar)
reshape_default_4: b8[5, 2, 1] = aten.reshape(logical_and_default, [-1, 2, 1])
where_scalar_other: f32[5, 2, 4] = aten.where.ScalarOther(reshape_default_4, reshape_default_3, 0)
sum_dim_int_list: f32[5, 4] = aten.sum.dim_IntList(where_scalar_other, [1])
add_tensor: f32[5, 4] = aten.add(combine_default, sum_dim_int_list)
return [add_tensor]""",
        )
        self.parity(gm, module, Idle.loop, args)
