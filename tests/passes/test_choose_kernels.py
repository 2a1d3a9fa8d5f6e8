"""Golden graphs for passes/choose_kernels.py, on fake CUDA tensors and on the CPU.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.
"""

import torch
from expecttest import TestCase
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile.ops  # noqa: F401  registers torch.ops.moe_ep
from moe_compile.cost import grouped_gemm_us
from moe_compile.graph_text import graph_text
from moe_compile.passes.choose_kernels import CHECK, FUSED, OPS, ChooseKernels

moe_ep = torch.ops.moe_ep
T, K, E, D, F = 64, 2, 4, 32, 48


def trace(fn, *shapes, device="cuda", dtype=torch.float32) -> GraphModule:
    """The graph of fn on fake tensors: a shape with a dtype, or a shape of floats."""
    with FakeTensorMode():
        args = [
            torch.empty(s[0], dtype=s[1], device=device)
            if isinstance(s[0], tuple)
            else torch.empty(s, dtype=dtype, device=device)
            for s in shapes
        ]
        return make_fx(fn)(*args)


def choose(gm: GraphModule) -> ChooseKernels:
    chooser = ChooseKernels()
    chooser(gm)
    return chooser


def mlp(x, ids, up, down, weights):
    return moe_ep.expert_mlp(x, ids, weights, [], [up], [down], E, "silu", True)


OFFSETS, ORDER, IDS = ((E,), torch.int32), ((T * K,), torch.int32), ((T, K), torch.int64)


