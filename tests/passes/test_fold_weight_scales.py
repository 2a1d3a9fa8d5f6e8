"""Golden graphs for passes/fold_weight_scales.py.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.
"""

from typing import Any
from unittest import mock

import torch
from expecttest import TestCase
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile  # noqa: F401
from moe_compile.graph_text import graph_text
from moe_compile.passes.fold_weight_scales import FoldWeightScales
from moe_compile.trained import TRAINED

R, E, D, F = 7, 3, 4, 5
E4M3, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
grouped_gemm = torch.ops.moe_ep.grouped_gemm


def values(*shapes: Any, dtype: torch.dtype = F32) -> list[torch.Tensor]:
    """x [R, D], float8 weights [E, F, D], scales of these shapes, and offsets with an empty expert and a tail."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(R, D, generator=g).to(dtype), (40 * torch.randn(E, F, D, generator=g)).to(E4M3)
    scales = [0.01 * torch.rand(s, generator=g) + 0.001 for s in shapes]
    return [x, w, *scales, torch.tensor([4, 4, 6], dtype=torch.int32)]


def trace(fn: Any, args: list[torch.Tensor], trained: tuple[str, ...] = ()) -> GraphModule:
    """The graph of fn, of whose inputs those that are named are trained."""
    gm = make_fx(fn, tracing_mode="fake", pre_dispatch=True)(*args)
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta[TRAINED] = node.name.removesuffix("_1") in trained
    return gm


class TestFoldWeightScales(TestCase):
    def check(self, fn: Any, args: list[torch.Tensor], rtol: float = 1e-5) -> GraphModule:
        gm = trace(fn, args)
        report = FoldWeightScales()(gm)
        self.assertEqual((len(report.applied), report.refused), (1, []))
        ours, theirs = gm(*args), fn(*args)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))
        return gm

    def declined(self, fn: Any, args: list[torch.Tensor], trained: tuple[str, ...] = ()) -> str:
        gm = trace(fn, args, trained)
        before = graph_text(gm.graph)
        report = FoldWeightScales()(gm)
        self.assertEqual(graph_text(gm.graph), before)
        self.assertEqual(report.applied, [])
        return str(report)

    def test_scales_by_feature(self):
        gm = self.check(lambda x, w, s, o: grouped_gemm(x, [w.to(F32) * s], o), values((E, F, 1)))
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x_1: f32[7, 4]
w_1: torch.float8_e4m3fn[3, 5, 4]
s_1: f32[3, 5, 1]
o_1: i32[3]
reshape_default: f32[3, 5] = aten.reshape(s_1, [3, 5])
grouped_gemm_scaled_default: f32[7, 5] = moe_ep.grouped_gemm_scaled(x_1, [w_1], reshape_default, o_1)
return grouped_gemm_scaled_default""",
        )

    def test_scales_by_expert(self):
        gm = self.check(lambda x, w, s, o: grouped_gemm(x, [s * w.to(F32)], o), values((E, 1, 1)))
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x_1: f32[7, 4]
w_1: torch.float8_e4m3fn[3, 5, 4]
s_1: f32[3, 1, 1]
o_1: i32[3]
reshape_default: f32[3, 1] = aten.reshape(s_1, [3, 1])
reshape_default_1: f32[3] = aten.reshape(reshape_default, [3])
grouped_gemm_scaled_default: f32[7, 5] = moe_ep.grouped_gemm_scaled(x_1, [w_1], reshape_default_1, o_1)
return grouped_gemm_scaled_default""",
        )

    def test_a_scale_for_all_in_bf16(self):
        """Two roundings of 2**-9 in the original, of s * w and of y; one here."""
        args = values((), dtype=BF16)
        gm = self.check(lambda x, w, s, o: grouped_gemm(x, [(w.float() * s).to(BF16)], o), args, rtol=2**-7)
        self.assertIn("aten.expand(", graph_text(gm.graph))

    def test_no_scale_and_a_transpose(self):
        x, w, o = values()
        args = [x, w.transpose(1, 2).contiguous(), o]
        gm = self.check(lambda x, w, o: grouped_gemm(x, [w.to(BF16).to(F32).transpose(1, 2)], o), args)
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x_1: f32[7, 4]
w_1: torch.float8_e4m3fn[3, 4, 5]
o_1: i32[3]
transpose_int: torch.float8_e4m3fn[3, 5, 4] = aten.transpose.int(w_1, -2, -1)
grouped_gemm_scaled_default: f32[7, 5] = moe_ep.grouped_gemm_scaled(x_1, [transpose_int], None, o_1)
return grouped_gemm_scaled_default""",
        )

    def test_scales_by_feature_of_transposed_weights(self):
        x, w, s, o = values((E, 1, F))
        args = [x, w.transpose(1, 2).contiguous(), s, o]
        self.check(lambda x, w, s, o: grouped_gemm(x, [(w.to(F32) * s).transpose(-2, -1)], o), args)

    def test_a_matrix_an_expert(self):
        def product(x, a, b, c, s, o):
            return grouped_gemm(x, [w.to(F32) * s[e] for e, w in enumerate((a, b, c))], o)

        x, w, s, o = values((E, F, 1))
        gm = self.check(product, [x, *w.unbind(0), s, o])
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x_1: f32[7, 4]
a_1: torch.float8_e4m3fn[5, 4]
b_1: torch.float8_e4m3fn[5, 4]
c_1: torch.float8_e4m3fn[5, 4]
s_1: f32[3, 5, 1]
o_1: i32[3]
select: f32[5, 1] = aten.select.int(s_1, 0, 0)
select_1: f32[5, 1] = aten.select.int(s_1, 0, 1)
select_2: f32[5, 1] = aten.select.int(s_1, 0, 2)
reshape_default: f32[5] = aten.reshape(select, [5])
reshape_default_1: f32[5] = aten.reshape(select_1, [5])
reshape_default_2: f32[5] = aten.reshape(select_2, [5])
stack_default: f32[3, 5] = aten.stack([reshape_default, reshape_default_1, reshape_default_2])
grouped_gemm_scaled_default: f32[7, 5] = moe_ep.grouped_gemm_scaled(x_1, [a_1, b_1, c_1], stack_default, o_1)
return grouped_gemm_scaled_default""",
        )

    def test_matrices_of_one_stack(self):
        x, w, s, o = values(())
        gm = self.check(lambda x, w, s, o: grouped_gemm(x, [v.to(F32).t() * s for v in (w[0], w[1], w[2])], o),
                        [x, w.transpose(1, 2).contiguous(), s, o])  # fmt: skip
        self.assertIn("aten.transpose.int(w_1, -2, -1)", graph_text(gm.graph))

    def test_matrices_of_one_stack_in_another_order(self):
        args = values(())
        gm = self.check(lambda x, w, s, o: grouped_gemm(x, [v.to(F32) * s for v in (w[1], w[0], w[2])], o), args)
        self.assertIn("moe_ep.grouped_gemm_scaled(x_1, [select, select_1, select_2],", graph_text(gm.graph))

    # -- what it declines -------------------------------------------------------------------

    def test_declines_other_types_of_weights(self):
        x, w, s, o = values((E, 1, 1))
        args = [x, w.float().to(torch.float8_e4m3fnuz), s, o]
        self.assertExpectedInline(
            self.declined(lambda x, w, s, o: grouped_gemm(x, [w.to(F32) * s], o), args),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: weights are torch.float8_e4m3fnuz, expected float8_e4m3fn or float8_e5m2""",
        )

    def test_declines_other_types_of_scales(self):
        x, w, s, o = values((E, 1, 1))
        said = self.declined(lambda x, w, s, o: grouped_gemm(x, [(w.to(F32) * s).to(F32)], o), [x, w, s.double(), o])
        self.assertExpectedInline(
            said,
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: scales are torch.float64, expected f32, bf16 or f16""",
        )

    def test_declines_scales_along_the_inner_width(self):
        said = self.declined(lambda x, w, s, o: grouped_gemm(x, [w.to(F32) * s], o), values((E, 1, D)))
        self.assertExpectedInline(
            said,
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: scales (3, 1, 4) vary along the inner width of weights (3, 5, 4)""",
        )

    def test_declines_experts_that_differ(self):
        def product(x, w, s, o):
            return grouped_gemm(x, [w[0].to(F32) * s[0], w[1].to(F32) * s[1, :1], w[2].to(F32) * s[2]], o)

        self.assertExpectedInline(
            self.declined(product, values((E, F, 1))),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: experts' weights are made in different ways""",
        )

    def test_declines_what_is_used_elsewhere(self):
        def product(x, w, s, o):
            wide = w.to(F32) * s
            return grouped_gemm(x, [wide], o) * wide.mean()

        self.assertExpectedInline(
            self.declined(product, values((E, F, 1))),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: the wider weights are used elsewhere too (mean)""",
        )

    def test_declines_what_changes_before_the_product(self):
        def scales(x, w, s, o):
            wide = w.to(F32) * s
            s.view(-1).mul_(2)
            return grouped_gemm(x, [wide], o)

        def weights(x, w, s, o):
            wide = w.to(F32) * s
            w[0].zero_()
            return grouped_gemm(x, [wide], o)

        self.assertExpectedInline(
            self.declined(scales, values((E, F, 1))),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: s_1 changes in place before the product""",
        )
        self.assertExpectedInline(
            self.declined(weights, values((E, F, 1))),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: w_1 changes in place before the product""",
        )

    def test_takes_what_changes_before_it_is_read_or_is_something_else(self):
        def product(x, w, s, o):
            s.mul_(2)
            wide = w.to(F32) * s
            return grouped_gemm(x.clone().mul_(2), [wide], o)

        gm = trace(product, values((E, F, 1)))
        self.assertEqual(len(FoldWeightScales()(gm).applied), 1)
        torch.testing.assert_close(gm(*values((E, F, 1))), product(*values((E, F, 1))))

    def test_declines_what_is_trained(self):
        def product(x, w, s, o):
            return grouped_gemm(x, [w.to(F32) * s.exp()], o)

        self.assertExpectedInline(
            self.declined(product, values((E, F, 1)), ("w",)),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: weights (w_1) may need a gradient""",
        )
        self.assertExpectedInline(
            self.declined(product, values((E, F, 1)), ("s",)),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: scales (exp) may need a gradient""",
        )
        gm = trace(product, values((E, F, 1)))
        for node in gm.graph.find_nodes(op="placeholder"):
            del node.meta[TRAINED]  # nobody says
        self.assertEqual(FoldWeightScales()(gm).applied, [])

    def test_takes_what_is_trained_elsewhere(self):
        def product(x, w, s, o):
            return grouped_gemm(x, [w.to(F32) * s.detach()], o)

        gm = trace(product, values((E, F, 1)), ("x", "s"))
        self.assertEqual(len(FoldWeightScales()(gm).applied), 1)

    def on_a_device(self, device: str, dtype: torch.dtype = BF16, capability: tuple[int, int] = (9, 0)) -> str:
        with FakeTensorMode():
            args = [v.to(dtype if i == 0 else v.dtype) for i, v in enumerate(values((E, F, 1)))]
            args = [torch.empty(v.shape, dtype=v.dtype, device=device) for v in args]
            gm = make_fx(lambda x, w, s, o: grouped_gemm(x, [(w.float() * s).to(dtype)], o))(*args)  # casts copy here
        for node in gm.graph.find_nodes(op="placeholder"):
            node.meta[TRAINED] = False
        there = mock.patch("torch.cuda.is_available", lambda: True)
        with there, mock.patch("torch.cuda.get_device_capability", lambda _: capability):
            return str(FoldWeightScales()(gm))

    def test_devices(self):
        self.assertIn("1 applied, 0 refused", self.on_a_device("cuda"))
        self.assertExpectedInline(
            self.on_a_device("cuda", torch.float64),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: no kernel: x is torch.float64, expected one of bf16, f16, f32""",
        )
        self.assertExpectedInline(
            self.on_a_device("cuda", capability=(8, 6)),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: no kernel: torch.float8_e4m3fn on sm_86, which widens no such numbers""",
        )
        self.assertExpectedInline(
            self.on_a_device("meta"),
            """\
FoldWeightScales: 0 applied, 1 refused
  - grouped_gemm: no kernel on meta""",
        )

    def test_scales_of_blocks(self):
        """Blocks of 5 by 2, in whatever form, also of weights that are transposed later, or whose scales are cast."""

        def whole(s):
            return s.repeat_interleave(5, 1).repeat_interleave(2, -1)

        def parts(x, w, s, o):
            return grouped_gemm(x, [(s.view(E, 2, 1, 2, 1) * w.float().view(E, 2, 5, 2, 2)).view(E, 10, 4)], o)

        forms = {
            "interleaved": lambda x, w, s, o: grouped_gemm(x, [w.to(F32) * whole(s)], o),
            "cast": lambda x, w, s, o: grouped_gemm(x, [w.to(F32) * whole(s.to(BF16)).to(F32)], o),
            "in parts": parts,
            "unflattened": lambda x, w, s, o: grouped_gemm(
                x, [w.float() * s.flatten(1).unflatten(1, (2, 2)).repeat_interleave(2, 2).repeat_interleave(5, 1)], o
            ),
            "a matrix an expert": lambda x, w, s, o: grouped_gemm(
                x, [v.float() * s[e].repeat_interleave(5, 0).repeat_interleave(2, 1) for e, v in enumerate(w)], o
            ),
        }
        x, _, s, o = values((E, 2, 2))
        w = (40 * torch.randn(E, 10, D, generator=torch.Generator().manual_seed(1))).to(E4M3)
        for name, fn in forms.items():
            with self.subTest(name):
                self.assertIn("aten.reshape(", graph_text(self.check(fn, [x, w, s, o]).graph))
        late = lambda x, w, s, o: grouped_gemm(x, [(w.to(F32) * whole(s)).transpose(1, 2)], o)  # noqa: E731
        gm = self.check(late, [torch.randn(R, 10), w, s, o])
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x_1: f32[7, 10]
w_1: torch.float8_e4m3fn[3, 10, 4]
s_1: f32[3, 2, 2]
o_1: i32[3]
transpose_int: torch.float8_e4m3fn[3, 4, 10] = aten.transpose.int(w_1, -2, -1)
reshape_default: f32[3, 2, 2] = aten.reshape(s_1, [3, 2, 2])
transpose_int_1: f32[3, 2, 2] = aten.transpose.int(reshape_default, -2, -1)
grouped_gemm_scaled_default: f32[7, 4] = moe_ep.grouped_gemm_scaled(x_1, [transpose_int], transpose_int_1, o_1)
return grouped_gemm_scaled_default""",
        )

    def test_declines_scales_that_are_not_of_blocks(self):
        def changed(x, w, s, o):
            full = s.repeat_interleave(5, 1).repeat_interleave(2, 2)
            full.mul_(2)
            return grouped_gemm(x, [w.to(F32) * full], o)

        def changed_after_it_was_read(x, w, s, o):
            full = s.repeat_interleave(5, 1).repeat_interleave(2, 2)
            s.mul_(2)
            return grouped_gemm(x, [w.to(F32) * full], o)

        def changed_as_a_view(x, w, s, o):
            full = s.repeat_interleave(5, 1).repeat_interleave(2, 2)
            full[0].mul_(2)
            return grouped_gemm(x, [w.to(F32) * full], o)

        forms = {
            "tiled": lambda x, w, s, o: grouped_gemm(x, [w.to(F32) * s.repeat(1, 5, 2)], o),
            "tiled columns": lambda x, w, s, o: grouped_gemm(
                x, [w.to(F32) * s.repeat_interleave(5, 1).repeat(1, 1, 2)], o
            ),
            "in turn": lambda x, w, s, o: grouped_gemm(
                x, [w.to(F32) * s.mT.reshape(E, 2, 2).repeat_interleave(5, 1).repeat_interleave(2, 2)], o
            ),
            "flipped": lambda x, w, s, o: grouped_gemm(
                x, [w.to(F32) * s.repeat_interleave(5, 1).flip(1).repeat_interleave(2, 2)], o
            ),
            "of all experts": lambda x, w, s, o: grouped_gemm(
                x, [w.to(F32) * s[:1].repeat_interleave(5, 1).repeat_interleave(2, 2)], o
            ),
            "no repetition along rows": lambda x, w, s, o: grouped_gemm(
                x, [w.to(F32) * s.repeat_interleave(5, 1).repeat_interleave(2, 2).cumsum(2)], o
            ),
            "changed": changed,
            "changed after it was read": changed_after_it_was_read,
            "changed as a view": changed_as_a_view,
        }
        for name, fn in forms.items():
            x, _, s, o = values((E, 2, 2))
            w = (40 * torch.randn(E, 10, D, generator=torch.Generator().manual_seed(1))).to(E4M3)
            with self.subTest(name):
                gm = trace(fn, [x, w, s.clone(), o])
                report = FoldWeightScales()(gm)
                # what was transposed, or flipped, has the scales of these blocks, or of blocks of 1 by 2
                self.assertEqual(len(report.applied), 1 if name in ("in turn", "flipped") else 0)
                torch.testing.assert_close(gm(x, w, s.clone(), o), fn(x, w, s.clone(), o))

    def test_near_misses(self):
        """Not of the form; a square is, with a scale that is none."""
        forms = {
            "a quotient": lambda x, w, s, o: grouped_gemm(x, [w.to(F32) / s], o),
            "a sum": lambda x, w, s, o: grouped_gemm(x, [w.to(F32) + s], o),
            "two scales": lambda x, w, s, o: grouped_gemm(x, [w.to(F32) * s * s], o),
            "a square": lambda x, w, s, o: grouped_gemm(x, [w.to(F32) * w.to(F32)], o),
            "back to float8": lambda x, w, s, o: grouped_gemm(x, [(w.to(F32) * s).to(E4M3).to(F32)], o),
            "another float8 between": lambda x, w, s, o: grouped_gemm(x, [w.to(torch.float8_e5m2).to(F32) * s], o),
            "a part": lambda x, w, s, o: grouped_gemm(x, [(w.to(F32) * s)[:, :2]], o),
            "experts in turn": lambda x, w, s, o: grouped_gemm(x, [(w.to(F32) * s).flip(0)], o),
            "wide weights": lambda x, w, s, o: grouped_gemm(x, [w.to(F32).add(0) * s], o),
        }
        for name, fn in forms.items():
            args = values((E, F, 1))
            gm = trace(fn, args)
            report = FoldWeightScales()(gm)
            if name in ("back to float8", "another float8 between"):  # these numbers are the weights
                self.assertEqual(len(report.applied), 1, name)
                self.assertIn("float8_e" + ("4m3fn" if name[0] == "b" else "5m2"), graph_text(gm.graph))
            else:
                self.assertEqual(report.applied, [], name)
            torch.testing.assert_close(gm(*args), fn(*args), msg=name)
