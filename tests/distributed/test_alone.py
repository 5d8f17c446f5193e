"""An analysis runs `training_step` in the first process alone: a step that needs the other one is refused, no hang."""

import pytest
import torch

from tests.distributed.alone_script import STEPS

pytestmark = pytest.mark.distributed
REFUSED = ["all_gather", "reduce", "torch.distributed", "sampler"]
SENTENCE = "gathers, reduces or waits over all processes, and an analysis runs it in the first one alone"


@pytest.fixture(scope="module")
def ranks(two_processes, tmp_path_factory):
    return two_processes("alone_script.py", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("kind", [*STEPS, "sampler"])
def test_training_is_that_of_a_run_without_monitors(ranks, kind):
    for rank in ranks:
        assert rank[kind]["steps"] == 6
        assert rank[kind]["shadows"] == set()
        for name, weight in rank["unwatched"]["weights"].items():
            assert torch.equal(rank[kind]["weights"][name], weight), name


# "later": what was read before the step began to gather goes on; the step itself is not run again.
@pytest.mark.parametrize("kind", ["nothing", "log_dir", "sync_dist", "barrier", "later"])
def test_what_the_first_process_can_answer_alone_is_analysed(ranks, kind):
    first, second = (rank[kind] for rank in ranks)
    assert not [text for text in first["told"] + second["told"] if SENTENCE in text]
    assert first["trace"] == ranks[0]["nothing"]["trace"] > 0
    assert torch.equal(first["observed"], ranks[0]["nothing"]["observed"])
    assert first["predicted"].isfinite().all()


def test_copies_do_not_wait_for_the_other_process_either(ranks):
    found = ranks[0]["sync_dist, copies"]
    assert found["predicted"].isfinite().all()
    assert not [text for text in found["told"] if SENTENCE in text]
    refused = [text for text in ranks[0]["torch.distributed, copies"]["told"] if "shows no loss" in text]
    assert len(refused) == 1
    assert f"training_step {SENTENCE}" in refused[0]
    assert [rank["torch.distributed, copies"]["steps"] for rank in ranks] == [6, 6]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_needs_the_other_process_is_refused_in_one_sentence(ranks, kind):
    first, second = (rank[kind] for rank in ranks)
    what = "the train dataloader" if kind == "sampler" else "training_step"
    starts = [f"{name} at step 0: {what} {SENTENCE}" for name in ("shows no spectrum", "shows no loss")]
    told = sorted(text.partition("Monitor ")[2] for text in first["told"] if SENTENCE in text)
    assert [text[: len(start)] for text, start in zip(told, sorted(starts), strict=True)] == sorted(starts)
    assert second["told"] == []
    assert first["trace"] is None
    assert len(first["observed"]) == 0
