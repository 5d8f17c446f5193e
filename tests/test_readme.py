"""The code of the pages runs, and its numbers are those that the pages state."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def run(page):
    """The names that the page's code leaves."""
    names: dict[str, object] = {}
    for code in blocks(page):
        exec(compile(code, page, "exec"), names)  # noqa: S102  (our own text)
    return names


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {**run("README.md"), "folder": folder}


def test_prediction_of_the_readme_holds(readme):
    monitor, curves = readme["monitor"], readme["monitor"].curves
    assert monitor.invalid_from is None
    first, last = curves["observed"][[0, -1]].tolist()
    assert last < 0.5 * first
    assert [first, last, float(curves["predicted"][-1])] == pytest.approx([3.69, 1.67, 1.70], abs=0.02)
    assert float((curves["predicted"] / curves["observed"] - 1).abs().max()) < 0.025
    rehearsed = (curves["rehearsed"] / curves["observed"] - 1).abs()
    assert float(rehearsed.max()) < 0.015
    assert rehearsed.isfinite().all(), "to the end"
    assert int(curves["step"][-1]) == readme["trainer"].global_step == 290


def test_masks_and_kernel_of_the_readme(readme):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"pruner.masks  # {readme['pruner'].masks!r}" in text
    assert readme["masks"].sparsity == pytest.approx(0.9, abs=1e-5)
    assert readme["kernel"].shape == (64, 64)
    assert set(readme["graphons"]) == set(readme["masks"])
    for name, mask in readme["masks"].items():
        assert not readme["net"].get_parameter(name)[~mask].any()


def test_readme_logs_where_it_says(readme):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (readme["folder"] / "runs").glob("**/events.out.tfevents.*")
    tags = EventAccumulator(str(file)).Reload().Tags()
    assert {"graphons", "ntk_spectrum", "Loss_decay"} <= set(tags["images"])
    assert {"loss_decay/observed", "loss_decay/predicted"} <= set(tags["scalars"])


def test_methods_of_the_page_prune():
    from torch import nn

    from lightning_graphon.pruning import prune

    names = run("docs/how-to/prune.md")
    assert names["masks"].sparsity == pytest.approx(0.9, abs=0.01)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    batch = (torch.randn(8, 16), torch.arange(8) % 4)
    for method in ("fan-out", "squared-gradient"):
        assert prune(net, method, sparsity=0.5, batches=[batch]).sparsity == 0.5


def test_two_pruners_side_by_side():
    """As the page says: with different `include`, and refused by Lightning without."""
    from lightning_graphon.callbacks import PruneAtInit
    from tests.helpers.modules import Classifier, loader, make_trainer

    first = PruneAtInit("snip", 0.5, include="net.0", verbose=False)
    second = PruneAtInit("magnitude", 0.9, include="net.4", verbose=False)
    make_trainer(first, second).fit(Classifier(), loader())
    assert not set(first.masks) & set(second.masks)
    same = [PruneAtInit("snip", 0.5, verbose=False) for _ in range(2)]
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        make_trainer(*same).fit(Classifier(), loader())


def test_numbers_of_the_page_of_graphons_are_what_its_code_gives():
    page = "docs/tutorials/graphons.md"
    names = run(page)
    found = (names["W"](0.0, 0.0), names["test"].c4_ratio, names["cut"].lower, names["cut"].upper)
    assert [float(number) for number in found] == pytest.approx([0.39, 6.8, 0.0494, 0.0494], rel=0.01)  # as rounded
    assert "here 0.0494 and 0.0494" in (ROOT / page).read_text(encoding="utf-8")


def test_numbers_of_the_page_of_limits_are_what_its_code_gives():
    names = run("docs/how-to/predict-limits.md")
    assert repr(names["fit"]) == "FactorisedSaliency(256x200, explained=0.611, noise_ks=0.022)"
    assert names["common_neighbour_count"](names["mask"], names["best"]) == 12
    assert names["common_neighbour_count"](names["limit"], names["best"], units=256) == pytest.approx(14.5, abs=0.05)


@pytest.mark.filterwarnings("ignore::lightning_graphon.pruning.LayerCollapseWarning")
def test_numbers_of_the_page_of_kernels_are_what_its_code_gives():
    page = "docs/tutorials/kernels.md"
    names, page = run(page), (ROOT / page).read_text(encoding="utf-8")
    for method, (trace, share, loss) in names["found"].items():
        row = re.search(rf"^\| {method} \| (\S+) \| (\S+)(?: %)? \| (\S+) \|", page, re.MULTILINE | re.IGNORECASE)
        shown = [float(number) for number in row.groups()]
        assert [trace, 100 * share] == pytest.approx(shown[:2], abs=0.6)  # rounded to whole numbers
        assert loss == pytest.approx(shown[2], abs=0.006)


def test_numbers_of_the_page_of_predicted_loss_are_what_its_code_gives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("docs/tutorials/predicted-loss.md")
    theory, rehearsal = names["theory"], names["rehearsal"]
    assert names["lazy_until"](theory, rehearsal) == 110
    last = [float(names[name].mean[-1]) for name in ("redrawn", "rehearsal")]
    assert last == pytest.approx([1.065, 1.012], abs=0.01)  # sums of another processor
    assert torch.allclose(names["linear"](names["probe"][0]), names["net"](names["probe"][0]), atol=1e-5)


def test_the_callbacks_are_one_line():
    """Without and with: what a user adds to a Trainer."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("| Python |"))
    without, with_callbacks = re.findall(r"`([^`]+)`", row)
    assert with_callbacks.startswith(without.removesuffix(")"))
    assert all(name in with_callbacks for name in ("PruneAtInit", "GraphonMonitor", "LossDecayMonitor"))
