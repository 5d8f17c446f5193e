"""Two real processes with gloo: the loss predicted from weights in shards, with the numbers of one process."""

import csv

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.fsdp_loss_script import (
    CASES,
    DATA,
    STEPS,
    OneProcess,
    adam,
    centred,
    descent,
    fit,
    half,
    momentum,
    monitor,
)
from tests.distributed.fsdp_script import two_layers, uneven
from tests.helpers.modules import digits, needs_fsdp2

pytestmark = [pytest.mark.distributed, needs_fsdp2]
OPTIMIZERS = {"groups": momentum, "centred": centred, "graphon": descent}
LOOKS = [0.0, 2.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0, 15.0, 16.0, 18.0]
# float64 on both sides, but two processes add up their halves of the batch: measured up to 2e-13.
ROUNDING = {"rel": 1e-10, "abs": 1e-12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp_loss")


@pytest.fixture(scope="module")
def ranks(two_processes, folder):
    return two_processes("fsdp_loss_script.py", folder)


def logged(folder, prefix="loss_decay/"):
    """What was logged under keys with this prefix, and at which step, in order."""
    with open(folder / "metrics.csv") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    rows = [{k: v for k, v in row.items() if k.startswith(prefix) or k == "step"} for row in rows]
    return [row for row in rows if len(row) > 1]


def in_one_process(case, ranks, folder):
    """The same training in this one process: the first one's data come first, since its probe is drawn from them."""
    both = ranks[:1] if case == "tensor parallel" else ranks
    order = [i for rank in both for i in rank[case]["indices"]]
    assert sorted(order) == list(range(DATA))
    x, y = digits(DATA)
    cut = case == "tensor parallel"
    model = OneProcess(two_layers if cut else uneven, OPTIMIZERS.get(case, adam))
    masks = [] if case == "compiled" else [half(shape=(34, 64) if cut else (33, 64))]
    watch = monitor(ntk="graphon" if case == "graphon" else "empirical")
    data = DataLoader(TensorDataset(x[order], y[order]), batch_size=DATA)
    fit(model, watch, *masks, data=data, name=folder / case)
    return watch


@pytest.mark.parametrize("case", CASES)
def test_everything_that_is_logged_is_that_of_one_process(ranks, folder, tmp_path, case):
    watch = in_one_process(case, ranks, tmp_path)
    found = ranks[0][case]
    assert found["cut"], "the weights must be in shards for this test to say anything"
    expected, rows = logged(tmp_path / case), logged(folder / case)
    assert [row["step"] for row in rows] == [*LOOKS, STEPS]
    keys = {key for row in rows for key in row} - {"loss_decay/invalid_from"}
    assert len(keys) == 10, "the step and all that there is"
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, **ROUNDING)
    assert found["invalid_from"] == watch.invalid_from
    for name, values in found["curves"].items():
        torch.testing.assert_close(
            values, watch.curves[name], rtol=ROUNDING["rel"], atol=ROUNDING["abs"], equal_nan=True
        )


@pytest.mark.parametrize("case", CASES)
def test_the_first_process_alone_measures_and_all_take_their_steps(ranks, case):
    assert ranks[1][case]["curves"]["step"].numel() == 0
    for rank in ranks:
        assert rank[case]["steps"] == STEPS


def test_training_is_the_same_to_the_bit(ranks):
    for rank in ranks:
        for name, weight in rank["alone"]["weights"].items():
            assert torch.equal(rank["groups"]["weights"][name], weight), name


def test_a_graphon_monitor_before_the_pruner_sees_its_masks(ranks, folder):
    """Without a sanity check it would prune behind them, at the start of training."""
    first, *_ = logged(folder / "graphons", "graphon/net.0.weight/")
    assert first["graphon/net.0.weight/density"] == pytest.approx(0.5)


def test_a_short_fit_is_measured_at_its_end_and_drawn(ranks, folder):
    assert ranks[0]["short"]["curves"]["step"].tolist() == [0.0, 3.0]
    assert len(list((folder / "short").glob("**/*.png"))) == 1


def test_without_a_prediction_the_loss_is_observed(ranks):
    curves = ranks[0]["two optimizers"]["curves"]
    assert curves["step"].tolist() == LOOKS[:3] + [s for s in LOOKS[4:] if s != 15]
    assert curves["observed"].isfinite().all()
    assert curves["predicted"].isnan().all()


def test_where_weights_are_cut_no_copy_trains(ranks):
    assert [rank["copies"]["said"] for rank in ranks] == [
        [
            "LossDecayMonitor predicts nothing from step 0 on: the weights are cut over processes, and a copy would "
            "need them whole on each. The observed loss is logged."
        ],
        [],
    ]
    assert [rank["copies"]["steps"] for rank in ranks] == [STEPS, STEPS]
    assert ranks[0]["copies"]["curves"]["observed"].isfinite().all()


def test_an_error_on_the_first_process_ends_the_analysis_on_both_or_the_fit_on_both(ranks):
    assert ranks[0]["failed"]["curves"]["step"].tolist() == [0.0, 2.0]
    assert ranks[0]["failed aloud"] == {"said": "broken kernel"}
    assert ranks[1]["failed aloud"]["said"].startswith("the analysis failed on the first process: RuntimeError('broken")
    for rank in ranks:
        assert rank["failed"]["steps"] == STEPS


def test_memory_that_lacks_on_one_process_ends_the_analysis_on_both(ranks):
    assert ranks[0]["no room"]["curves"]["step"].tolist() == [0.0]
    for rank in ranks:
        assert rank["no room"]["steps"] == STEPS
        assert rank["no room"]["trials"] == 2
    assert [rank["no room"]["said"] for rank in ranks] == [
        ["LossDecayMonitor stops: the whole weights do not fit into the memory of every process"],
        [],
    ]


def test_while_memory_lacks_on_one_process_a_graphon_monitor_skips_its_looks_on_both(ranks):
    """Room for masks at the start; none for the spectrum and the next looks; room again later."""
    first, second = (rank["no room for graphons"] for rank in ranks)
    assert [sentence.partition(":")[0] for sentence in first["said"]] == [
        "GraphonMonitor shows no spectrum at step 0",
        "GraphonMonitor shows no graphons at step 0",
    ]
    assert second["said"] == []
    assert first["spectrum"] > 0
    assert second["spectrum"] is None
    for found in (first, second):
        assert found["steps"] == STEPS
        assert found["trials"] == 2 * STEPS + 5


@pytest.mark.parametrize("kind", ["7 whole", "13 whole", "13 shards"])
def test_resumed_is_unbroken(ranks, kind):
    found, unbroken = (ranks[0]["resume"][key] for key in (kind, "unbroken"))
    assert unbroken["curves"]["step"].tolist() == LOOKS
    torch.testing.assert_close(found["curves"], unbroken["curves"], rtol=0, atol=0, equal_nan=True)
    assert found["invalid_from"] == unbroken["invalid_from"] is not None
    for rank in ranks:
        assert rank["resume"][kind]["steps"] == STEPS


def test_where_one_process_has_no_room_all_refuse_to_prune(ranks):
    for rank in ranks:
        assert "PruneAtInit.from_masks('masks.pt')" in rank["no room to prune"]


def test_a_process_that_is_lost_while_gathering_leaves_nobody_waiting(tmp_path, two_processes):
    with pytest.raises(AssertionError):  # the script ends with an error, not at the fixture's time limit
        two_processes("lost_rank_script.py", tmp_path)
    assert (tmp_path / "rank1.txt").read_text() == "full"
    assert (tmp_path / "rank0.txt").read_text()
