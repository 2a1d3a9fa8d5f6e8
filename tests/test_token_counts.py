"""New token counts compile nothing, under Inductor too."""

import pytest
import torch

from tests.tiny import Block, D, check_same, close, compiled, graphs, original


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("training", [False, True])
def test_new_token_counts_compile_nothing(training: bool) -> None:
    """But one: PyTorch specialises sizes of 0 and 1, so a single token has a graph of its own."""
    torch.manual_seed(0)
    block = Block()
    run, reference = compiled(block, "inductor", fullgraph=True, strict=True), original(block)

    def step(num_tokens: int) -> None:
        x = torch.randn(num_tokens, D)
        if training:
            check_same(run, reference, block, reference, x)
        else:
            with torch.no_grad():
                assert close(run(x), reference(x))

    step(12)
    step(40)
    before = graphs()
    assert before == 2
    for num_tokens in (12, 40, 7, 65, 2):
        step(num_tokens)
        assert graphs() == before, num_tokens
    step(1)
    assert graphs() == before + 1
    step(1)
    step(9)
    assert graphs() == before + 1
