"""`moe-compile plan`: shapes against transformers' own models, memory and bytes by hand, what is recommended."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import plan_accuracy
from benchmarks.scale import mesh_of, ranks
from moe_compile.cli import app
from moe_compile.errors import MoeCompileError
from moe_compile.plan import hardware, memory, shapes
from moe_compile.plan.layouts import Layout, layouts
from moe_compile.plan.memory import Setup, held
from moe_compile.plan.search import ALIKE, plan, predict
from moe_compile.plan.shapes import CONFIGS, PRESETS, from_config
from moe_compile.plan.step import Cluster, Group, Ways, groups, step

H100, H200 = Cluster(hardware.find("h100"), 8), Cluster(hardware.find("h200"), 8)
MIXTRAL, QWEN = PRESETS["mixtral-8x7b"], PRESETS["qwen3-30b-a3b"]

# -- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_has_the_parameters_of_transformers_model(name: str) -> None:
    """Norms inside attention and biases are left out."""
    assert PRESETS[name].parameters == pytest.approx(shapes.count(CONFIGS[name]), rel=1e-4)


def test_published_sizes() -> None:
    billions = {name: round(shape.parameters / 1e9, 1) for name, shape in PRESETS.items()}
    assert billions == {
        "mixtral-8x7b": 46.7, "mixtral-8x22b": 140.6, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.1,
        "deepseek-v3": 671.0, "granite-3b-a800m": 3.3,
    }  # fmt: skip
    assert PRESETS["deepseek-v3"].active == pytest.approx(37e9, rel=0.02)


def test_layers_without_experts() -> None:
    base = CONFIGS["qwen3-30b-a3b"]
    assert from_config(base | {"decoder_sparse_step": 2}).moe_layers == 24
    assert from_config(base | {"mlp_only_layers": [0, 5]}).moe_layers == 46
    assert from_config(CONFIGS["deepseek-v3"]).moe_layers == 58
    assert from_config({"text_config": base, "model_type": "with_images"}).E == 128


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_local_experts": None}, "none of num_local_experts, n_routed_experts"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok is True"),
        ({"moe_layer_freq": [0, 1]}, "which layers have experts is not understood"),
    ],
)
def test_a_config_that_says_too_little(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(MoeCompileError, match=reason):
        from_config(CONFIGS["mixtral-8x7b"] | change)


def test_load(tmp_path: Path) -> None:
    small = CONFIGS["mixtral-8x7b"] | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(small))
    assert shapes.load(str(tmp_path)) == dataclasses.replace(MIXTRAL, num_layers=2, moe_layers=2, name=tmp_path.name)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    for model, reason in (
        ("nowhere", "nor one of the presets"),
        ("list.json", "is a list"),
        ("broken.json", "not JSON"),
    ):
        with pytest.raises(MoeCompileError, match=reason):
            shapes.load(model if model == "nowhere" else str(tmp_path / model))


def test_a_model_with_layers_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Jamba's experts are in every other layer, and most of its layers are no attention."""
    from transformers import JambaConfig

    (tmp_path / "jamba.json").write_text(json.dumps(JambaConfig(num_hidden_layers=8).to_dict()))
    with pytest.raises(MoeCompileError, match="layers of a kind that is not planned for"):
        shapes.load(str(tmp_path / "jamba.json"))


# -- memory and bytes -----------------------------------------------------------------------


