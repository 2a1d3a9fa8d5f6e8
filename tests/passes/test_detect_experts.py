"""Golden graphs for passes/detect_experts.py.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.
"""

import torch
from expecttest import TestCase
from torch import nn

from moe_compile.graph_text import graph_text
from tests.golden import Stacked, captured, detected, gradients, inputs, run


class TestDetectExperts(TestCase):
    def refusal(self, fn, module=None, args=None) -> str:
        """The golden report of a loop that must stay; its graph is unchanged."""
        module, args = module or Stacked(), args or inputs()
        before = graph_text(captured(module, fn, *args).gm.graph)
        gm, report = detected(module, fn, *args)
        self.assertEqual(graph_text(gm.graph), before)
        return str(report)

    def test_writes_a_loop_as_one_node(self):
        module, args = Stacked(), inputs()
        self.assertExpectedInline(
            graph_text(captured(module, Stacked.loop, *args).gm.graph),
            """\
x: f32[5, 4]
ids: i64[5, 2]
weights: f32[5, 2]
up: f32[2, 3, 4]
down: f32[2, 4, 3]
zeros_like: f32[5, 4] = aten.zeros_like(x, pin_memory=False)
eq: b8[5, 2] = aten.eq.Scalar(ids, 0)
nonzero: i64[r, 2] = moe_ep_capture.nonzero(eq, r)
unbind: tuple = aten.unbind.int(nonzero, 1)
getitem: i64[r] = unbind[0]
getitem_1: i64[r] = unbind[1]
index: f32[r, 4] = aten.index(x, [getitem])
select: f32[3, 4] = aten.select.int(up, 0, 0)
linear: f32[r, 3] = aten.linear(index, select)
relu: f32[r, 3] = aten.relu(linear)
select_1: f32[4, 3] = aten.select.int(down, 0, 0)
linear_1: f32[r, 4] = aten.linear(relu, select_1)
unsqueeze: f32[5, 2, 1] = aten.unsqueeze(weights, 2)
index_1: f32[r, 1] = aten.index(unsqueeze, [getitem, getitem_1])
mul: f32[r, 4] = aten.mul(linear_1, index_1)
index_add_: f32[5, 4] = aten.index_add_(zeros_like, 0, getitem, mul)
eq_1: b8[5, 2] = aten.eq.Scalar(ids, 1)
nonzero_1: i64[r, 2] = moe_ep_capture.nonzero(eq_1, r)
unbind_1: tuple = aten.unbind.int(nonzero_1, 1)
getitem_2: i64[r] = unbind_1[0]
getitem_3: i64[r] = unbind_1[1]
index_2: f32[r, 4] = aten.index(x, [getitem_2])
select_2: f32[3, 4] = aten.select.int(up, 0, 1)
linear_2: f32[r, 3] = aten.linear(index_2, select_2)
relu_1: f32[r, 3] = aten.relu(linear_2)
select_3: f32[4, 3] = aten.select.int(down, 0, 1)
linear_3: f32[r, 4] = aten.linear(relu_1, select_3)
unsqueeze_1: f32[5, 2, 1] = aten.unsqueeze(weights, 2)
index_3: f32[r, 1] = aten.index(unsqueeze_1, [getitem_2, getitem_3])
mul_1: f32[r, 4] = aten.mul(linear_3, index_3)
index_add__1: f32[5, 4] = aten.index_add_(index_add_, 0, getitem_2, mul_1)
return [index_add__1]""",
        )
        gm, report = detected(module, Stacked.loop, *args)
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x: f32[5, 4]
ids: i64[5, 2]
weights: f32[5, 2]
up: f32[2, 3, 4]
down: f32[2, 4, 3]
unsqueeze: f32[5, 2, 1] = aten.unsqueeze(weights, 2)
experts_body_0: body
    token_0: f32[r, 4]
    pair_0: f32[r, 1]
    param_0: f32[3, 4]
    param_1: f32[4, 3]
    linear_default: f32[r, 3] = aten.linear(token_0, param_0)
    relu_default: f32[r, 3] = aten.relu(linear_default)
    linear_default_1: f32[r, 4] = aten.linear(relu_default, param_1)
    mul_tensor: f32[r, 4] = aten.mul(linear_default_1, pair_0)
    return mul_tensor
experts: f32[5, 4] = experts(ids, [x], [unsqueeze], [up, down], [], experts_body_0, 2, None)
return [experts]""",
        )
        self.assertExpectedInline(
            str(report),
            """\