class TestChooseKernels(TestCase):
    def test_float8_weights(self):
        e4m3, x = torch.float8_e4m3fn, ((T, D), torch.bfloat16)
        stack, one = ((E, F, D), e4m3), ((F, D), e4m3)
        gm = trace(lambda x, w, s, o: moe_ep.grouped_gemm_scaled(x, [w], s, o), x, stack, (E, F), OFFSETS)
        self.assertEqual(choose(gm).chosen, [("grouped_gemm_scaled", "triton", "")])
        self.assertExpectedInline(
            "\n".join(graph_text(gm.graph).splitlines()[-2:]),
            """\
grouped_gemm_scaled_default: bf16[64, 48] = moe_ep_triton.grouped_gemm_scaled(x_1, w_1, s_1, o_1)
return grouped_gemm_scaled_default""",
        )
        gm = trace(lambda x, a, b, o: moe_ep.grouped_gemm_scaled(x, [a, b], None, o), x, one, one, ((2,), torch.int32))
        self.assertEqual(choose(gm).chosen, [("grouped_gemm_scaled", "triton", "")])
        self.assertExpectedInline(
            "\n".join(graph_text(gm.graph).splitlines()[-3:]),
            """\
cat_default: torch.float8_e4m3fn[2, 48, 32] = aten.cat([unsqueeze_default, unsqueeze_default_1])
grouped_gemm_scaled_default: bf16[64, 48] = moe_ep_triton.grouped_gemm_scaled(x_1, cat_default, None, o_1)
return grouped_gemm_scaled_default""",
        )
        wide = ((T, D), torch.float64)
        gm = trace(lambda x, w, o: moe_ep.grouped_gemm_scaled(x, [w], None, o), wide, stack, OFFSETS)
        reason = "triton: x is torch.float64, expected one of bf16, f16, f32"
        self.assertEqual(choose(gm).chosen, [("grouped_gemm_scaled", "moe_ep", reason)])
        gm = trace(lambda x, w, o: moe_ep.grouped_gemm_scaled(x, [w], None, o), x, stack, OFFSETS, device="cpu")
        self.assertEqual(choose(gm).chosen, [("grouped_gemm_scaled", "moe_ep", "")])

    def test_takes_triton_on_cuda(self):
        def layer(x, ids, w, weights):
            rows, offsets, order = moe_ep.dispatch(x, ids, E)
            return moe_ep.combine(moe_ep.grouped_gemm(rows, [w], offsets), weights, order, offsets, K)

        gm = trace(layer, (T, D), IDS, (E, F, D), (T, K))
        chooser = choose(gm)
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x_1: f32[64, 32]
ids_1: i64[64, 2]
w_1: f32[4, 48, 32]
weights_1: f32[64, 2]
dispatch_default: tuple = moe_ep_triton.dispatch(x_1, ids_1, 4)
getitem: f32[128, 32] = dispatch_default[0]
getitem_1: i32[4] = dispatch_default[1]
getitem_2: i32[128] = dispatch_default[2]
grouped_gemm_default: f32[128, 48] = moe_ep_triton.grouped_gemm(getitem, w_1, getitem_1)
combine_default: f32[64, 48] = moe_ep_triton.combine(grouped_gemm_default, weights_1, getitem_2, getitem_1, 2)
return combine_default""",
        )
        self.assertEqual([c[1] for c in chooser.chosen], ["triton"] * 3)

    def test_takes_the_backward_kernels(self):
        def backward(dout, y, weights, order, offsets, x):
            dy, dw = moe_ep.combine_backward(dout, y, weights, order, offsets)
            return dw, moe_ep.grouped_gemm_dw(dy, x, offsets)

        gm = trace(backward, (T, F), (T * K, F), (T, K), ORDER, OFFSETS, (T * K, D))
        self.assertEqual(sorted(c[1] for c in choose(gm).chosen), ["triton", "triton"])
        self.assertFalse([n for n in gm.graph.nodes if str(n.target).startswith("moe_ep.")])

    def test_leaves_separate_weights_where_they_are(self):
        shapes = (T, D), (F, D), (F, D), ((2,), torch.int32)
        gm = trace(lambda x, a, b, offsets: moe_ep.grouped_gemm(x, [a, b], offsets), *shapes)
        before = graph_text(gm.graph)
        self.assertEqual(choose(gm).chosen, [("grouped_gemm", "triton, by addresses", "")])
        self.assertEqual(graph_text(gm.graph), before)

    def test_stacks_separate_weights_that_are_not_alike(self):
        gm = trace(
            lambda x, a, b, offsets: moe_ep.grouped_gemm(x, [a, b.t()], offsets),
            (T, D),
            (F, D),
            (D, F),
            ((2,), torch.int32),
        )
        choose(gm)
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x_1: f32[64, 32]
a_1: f32[48, 32]
b_1: f32[32, 48]
offsets_1: i32[2]
t: f32[48, 32] = aten.t(b_1)
unsqueeze_default: f32[1, 48, 32] = aten.unsqueeze(a_1, 0)
unsqueeze_default_1: f32[1, 48, 32] = aten.unsqueeze(t, 0)
cat_default: f32[2, 48, 32] = aten.cat([unsqueeze_default, unsqueeze_default_1])
grouped_gemm_default: f32[64, 48] = moe_ep_triton.grouped_gemm(x_1, cat_default, offsets_1)
return grouped_gemm_default""",
        )

    def test_prefers_torch_where_the_table_says_so(self):
        gm = trace(
            lambda x, w, o: moe_ep.grouped_gemm(x, [w], o),
            (65536, 2048),
            (8, 1536, 2048),
            ((8,), torch.int32),
            dtype=torch.bfloat16,
        )
        chooser = choose(gm)
        self.assertEqual(chooser.chosen[0][1], "aten._grouped_mm")
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x_1: bf16[65536, 2048]
w_1: bf16[8, 1536, 2048]
o_1: i32[8]
permute_default: bf16[8, 2048, 1536] = aten.permute(w_1, [0, 2, 1])
_grouped_mm_default: bf16[65536, 1536] = aten._grouped_mm(x_1, permute_default, o_1)
iota_default: i32[65536] = prims.iota(65536, start=0, step=1, dtype=torch.int32, requires_grad=False, device=cuda:0)
select_int: i32[] = aten.select.int(o_1, 0, -1)
lt_tensor: b8[65536] = aten.lt(iota_default, select_int)
unsqueeze_default: b8[65536, 1] = aten.unsqueeze(lt_tensor, 1)
full_default: bf16[] = aten.full([], 0.0, dtype=torch.bfloat16, device=cuda:0)
where_self: bf16[65536, 1536] = aten.where.self(unsqueeze_default, _grouped_mm_default, full_default)
return where_self""",
        )

    def test_writes_checks_of_ids_for_inductor(self):
        """Where its kernels have assertions; on a CPU the op reads the ids."""
        layer = lambda ids: moe_ep.check_ids(ids, E) + 1  # noqa: E731
        gm = trace(layer, IDS)
        self.assertEqual(choose(gm).chosen[0][1], "Inductor")
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
ids_1: i64[64, 2]
lt_scalar: b8[64, 2] = aten.lt.Scalar(ids_1, 0)
ge_scalar: b8[64, 2] = aten.ge.Scalar(ids_1, 4)
logical_or_default: b8[64, 2] = aten.logical_or(lt_scalar, ge_scalar)
any_default: b8[] = aten.any(logical_or_default)
logical_not_default: b8[] = aten.logical_not(any_default)
_assert_async_msg: none = aten._assert_async.msg(logical_not_default, an expert's id is outside [0, 4))
add: i64[64, 2] = aten.add(ids_1, 1)
return add""",
        )
        for device, asserts in (("cpu", True), ("cuda", False)):
            gm = trace(layer, IDS, device=device)
            with inductor_config.patch(assert_indirect_indexing=asserts):
                self.assertEqual(choose(gm).chosen[0][1], "moe_ep")
            self.assertIn("moe_ep.check_ids(", graph_text(gm.graph))

    def test_leaves_the_choice_to_inductor_under_max_autotune(self):
        def layer(x, w, o):
            return moe_ep.grouped_gemm(x, [w], o)

        for dtype, target in ((torch.bfloat16, "moe_ep_timed"), (torch.float32, "moe_ep_triton")):
            gm = trace(layer, (T, D), (E, F, D), OFFSETS, dtype=dtype)
            with inductor_config.patch(max_autotune=True):
                choose(gm)
            self.assertIn(f"= {target}.grouped_gemm(x_1, w_1, o_1)", graph_text(gm.graph))
        gm = trace(lambda *args: mlp(*args)[0], (T, D), IDS, (E, 2 * F, D), (E, D, F), (T, K), dtype=torch.bfloat16)
        with inductor_config.patch(max_autotune=True):
            self.assertEqual(choose(gm).chosen[0][1], "triton and the faster one, by Inductor")
        self.assertIn("= moe_ep_timed.grouped_gemm(getitem_8, arg3_1, getitem_5)", graph_text(gm.graph))

    def test_says_what_a_kernel_lacks_and_leaves_the_op(self):
        gm = trace(lambda x, w, o: moe_ep.grouped_gemm(x, [w], o), (T, D), (E, F, D), OFFSETS, dtype=torch.float64)
        before = graph_text(gm.graph)
        chooser = choose(gm)
        self.assertEqual(graph_text(gm.graph), before)
        self.assertExpectedInline(
            str(chooser.chosen),
            """[('grouped_gemm', 'moe_ep', 'triton: x is torch.float64 and w is torch.float64, expected one of bf16, f16, f32')]""",
        )

    def test_leaves_the_ops_on_a_cpu(self):
        gm = trace(lambda x, w, o: moe_ep.grouped_gemm(x, [w], o), (T, D), (E, F, D), OFFSETS, device="cpu")
        before = graph_text(gm.graph)
        self.assertEqual(choose(gm).chosen[0][1], "moe_ep")
        self.assertEqual(graph_text(gm.graph), before)

    def test_writes_an_inference_as_its_kernels(self):
        gm = trace(lambda *args: mlp(*args)[0], (T, D), IDS, (E, 2 * F, D), (E, D, F), (T, K), dtype=torch.bfloat16)
        chooser = choose(gm)
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
arg0_1: bf16[64, 32]
arg1_1: i64[64, 2]
arg2_1: bf16[4, 96, 32]
arg3_1: bf16[4, 32, 48]
arg4_1: bf16[64, 2]
route_rows_default: tuple = moe_ep_triton.route_rows(arg1_1, 4, 64)
getitem_4: i32[128] = route_rows_default[0]
getitem_5: i32[4] = route_rows_default[1]
getitem_6: i32[128] = route_rows_default[2]
getitem_7: i32[6, 3] = route_rows_default[3]
gated_gemm_default: tuple = moe_ep_triton.gated_gemm(arg0_1, None, arg2_1, getitem_5, getitem_4, 2, silu, True, False, None, getitem_7, 64)
getitem_8: bf16[128, 48] = gated_gemm_default[0]
grouped_gemm_default: bf16[128, 32] = moe_ep_triton.grouped_gemm(getitem_8, arg3_1, getitem_5, None, getitem_7, 64)
combine_default: bf16[64, 32] = moe_ep_triton.combine(grouped_gemm_default, arg4_1, getitem_4, getitem_5, 2, getitem_6)
return combine_default""",
        )
        self.assertEqual(chooser.chosen, [("expert_mlp", "triton", "")])

    def test_an_inference_may_end_in_torchs_product(self):
        rows, shapes = (65536, 2048), ((8, 1536, 2048), (8, 2048, 768))
        for separate in (False, True):

            def layer(x, ids, up, down):
                weights = ([*up], [*down]) if separate else ([up], [down])  # noqa: B023  called before the next turn
                return moe_ep.expert_mlp(x, ids, None, [], *weights, 8, "silu", True)[0]

            gm = trace(layer, rows, ((65536, 2), torch.int64), *shapes, dtype=torch.bfloat16)
            chosen, text = choose(gm).chosen[-1][1], graph_text(gm.graph)
            if separate:  # one call, which copies no weight and writes no products before the activation
                self.assertEqual(chosen, "triton, in one call")
                self.assertIn("moe_ep_triton.expert_mlp_result(", text)
                self.assertNotIn("moe_ep.", text)
                self.assertNotIn("aten.stack(", text)
                continue
            self.assertEqual(chosen, "triton and aten._grouped_mm")
            self.assertNotIn("moe_ep.", text)
            self.assertIn("aten._grouped_mm(", text)
            self.assertIn("gated_gemm(x_1, None, ", text)

    def test_a_training_step_stays_one_call(self):
        def step(x, ids, up, down, weights, dout):
            out, h, offsets, order = mlp(x, ids, up, down, weights)
            rest = h, weights, offsets, order, [], [up], [down], "silu", True, True, True
            return out, moe_ep.expert_mlp_backward(dout, x, *rest)

        gm = trace(step, (T, D), IDS, (E, 2 * F, D), (E, D, F), (T, K), (T, D), dtype=torch.bfloat16)
        before = graph_text(gm.graph)
        chosen = choose(gm).chosen
        self.assertEqual(graph_text(gm.graph), before)
        self.assertEqual([c[1:] for c in chosen], [("triton, in one call", "")] * 2)

    def test_a_training_step_of_separate_weights_keeps_its_products(self):
        def step(x, ids, up, down):
            return moe_ep.expert_mlp(x, ids, None, [], [*up], [*down], E, "silu", True)[:2]

        gm = trace(step, (T, D), IDS, (E, 2 * F, D), (E, D, F), dtype=torch.bfloat16)
        self.assertEqual([c[1:] for c in choose(gm).chosen], [("triton, in one call", "")])
        self.assertIn("= moe_ep.expert_mlp(", graph_text(gm.graph))

    def test_an_inference_with_biases(self):
        def layer(x, ids, up, down, up_bias, down_bias):
            how = "silu alpha=1.702 limit=7.0 shift=1.0 pairs", True, up_bias, down_bias
            return moe_ep.expert_mlp(x, ids, None, [], [up], [down], E, *how)[0]

        shapes = (T, D), IDS, (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D)
        gm = trace(layer, *shapes, dtype=torch.bfloat16)
        choose(gm)
        self.assertExpectedInline(
            "\n".join(line for line in graph_text(gm.graph).splitlines() if "_gemm" in line),
            """\