def test_what_a_rank_holds_by_hand() -> None:
    dense, experts = held(MIXTRAL, Layout(ep=4, dp_shard=16, dp_replicate=2))
    assert dense == -(-MIXTRAL.dense_parameters // 16)
    assert experts == 32 * 2 * 3 * 4096 * 14336
    assert held(MIXTRAL, Layout(ep=3, dp_shard=3))[1] == 32 * 3 * 3 * 4096 * 14336  # the rank with the most
    assert held(MIXTRAL, Layout(dp_shard=8, splits_experts=True))[1] == 8 * 32 * 3 * 4096 * 14336 // 8
    assert held(MIXTRAL, Layout(8, 1, 64, splits_experts=True))[1] == 32 * 3 * 4096 * 14336 // 8
    found = memory.memory(MIXTRAL, Layout(8, 1, 8), Setup(kept=2, states=4))
    assert found.parameters + found.gradients + found.states == 8 * sum(held(MIXTRAL, Layout(8, 1, 8)))


def test_more_is_held_without_checkpoints_and_with_more_tokens() -> None:
    layout = Layout(8, 1, 8)
    base, more, all_kept = (
        memory.memory(QWEN, layout, s).activations for s in (Setup(), Setup(8192), Setup(checkpoint=False))
    )
    assert more == 2 * base < 2 * all_kept


def test_groups_and_nodes() -> None:
    """Ranks are (dp_replicate, edp, ep, tp), neighbours last."""
    found = groups(Layout(ep=16, tp=2, dp_shard=32, dp_replicate=4), H100)
    assert found == {
        "tp": Group(2, 2), "ep": Group(16, 4), "dp_shard": Group(32, 4), "dp_replicate": Group(4, 1), "copies": Group(8, 1),
        "edp": Group(1, 1),
    }  # fmt: skip
    assert groups(Layout(2, 1, 4), H100)["copies"] == Group(2, 2)
    split = groups(Layout(ep=2, dp_shard=16, dp_replicate=2, splits_experts=True), H100)
    assert split["edp"] == Group(8, 4) and split["copies"] == Group(2, 1)


def test_a_ring_within_and_between_nodes() -> None:
    machine = H100.machine
    near, far = Group(8, 8).ring_us(1e9, machine), Group(16, 8).ring_us(1e9, machine)
    assert near == pytest.approx(machine.latency_us + 1e6 * 7 / 8 / machine.within)
    assert far == pytest.approx(machine.latency_us + hardware.HOP_US + 1e6 * 15 / 16 / machine.within)
    alone = Group(16, 1).ring_us(1e9, machine)
    assert alone == pytest.approx(machine.latency_us + 15 * hardware.HOP_US + 1e6 * 15 / 16 / machine.between)
    assert Group(1, 1).ring_us(1e9, machine) == 0.0


def test_bytes_of_a_step_by_hand() -> None:
    found = step(QWEN, Layout(8, 1, 16, 2), H100, Setup(1024, 1024))
    one_way = 4 * 7 * (16 + 2) + 2 * 1024 * 8 * 7 / 8 * 2 * 2048
    assert found.exchange_sent == 48 * 2 * one_way
    gathered = 2 * (48 * QWEN.unit(True) + QWEN.embeddings)
    assert found.fsdp_sent == pytest.approx(3 * gathered * 15 / 16)
    dense, experts = held(QWEN, Layout(8, 1, 16, 2))
    assert found.end_sent == pytest.approx(2 * 4 * (dense / 2 + experts * 3 / 4))
    assert found.host_reads == 48
    split = step(QWEN, Layout(8, 1, 16, 2, splits_experts=True), H100, Setup(1024, 1024))
    weights = 2 * 48 * QWEN.E // 8 * QWEN.expert
    assert split.fsdp_sent - found.fsdp_sent == pytest.approx(3 * weights / 2)
    assert split.end_sent == pytest.approx(2 * 4 * (dense / 2 + experts / 2 / 2)) and split.fsdp_us > found.fsdp_us
    alone = step(QWEN, Layout(), H100, Setup(1024, 1024))
    assert alone.sent == 0.0 == alone.exchange_us == alone.tp_us and alone.host_reads == 0


def test_products_are_counted() -> None:
    """Where attention's scores are negligible, a step is 6 FLOPs a parameter and token, 8 with checkpoints."""
    flops = 2 * (PRESETS["mixtral-8x7b"].active - MIXTRAL.D * 65) * 8192
    for checkpoint, times in ((False, 3), (True, 4)):
        found = step(MIXTRAL, Layout(), H100, Setup(8192, 1, checkpoint))
        assert found.compute_us + found.experts_us == pytest.approx(times * flops / H100.machine.gflops / 1e3, rel=1e-3)


def test_dropping_duplicates_and_repeating_no_collective() -> None:
    layout, setup = Layout(16, 4, 32), Setup(4096)
    cluster = Cluster(hardware.find("v100-16gb"), 6)
    both = step(QWEN, layout, cluster, setup)
    duplicates = step(QWEN, layout, cluster, setup, Ways(drop_duplicates=False))
    repeated = step(QWEN, layout, cluster, setup, Ways(repeat_collectives=True))
    assert duplicates.exchange_sent == 4 * both.exchange_sent
    assert repeated.exchange_sent == 1.5 * both.exchange_sent and repeated.tp_sent == 1.5 * both.tp_sent
    assert repeated.host_reads == 2 * both.host_reads


# -- which layout ---------------------------------------------------------------------------


def test_layouts_fit_the_ranks_and_the_experts() -> None:
    found = list(layouts(24, 8, num_experts=8, heads=32, most_tp=8))
    assert all(x.ranks == 24 and x.dp_shard % x.ep == 0 and 32 % x.tp == 0 for x in found)
    assert {x.ep for x in found} == {1, 2, 3, 4, 8} and {x.tp for x in found} == {1, 2, 4, 8}
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("ranks", "a_node", "reason"), [(12, 8, "do not fill nodes"), (0, 8, "above zero")])
def test_ranks_that_cannot_be_divided(ranks: int, a_node: int, reason: str) -> None:
    with pytest.raises(MoeCompileError, match=reason):
        list(layouts(ranks, a_node, 8, 32))


