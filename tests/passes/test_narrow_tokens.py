"""Golden graphs and must-not-match cases for passes/narrow_tokens.py, and what it does to rounding under autocast.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.
"""

from typing import Any

import torch
from expecttest import TestCase
from torch import Tensor, nn

import moe_compile  # noqa: F401
from moe_compile.graph_text import graph_text
from moe_compile.passes.narrow_tokens import NarrowTokens
from moe_compile.region import experts
from tests.golden import Stacked, detected, inputs
from tests.tiny import FF, D, Separate, compiled, original, regions, routed

BF16, F16 = torch.bfloat16, torch.float16


def loop(body: Any) -> Any:
    """Experts whose rows are worked on by body(rows, up, down)."""

    def run(module: Stacked, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(module.up.shape[0]):
            t, k = torch.where(ids == e)
            y = body(x[t], module.up[e], module.down[e])
            out.index_add_(0, t, (y * weights[t, k, None]).to(out.dtype))
        return out

    return run


def cast(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.relu(rows.to(BF16) @ up.to(BF16).t()) @ down.to(BF16).t()


def two_casts(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    up = up.to(BF16)
    return (torch.relu(rows.to(BF16) @ up.t()) * (rows.to(BF16) @ up.t())) @ down.to(BF16).t()


def plain(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.relu(rows @ up.t()) @ down.t()


def kept_wide(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return cast(rows, up, down) + rows


def two_types(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return cast(rows, up, down) + torch.relu(rows.to(F16) @ up.to(F16).t()) @ down.to(F16).t()


def halved(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A sum of gradients in float16 may be infinite where that of wider ones is not."""
    return torch.relu(rows.to(F16) @ up.to(F16).t()) @ down.to(F16).t()


def quantized(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return plain(rows.to(torch.float8_e4m3fn).to(rows.dtype), up, down)


def widened(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.relu(rows.double() @ up.double().t()) @ down.double().t()


def cut(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Whole numbers are another function."""
    return torch.relu(rows.int().float() @ up.t()) @ down.t()


class TestNarrowTokens(TestCase):
    def after(self, body: Any, autocast: bool = False) -> tuple[Any, str]:
        with torch.autocast("cpu", BF16, enabled=autocast):
            gm, _ = detected(Stacked(), loop(body), *inputs())
        return gm, str(NarrowTokens()(gm))

    def test_casts_tokens_before_their_experts(self):
        for body in (cast, two_casts):
            gm, report = self.after(body)
            self.assertIn("1 applied, 0 refused", report)
        gm, report = self.after(cast)
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
    token_0: bf16[r, 4]
    pair_0: f32[r, 1]
    param_0: f32[3, 4]
    param_1: f32[4, 3]
    to_dtype_1: bf16[3, 4] = aten.to.dtype(param_0, torch.bfloat16)
    t_default: bf16[4, 3] = aten.t(to_dtype_1)
    matmul_default: bf16[r, 3] = aten.matmul(token_0, t_default)
    relu_default: bf16[r, 3] = aten.relu(matmul_default)
    to_dtype_2: bf16[4, 3] = aten.to.dtype(param_1, torch.bfloat16)
    t_default_1: bf16[3, 4] = aten.t(to_dtype_2)
    matmul_default_1: bf16[r, 4] = aten.matmul(relu_default, t_default_1)
    mul_tensor: f32[r, 4] = aten.mul(matmul_default_1, pair_0)
    to_dtype_3: f32[r, 4] = aten.to.dtype(mul_tensor, torch.float32)
    return to_dtype_3
to_dtype: bf16[5, 4] = aten.to.dtype(x, torch.bfloat16)
experts: f32[5, 4] = experts(ids, [to_dtype], [unsqueeze], [up, down], [], experts_body_0, 2, None)
return [experts]""",
        )

    def test_under_autocast_products_say_it(self):
        gm, report = self.after(plain, autocast=True)
        self.assertIn("1 applied, 0 refused", report)
        (node,) = gm.graph.find_nodes(op="call_function", target=experts)
        self.assertEqual([t.meta["val"].dtype for t in node.args[1]], [BF16])
        self.assertEqual(self.after(plain)[1], "NarrowTokens: 0 applied, 0 refused")

    def test_refuses(self):
        for body, reason in ((kept_wide, "token_0 is read otherwise too, by add_tensor"),
                             (two_types, "token_0 is read otherwise too, by to_dtype")):  # fmt: skip
            self.assertIn(reason, self.after(body)[1])
        self.assertIn("token_0 is read otherwise too, by add_tensor", self.after(lambda *a: plain(*a) + a[0], True)[1])

    def test_refuses_a_body_that_others_have_too(self):
        gm, _ = detected(Stacked(), loop(cast), *inputs())
        (node,) = gm.graph.find_nodes(op="call_function", target=experts)
        with gm.graph.inserting_after(node):
            gm.graph.node_copy(node)
        before = graph_text(gm.graph)
        report = NarrowTokens()(gm)
        self.assertEqual(
            [why for _, why in report.refused], ["the body experts_body_0 is that of other experts too"] * 2
        )
        self.assertEqual(graph_text(gm.graph), before)

    def test_leaves_what_is_no_bfloat16(self):
        for body in (widened, halved, quantized, cut, plain):
            self.assertEqual(self.after(body)[1], "NarrowTokens: 0 applied, 0 refused")


class Gated(nn.Module):
    """Two products before the activation, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, FF), nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class TestUnderAutocast(TestCase):
    def results(self, run: Any, model: nn.Module, x: Tensor, *routing: Tensor) -> dict[str, Tensor]:
        """The result and all gradients."""
        x = x.clone().requires_grad_()
        out = run(x, *routing)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        return {"out": out.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters()}  # type: ignore[dict-item]

    def test_rounds_as_the_model(self):
        """Two products with biases before the activation are one op, and results are as near to f64 as the model's."""
        torch.manual_seed(0)
        model = Separate(Gated)
        x, ids, weights = routed(400)
        wide, ours = original(model).double(), original(model)
        exact = self.results(wide, wide, x.double(), ids, weights.double())
        found = []
        for m, call in ((ours, compiled(ours, "aot_eager", fullgraph=True)), (model, model)):
            with torch.autocast("cpu", BF16), regions() as reports:
                found.append(self.results(call, m, x, ids, weights))
            assert m is model or ["expert_mlp" in r.after for r in reports] == [True]
        parts = {"out": ["out"], "x": ["x"], "parameters": [*exact][2:]}  # single biases are a few numbers
        mine, theirs = (
            {
                part: sum(float((f[n] - exact[n]).norm() / exact[n].norm()) for n in names)
                for part, names in parts.items()
            }
            for f in found
        )
        self.assertGreater(min(theirs.values()), 1e-3)  # they do round
        self.assertLess(max(mine[part] / theirs[part] for part in parts), 1.1, (mine, theirs))