DetectExperts: 1 applied, 0 refused
  + index_add__1""",
        )
        x, ids, weights = args
        leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
        ours, theirs = run(gm, module, *args), module.loop(*args)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
            torch.testing.assert_close(a, b)

    def test_keeps_a_known_start(self):
        def loop(self, x, ids, weights):
            out = x.clone()
            for e in range(2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, (x[t] @ self.up[e].T @ self.down[e].T) * weights[t, k, None])
            return out

        module, args = Stacked(), inputs()
        gm, report = detected(module, loop, *args)
        self.assertEqual(len(report.applied), 1)
        torch.testing.assert_close(run(gm, module, *args), loop(module, *args))

    def test_honours_a_permutation_of_separate_weights(self):
        class Listed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

            def loop(self, x, ids, weights):
                out = torch.zeros_like(x)
                for e in range(2):
                    t, k = torch.where(ids == e)
                    out.index_add_(0, t, self.experts[1 - e](x[t]) * weights[t, k, None])
                return out

        module, args = Listed(), inputs()
        gm, report = detected(module, Listed.loop, *args)
        self.assertEqual(len(report.applied), 1)
        torch.testing.assert_close(run(gm, module, *args), module.loop(*args))

    def test_refuses_an_expert_of_another_kind(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                h = x[t] @ self.up[e].T
                h = torch.relu(h) if e == 0 else torch.tanh(h)
                out.index_add_(0, t, (h @ self.down[e].T) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add__1: expert 1 differs from expert 0: aten.tanh where that has aten.relu""",
        )

    def test_refuses_another_scale(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, (x[t] @ self.up[e].T @ self.down[e].T) * (1.0 + e) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add__1: expert 1 differs from expert 0: 2.0 where that has 1.0""",
        )

    def test_refuses_rows_that_look_at_each_other(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                h = x[t] @ self.up[e].T
                out.index_add_(0, t, ((h - h.mean(0)) @ self.down[e].T) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add_: mean along dimension 0 lets rows depend on each other""",
        )

    def test_refuses_a_missing_expert(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in (0, 2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, (x[t] @ self.up[e].T @ self.down[e].T) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop, Stacked(3), inputs(3)),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add__1: the loop visits experts [0, 2], not each of 0..1 once""",
        )

    def test_refuses_weights_of_experts_that_are_not_visited(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, (x[t] @ self.up[e].T @ self.down[e].T) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop, Stacked(3), inputs(3)),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add__1: 2 experts are used, down holds 3""",
        )

    def test_refuses_the_weight_of_another_expert(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, (x[t] @ self.up[0].T @ self.down[e].T) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add__1: expert 1 differs from expert 0: outer numpy_t where that has aten.numpy_T""",
        )

    def test_refuses_a_sum_that_is_read_inside(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, ((x[t] + out[t]) @ self.up[e].T @ self.down[e].T) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add_: aten.matmul is not known to be row-wise (it reads sumread)""",
        )

    def test_refuses_assignment(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                out[t] = (x[t] @ self.up[e].T @ self.down[e].T) * weights[t, k, None]
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_put_: aten.index_put_ overwrites what another expert of the same token wrote""",
        )

    def test_refuses_ids_that_may_repeat(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                out[t] += (x[t] @ self.up[e].T @ self.down[e].T) * weights[t, k, None]
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_put_: aten.index_put_ keeps only one of two equal tokens: the ids (ids) are not shown to be distinct, as those of topk are""",
        )

    def test_refuses_a_changed_input(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, (x[t] @ self.up[e].T @ self.down[e].T) * weights[t, k, None])
                x.mul_(2)
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add__1: expert 1 differs from expert 0: it reads token mul_, that one token x""",
        )

    def test_refuses_a_buffer_that_is_read_through_another_name(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            alias = out.view(-1)
            for e in range(2):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, (x[t] @ self.up[e].T @ self.down[e].T) * weights[t, k, None])
            return out + alias.view_as(out)

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - view_as: view is read after it was changed in place through another name""",
        )

    def test_refuses_random_numbers(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                h = nn.functional.dropout(x[t] @ self.up[e].T, 0.5)
                out.index_add_(0, t, (h @ self.down[e].T) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add_: dropout with p = 0.5 draws random numbers expert by expert""",
        )

    def test_refuses_an_expert_under_no_grad(self):
        def loop(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(2):
                t, k = torch.where(ids == e)
                with torch.no_grad():
                    h = x[t] @ self.up[e].T
                out.index_add_(0, t, (h @ self.down[e].T) * weights[t, k, None])
            return out

        self.assertExpectedInline(
            self.refusal(loop),
            """\
DetectExperts: 0 applied, 1 refused
  - index_add_: aten.index.Tensor runs under no_grad inside the expert loop""",
        )

    def test_leaves_a_graph_without_experts_alone(self):
        self.assertExpectedInline(
            self.refusal(lambda self, x, ids, weights: x @ self.up[0].T), """DetectExperts: 0 applied, 0 refused"""
        )

    def sorted_form(self, times: int):
        """The grouped form by bmm, over tokens that are repeated `times` times before they are sorted."""

        def form(self, x, ids, weights):
            flat = ids.reshape(-1)
            order = flat.argsort()
            rows = x.repeat_interleave(times, 0)[order]
            mine = flat[order]
            y = torch.bmm(self.up[mine], rows.unsqueeze(-1)).squeeze(-1)
            y = torch.bmm(self.down[mine], y.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1)[order].unsqueeze(-1)
            return y[order.argsort()].view(x.shape[0], 2, -1).sum(1)

        return form

    def test_sorts_repeated_tokens(self):
        module, args, form = Stacked(), inputs(), self.sorted_form(2)
        gm, report = detected(module, form, *args)
        self.assertEqual(len(report.applied), 1)
        torch.testing.assert_close(run(gm, module, *args), form(module, *args))

    def test_leaves_tokens_that_are_repeated_another_number_of_times(self):
        self.assertIn("0 applied", self.refusal(self.sorted_form(3)))
