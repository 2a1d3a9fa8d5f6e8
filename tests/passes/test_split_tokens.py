"""Golden graphs for passes/split_tokens.py, and its ops on one process.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.  tests/parallel/checks_tp.py has the numbers.
"""

import dataclasses

import torch
import torch.nn.functional as F
from expecttest import TestCase

import moe_compile
from moe_compile import pipeline
from moe_compile.graph_text import graph_text
from moe_compile.parallel.shards import Family, Placement
from moe_compile.passes.split_tokens import SplitTokens
from moe_compile.region import experts
from tests.golden import Stacked, captured, detected, inputs

assert moe_compile
moe_ep = torch.ops.moe_ep
FAMILIES = (Family("up", ("up",), 4), Family("down", ("down",), 4))


def loop(self, x, ids, weights):
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, 4).permute(2, 1, 0)
    for e in range(4):
        k, t = torch.where(mask[e])
        y = torch.relu(x[t] @ self.up[e].T) @ self.down[e].T
        out.index_add_(0, t, y * weights[t, k, None])
    return out


class Scaled(Stacked):
    def __init__(self, num_experts):
        super().__init__(num_experts)
        self.scale = torch.nn.Parameter(torch.rand(4))


def scaled(self, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(4):
        t, k = torch.where(ids == e)
        y = torch.relu((x[t] * self.scale) @ self.up[e].T) @ self.down[e].T
        out.index_add_(0, t, y * weights[t, k, None])
    return out


def shared(self, x, ids, weights):
    out = torch.zeros_like(x)
    mean = x.mean(0)
    for e in range(4):
        t, k = torch.where(ids == e)
        y = torch.relu((x[t] - mean) @ self.up[e].T) @ self.down[e].T
        out.index_add_(0, t, y * weights[t, k, None])
    return out


def split(fn, families=FAMILIES, module=None, group="tokens"):
    """(graph, report) of the pass, as one of some ranks runs it."""
    module, args = module or Stacked(4), inputs(4)
    state = captured(module, fn, *args).state
    gm, found = detected(module, fn, *args)
    assert found.applied, found
    nodes = gm.graph.find_nodes(op="placeholder")
    known = dict(zip(state, nodes[len(args) : len(args) + len(state)], strict=True))
    where = Placement(2, 0, "experts", families, 2, 1, group)
    report = SplitTokens(where, {known[m] for f in families for m in f.members})(gm)
    return gm, report, (where, known)


class TestSplitTokens(TestCase):
    maxDiff = None

    def test_each_rank_runs_its_part(self):
        gm, report, _ = split(loop)
        self.assertExpectedInline(
            graph_text(gm.graph),
            """\
x: f32[5, 4]
ids: i64[5, 2]
weights: f32[5, 2]
up: f32[4, 3, 4]
down: f32[4, 4, 3]
unsqueeze: f32[5, 2, 1] = aten.unsqueeze(weights, 2)
experts_body_0: body
    token_0: f32[r, 4]
    pair_0: f32[r, 1]
    param_0: f32[3, 4]
    param_1: f32[4, 3]
    numpy_t_default: f32[4, 3] = aten.numpy_T(param_0)
    matmul_default: f32[r, 3] = aten.matmul(token_0, numpy_t_default)
    relu_default: f32[r, 3] = aten.relu(matmul_default)
    numpy_t_default_1: f32[3, 4] = aten.numpy_T(param_1)
    matmul_default_1: f32[r, 4] = aten.matmul(relu_default, numpy_t_default_1)
    mul_tensor: f32[r, 4] = aten.mul(matmul_default_1, pair_0)
    return mul_tensor
check_ids_default: i64[5, 2] = moe_ep.check_ids(ids, 4)
detach_default: f32[5, 4] = aten.detach(x)
detach_default_1: i64[5, 2] = aten.detach(check_ids_default)
detach_default_2: f32[5, 2, 1] = aten.detach(unsqueeze)
token_message_default: f64[28] = moe_ep.token_message([detach_default, detach_default_1, detach_default_2])
all_gather_into_tensor_default: f64[56] = _c10d_functional.all_gather_into_tensor(token_message_default, 2, tokens)
wait_tensor_default: f64[56] = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
check_shared_default: i64[5, 2] = moe_ep.check_shared(check_ids_default, wait_tensor_default, 2)
own_rows_default: i64[3, 2] = moe_ep.own_rows(check_shared_default, 1, 2, -1, tokens)
own_rows_default_1: f32[3, 4] = moe_ep.own_rows(x, 1, 2, 0, tokens)
own_rows_default_2: f32[3, 2, 1] = moe_ep.own_rows(unsqueeze, 1, 2, 0, tokens)
experts_1: f32[3, 4] = experts(own_rows_default, [own_rows_default_1], [own_rows_default_2], [up, down], [], experts_body_0, 4, None)
detach_default_3: f32[3, 4] = aten.detach(experts_1)
all_gather_into_tensor_default_1: f32[6, 4] = _c10d_functional.all_gather_into_tensor(detach_default_3, 2, tokens)
wait_tensor_default_1: f32[6, 4] = _c10d_functional.wait_tensor(all_gather_into_tensor_default_1)
joined_default: f32[5, 4] = moe_ep.joined(wait_tensor_default_1, experts_1, check_shared_default, 1, 2, tokens)
return [joined_default]""",
        )
        self.assertExpectedInline(
            str(report),
            """\
SplitTokens: 1 applied, 0 refused
  + experts""",
        )

    def test_without_gradients_only_tokens_are_compared(self):
        with torch.no_grad():
            gm, _, _ = split(loop)
        (message,) = gm.graph.find_nodes(op="call_function", target=moe_ep.token_message.default)
        self.assertEqual([n.args[0].name for n in message.args[0]], ["x"])

    def test_what_all_experts_read_gets_the_whole_gradient(self):
        gm, _, _ = split(shared)
        (read,) = gm.graph.find_nodes(op="call_function", target=moe_ep.read_by_parts.default)
        self.assertEqual(read.args[0].name, "mean")
        (node,) = gm.graph.find_nodes(op="call_function", target=experts)
        self.assertEqual(node.args[4], [read])

    def test_the_part_is_placed(self):
        """The fingerprint has no name of a group in it: it is the same on all ranks."""
        marks = set()
        for group in ("tokens", "others"):
            gm, _, (where, known) = split(scaled, module=Scaled(4), group=group)
            where = dataclasses.replace(where, tp=1)
            done = pipeline.place(gm, where, known, "alltoall")
            self.assertEqual((len(done.report.applied), done.strategy), (1, "alltoall"))
            marks |= {n.args[4] for n in gm.graph.nodes if n.name == "message"}
        self.assertEqual(len(marks), 1)

    def test_experts_that_are_not_sharded(self):
        _, report, _ = split(loop, families=())
        self.assertEqual((report.applied, report.refused), ([], []))


def test_parts_are_the_whole() -> None:
    for number in (0, 1, 2, 5, 6):
        for ranks in (1, 2, 4):
            rows = torch.randn(number, 3)
            parts = [moe_ep.own_rows(rows, r, ranks, -1, "") for r in range(ranks)]
            assert {len(p) for p in parts} == {-(-number // ranks)}
            whole = torch.cat(parts)
            assert (whole[number:] == -1).all()
            for r, part in enumerate(parts):
                part.requires_grad_()
                out = moe_ep.joined(whole, part, rows, r, ranks, "")
                assert torch.equal(out, rows)
                out.backward(rows)
                assert torch.equal(part.grad, torch.where(part == -1, 0, part))


def told(*ranks: torch.Tensor) -> torch.Tensor:
    return torch.cat([moe_ep.token_message([x]) for x in ranks])


def test_other_tokens_are_noticed() -> None:
    torch.manual_seed(0)
    ids = torch.arange(8).view(4, 2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        for shape in ((4, 6), (1, 6), (1, 1), (300, 2), (6,), (5, 2, 3)):
            x = (3 * torch.randn(shape)).to(dtype) if dtype != torch.bool else torch.rand(shape) > 0.5
            assert torch.equal(moe_ep.check_shared(ids, told(x, x, x), 3), ids)
            if dtype.is_floating_point and x.numel() > 2:
                assert torch.equal(moe_ep.check_shared(ids, told(x, x * 1.001), 2), ids)
                for other in (-x, x * 1.5, x + torch.randn_like(x), torch.randn_like(x), torch.zeros_like(x)):
                    try:
                        moe_ep.check_shared(ids, told(x, x, other), 3)
                    except RuntimeError as error:
                        assert "ranks [2] of the tensor-parallel group have other tokens" in str(error)
                    else:
                        raise AssertionError((dtype, shape, x, other))
    nothing = told(torch.zeros(0, 3), torch.zeros(0, 3))
    assert torch.equal(moe_ep.check_shared(ids, nothing, 2), ids)
    bad = torch.full((4, 3), torch.nan)
    assert torch.equal(moe_ep.check_shared(ids, told(bad, bad), 2), ids)
