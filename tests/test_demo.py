"""The demo without its long runs: data, parity, a tiny training, and the report of a made-up run."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from moe_compile.demo.data import decode, encode, load_corpus
from moe_compile.demo.models import TINY, Variant, build_model, variants
from moe_compile.demo.parity import compare_losses
from moe_compile.demo.record import ModelRun, RegionRecord, RunRecord, VariantRun
from moe_compile.demo.report import write_report
from moe_compile.demo.run import DemoSettings, run_demo
from moe_compile.demo.train import Trainer, TrainSettings, cold_compilers, train_variant


def test_the_split_is_deterministic_and_disjoint() -> None:
    first, second = load_corpus(max_bytes=200_000), load_corpus(max_bytes=200_000)
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)
    assert first.train_files == second.train_files
    assert not set(first.train_files) & set(first.validation_files)
    assert len(first.validation) > 1000


def test_the_split_does_not_depend_on_the_order_of_the_file_system(tmp_path: Path) -> None:
    names = [f"m{i}.py" for i in range(20)]
    for folder, order in (("a", names), ("b", names[::-1])):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_text(f"# {name}\n" * 10)
    first, second = load_corpus(tmp_path / "a"), load_corpus(tmp_path / "b")
    assert first.train_files == second.train_files
    assert torch.equal(first.train, second.train)


def test_batches_are_a_function_of_seed_and_step() -> None:
    corpus = load_corpus(max_bytes=100_000)
    batch = corpus.batch(3, 2, 16, seed=1)
    assert batch.shape == (2, 16) and batch.dtype == torch.int64
    assert torch.equal(batch, corpus.batch(3, 2, 16, seed=1))
    assert not torch.equal(batch, corpus.batch(4, 2, 16, seed=1))
    assert not torch.equal(batch, corpus.batch(3, 2, 16, seed=2))


def test_text_survives_the_round_trip() -> None:
    assert decode(encode("x = 'ä'\n")[0].tolist()) == "x = 'ä'\n"
    assert decode([0, 65]) == "\ufffdA"


@pytest.mark.parametrize(
    ("losses", "passed"),
    [([4.0, 3.0], True), ([4.0, 3.0002], True), ([4.0, 3.001], False), ([4.0, math.nan], False), ([], False)],
)
def test_parity(losses: list[float], passed: bool) -> None:
    assert compare_losses("x", [4.0, 3.0], losses, 1e-4).passed is passed


def test_parity_looks_at_the_first_steps_only() -> None:
    assert compare_losses("x", [1.0, 2.0, 9.0], [1.0, 2.0, 3.0], 1e-4, num_steps=2).passed


@pytest.mark.parametrize("name", TINY)
def test_forms_start_from_equal_weights(name: str) -> None:
    loop, grouped = (build_model(TINY[name], form, seed=5).state_dict() for form in ("eager", "grouped_mm"))
    assert loop.keys() == grouped.keys()
    assert all(torch.equal(loop[key], grouped[key]) for key in loop)


def test_a_tiny_training_through_a_stand_in() -> None:
    corpus = load_corpus(max_bytes=100_000)
    settings = TrainSettings(batch_size=2, length=16)
    runs = {}
    for variant in variants(backend="eager"):
        if variant.backend == "inductor":
            continue
        with cold_compilers():
            runs[variant.key] = train_variant(Trainer(TINY["mixtral"], variant, corpus, settings), 3)
    reference = runs.pop("hf_eager")
    for key, run in runs.items():
        assert not run.error
        assert compare_losses(key, reference.losses, run.losses, 1e-5).passed


def test_an_error_of_a_compiler_is_recorded_and_not_raised() -> None:
    corpus = load_corpus(max_bytes=100_000)
    variant = replace(variants()[3], backend="no such backend")
    run = train_variant(Trainer(TINY["mixtral"], variant, corpus, TrainSettings(2, 16)), 2)
    assert "no such backend" in run.error
    assert not run.losses


def test_a_whole_run_of_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    region = RegionRecord(True, "model.layers.0.mlp", "m.py:7", "loop", 4, 2, None)
    monkeypatch.setattr("moe_compile.demo.run.variants", lambda backend: tuple(_stand_ins()))
    monkeypatch.setattr("moe_compile.demo.run.warm_up_toolchain", lambda device: None)
    monkeypatch.setattr("moe_compile.explain", lambda *_, **__: SimpleNamespace(regions=[region]))
    seen: list[str] = []
    settings = DemoSettings(
        TrainSettings(batch_size=2, length=16), ("qwen3_moe",), 3, 4, 5, backend="eager", specs=TINY
    )
    record = run_demo(settings, lambda title, *_: seen.append(title))
    [model] = record.models
    assert record.passed
    assert len(model.variants[1].losses) == 4
    assert model.validation_after != model.validation_before
    assert not model.generate_error
    assert model.regions["HF default"] == [region]
    assert any("HF eager loop" in title for title in seen)


def _stand_ins() -> list[Variant]:
    found = {variant.key: variant for variant in variants(backend="eager")}
    return [found["hf_eager"], found["moe_ep_loop"]]


def synthetic_record() -> RunRecord:
    """A run that took place nowhere."""
    runs = [
        VariantRun(entry.key, entry.label, [4.0 - 0.1 * i for i in range(8)], [0.9 - 0.1 * n] * 8, 1.0 + n)
        for n, entry in enumerate(variants())
    ]
    runs.append(VariantRun("broken", "Broken <one>", error="ValueError: a < b"))
    region = RegionRecord(True, "model.layers.0.mlp", "m.py:7", "loop", 8, 2, None, "x: f32[2]", "y & z")
    refused = RegionRecord(False, "model.layers.1.mlp", "m.py:9", "", 8, None, "op <sort> has no rule")
    model = ModelRun("mixtral", "Mixtral", "1 layer", 1_000_000, 512, runs, generated="<b>text</b>")
    model.parity = [compare_losses(run.key, runs[0].losses, run.losses, 1e-4) for run in runs[1:5]]
    model.regions = {"HF eager loop": [region, refused]}
    return RunRecord({"cores": "2"}, {"compiler under test": "moe_ep"}, [model], 12.0)


def test_the_report_is_one_self_contained_page(tmp_path: Path) -> None:
    record = synthetic_record()
    page = write_report(record, tmp_path).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "@import" not in page and "url(" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 3
    for shown in ("y &amp; z", "op &lt;sort&gt; has no rule", "&lt;b&gt;text&lt;/b&gt;", "a &lt; b", "PASS"):
        assert shown in page
    for name in ("loss", "step_time", "first_step"):
        assert (tmp_path / f"mixtral_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_survives_json(tmp_path: Path) -> None:
    record = synthetic_record()
    record.save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json").to_json() == record.to_json()


def test_a_variant_that_did_not_run_fails_the_run() -> None:
    record = synthetic_record()
    assert not record.passed
    record.models[0].variants.pop()
    assert record.passed
    record.models[0].parity[0].max_relative = 1.0
    assert not record.passed
