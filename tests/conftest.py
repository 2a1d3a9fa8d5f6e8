import gc

import pytest


def pytest_collection_modifyitems(items):
    """What starts several ranks first: a minute each, of which none should be the last that a worker begins."""
    items.sort(key=lambda item: "parallel" not in item.path.parts)


def pytest_collection_finish():
    """Half a million objects were imported and stay: no collection walks over them while graphs are traced."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000)


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
