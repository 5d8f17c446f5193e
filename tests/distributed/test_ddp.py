"""Two real processes with gloo on the CPU: one set of masks, whatever the ranks' data and random numbers."""

import pickle

import pytest
import torch

from lightning_graphon.graphon import estimate_graphon
from lightning_graphon.pruning import prune
from tests.helpers.leaving import Unhurried
from tests.helpers.modules import METHODS, Classifier, digits, disagreement, loader, make_trainer, quiet

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(two_processes, tmp_path_factory):
    return two_processes("ddp_script.py", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("method", [*METHODS, "batch norm", "synflow, float32", "batch norm, float32"])
def test_masks_and_weights_are_the_same_on_both_ranks(ranks, method):
    a, b = (rank[method] for rank in ranks)
    assert a["random"] != b["random"], "the ranks must draw different random numbers for this test to say anything"
    assert a["indices"] != b["indices"], "the ranks must see different data for this test to say anything"
    assert disagreement(a["masks"], b["masks"]) == 0.0
    for name, weight in a["weights"].items():
        assert torch.equal(weight, b["weights"][name]), name
    for found in (a, b):
        assert found["seen"] > 0
        assert found["worst"] == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}
        kept, total = (sum(int(f(m)) for m in found["masks"].values()) for f in (torch.sum, torch.numel))
        assert kept == round(total / 10)
        assert not any(key.startswith("module.") for key in found["keys"])


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "magnitude", "random"])
def test_masks_are_those_of_one_process_on_all_the_data(ranks, method):
    x, y = digits(96)
    seen = [i for rank in ranks for i in rank[method]["indices"]]  # two batches of 16 on each of two ranks
    assert len(set(seen)) == 64
    union = [(x[seen].double(), y[seen])]
    net = Classifier(seed=1).double().net
    steps = 10 if method == "synflow" else None
    batches = union if method in ("snip", "grasp") else [(x[:16].double(), y[:16])]
    expected = prune(net, method, sparsity=0.9, batches=batches, steps=steps)
    found = {name.removeprefix("net."): mask for name, mask in ranks[0][method]["masks"].items()}
    assert disagreement(found, expected) == 0.0


@pytest.mark.parametrize("method", ["snip", "batch norm"])
def test_the_monitor_sees_the_same_graphons_on_every_rank_and_waits_for_nobody(ranks, method):
    for rank in ranks:
        for name, values in rank[method]["graphons"].items():
            assert torch.equal(values, estimate_graphon(rank[method]["masks"][name]).values)
    # The kernel is computed and logged by the first process alone.
    assert ranks[0][method]["trace"] > 0
    assert ranks[1][method]["trace"] is None


@pytest.mark.parametrize("method", ["snip", "batch norm"])
def test_the_first_process_alone_predicts_the_loss(ranks, method):
    curves = ranks[0][method]["losses"]
    steps = 2 * 3
    assert curves["step"].tolist() == list(range(steps + 1))
    assert curves["observed"].isfinite().all()
    assert curves["predicted"][:2].isfinite().all()
    assert curves["rehearsed"].isfinite().all(), "with the batch of both, while the other does not wait for it"
    assert ranks[1][method]["losses"]["step"].numel() == 0


def test_ranks_that_disagree_are_told_so(ranks):
    for rank in ranks:
        assert "masks differ between processes" in rank["other weight"]
        assert "rank 1" in rank["other weight"]
        assert "net." in rank["other weight"]


def test_spawned_processes_prune_too(tmp_path):
    pruner, model = quiet("snip", batches=2), Classifier()
    assert pickle.dumps(pruner)
    trainer = make_trainer(pruner, Unhurried(), strategy="ddp_spawn", devices=2, limit_val_batches=0)
    trainer.fit(model, loader(batch_size=16))
    kept = sum(int(p.count_nonzero()) for n, p in model.named_parameters() if n.endswith("weight"))
    total = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight"))
    assert kept == round(total / 10)
