"""Controls that must fail: a rewritten graph that is sabotaged has to turn the parity check red."""

import copy

import pytest
import torch

import moe_compile  # noqa: F401
from moe_compile.pipeline import canonicalise
from tests.golden import Stacked, detected, inputs, run

moe_ep = torch.ops.moe_ep


def rewritten(fused: bool = False):
    """In general ops, or as one fused op."""
    module, args = Stacked(4), inputs(4, tokens=16)
    gm, report = detected(module, Stacked.loop, *args)
    assert report.applied
    canonicalise(gm, frozenset() if fused else frozenset({"fuse_experts"}))
    return gm, module, args


def red(gm, module, args) -> bool:
    gm.graph.lint()
    gm.recompile()
    return not torch.allclose(run(gm, module, *args), module.loop(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_untouched_graph_is_green(fused: bool):
    assert not red(*rewritten(fused))


@pytest.mark.parametrize("fused", [False, True])
def test_two_experts_exchanged(fused: bool):
    gm, module, args = rewritten(fused)
    swapped = copy.deepcopy(module)
    with torch.no_grad():
        swapped.up.copy_(module.up[[1, 0, 2, 3]])
    assert not torch.allclose(run(gm, swapped, *args), module.loop(*args), rtol=1e-4, atol=1e-5)


def test_one_expert_dropped():
    gm, module, args = rewritten()
    (dispatch,) = gm.graph.find_nodes(op="call_function", target=moe_ep.dispatch.default)
    gemms = gm.graph.find_nodes(op="call_function", target=moe_ep.grouped_gemm.default)
    dispatch.update_arg(2, 3)
    for gemm in gemms:
        with gm.graph.inserting_before(gemm):
            fewer = gm.graph.call_function(torch.ops.aten.slice.Tensor, (gemm.args[1][0], 0, 0, 3))
        gemm.update_arg(1, [fewer])
    assert red(gm, module, args)


def test_the_weights_deleted():
    gm, module, args = rewritten()
    (combine,) = gm.graph.find_nodes(op="call_function", target=moe_ep.combine.default)
    assert combine.args[1] is not None
    combine.update_arg(1, None)
    assert red(gm, module, args)


@pytest.mark.parametrize("position", [0, 1])
def test_a_gemm_reads_the_other_stack(position: int):
    gm, module, args = rewritten()
    gemm = gm.graph.find_nodes(op="call_function", target=moe_ep.grouped_gemm.default)[position]
    with gm.graph.inserting_before(gemm):
        flipped = gm.graph.call_function(torch.ops.aten.flip.default, (gemm.args[1][0], [0]))
    gemm.update_arg(1, [flipped])
    assert red(gm, module, args)


# x, ids, weights, gate, up, down, number of experts, ...
SABOTAGE = {"weights deleted": (2, None), "one expert dropped": (6, 3), "another activation": (7, "silu")}


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_fused_op(what: str):
    gm, module, args = rewritten(fused=True)
    (node,) = gm.graph.find_nodes(op="call_function", target=moe_ep.expert_mlp.default)
    position, instead = SABOTAGE[what]
    assert node.args[position] != instead
    node.update_arg(position, instead)
    if what == "one expert dropped":
        for i in (4, 5):
            with gm.graph.inserting_before(node):
                fewer = gm.graph.call_function(torch.ops.aten.slice.Tensor, (node.args[i][0], 0, 0, 3))
            node.update_arg(i, [fewer])
    assert red(gm, module, args)
