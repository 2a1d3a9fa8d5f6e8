"""passes/overlap_collectives.py: the order of launches and waits, and what nothing may change places with.

Refresh with EXPECTTEST_ACCEPT=1, then read the diff before committing it.  tests/parallel/checks_chunks.py has the
numbers.
"""

import re

import pytest
import torch
import torch.distributed as dist
from expecttest import TestCase
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import moe_compile
from moe_compile import lower
from moe_compile.passes.overlap_collectives import OverlapCollectives
from tests.tiny import Block, D, Experts, Net, compiled

aten, functional = torch.ops.aten, torch.ops._c10d_functional
SHOWN = ("all_to_all_single", "wait_tensor", "expert_mlp", "expert_mlp_backward", "combine", "mm", "addmm", "item")


class Shared(Block):
    """A router, experts, then an expert of all tokens."""

    def __init__(self) -> None:
        super().__init__(Experts(4), num_experts=4)
        self.shared = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x).relu()


class TestOrder(TestCase):
    maxDiff = None

    def setUp(self):
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch._dynamo.reset()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)

    def tearDown(self):
        dist.destroy_process_group()

    def step(self, inner, **options):
        torch.manual_seed(0)
        model = moe_compile.parallelize(Net(1, Shared), moe_compile.build_mesh(ep=2))
        call = compiled(model, inner, fullgraph=True, strategy="alltoall", numerics="fast", **options)
        call(torch.randn(6, D, requires_grad=True)).sum().backward()

    def orders(self, **options):
        """Of the forward and the backward, as AOTAutograd's graphs have them behind the pass."""
        graphs = []
        run = lower.boxed_nop
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lower, "boxed_nop", lambda gm, inputs: graphs.append(gm) or run(gm, inputs))
            self.step("aot_eager", **options)
        return "\n--\n".join("\n".join(_calls(g)) for g in graphs)

    def test_one_chunk(self):
        """The shared expert, and in the backward the gradients of all dense weights, under the collectives."""
        self.assertExpectedInline(
            self.orders(),
            """\
addmm
launch 0
wait 0
launch 1
addmm
wait 1
expert_mlp
launch 2
wait 2
combine
addmm
--
mm
launch 0
mm
mm
mm
mm
mm
wait 0
expert_mlp_backward
launch 1
wait 1
combine""",
        )

    def test_two_chunks(self):
        """The rows of the second chunk travel while the first is computed, there and back, forwards and backwards."""
        self.assertExpectedInline(
            self.orders(chunks=2),
            """\
addmm
launch 0
wait 0
launch 1
wait 1
launch 2
launch 3
addmm
wait 2
expert_mlp
launch 4
wait 3
expert_mlp
launch 5
wait 4
combine
wait 5
combine
addmm
--
mm
launch 0
launch 1
mm
mm
mm
mm
mm
wait 0
expert_mlp_backward
launch 2
wait 1
expert_mlp_backward
launch 3
wait 2
combine
wait 3
combine""",
        )

    def test_without_the_pass(self):
        self.assertExpectedInline(
            self.orders(skip=["overlap_collectives"]),
            """\
addmm
launch 0
wait 0
launch 1
wait 1
expert_mlp
launch 2
wait 2
combine
addmm
addmm
--
mm
mm
mm
mm
launch 0
wait 0
expert_mlp_backward
launch 1
wait 1
combine
mm
mm""",
        )

    def test_inductor_keeps_the_order(self):
        """What Inductor's wrappers call, in their order."""
        code = []
        from torch._inductor.graph import GraphLowering

        codegen = GraphLowering.codegen

        def seen(graph):
            result = codegen(graph)
            code.append(result[0].value)
            return result

        # a setting put back by setattr would be gone
        with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(force_disable_caches=True):
            patch.setattr(GraphLowering, "codegen", seen)
            self.step("inductor", chunks=2)
        self.assertExpectedInline(
            "\n--\n".join("\n".join(_of_wrapper(c)) for c in code),
            """\
addmm
launch 0
wait 0
launch 1
wait 1
launch 2
launch 3
addmm
wait 2
expert_mlp
launch 4
wait 3
expert_mlp
launch 5
wait 4
combine
wait 5
combine
addmm
--
mm
launch 0
launch 1
mm
mm
addmm
mm
wait 0
expert_mlp_backward
launch 2
wait 1
expert_mlp_backward
launch 3
wait 2
combine
wait 3
combine
addmm""",
        )


