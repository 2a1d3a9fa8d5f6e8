"""The table of launch settings: which entry counts, and what is no entry."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moe_compile import MoeCompileError
from moe_compile.kernels import settings
from moe_compile.kernels.settings import Entry, Problem, Setting
from tests.kernels.conftest import DEVICE

SEED = (64, 64, 16, 8, 2)
PROBLEM = Problem("grouped_gemm", "d packed", "cpu", "fp32", 256, 32, 48)


def table(path: Path, *entries: Entry) -> Path:
    path.write_text("".join(entry.line() + "\n" for entry in entries))
    return path


def entry(rows: int, block_m: int, **changes: object) -> Entry:
    problem = Problem(**{**vars(PROBLEM), "rows": rows, **changes})  # type: ignore[arg-type]
    return Entry(problem, (block_m, 64, 16, 8, 2))


def chosen(rows: int) -> Setting:
    return settings.choose("grouped_gemm", "d packed", torch.device("cpu"), torch.float32, rows, 32, 48, seed=SEED)


def test_nothing_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "TABLE", table(tmp_path / "none.jsonl"))
    assert chosen(256) == SEED


def test_the_nearest_rows_within_a_factor_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "TABLE", table(tmp_path / "t.jsonl", entry(256, 128), entry(64, 32)))
    assert [chosen(rows)[0] for rows in (512, 256, 160, 100, 32)] == [128, 128, 128, 32, 32]
    assert chosen(513) == chosen(31) == SEED


@pytest.mark.parametrize(
    "other", [{"form": "f packed"}, {"device": "sm_90"}, {"dtype": "bf16"}, {"D": 64}, {"F": 64}], ids=str
)
def test_entries_for_something_else(other: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "TABLE", table(tmp_path / "t.jsonl", entry(256, 128, **other)))
    assert chosen(256) == SEED


def test_what_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin, then the user's file, then the table."""
    monkeypatch.setattr(settings, "TABLE", table(tmp_path / "t.jsonl", entry(256, 128)))
    before = settings.table_texts()
    monkeypatch.setenv("MOE_COMPILE_SETTINGS", str(table(tmp_path / "mine.jsonl", entry(256, 32))))
    assert chosen(256)[0] == 32 and settings.table_texts() != before
    with settings.pinned("grouped_gemm", "d packed", (16, 64, 16, 4, 2)):
        assert chosen(256)[0] == 16
    assert chosen(256)[0] == 32


def test_a_pin_holds_in_all_threads() -> None:
    """The backward of tensors on a GPU is run by a thread of autograd's."""
    with settings.pinned("grouped_gemm", "d packed", (16, 64, 16, 4, 2)), ThreadPoolExecutor(1) as other:
        assert other.submit(chosen, 256).result()[0] == 16
    assert chosen(256) == SEED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to ask")
def test_a_table_for_a_device_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of fake tensors for a GPU are compiled as without the table."""
    monkeypatch.setattr(settings, "TABLE", table(tmp_path / "t.jsonl", entry(256, 128, device="sm_90")))
    there = torch.device("cuda", 0)
    assert settings.choose("grouped_gemm", "d packed", there, torch.float32, 256, 32, 48, seed=SEED) == SEED


@pytest.mark.parametrize(
    ("line", "why"),
    {
        "{": "Expecting property name",
        '{"kernel": "gemm", "setting": []}': "unknown kernel 'gemm'; there are settings for grouped_gemm, ",
        '{"kernel": "grouped_gemm", "setting": [64, 64]}': "expected BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages",
        '{"kernel": "grouped_gemm", "setting": [64, 64, 48, 4, 2]}': "BLOCK_K is 48, no power of two",
        '{"kernel": "grouped_gemm", "setting": [8, 64, 64, 4, 2]}': "BLOCK_M is 8, less than 16",
        '{"kernel": "grouped_gemm", "setting": [64, 64, 64, 4, 3]}': "missing 6 required positional arguments",
    }.items(),
)
def test_what_is_no_entry(line: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.jsonl").write_text(f"\n{line}\n")
    monkeypatch.setenv("MOE_COMPILE_SETTINGS", str(tmp_path / "bad.jsonl"))
    with pytest.raises(MoeCompileError, match=r"bad\.jsonl:2: ") as caught:
        chosen(256)
    assert why in str(caught.value)


def test_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_COMPILE_SETTINGS", "/nowhere/settings.jsonl")
    with pytest.raises(MoeCompileError, match=r"/nowhere/settings.jsonl: No such file.*MOE_COMPILE_SETTINGS names it"):
        chosen(256)
    with pytest.raises(MoeCompileError, match="No such file"):
        settings.table_texts()


@pytest.mark.parametrize("setting", [(16, 16, 16, 4, 2), (32, 64, 32, 4, 2)])
def test_kernels_take_what_is_chosen(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_compile.kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference

    asked = []
    monkeypatch.setattr(settings, "choose", lambda *args, seed, choose=settings.choose: asked.append(
        choose(*args, seed=seed)) or asked[-1])  # fmt: skip
    x, w = torch.randn(40, 24, device=DEVICE), torch.randn(3, 20, 24, device=DEVICE)
    ends = torch.tensor([7, 7, 40], dtype=torch.int32, device=DEVICE)
    with settings.pinned("grouped_gemm", "d packed", setting):
        y = grouped_gemm(x, w, ends)
    torch.testing.assert_close(y, grouped_gemm_reference(x, w, ends))
    assert asked == [setting]


def test_the_committed_table_can_be_read() -> None:
    for found in settings.read(settings.TABLE):
        assert settings.checked(found.problem.kernel, found.setting) == found.setting


def test_what_a_persistent_grid_may_be() -> None:
    tile = (16, 32, 32, 4, 2)
    for rest in ((), (0,), (1,), (0, 2), (1, 8)):
        assert settings.checked("grouped_gemm", (*tile, *rest)) == (*tile, *rest)
    for rest, why in (((2,), "TMA is"), ((0, 9), "PROGRAMS is 9"), ((0, -1), "PROGRAMS is -1"), ((0, 1, 1), "TMA is")):
        with pytest.raises(MoeCompileError, match=why):
            settings.checked("gated_gemm", (*tile, *rest))
    with pytest.raises(MoeCompileError):
        settings.checked("grouped_gemm_scaled", (*tile, 0))
