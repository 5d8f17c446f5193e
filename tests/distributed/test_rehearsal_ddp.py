"""Two real processes: one rehearses with the batch of both, nobody waits, and training is as without."""

import pytest
import torch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(two_processes, tmp_path_factory):
    return two_processes("rehearsal_script.py", tmp_path_factory.mktemp("rehearsal"))


def test_the_first_process_rehearses_with_the_batch_of_both(ranks):
    assert len(ranks[0]["losses"]) == 5
    assert ranks[1]["losses"] is None
    minibatches = [size for size, _ in ranks[0]["seen"] if size != 8]  # 8 samples has the probe
    assert minibatches == [32] * 4
    assert {world for _, world in ranks[0]["seen"]} == {2}


def test_training_is_as_without(ranks):
    for rank in ranks:
        (losses, weights), (others, other_weights) = rank["plain"], rank["rehearsed"]
        assert losses == others
        assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())