def _calls(gm):
    """Names of the calls that compute or communicate, with the number of the collective that is waited for."""
    launches: dict = {}
    for node in gm.graph.nodes:
        name = getattr(node.target, "_opname", "").replace("_local_scalar_dense", "item")
        if name == "all_to_all_single":
            launches[node] = len(launches)
            yield f"launch {launches[node]}"
        elif name == "wait_tensor":
            yield f"wait {launches[node.args[0]]}"
        elif name in SHOWN and name != "item":
            yield name


def _of_wrapper(code):
    launches: dict = {}
    for line in code.splitlines():
        if found := re.search(r"(buf\d+) = torch.ops._c10d_functional.all_to_all_single", line):
            launches[found[1]] = len(launches)
            yield f"launch {launches[found[1]]}"
        elif found := re.search(r"wait_tensor.default\((buf\d+)\)", line):
            yield f"wait {launches[found[1]]}"
        elif found := re.search(
            r"= torch.ops.moe_ep.(expert_mlp\w*|combine).default\(|extern_kernels.(mm|addmm)\(", line
        ):
            yield found[1] or found[2]


# -- graphs by hand -------------------------------------------------------------------------


def travelling(extra):
    """x -> launch -> wait -> relu, with nodes of `extra(graph, x)` behind; the order after the pass."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1000, 1000, device="meta")

    def call(target, *args):
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(1000, 1000, device="meta")
        return node

    sent = call(functional.all_to_all_single.default, x, [500, 500], [500, 500], "0")
    there = call(functional.wait_tensor.default, sent)
    y = call(aten.relu.default, there)
    results = extra(call, x, y)
    graph.output((y, *results))
    gm = GraphModule(nn.Module(), graph)
    OverlapCollectives()(gm)
    return [str(n.target).split(".")[-2] for n in gm.graph.nodes if n.op == "call_function"]


def test_independent_work_comes_before_the_wait() -> None:
    order = travelling(lambda call, x, y: [call(aten.mm.default, x, x)])
    assert order == ["all_to_all_single", "mm", "wait_tensor", "relu"]


def test_dependent_work_does_not() -> None:
    order = travelling(lambda call, x, y: [call(aten.mm.default, x, y)])
    assert order == ["all_to_all_single", "wait_tensor", "relu", "mm"]


def test_as_much_as_the_collective_takes() -> None:
    """4 MB at 2 GB/s take 2 ms, a product of 2 GFLOP 40: one of two stays where it was."""
    order = travelling(lambda call, x, y: [call(aten.mm.default, x, x), call(aten.mm.default, x, x)])
    assert order == ["all_to_all_single", "mm", "wait_tensor", "relu", "mm"]


def test_nothing_crosses_a_change() -> None:
    """x is written after the relu: what reads it then is no earlier, and what was before stays before."""

    def changed(call, x, y):
        call(aten.copy_.default, x, y)
        return [call(aten.mm.default, x, x)]

    assert travelling(changed) == ["all_to_all_single", "wait_tensor", "relu", "copy_", "mm"]


def test_random_numbers_keep_their_order() -> None:
    """The first of them needs what travels, so the second waits as well."""

    def drawn(call, x, y):
        return [call(aten.bernoulli.default, y), call(aten.bernoulli.default, x), call(aten.sigmoid.default, x)]

    assert travelling(drawn) == ["all_to_all_single", "sigmoid", "wait_tensor", "relu", "bernoulli", "bernoulli"]


def test_launches_keep_their_order() -> None:
    """Ranks share it: a launch that is ready stands behind one that is not."""

    def second(call, x, y):
        third = call(functional.all_to_all_single.default, y, [500, 500], [500, 500], "0")
        fourth = call(functional.all_to_all_single.default, x, [500, 500], [500, 500], "0")
        return [call(functional.wait_tensor.default, third), call(functional.wait_tensor.default, fourth)]

    assert travelling(second) == [
        "all_to_all_single", "wait_tensor", "relu", "all_to_all_single", "all_to_all_single", "wait_tensor",
        "wait_tensor",
    ]  # fmt: skip


def test_a_graph_without_all_to_alls_stays_as_it_is() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.relu.default, (x,)))
    report = OverlapCollectives()(GraphModule(nn.Module(), graph))
    assert not report.applied
