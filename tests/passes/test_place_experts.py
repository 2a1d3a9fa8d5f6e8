"""Golden graphs for passes/place_experts.py.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.  tests/parallel has the numbers.
"""

from types import SimpleNamespace

import torch
from expecttest import TestCase
from torch import nn

import moe_compile
from moe_compile import pipeline
from moe_compile.errors import MoeCompileError, Refusal
from moe_compile.graph_text import graph_text
from moe_compile.parallel.shards import Family, Placement
from tests.golden import Stacked, captured, inputs
from tests.golden import detected as _detected

assert moe_compile


def placed(*args, **kwargs):
    """(graph, report, new inputs) of the pass, as one of some ranks runs it."""
    done = _placed(*args, **kwargs)
    return done.gm, done.report, done.local


def _placed(
    module,
    fn,
    families,
    strategy="alltoall",
    ranks=2,
    rank=1,
    numerics="exact",
    tokens=5,
    agree=lambda topic, mine: mine,
):
    args = inputs(4, tokens)
    state = captured(module, fn, *args).state
    gm, found = _detected(module, fn, *args)
    assert found.applied, found
    nodes = gm.graph.find_nodes(op="placeholder")
    where = Placement(ranks, rank, "group", families)
    known = dict(zip(state, nodes[len(args) : len(args) + len(state)], strict=True))
    done = pipeline.place(gm, where, known, strategy, numerics, agree)
    return SimpleNamespace(gm=gm, **vars(done))


UP, DOWN = Family("up", ("up",), 4), Family("down", ("down",), 4)


