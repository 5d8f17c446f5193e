"""The README's own code runs."""

import re
from pathlib import Path

import pytest
import torch

from lightning_graphon.callbacks import PruneAtInit

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/pruning.md"]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(page):
        exec(compile(code, page, "exec"), names)  # noqa: S102  (our own text)
        if isinstance(names.get("prune"), PruneAtInit):
            assert abs(names["prune"].masks.sparsity - names["prune"].config.sparsity) < 1e-9
    assert names["masks"].sparsity == pytest.approx(0.9, abs=0.01)


def test_methods_of_the_page_prune(tmp_path):
    from torch import nn

    from lightning_graphon.pruning import prune

    names: dict[str, object] = {}
    for code in blocks("docs/pruning.md"):
        exec(compile(code, "docs/pruning.md", "exec"), names)  # noqa: S102
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    batch = (torch.randn(8, 16), torch.arange(8) % 4)
    for method in ("fan-out", "squared-gradient"):
        assert prune(net, method, sparsity=0.5, batches=[batch]).sparsity == 0.5


def test_numbers_of_the_page_of_graphons_are_what_its_code_gives():
    names: dict[str, object] = {}
    for code in blocks("docs/graphons.md"):
        exec(compile(code, "docs/graphons.md", "exec"), names)  # noqa: S102
    found = (names["W"](0.0, 0.0), names["test"].c4_ratio, names["cut"].lower, names["cut"].upper)
    assert [float(number) for number in found] == pytest.approx([0.39, 6.8, 0.0494, 0.0494], rel=0.01)  # as rounded
    assert "here 0.0494 and 0.0494" in (ROOT / "docs/graphons.md").read_text(encoding="utf-8")


def test_numbers_of_the_page_of_limits_are_what_its_code_gives():
    names: dict[str, object] = {}
    for code in blocks("docs/limits.md"):
        exec(compile(code, "docs/limits.md", "exec"), names)  # noqa: S102
    assert repr(names["fit"]) == "FactorisedSaliency(256x200, explained=0.611, noise_ks=0.022)"
    assert names["common_neighbour_count"](names["mask"], names["best"]) == 12
    assert names["common_neighbour_count"](names["limit"], names["best"], units=256) == pytest.approx(14.5, abs=0.05)


@pytest.mark.filterwarnings("ignore::lightning_graphon.pruning.LayerCollapseWarning")
def test_numbers_of_the_page_of_kernels_are_what_its_code_gives():
    names: dict[str, object] = {}
    for code in blocks("docs/ntk.md"):
        exec(compile(code, "docs/ntk.md", "exec"), names)  # noqa: S102
    page = (ROOT / "docs/ntk.md").read_text(encoding="utf-8")
    for method, (trace, share, loss) in names["found"].items():
        row = re.search(rf"^\| {method} \| (\S+) \| (\S+)(?: %)? \| (\S+) \|", page, re.MULTILINE | re.IGNORECASE)
        shown = [float(number) for number in row.groups()]
        assert [trace, 100 * share] == pytest.approx(shown[:2], abs=0.6)  # rounded to whole numbers
        assert loss == pytest.approx(shown[2], abs=0.006)


def test_quick_start_is_short():
    lines = [line for line in blocks("README.md")[0].splitlines() if line.strip()]
    assert len(lines) <= 10


def test_every_preset_and_method_is_named():
    from lightning_graphon.pruning import methods

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    builtin = {"random", "magnitude", "snip", "grasp", "synflow", "graphon"}
    assert builtin <= set(methods())
    assert all(f"`{name}`" in text for name in builtin)
