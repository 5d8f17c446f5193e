"""Two real processes with gloo under ModelParallelStrategy: weights in shards, and the masks of one process."""

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_graphon._shared.batch_norm import batch_norms, settle_batch_norms
from lightning_graphon.callbacks._module import scoring as pruner_module
from lightning_graphon.graphon import estimate_graphon
from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model, spectral_summary
from lightning_graphon.pruning import Masks, prune, rescale_
from tests.distributed.fsdp_script import GRAPHON, Whole, cnn, never, two_layers, uneven
from tests.helpers.modules import METHODS, digits, disagreement, loader, make_trainer, needs_fsdp2, pruned_max, quiet

pytestmark = [pytest.mark.distributed, needs_fsdp2]
ALL = [*METHODS, "graphon"]
CASES = [*ALL, "batch norm", "tensor parallel"]
SAVED = ["whole", "shards", "single"]


def alone(model, pruner, ckpt_path=None, max_epochs=2):
    """The same training in this one process."""
    trainer = make_trainer(pruner, max_epochs=max_epochs, limit_train_batches=1.0)
    trainer.fit(model, loader(90), loader(32), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    prune(Whole(), "random", sparsity=0.8, seed=4).save(folder / "masks.pt")
    alone(Whole(), quiet("snip", batches=2)).save_checkpoint(folder / "single.ckpt")
    return folder


@pytest.fixture(scope="module")
def ranks(two_processes, folder):
    return two_processes("fsdp_script.py", folder)


@pytest.mark.parametrize("case", CASES)
def test_masks_and_weights_are_the_same_on_both_ranks_and_pruned_shards_stay_zero(ranks, case):
    a, b = (rank[case] for rank in ranks)
    assert a["random"] != b["random"], "the ranks must draw different random numbers for this test to say anything"
    assert disagreement(a["masks"], b["masks"]) == 0.0
    for name, weight in a["weights"].items():
        assert torch.equal(weight, b["weights"][name]), name
    kept, total = (sum(int(f(m)) for m in a["masks"].values()) for f in (torch.sum, torch.numel))
    assert kept == round(total / 10)
    for found in (a, b):
        assert found["seen"] > 0
        assert found["worst"] == 0.0
        assert found["dense"] is False, "the weights must be in shards for this test to say anything"
        assert found["same objects"]
        assert found["steps"] == (12 if case == "tensor parallel" else 6)
    assert a["class"] == {"batch norm": "Unflatten", "tensor parallel": "Linear"}.get(case, "FSDPLinear")


@pytest.mark.parametrize("case", [*ALL, "tensor parallel"])
def test_masks_are_those_of_one_process_on_all_the_data(ranks, case):
    x, y = digits(96)
    seen = [i for rank in ranks for i in rank[case]["indices"]]  # two batches of 16 on each data-parallel rank
    assert len(set(seen)) == (32 if case == "tensor parallel" else 64)
    net, method = (Whole(two_layers).net, "grasp") if case == "tensor parallel" else (Whole().net, case)
    union = [(x[seen].double(), y[seen])]
    steps, options = 10 if method == "synflow" else None, GRAPHON if method == "graphon" else {}
    expected = prune(net, method, sparsity=0.9, batches=union, steps=steps, options=options)
    found = {name.removeprefix("net."): mask for name, mask in ranks[0][case]["masks"].items()}
    assert disagreement(found, expected) == 0.0


@pytest.mark.parametrize("case", CASES)
def test_graphons_and_kernel_are_those_of_the_whole_weights(ranks, case):
    for rank in ranks:
        for name, values in rank[case]["graphons"].items():
            assert torch.equal(values, estimate_graphon(rank[case]["masks"][name]).values)
    # The first process alone computes and logs the kernel.
    found, other = (rank[case] for rank in ranks)
    assert other["trace"] is None
    model = Whole({"batch norm": cnn, "tensor parallel": two_layers}.get(case, uneven)).eval()
    model.load_state_dict({**model.state_dict(), **found["weights"], **found["buffers"]})
    settle_batch_norms(batch_norms(model).values(), lambda: model(found["inputs"]))
    masks = {name.removeprefix("net."): mask for name, mask in found["masks"].items()}
    chain = case != "batch norm"
    kind = "Graphon NTK (energy, float64)" if chain else "empirical NTK (float64)"
    assert found["source"] == f"{kind} on 16 samples"
    kernel = (
        graphon_ntk_from_model(model, found["inputs"], found["masks"], bins=9, propagate="energy")
        if chain
        else empirical_ntk(model.net, found["inputs"].double(), masks=masks)
    )
    assert found["trace"] == pytest.approx(spectral_summary(kernel).trace, rel=1e-12)  # one sum, in another order


@pytest.mark.parametrize("kind", SAVED)
def test_two_processes_resume(ranks, folder, kind):
    """Weights come after the optimizers here, and after `on_fit_start`."""
    single = torch.load(folder / "single.ckpt", weights_only=True)["callbacks"][quiet("snip").state_key]
    for rank in ranks:
        found, unbroken = rank["resume"][f"resumed {kind}"], rank["resume"]["unbroken"]
        assert found["worst"] == 0.0
        assert found["seen"] > 0
        assert found["same objects"]
        if kind == "single":
            masks = Masks({})
            masks.load_state_dict(single)
            assert disagreement(found["masks"], masks) == 0.0
        else:
            assert disagreement(found["masks"], rank["resume"][f"first {kind}"]["masks"]) == 0.0
            assert disagreement(found["masks"], unbroken["masks"]) == 0.0
            for name, weight in unbroken["weights"].items():
                assert torch.equal(found["weights"][name], weight), name


def test_one_process_resumes_what_two_have_saved(ranks, folder, monkeypatch):
    monkeypatch.setattr(pruner_module, "compute_masks", never)
    pruner, model = quiet("snip", batches=2), Whole(seed=9)
    trainer = alone(model, pruner, folder / "whole.ckpt", max_epochs=4)
    assert trainer.global_step == 6 + 2 * 6  # two epochs of three steps on two processes, two of six on one
    assert disagreement(pruner.masks, ranks[0]["resume"]["first whole"]["masks"]) == 0.0
    assert pruned_max(model, pruner.masks) == 0.0


@pytest.mark.parametrize("kind", ["garbage", "garbage in shards"])
def test_a_checkpoint_has_dense_keys_and_zeros_whoever_wrote_to_the_weights(ranks, folder, kind):
    path = folder / f"{kind}.ckpt"
    if path.is_dir():
        dcp_to_torch_save(path, folder / "together.ckpt")
        path = folder / "together.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert list(state) == list(Whole().state_dict())
    for name, mask in ranks[0][kind]["masks"].items():
        assert (state[name][~mask] == 0).all(), name
        assert (state[name][mask] != 0).all(), name


def test_masks_from_a_file(ranks, folder):
    for rank in ranks:
        assert disagreement(rank["given"]["masks"], Masks.load(folder / "masks.pt")) == 0.0
        assert rank["given"]["worst"] == 0.0
        assert rank["given"]["seen"] > 0


@pytest.mark.parametrize("case", ["rescaled", "rescaled, tensor parallel"])
def test_patterns_and_rescaled_weights_are_those_of_one_process(ranks, case):
    model = Whole(two_layers if "tensor" in case else uneven)
    expected = prune(model, "magnitude", allocation="2:4")
    rescale_(model, expected)
    for found in (rank[case] for rank in ranks):
        assert disagreement(found["masks"], expected) == 0.0
        assert found["worst"] == 0.0
        assert found["seen"] > 0
        assert found["same objects"]
        for name, weight in model.named_parameters():
            assert torch.equal(found["start"][name], weight), name


def test_without_lightning(ranks):
    for rank in ranks:
        found = rank["alone"]
        assert disagreement(found["masks"], found["expected"]) == 0.0
        assert found["pruned"] == 0.0
        assert found["inside"] == ("Linear", [])
        assert found["outside"]
        assert "'0.weight' is a shard" in found["said"]
    assert [rank["alone"]["local rows"] for rank in ranks] == [1, 0]


def test_the_monitor_alone_reads_zeros_from_all_shards(ranks, folder):
    masks = Masks.load(folder / "masks.pt")
    for rank in ranks:
        found = rank["monitor alone"]
        assert list(found) == list(masks)
        for name, values in found.items():
            assert torch.equal(values, estimate_graphon(masks[name]).values)


def test_gathered_models_are_what_they_were_before(ranks):
    for rank in ranks:
        found = rank["wrapped"]
        assert torch.equal(found["found"], found["expected"])
        assert found["low"].dtype == torch.bfloat16, "FSDP must be at work outside for this test to say anything"
        assert found["tied"]