gated_gemm_default: tuple = moe_ep_triton.gated_gemm(x_1, None, up_1, getitem_5, getitem_4, 2, silu alpha=1.702 limit=7.0 shift=1.0 pairs, True, False, up_bias_1, getitem_7, 64)
getitem_8: bf16[128, 48] = gated_gemm_default[0]
grouped_gemm_default: bf16[128, 32] = moe_ep_triton.grouped_gemm(getitem_8, down_1, getitem_5, down_bias_1, getitem_7, 64)
combine_default: bf16[64, 32] = moe_ep_triton.combine(grouped_gemm_default, None, getitem_4, getitem_5, 2, getitem_6)""",
        )

    def test_says_what_the_fused_kernels_lack(self):
        gm = trace(mlp, (T, D), IDS, (E, 2 * F, D), (E, D, F), (T, K), dtype=torch.float64)
        self.assertExpectedInline(
            str(choose(gm).chosen),
            """[('expert_mlp', 'moe_ep', 'triton: x is torch.float64 and up is torch.float64, expected one of bf16, f16, f32')]""",
        )

    def test_decides_every_op_that_carries_values(self):
        one_form = {"check_messages", "fit_rows", "of_equal_sizes", "of_same_experts", "sort_by_expert"}
        one_form |= {"check_shared", "join_shards", "joined", "own_rows", "read_by_parts", "token_message"}
        decided = {*OPS, *FUSED, CHECK, *one_form}
        mine = {
            str(name).split("::")[1]
            for name in torch._C._dispatch_get_all_op_names()
            if str(name).startswith("moe_ep::")
        }
        self.assertEqual(mine, decided)

    def test_cost_grows_with_rows_and_never_guards(self):
        with FakeTensorMode():
            few, many, w = torch.empty(64, 512), torch.empty(65536, 512), torch.empty(8, 512, 512)
            for kernel in ("triton", "grouped_mm"):
                self.assertLess(grouped_gemm_us(kernel, few, w), grouped_gemm_us(kernel, many, w))
