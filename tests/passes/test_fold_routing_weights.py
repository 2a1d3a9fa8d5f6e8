"""Golden graphs for passes/fold_routing_weights.py.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.
"""

import torch
from expecttest import TestCase

import moe_compile  # noqa: F401
from moe_compile.graph_text import graph_text
from moe_compile.passes.dispatch_experts import DispatchExperts
from moe_compile.passes.fold_routing_weights import FoldRoutingWeights
from tests.golden import Stacked, detected, gradients, inputs, run


def dispatched(fn):
    module, args = Stacked(), inputs()
    gm, _ = detected(module, fn, *args)
    DispatchExperts()(gm)
    return gm, module, args


class TestFoldRoutingWeights(TestCase):
    def test_moves_the_weights_into_combine(self):
        gm, module, args = dispatched(Stacked.loop)
        report = FoldRoutingWeights()(gm)
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
grouped_gemm_default: f32[10, 3] = moe_ep.grouped_gemm(getitem_4, [up], getitem_5)
relu_default: f32[10, 3] = aten.relu(grouped_gemm_default)
grouped_gemm_default_1: f32[10, 4] = moe_ep.grouped_gemm(relu_default, [down], getitem_5)
reshape_default_1: f32[5, 2] = aten.reshape(reshape_default, [-1, 2])
combine_default_1: f32[5, 4] = moe_ep.combine(grouped_gemm_default_1, reshape_default_1, getitem_6, getitem_5, 2)
return [combine_default_1]""",
        )
        self.assertExpectedInline(
            str(report),
            """\
FoldRoutingWeights: 1 applied, 0 refused
  + combine_default""",
        )
        x, _, weights = args
        leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
        ours, theirs = run(gm, module, *args), module.loop(*args)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
            torch.testing.assert_close(a, b)

    def test_declines_weights_for_each_feature(self):
        def loop(self, x, ids, weights):
            out, wide = torch.zeros_like(x), weights[:, :, None].expand(-1, -1, 4) * x[:, None, :]
            for e in range(2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, (x[t] @ self.up[e].T @ self.down[e].T) * wide[t, k])
            return out

        gm, module, args = dispatched(loop)
        before = graph_text(gm.graph)
        report = FoldRoutingWeights()(gm)
        self.assertEqual(graph_text(gm.graph), before)
        self.assertExpectedInline(
            str(report),
            """\
FoldRoutingWeights: 0 applied, 1 refused
  - combine_default: rows are (10, 4), weights (10, 4)""",
        )
        torch.testing.assert_close(run(gm, module, *args), loop(module, *args))

    def test_declines_a_product_that_is_used_twice(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                y = (x[t] @ self.up[e].T @ self.down[e].T) * weights[t, k, None]
                out.index_add_(0, t, y + y.sin())
            return out

        gm, module, args = dispatched(loop)
        self.assertExpectedInline(str(FoldRoutingWeights()(gm)), """FoldRoutingWeights: 0 applied, 0 refused""")
        torch.testing.assert_close(run(gm, module, *args), loop(module, *args))
