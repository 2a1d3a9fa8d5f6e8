"""Golden graphs for passes/chunk_tokens.py, and its meaning on one process.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.  tests/parallel/checks_chunks.py has several
ranks.
"""

import torch
from expecttest import TestCase

import moe_compile
from moe_compile import pipeline
from moe_compile.errors import MoeCompileError
from moe_compile.graph_text import graph_text
from moe_compile.parallel.exchange import token_chunks
from moe_compile.parallel.shards import Family, Placement
from moe_compile.passes.chunk_tokens import ChunkTokens
from tests.golden import Stacked, captured, detected, inputs, run

assert moe_compile
FAMILIES = (Family("up", ("up",), 4), Family("down", ("down",), 4))


def loop(self, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(4):
        t, k = torch.where(ids == e)
        y = torch.relu(x[t] @ self.up[e].T) @ self.down[e].T
        out.index_add_(0, t, y * weights[t, k, None])
    return out


def found(tokens=5):
    """(graph, the inputs that are parameters by name, arguments, module)."""
    module, args = Stacked(4), inputs(4, tokens)
    state = captured(module, loop, *args).state
    gm, report = detected(module, loop, *args)
    assert report.applied, report
    nodes = gm.graph.find_nodes(op="placeholder")
    return gm, dict(zip(state, nodes[len(args) : len(args) + len(state)], strict=True)), args, module


class TestChunkTokens(TestCase):
    maxDiff = None

    def test_two_chunks(self):
        gm, state, *_ = found()
        report = ChunkTokens(2, set(state.values()))(gm)
        self.assertExpectedInline(
            _outside(gm),
            """\
unsqueeze = aten.unsqueeze(weights, 2)
token_chunks = token_chunks(ids, 2)
token_chunks_1 = token_chunks(x, 2)
token_chunks_2 = token_chunks(unsqueeze, 2)
getitem_8 = token_chunks[0]
getitem_9 = token_chunks_1[0]
getitem_10 = token_chunks_2[0]
experts_1 = experts(getitem_8, [getitem_9], [getitem_10], [up, down], [], experts_body_0, 4, None)
getitem_11 = token_chunks[1]
getitem_12 = token_chunks_1[1]
getitem_13 = token_chunks_2[1]
experts_2 = experts(getitem_11, [getitem_12], [getitem_13], [up, down], [], experts_body_0, 4, None)
cat_default = aten.cat([experts_1, experts_2])
return [cat_default]""",
        )
        self.assertEqual(report.applied, ["experts"])

    def test_they_are_placed_together(self):
        """One message, one read; what brings tokens stands before what runs."""
        gm, state, *_ = found()
        done = pipeline.place(gm, Placement(2, 1, "group", FAMILIES), state, "alltoall", "fast", chunks=2)
        self.assertEqual(done.chunks, 2)
        self.assertExpectedInline(
            _outside(gm),
            """\
unsqueeze = aten.unsqueeze(weights, 2)
token_chunks = token_chunks(ids, 2)
token_chunks_1 = token_chunks(x, 2)
token_chunks_2 = token_chunks(unsqueeze, 2)
getitem_8 = token_chunks[0]
getitem_9 = token_chunks_1[0]
getitem_10 = token_chunks_2[0]
getitem_11 = token_chunks[1]
getitem_12 = token_chunks_1[1]
getitem_13 = token_chunks_2[1]
dispatch_default = moe_ep.dispatch(getitem_9, getitem_8, 4)
getitem_14 = dispatch_default[0]
getitem_15 = dispatch_default[1]
getitem_16 = dispatch_default[2]
message = message(getitem_15, getitem_14, 2, 2, 1113227700)
dispatch_default_1 = moe_ep.dispatch(getitem_12, getitem_11, 4)
getitem_17 = dispatch_default_1[0]
getitem_18 = dispatch_default_1[1]
getitem_19 = dispatch_default_1[2]
message_1 = message(getitem_18, getitem_17, 2, 2, 1113227700)
all_to_all_single_default = _c10d_functional_autograd.all_to_all_single(message, [4, 4], [4, 4], group)
wait_tensor_default = _c10d_functional.wait_tensor(all_to_all_single_default)
of_same_experts_default = moe_ep.of_same_experts(message_1, wait_tensor_default, message, 2)
all_to_all_single_default_1 = _c10d_functional_autograd.all_to_all_single(of_same_experts_default, [4, 4], [4, 4], group)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_to_all_single_default_1)
host_reads = host_reads([message, message_1], [wait_tensor_default, wait_tensor_default_1], [getitem_14, getitem_17], 2)
getitem_20 = host_reads[0]
getitem_21 = host_reads[1]
getitem_22 = host_reads[2]
getitem_23 = host_reads[3]
all_to_all_single_default_2 = _c10d_functional_autograd.all_to_all_single(getitem_14, getitem_21, getitem_20, group)
wait_tensor_default_2 = _c10d_functional.wait_tensor(all_to_all_single_default_2)
expert_of_row = expert_of_row(wait_tensor_default, wait_tensor_default_2, 2)
all_to_all_single_default_3 = _c10d_functional_autograd.all_to_all_single(getitem_17, getitem_23, getitem_22, group)
wait_tensor_default_3 = _c10d_functional.wait_tensor(all_to_all_single_default_3)
expert_of_row_1 = expert_of_row(wait_tensor_default_1, wait_tensor_default_3, 2)
experts_3 = experts(expert_of_row, [wait_tensor_default_2], [], [up_local, down_local], [], local_body_0, 2, None)
all_to_all_single_default_4 = _c10d_functional_autograd.all_to_all_single(experts_3, getitem_20, getitem_21, group)
wait_tensor_default_4 = _c10d_functional.wait_tensor(all_to_all_single_default_4)
experts_4 = experts(expert_of_row_1, [wait_tensor_default_3], [], [up_local, down_local], [], local_body_1, 2, None)
all_to_all_single_default_5 = _c10d_functional_autograd.all_to_all_single(experts_4, getitem_22, getitem_23, group)
wait_tensor_default_5 = _c10d_functional.wait_tensor(all_to_all_single_default_5)
reshape_default = aten.reshape(getitem_10, [-1, 1])
index_tensor = aten.index(reshape_default, [getitem_16])
mul_tensor = aten.mul(wait_tensor_default_4, index_tensor)
combine_default = moe_ep.combine(mul_tensor, None, getitem_16, getitem_15, 2)
reshape_default_1 = aten.reshape(getitem_13, [-1, 1])
index_tensor_1 = aten.index(reshape_default_1, [getitem_19])
mul_tensor_1 = aten.mul(wait_tensor_default_5, index_tensor_1)
combine_default_1 = moe_ep.combine(mul_tensor_1, None, getitem_19, getitem_18, 2)
cat_default = aten.cat([combine_default, combine_default_1])
return [cat_default]""",
        )

    def test_the_same_numbers(self):
        for tokens in (0, 1, 2, 5, 7):
            if tokens < 2:
                continue  # a trace is for two tokens and more; the function below takes any
            gm, state, args, module = found(tokens)
            want = run(gm, module, *args)
            ChunkTokens(3, set(state.values()))(gm)
            self.assertTrue(torch.equal(run(gm, module, *args), want))

    def test_sizes_of_chunks(self):
        for tokens, chunks in ((0, 3), (1, 3), (2, 3), (7, 3), (8, 2), (9, 4)):
            parts = token_chunks(torch.arange(tokens), chunks)
            self.assertEqual(len(parts), chunks)
            self.assertEqual(torch.cat(parts).tolist(), list(range(tokens)))
            self.assertTrue(max(map(len, parts)) - min(map(len, parts)) <= 1)

    def test_exact_sums_are_not_cut(self):
        where = Placement(2, 1, "group", FAMILIES)
        gm, state, *_ = found()
        with self.assertRaisesRegex(MoeCompileError, "option chunks is 2: .* it needs numerics 'fast'"):
            pipeline.place(gm, where, state, "alltoall", "exact", chunks=2, trained=frozenset([state["up"]]))
        for strategy, numerics, chunks in (("alltoall", "exact", 2), ("gather_weights", "exact", 1)):
            gm, state, *_ = found()  # nothing is trained, or weights travel
            done = pipeline.place(gm, where, state, strategy, numerics, chunks=2)
            self.assertEqual((done.report.refused, done.chunks), ([], chunks))


def _outside(gm):
    """Without inputs and bodies."""
    lines = graph_text(gm.graph, types=False).splitlines()
    return "\n".join(line for line in lines if (not line.startswith(" ") and " = " in line) or "return [" in line)
