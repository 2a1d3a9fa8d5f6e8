import pytest


def pytest_addoption(parser):
    parser.addoption("--all-families", action="store_true", help="every family of transformers in every form: slow")
    parser.addoption("--all-mutants", action="store_true", help="compile every mutant that is refused: slow")


@pytest.fixture
def fresh():
    """No compiled code, no proofs, no counts, and a fixed seed."""
    import torch

    from moe_compile import kinds

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kinds.forget()
    torch.manual_seed(0)
