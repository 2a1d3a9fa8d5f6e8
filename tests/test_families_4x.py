"""Whole models of transformers 4, whose experts are ModuleLists in loops: same loss and gradients, in both modes.

Skipped where another transformers is installed; `make test-4x` makes an environment beside the first and runs this.
"""

import pytest

from tests.family_models import build
from tests.test_models import check
from tests.tiny import compiled, regions

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.skipif(
        not transformers.__version__.startswith("4.57."),
        reason=f"transformers {transformers.__version__} is installed, these are the loops of 4.57",
    ),
]

REWRITTEN = """
    aria dbrx deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe granitemoehybrid
    granitemoeshared hunyuan_v1_moe jamba jetmoe llama4 longcat_flash minimax mixtral olmoe phimoe qwen2_moe qwen3_moe
    qwen3_next
""".split()
MODES = [(family, mode) for family in REWRITTEN for mode in ("train", "eval")]


@pytest.mark.parametrize(("family", "mode"), MODES, ids=["-".join(case) for case in MODES])
def test_model(family: str, mode: str) -> None:
    built = build(family, None)
    assert not isinstance(built, str), built
    model, ids = built
    model.train(mode == "train")
    with regions() as found:
        check(compiled(model, "eager"), model, ids)
    assert found and all(r.matched for r in found), [(r.location, r.reason) for r in found]
