"""Inductor's and AOTAutograd's caches: a second process compiles nothing, and other options are another entry."""

import json
import os
import subprocess
import sys
from pathlib import Path

RUN = """
import json, sys, torch
from torch._dynamo.utils import counters
from tests.tiny import D, Block, compiled
torch.manual_seed(0)
model, x = Block(), torch.randn(6, D)
out = compiled(model, inner="inductor", fullgraph=True, skip=sys.argv[1:])(x)
out.sum().backward()
torch.testing.assert_close(out, model(x))
found = {**counters["aot_autograd"], **counters["inductor"]}
hashes = [out.sum().item(), *(p.grad.norm().item() for p in model.parameters())]
print(json.dumps([{k: v for k, v in found.items() if "cache" in k}, hashes]))
"""


def test_a_second_process(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}

    def run(*skip: str) -> tuple[dict[str, int], list[float]]:
        command = [sys.executable, "-W", "ignore", "-c", RUN, *skip]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found, numbers = json.loads(done.stdout.splitlines()[-1])
        return found, numbers

    first, numbers = run()
    assert (first["autograd_cache_miss"], first["autograd_cache_saved"], first["fxgraph_cache_miss"]) == (1, 1, 2)
    second, again = run()
    assert (second["autograd_cache_hit"], second["fxgraph_cache_hit"]) == (1, 2)
    assert "autograd_cache_miss" not in second and "fxgraph_cache_miss" not in second
    assert again == numbers
    other, _ = run("choose_kernels")
    assert "autograd_cache_hit" not in other and other["autograd_cache_miss"] == 1