def test_the_best_fits_and_is_the_fastest_that_does() -> None:
    found = plan(MIXTRAL, 64, H200, Setup())
    assert found.best is not None and found.best.fits
    fitting = [o for o in found.options if o.fits]
    fastest = min(o.step.total_us for o in fitting)
    near = [o for o in fitting if o.step.total_us <= ALIKE * fastest]
    assert found.best in near and found.best.step.sent == min(o.step.sent for o in near)
    assert (found.best.layout.ep, found.best.layout.edp) == (8, 8)
    assert not any(o.fits for o in found.options[len(fitting) :])
    assert len({(o.layout.ep, o.layout.tp) for o in found.options}) == len(found.options)
    for layout in layouts(64, 8, 8, 32):  # none that is left out is better
        option = predict(MIXTRAL, layout, H200, Setup())
        assert not option.fits or option.step.total_us >= fastest


def test_small_models_need_no_expert_parallelism_and_large_ones_do() -> None:
    """As IBM measured on A100: a model of 3 B is slower with experts split, Mixtral faster."""
    ratios = {r.group: r.predicted for r in plan_accuracy.rows() if r.unit == "x"}
    assert ratios["granite"] < 1 < ratios["mixtral"]
    large = plan(PRESETS["deepseek-v3"], 512, H200, Setup())
    assert large.best is not None and large.best.layout.ep >= 64
    assert plan(PRESETS["deepseek-v3"], 8, H100, Setup()).best is None


# -- the command ----------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_shows_a_table_and_recommends() -> None:
    result = run("--model", "mixtral-8x7b", "--gpus", "16", "--gpu", "h200")
    assert result.exit_code == 0, result.output
    assert "mesh = moe_compile.build_mesh(ep=8, dp_shard=16)" in result.output
    assert 'model = moe_compile.parallelize(model, mesh, experts="sharded")' in result.output
    result = run("--model", "granite-3b-a800m", "--gpus", "1")
    assert (
        "mesh = moe_compile.build_mesh(ep=1, dp_shard=1)\nmodel = moe_compile.parallelize(model, mesh)\n"
        in result.output
    )
    assert "does not fit in 72" in run("--model", "mixtral-8x7b", "--gpus", "8").output


def test_the_recommended_mesh_can_be_built() -> None:
    found = plan(QWEN, 48, H100, Setup())
    with ranks(48):
        for option in found.options:
            mesh = mesh_of(option.layout, True)
            assert (mesh["ep"].size(), mesh.size()) == (option.layout.ep, 48)
            assert mesh["dp_replicate"].size() == option.layout.dp_replicate


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--model", "gpt", "--gpus", "8"), "nor one of the presets"),
        (("--model", "mixtral-8x7b", "--gpus", "12"), "do not fill nodes of 8"),
        (("--model", "mixtral-8x7b", "--gpus", "8", "--gpu", "tpu"), "no GPU 'tpu'"),
        (("--model", "mixtral-8x7b", "--gpus", "8", "--state-bytes", "12"), "8 or 16"),
    ],
)
def test_what_the_command_refuses(arguments: tuple[str, ...], reason: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0 and reason in " ".join(result.output.replace("│", " ").split())


def test_nothing_fits() -> None:
    result = run("--model", "deepseek-v3", "--gpus", "8")
    assert result.exit_code == 0 and "Nothing fits" in result.output and "recommended" not in result.output


def test_the_page_has_the_tables_of_today() -> None:
    """docs/planning.md: written by the command that it names."""
    text = plan_accuracy.PAGE.read_text()
    assert plan_accuracy.page(text) == text, "python -m benchmarks.plan_accuracy --write"
