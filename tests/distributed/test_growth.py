"""Two real processes with gloo on the CPU: masks that move are the same on both, and those of both ranks' data."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.distributed.fsdp_script import Whole
from tests.distributed.growth_script import METHODS, Watch, moving
from tests.helpers.modules import digits, make_trainer, needs_fsdp2

pytestmark = pytest.mark.distributed
SHARDED = [pytest.param(f"fsdp {method}", marks=needs_fsdp2) for method in METHODS]


@pytest.fixture(scope="module")
def ranks(two_processes, tmp_path_factory):
    return two_processes("growth_script.py", tmp_path_factory.mktemp("growth"))


@pytest.mark.parametrize("case", [*(f"ddp {method}" for method in METHODS), "ddp accumulated", *SHARDED])
def test_masks_and_weights_are_the_same_on_both_ranks(ranks, case):
    a, b = (rank[case] for rank in ranks)
    assert a["random"] != b["random"], "the ranks must draw different random numbers for this test to say anything"
    for found in (a, b):
        assert found["worst"] == 0.0
        assert found["sharded"] == case.startswith("fsdp")
    assert len(a["masks"]) == len(b["masks"]) == 12
    for mine, other in zip(a["masks"], b["masks"], strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert sum(int((a["masks"][0][name] != mask).sum()) for name, mask in a["masks"][-1].items()) > 50
    for name, weight in a["weights"].items():
        assert torch.equal(weight, b["weights"][name]), name


@pytest.mark.parametrize("case", [*(f"ddp {method}" for method in METHODS), *SHARDED])
def test_masks_are_those_of_one_process_on_all_the_data(ranks, case):
    """In float64, where sums in another order change no choice among a few thousand weights."""
    x, y = digits(96)
    batches = [(x[32 * k : 32 * k + 32], y[32 * k : 32 * k + 32]) for k in range(3)]
    pruner = moving(case.split()[1])
    watch = Watch(pruner)
    make_trainer(pruner, watch, max_epochs=4, limit_val_batches=0).fit(Whole(), DataLoader(batches, batch_size=None))
    for step, (alone, together) in enumerate(zip(watch.masks, ranks[0][case]["masks"], strict=True)):
        for name, mask in alone.items():
            assert torch.equal(mask, together[name]), (step, name)
