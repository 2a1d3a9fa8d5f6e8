"""What the documentation starts: the example of `make demo-ep`, and the commands of docs/multi_node.md."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/multi_node.md").read_text()
SLURM = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL).group(1)  # type: ignore[union-attr]


def test_the_slurm_script_is_one(tmp_path: Path) -> None:
    """For the shell; what it calls gets what Slurm would give."""
    done = subprocess.run(["bash", "-n"], input=SLURM, capture_output=True, text=True)
    assert not done.returncode and not done.stderr, done.stderr
    for name, says in {"scontrol": "echo node1; echo node2", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    done = subprocess.run(["bash"], input=SLURM, capture_output=True, text=True, env={**given, "SLURM_JOB_ID": "7"})
    assert not done.returncode, done.stderr
    _, command, *words = done.stdout.split("\n")[:-1]
    assert command == "torchrun"
    parsed = check(words)
    assert (parsed.nnodes, parsed.rdzv_endpoint, parsed.rdzv_id, parsed.max_restarts) == ("2", "node1:29500", "7", 3)


def test_torchrun_takes_the_arguments() -> None:
    lines = SLURM.replace("\\\n", " ") + TEXT.replace(SLURM, "").replace("\\\n", " ")
    calls = [shlex.split(line) for line in lines.splitlines() if line.startswith("torchrun ")]
    assert len(calls) == 1
    assert check(calls[0][1:]).nproc_per_node == "8"


def check(words: list[str]) -> object:
    """Arguments that torchrun parses, of a script that is there and takes its own."""
    parsed = get_args_parser().parse_args(words)
    script = ROOT / parsed.training_script
    assert script.exists()
    known = set(re.findall(r"add_argument\(\"(--[a-z-]+)\"", script.read_text()))
    assert {w for w in parsed.training_script_args if w.startswith("--")} <= known
    return parsed


def test_the_example_trains() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(ROOT / "examples/train_ep.py"), "--steps", "20", "--layers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert not done.returncode, done.stderr
    losses = [float(n) for n in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.1 < 5.4, done.stdout  # log(256) is 5.55
    assert "alltoall" in done.stdout and "2 ranks; this one holds" in done.stdout, done.stdout
