"""What every test gets: the same random numbers, no leaked figures or threads, Lightning's chatter off."""

import logging
import random
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# A machine that others use too is slow now and then, and that is no failure.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.fixture(autouse=True)
def same_random_numbers():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(autouse=True)
def plain_console(monkeypatch):
    """What is printed does not depend on the terminal, nor on what a CI sets for it."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    threads, dtype = set(threading.enumerate()), torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype, "the test left another default dtype"
    torch.use_deterministic_algorithms(False)
    if "matplotlib.pyplot" in sys.modules:
        plt = sys.modules["matplotlib.pyplot"]
        figures = plt.get_fignums()
        plt.close("all")
        assert not figures, f"the test left figures open: {figures}"
    left = [t for t in set(threading.enumerate()) - threads if not t.daemon and t.is_alive()]
    for thread in left:
        thread.join(timeout=60)
    assert not any(t.is_alive() for t in left), f"the test left threads running: {left}"


@pytest.fixture(autouse=True)
def silent_lightning():
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning_graphon").setLevel(logging.NOTSET)  # which an example may have silenced
    with warnings.catch_warnings():
        for text in (
            ".*smaller than the logging interval.*",
            ".*`isinstance.treespec, LeafSpec.`.*",
            ".*exists and is not empty.*",
            ".*configured a `val_dataloader`.*",
            ".*defined a `validation_step` but have no `val_dataloader`.*",
            ".*`training_step` returned `None`.*",
            ".*was resumed from a checkpoint that ended before.*",
            ".*attribute 'net' is an instance of `nn.Module`.*",
        ):
            warnings.filterwarnings("ignore", message=text)
        yield
