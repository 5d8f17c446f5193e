"""Everything in this folder runs on an accelerator, by `make gpu`; elsewhere it is skipped.

LIGHTNING_GRAPHON_DEVICE=cpu tries the tests themselves on a machine without one.
"""

import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("LIGHTNING_GRAPHON_DEVICE", "cuda")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    missing = DEVICE == "cuda" and not torch.cuda.is_available()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker("gpu")
        if missing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif DEVICE == "cpu" and item.get_closest_marker("only_cuda"):
            item.add_marker(pytest.mark.skip(reason="asks CUDA's allocator or profiler"))


@pytest.fixture(scope="session")
def device():
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture(autouse=True)
def tensorfloat_as_it_was():
    """torch's own defaults in every test, whatever another has chosen."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