def loop(self, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(4):
        t, k = torch.where(ids == e)
        y = torch.relu(x[t] @ self.up[e].T) @ self.down[e].T
        out.index_add_(0, t, y * weights[t, k, None])
    return out


class TestPlaceExperts(TestCase):
    maxDiff = None

    def refuses(self, fn, reason, families=(UP, DOWN), module=None, **kwargs):
        gm, report, _ = placed(module or Stacked(4), fn, families, **kwargs)
        self.assertEqual(report.applied, [])
        self.assertEqual([why for _, why in report.refused], [reason])
        assert "all_to_all" not in graph_text(gm.graph)

    def test_tokens_travel(self):
        gm, report, local = placed(Stacked(4), loop, (UP, DOWN))
        self.assertExpectedInline(
            graph_text(gm.graph, types=False),
            """\
x
ids
weights
up
down
up_local
down_local
unsqueeze = aten.unsqueeze(weights, 2)
dispatch_default = moe_ep.dispatch(x, ids, 4)
getitem_8 = dispatch_default[0]
getitem_9 = dispatch_default[1]
getitem_10 = dispatch_default[2]
message = message(getitem_9, getitem_8, 2, 2, 1473554889)
all_to_all_single_default = _c10d_functional_autograd.all_to_all_single(message, [4, 4], [4, 4], group)
wait_tensor_default = _c10d_functional.wait_tensor(all_to_all_single_default)
host_read = host_read(message, wait_tensor_default, getitem_8, 2)
getitem_11 = host_read[0]
getitem_12 = host_read[1]
all_to_all_single_default_1 = _c10d_functional_autograd.all_to_all_single(getitem_8, getitem_12, getitem_11, group)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_to_all_single_default_1)
expert_of_row = expert_of_row(wait_tensor_default, wait_tensor_default_1, 2)
local_body_0
    token_0
    param_0
    param_1
    numpy_t_default = aten.numpy_T(param_0)
    matmul_default = aten.matmul(token_0, numpy_t_default)
    relu_default = aten.relu(matmul_default)
    numpy_t_default_1 = aten.numpy_T(param_1)
    matmul_default_1 = aten.matmul(relu_default, numpy_t_default_1)
    return matmul_default_1
experts_1 = experts(expert_of_row, [wait_tensor_default_1], [], [up_local, down_local], [], local_body_0, 2, None)
all_to_all_single_default_2 = _c10d_functional_autograd.all_to_all_single(experts_1, getitem_11, getitem_12, group)
wait_tensor_default_2 = _c10d_functional.wait_tensor(all_to_all_single_default_2)
reshape_default = aten.reshape(unsqueeze, [-1, 1])
index_tensor = aten.index(reshape_default, [getitem_10])
mul_tensor = aten.mul(wait_tensor_default_2, index_tensor)
combine_default = moe_ep.combine(mul_tensor, None, getitem_10, getitem_9, 2)
return [combine_default]""",
        )
        self.assertEqual(list(local), ["up", "down"])
        self.assertExpectedInline(
            str(report),
            """\
PlaceExperts: 1 applied, 0 refused
  + experts""",
        )

    def test_what_a_rank_runs_is_an_experts_node_again(self):
        gm, _, _ = placed(Stacked(4), loop, (UP, DOWN))
        reports = pipeline.canonicalise(gm, frozenset({"fuse_experts"}))
        self.assertEqual([len(r.applied) for r in reports], [1, 1, 0])  # the routing weights: in the `combine` at home
        self.assertExpectedInline(
            "\n".join(graph_text(gm.graph, types=False).splitlines()[-16:]),
            """\
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_to_all_single_default_1)
expert_of_row = expert_of_row(wait_tensor_default, wait_tensor_default_1, 2)
dispatch_default_1 = moe_ep.dispatch(wait_tensor_default_1, expert_of_row, 2)
getitem_13 = dispatch_default_1[0]
getitem_14 = dispatch_default_1[1]
getitem_15 = dispatch_default_1[2]
grouped_gemm_default = moe_ep.grouped_gemm(getitem_13, [up_local], getitem_14)
relu_default = aten.relu(grouped_gemm_default)
grouped_gemm_default_1 = moe_ep.grouped_gemm(relu_default, [down_local], getitem_14)
combine_default_1 = moe_ep.combine(grouped_gemm_default_1, None, getitem_15, getitem_14, 1)
all_to_all_single_default_2 = _c10d_functional_autograd.all_to_all_single(combine_default_1, getitem_11, getitem_12, group)
wait_tensor_default_2 = _c10d_functional.wait_tensor(all_to_all_single_default_2)
reshape_default = aten.reshape(unsqueeze, [-1, 1])
reshape_default_1 = aten.reshape(reshape_default, [-1, 2])
combine_default_2 = moe_ep.combine(wait_tensor_default_2, reshape_default_1, getitem_10, getitem_9, 2)
return [combine_default_2]""",
        )

    def test_weights_travel(self):
        gm, _, _ = placed(Stacked(4), loop, (UP, DOWN), "gather_weights")
        self.assertExpectedInline(
            graph_text(gm.graph, types=False),
            """\
x
ids
weights
up
down
up_local
down_local
unsqueeze = aten.unsqueeze(weights, 2)
experts_body_0
    token_0
    pair_0
    param_0
    param_1
    numpy_t_default = aten.numpy_T(param_0)
    matmul_default = aten.matmul(token_0, numpy_t_default)
    relu_default = aten.relu(matmul_default)
    numpy_t_default_1 = aten.numpy_T(param_1)
    matmul_default_1 = aten.matmul(relu_default, numpy_t_default_1)
    mul_tensor = aten.mul(matmul_default_1, pair_0)
    return mul_tensor
reshape_default = aten.reshape(up_local, [2, -1])
all_gather_into_tensor_default = _c10d_functional_autograd.all_gather_into_tensor(reshape_default, 2, group)
wait_tensor_default = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
slice_tensor = aten.slice(wait_tensor_default, 0, 0, 4)
reshape_default_1 = aten.reshape(slice_tensor, [4, 3, 4])
reshape_default_2 = aten.reshape(down_local, [2, -1])
all_gather_into_tensor_default_1 = _c10d_functional_autograd.all_gather_into_tensor(reshape_default_2, 2, group)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_gather_into_tensor_default_1)
slice_tensor_1 = aten.slice(wait_tensor_default_1, 0, 0, 4)
reshape_default_3 = aten.reshape(slice_tensor_1, [4, 4, 3])
experts_1 = experts(ids, [x], [unsqueeze], [reshape_default_1, reshape_default_3], [], experts_body_0, 4, None)
return [experts_1]""",
        )

    def test_uneven_shards(self):
        up, down = Family("up", ("up",), 3), Family("down", ("down",), 3)

        def three(self, x, ids, weights):
            out = torch.zeros_like(x)
            for e in range(3):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, torch.relu(x[t] @ self.up[e].T) @ self.down[e].T)
            return out

        for rank, number in ((0, 2), (1, 1)):
            gm, _, local = placed(Stacked(3), three, (up, down), rank=rank)
            self.assertEqual(local["up"].meta["val"].shape[0], number)
            gm, _, local = placed(Stacked(3), three, (up, down), "gather_weights", rank=rank)
            self.assertEqual("constant_pad_nd" in graph_text(gm.graph), rank == 1)

    def test_one_rank_has_no_collectives(self):
        gm, report, local = placed(Stacked(4), loop, (UP, DOWN), ranks=1, rank=0)
        assert report.applied and "c10d" not in graph_text(gm.graph)
        self.assertEqual(local["up"].meta["val"].shape[0], 4)

    def test_replicated_values_of_experts_are_sliced(self):
        gm, _, local = placed(Stacked(4), loop, (UP,))
        self.assertEqual(list(local), ["up"])
        assert "aten.slice(down, 0, 2, 4)" in graph_text(gm.graph)

    def test_a_list_becomes_one_stack(self):
        class Listed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

            def loop(self, x, ids, weights):
                out = torch.zeros_like(x)
                for e, expert in enumerate(self.experts):
                    t, k = torch.where(ids == e)
                    out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
                return out

            def reversed(self, x, ids, weights):
                out = torch.zeros_like(x)
                for e in range(4):
                    t, k = torch.where(ids == e)
                    out.index_add_(0, t, self.experts[3 - e](x[t]) * weights[t, k, None])
                return out

        family = Family("experts.weight", tuple(f"experts.{e}.weight" for e in range(4)), 4)
        gm, _, local = placed(Listed(), Listed.loop, (family,))
        self.assertEqual(tuple(local["experts.weight"].meta["val"].shape), (2, 4, 4))
        assert "[experts_weight_local]" in graph_text(gm.graph)
        self.refuses(
            Listed.reversed, "the experts' weights are not sharded in the order of the experts", (family,), Listed()
        )

    def test_refuses_another_number_of_experts_than_are_sharded(self):
        self.refuses(loop, "4 experts run, 4 and 5 are sharded", (Family("up", ("up",), 5), DOWN))

    def test_refuses_what_every_rank_has_its_own_of(self):
        def shared(self, x, ids, weights):
            out, mean = torch.zeros_like(x), x.mean(0)
            for e in range(4):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, torch.relu((x[t] + mean) @ self.up[e].T) @ self.down[e].T)
            return out

        self.refuses(shared, "experts read mean, of which every rank has its own")

        def late(self, x, ids, weights):  # behind the last product: it stays at home
            out, mean = torch.zeros_like(x), x.mean(0)
            for e in range(4):
                t, k = torch.where(ids == e)
                y = torch.relu(x[t] @ self.up[e].T) @ self.down[e].T
                out.index_add_(0, t, y * weights[t, k, None] * mean)
            return out

        gm, report, _ = placed(Stacked(4), late, (UP, DOWN))
        assert report.applied

    def test_refuses_values_of_experts_made_from_tokens(self):
        def scaled(self, x, ids, weights):
            out, scale = torch.zeros_like(x), self.down * x.mean()
            for e in range(4):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, torch.relu(x[t] @ self.up[e].T) @ scale[e].T)
            return out

        self.refuses(scaled, "what belongs to an expert is computed from the tokens of a rank", (UP,))
        self.refuses(scaled, "mul (aten.mul.Tensor) is not shown to work on every expert's weight alike")

    def test_refuses_stacks_that_mix_experts(self):
        def rolled(self, x, ids, weights):
            out, up = torch.zeros_like(x), self.up.roll(1, 0)
            for e in range(4):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, torch.relu(x[t] @ up[e].T) @ self.down[e].T)
            return out

        self.refuses(rolled, "roll (aten.roll.default) is not shown to work on every expert's weight alike")

        def flipped(self, x, ids, weights):
            out, up = torch.zeros_like(x), self.up.transpose(1, 2).chunk(3, 2)[0]
            for e in range(4):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, torch.relu(x[t] @ up[e]) @ self.down[e].T[:1])
            return out

        gm, report, _ = placed(Stacked(4), flipped, (UP, DOWN))  # views that leave the experts first
        assert report.applied, report

    def test_a_token_travels_once_to_a_rank(self):
        gm, _, _ = placed(Stacked(4), loop, (UP, DOWN), "dedup", numerics="fast")
        self.assertExpectedInline(
            _outside(gm),
            """\
unsqueeze = aten.unsqueeze(weights, 2)
on_the_wire = on_the_wire(ids, 4)
distinct_ranks = distinct_ranks(on_the_wire, 2)
dispatch_default = moe_ep.dispatch(x, distinct_ranks, 2)
getitem_8 = dispatch_default[0]
getitem_9 = dispatch_default[1]
getitem_10 = dispatch_default[2]
rank_message = rank_message(getitem_9, 2, 1416469141)
all_to_all_single_default = _c10d_functional_autograd.all_to_all_single(rank_message, [4, 4], [4, 4], group)
wait_tensor_default = _c10d_functional.wait_tensor(all_to_all_single_default)
host_read = host_read(rank_message, wait_tensor_default, None, 2)
getitem_11 = host_read[0]
getitem_12 = host_read[1]
floor_divide_default = aten.floor_divide(getitem_10, 2)
index_tensor = aten.index(on_the_wire, [floor_divide_default])
prefix = prefix(index_tensor, getitem_11)
all_to_all_single_default_1 = _c10d_functional_autograd.all_to_all_single(prefix, getitem_12, getitem_11, group)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_to_all_single_default_1)
sub_tensor = aten.sub(wait_tensor_default_1, 2)
prefix_1 = prefix(getitem_8, getitem_11)
all_to_all_single_default_2 = _c10d_functional_autograd.all_to_all_single(prefix_1, getitem_12, getitem_11, group)
wait_tensor_default_2 = _c10d_functional.wait_tensor(all_to_all_single_default_2)
floor_divide_default_1 = aten.floor_divide(getitem_10, 2)
reshape_default = aten.reshape(unsqueeze, [-1, 2])
index_tensor_1 = aten.index(reshape_default, [floor_divide_default_1])
prefix_2 = prefix(index_tensor_1, getitem_11)
all_to_all_single_default_3 = _c10d_functional_autograd.all_to_all_single(prefix_2, getitem_12, getitem_11, group)
wait_tensor_default_3 = _c10d_functional.wait_tensor(all_to_all_single_default_3)
reshape_default_1 = aten.reshape(wait_tensor_default_3, [-1, 2, 1])
local_body_0
experts_1 = experts(sub_tensor, [wait_tensor_default_2], [reshape_default_1], [up_local, down_local], [], local_body_0, 2, None)
all_to_all_single_default_4 = _c10d_functional_autograd.all_to_all_single(experts_1, getitem_11, getitem_12, group)
wait_tensor_default_4 = _c10d_functional.wait_tensor(all_to_all_single_default_4)
padded = padded(wait_tensor_default_4, getitem_10)
combine_default = moe_ep.combine(padded, None, getitem_10, getitem_9, 2)
return [combine_default]""",
        )

    def test_all_tokens_are_gathered(self):
        gm, _, _ = placed(Stacked(4), loop, (UP, DOWN), "allgather", numerics="fast")
        self.assertExpectedInline(
            _outside(gm),
            """\
unsqueeze = aten.unsqueeze(weights, 2)
on_the_wire = on_the_wire(ids, 4)
equal_message = equal_message(ids, 2, 2, 1616690900)
all_to_all_single_default = _c10d_functional_autograd.all_to_all_single(equal_message, [4, 4], [4, 4], group)
wait_tensor_default = _c10d_functional.wait_tensor(all_to_all_single_default)
of_equal_sizes_default = moe_ep.of_equal_sizes(on_the_wire, equal_message, wait_tensor_default, 2)
all_gather_into_tensor_default = _c10d_functional_autograd.all_gather_into_tensor(of_equal_sizes_default, 2, group)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
sub_tensor = aten.sub(wait_tensor_default_1, 2)
of_equal_sizes_default_1 = moe_ep.of_equal_sizes(x, equal_message, wait_tensor_default, 2)
all_gather_into_tensor_default_1 = _c10d_functional_autograd.all_gather_into_tensor(of_equal_sizes_default_1, 2, group)
wait_tensor_default_2 = _c10d_functional.wait_tensor(all_gather_into_tensor_default_1)
reshape_default = aten.reshape(unsqueeze, [-1, 2])
of_equal_sizes_default_2 = moe_ep.of_equal_sizes(reshape_default, equal_message, wait_tensor_default, 2)
all_gather_into_tensor_default_2 = _c10d_functional_autograd.all_gather_into_tensor(of_equal_sizes_default_2, 2, group)
wait_tensor_default_3 = _c10d_functional.wait_tensor(all_gather_into_tensor_default_2)
reshape_default_1 = aten.reshape(wait_tensor_default_3, [-1, 2, 1])
local_body_0
experts_1 = experts(sub_tensor, [wait_tensor_default_2], [reshape_default_1], [up_local, down_local], [], local_body_0, 2, None)
reduce_scatter_tensor_default = _c10d_functional_autograd.reduce_scatter_tensor(experts_1, sum, 2, group)
wait_tensor_default_4 = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
return [wait_tensor_default_4]""",
        )

    def test_all_rows_are_gathered(self):
        gm, _, _ = placed(Stacked(4), loop, (UP, DOWN), "allgather")
        self.assertExpectedInline(
            _outside(gm),
            """\
unsqueeze = aten.unsqueeze(weights, 2)
dispatch_default = moe_ep.dispatch(x, ids, 4)
getitem_8 = dispatch_default[0]
getitem_9 = dispatch_default[1]
getitem_10 = dispatch_default[2]
equal_message = equal_message(ids, 2, 2, 1552213450)
all_to_all_single_default = _c10d_functional_autograd.all_to_all_single(equal_message, [4, 4], [4, 4], group)
wait_tensor_default = _c10d_functional.wait_tensor(all_to_all_single_default)
of_equal_sizes_default = moe_ep.of_equal_sizes(getitem_8, equal_message, wait_tensor_default, 2)
all_gather_into_tensor_default = _c10d_functional_autograd.all_gather_into_tensor(of_equal_sizes_default, 2, group)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
on_the_wire = on_the_wire(ids, 4)
reshape_default = aten.reshape(on_the_wire, [-1, 1])
index_tensor = aten.index(reshape_default, [getitem_10])
of_equal_sizes_default_1 = moe_ep.of_equal_sizes(index_tensor, equal_message, wait_tensor_default, 2)
all_gather_into_tensor_default_1 = _c10d_functional_autograd.all_gather_into_tensor(of_equal_sizes_default_1, 2, group)
wait_tensor_default_2 = _c10d_functional.wait_tensor(all_gather_into_tensor_default_1)
sub_tensor = aten.sub(wait_tensor_default_2, 2)
local_body_0
experts_1 = experts(sub_tensor, [wait_tensor_default_1], [], [up_local, down_local], [], local_body_0, 2, None)
reduce_scatter_tensor_default = _c10d_functional_autograd.reduce_scatter_tensor(experts_1, sum, 2, group)
wait_tensor_default_3 = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
reshape_default_1 = aten.reshape(unsqueeze, [-1, 1])
index_tensor_1 = aten.index(reshape_default_1, [getitem_10])
mul_tensor = aten.mul(wait_tensor_default_3, index_tensor_1)
combine_default = moe_ep.combine(mul_tensor, None, getitem_10, getitem_9, 2)
return [combine_default]""",
        )

    def test_refuses_sums_of_ranks_where_numerics_are_exact(self):
        self.refuses(
            loop, "dedup adds a token's results rank by rank: numerics is 'exact'", strategy="dedup", numerics="exact"
        )

    def test_refuses_sums_of_what_a_rank_has_its_own_of(self):
        def late(self, x, ids, weights):  # behind the last product, which stays at home only with alltoall
            out, mean = torch.zeros_like(x), x.mean(0)
            for e in range(4):
                t, k = torch.where(ids == e)
                y = torch.relu(x[t] @ self.up[e].T) @ self.down[e].T
                out.index_add_(0, t, y * weights[t, k, None] * mean)
            return out

        for strategy in ("dedup", "allgather"):
            reason = "experts read mean, of which every rank has its own"
            self.refuses(late, reason, strategy=strategy, numerics="fast")
        gm, report, _ = placed(Stacked(4), late, (UP, DOWN), "allgather")
        assert report.applied and "all_gather" in graph_text(gm.graph)

    def test_auto_takes_what_is_possible_and_says_what_is_not(self):
        def centred(self, x, ids, weights):
            out, mean = torch.zeros_like(x), x.mean(0)
            for e in range(4):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, torch.relu((x[t] - mean) @ self.up[e].T) @ self.down[e].T)
            return out

        done = _placed(Stacked(4), centred, (UP, DOWN), "auto")
        self.assertEqual(done.strategy, "gather_weights")
        own = "experts read mean, of which every rank has its own"
        self.assertEqual(
            {e.strategy: e.why_not for e in done.estimates},
            {
                "alltoall": own,
                "dedup": "dedup adds a token's results rank by rank: numerics is 'exact'",
                "allgather": own,
                "gather_weights": "",
            },
        )

    def test_ranks_do_as_the_first_says(self):
        for strategy in ("alltoall", "gather_weights"):
            done = _placed(Stacked(4), loop, (UP, DOWN), "auto", agree=lambda topic, mine, s=strategy: s)
            self.assertEqual(done.strategy, strategy)
        with self.assertRaisesRegex(MoeCompileError, "rank 1 cannot place experts by 'dedup', as the first rank"):
            _placed(Stacked(4), loop, (UP, DOWN), "auto", agree=lambda topic, mine: "dedup")
        with self.assertRaisesRegex(Refusal, "the first rank of the group cannot place these experts"):
            _placed(Stacked(4), loop, (UP, DOWN), "auto", agree=lambda topic, mine: "")
        topics = []
        for rank, tokens in ((0, 4), (1, 7)):
            _placed(
                Stacked(4), loop, (UP, DOWN), "auto", rank=rank, tokens=tokens,
                agree=lambda topic, mine: topics.append(topic) or mine,
            )  # fmt: skip
        self.assertEqual(topics[0], topics[1])
        self.assertExpectedInline(topics[0], """[('up', 4, 4, 3, 4), ('down', 4, 4, 4, 3)], exact""")


def _outside(gm):
    """The graph without the inputs and the body of the experts."""
    lines = graph_text(gm.graph, types=False).splitlines()
    return "\n".join(line for line in lines[7:] if not line.startswith("    "))
