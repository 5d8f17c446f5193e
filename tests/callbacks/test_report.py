"""Logged scalars and the printed table."""

import csv
import re
from html import unescape

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit
from lightning_graphon.callbacks._logging.graphons import print_graphons
from lightning_graphon.callbacks._logging.scalars import markdown_table, print_masks
from lightning_graphon.graphon import layer_graphons
from lightning_graphon.pruning import Masks
from lightning_graphon.report.runs import read_runs
from tests.helpers.modules import Classifier, Gan, loader, make_trainer, quiet


class Plain(Logger):
    """A logger that can only take numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name = "plain"
    version = 0

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.calls.append((dict(metrics), step))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def expected(masks, parameters=3122):
    scalars = {f"sparsity/{n}": 1 - m.float().mean().item() for n, m in masks.items()}
    total = sum(m.numel() for m in masks.values())
    removed = sum(int((~m).sum()) for m in masks.values())
    return {**scalars, "sparsity/total": removed / total, "sparsity/model": removed / parameters}


def test_keys_values_and_step():
    pruner, logger = quiet("snip"), Plain()
    make_trainer(pruner, logger=logger).fit(Classifier(), loader())
    logged = [(metrics, step) for metrics, step in logger.calls if any(k.startswith("sparsity/") for k in metrics)]
    assert len(logged) == 1
    assert logged[0][1] == 0
    assert logged[0][0] == pytest.approx(expected(pruner.masks), abs=1e-6)
    assert set(logged[0][0]) == {*(f"sparsity/net.{i}.weight" for i in (0, 2, 4)), "sparsity/total", "sparsity/model"}


def test_other_callbacks_can_monitor_what_is_logged(tmp_path):
    stop = EarlyStopping("loss_decay/observed", stopping_threshold=1e9, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path, monitor="loss_decay/observed", save_on_train_epoch_end=True)
    monitors = GraphonMonitor(verbose=False, spectrum=None), LossDecayMonitor(probe_size=8, every_n_steps=2)
    options = {"enable_checkpointing": True, "max_epochs": 5, "default_root_dir": tmp_path}
    trainer = make_trainer(quiet("random"), *monitors, stop, keep, **options)
    trainer.fit(Classifier(), loader())
    assert trainer.current_epoch == 1
    assert keep.best_model_score == trainer.callback_metrics["loss_decay/observed"]
    assert trainer.callback_metrics["sparsity/total"] == pytest.approx(0.9, abs=1e-3)
    assert trainer.callback_metrics["graphon/net.0.weight/density"] < 1


@pytest.mark.parametrize("model", [Classifier, Gan])
def test_step_of_a_resumed_run_continues_the_axis(model, tmp_path):
    first = make_trainer(quiet("snip"), accumulate_grad_batches=1)
    first.fit(model(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    logger, pruner = Plain(), quiet("snip")
    make_trainer(pruner, logger=logger, max_epochs=2).fit(model(), loader(), ckpt_path=tmp_path / "a.ckpt")
    steps = [step for metrics, step in logger.calls if "sparsity/total" in metrics]
    assert steps == [first.global_step]


def test_csv(tmp_path):
    pruner = quiet("magnitude", 0.5)
    logger = CSVLogger(tmp_path)
    make_trainer(pruner, logger=logger, log_every_n_steps=1).fit(Classifier(), loader(), loader(32))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    found = {k: float(v) for row in rows for k, v in row.items() if k.startswith("sparsity/") and v}
    assert found == pytest.approx(expected(pruner.masks), abs=1e-6)
    assert [row["step"] for row in rows if row["sparsity/total"]] == ["0"]


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("several", [False, True])
def test_tensorboard(several, tmp_path):
    pruner = PruneAtInit("snip", 0.9, verbose=False, layer_scalars=True)
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path), Plain()]
    make_trainer(pruner, logger=loggers if several else loggers[0]).fit(Classifier(), loader(), loader(32))
    scalars = {tag: points for tag, points in read_events(loggers[0].log_dir).items() if tag.startswith("sparsity/")}
    assert {tag: points[0][1] for tag, points in scalars.items()} == pytest.approx(expected(pruner.masks), abs=1e-6)
    assert all([step for step, _ in points] == [0] for points in scalars.values())
    if several:
        assert any("sparsity/total" in metrics for metrics, _ in loggers[2].calls)


def test_layers_are_one_table_in_tensorboard_and_scalars_elsewhere(tmp_path):
    pruner, plain = PruneAtInit("snip", 0.9, verbose=False, report_limits=True), Plain()
    monitor, board = GraphonMonitor(verbose=False, spectrum=None), TensorBoardLogger(tmp_path)
    trainer = make_trainer(pruner, monitor, logger=[board, plain])
    trainer.fit(Classifier(), loader())
    own = [tag for tag in read_events(board.log_dir) if tag.startswith(("sparsity/", "graphon/"))]
    assert own == ["sparsity/total", "sparsity/model"]
    sent = {key: value for metrics, _ in plain.calls for key, value in metrics.items()}
    assert expected(pruner.masks).keys() <= sent.keys() & trainer.callback_metrics.keys()
    (run,) = read_runs(board.log_dir)
    layers = {key: value for key, value in sent.items() if key.startswith(("sparsity/", "graphon/"))}
    assert len(layers) == 2 + 3 * (1 + 1 + 4)
    assert {key: run.scalars[key][0] for key in layers} == pytest.approx(layers, rel=1e-3, abs=1e-30)


@pytest.mark.parametrize(
    "name",
    ["a|b", "**a**", "[a](http://b)", "`a`", "a\nb", "<b>a</b>", "&amp;", "\\|", "_a_", "# a", "![a](b)", "日本"],
)
def test_names_of_layers_are_words_in_a_table(name):
    from tensorboard.plugin_util import markdown_to_safe_html

    table = markdown_table({name: {"density": 0.5}, "other": {"density": 0.25, "moved": 1e-20}})
    html = markdown_to_safe_html(table)
    assert re.findall(r"<(\w+)", html) == ["table", "thead", *["tr", *["th"] * 3], "tbody", *["tr", *["td"] * 3] * 2]
    cells = [unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", html)]
    assert cells == ["layer", "density", "moved", name, "0.5", "", "other", "0.25", "1e-20"]


@pytest.mark.parametrize("logger", [False, None, []])
def test_without_loggers(logger, tmp_path):
    pruner = quiet("snip")
    make_trainer(pruner, logger=logger, default_root_dir=tmp_path).fit(Classifier(), loader())
    assert pruner.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_table_is_printed_once_and_only_when_verbose(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    pruner, model = PruneAtInit("snip", 0.9), Classifier()
    make_trainer(pruner).fit(model, loader())
    make_trainer(pruner).fit(model, loader())
    shown = capsys.readouterr().out
    assert shown.count("net.0.weight") == 1
    assert shown.count("PruneAtInit: snip, sparsity 0.9") == 1
    assert "neither faster nor smaller" in shown
    kept = sum(int(m.sum()) for m in pruner.masks.values())
    total = sum(m.numel() for m in pruner.masks.values())
    (line,) = [line for line in shown.splitlines() if "total" in line]
    assert str(kept) in line
    assert str(total) in line
    make_trainer(quiet("snip")).fit(Classifier(), loader())
    assert capsys.readouterr().out == ""


def test_names_of_a_resnet_have_a_line_each_on_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    masks = Masks({f"net.layer4.0.conv{i}.weight": torch.rand(512, 256, 3, 3) < 0.1 for i in (1, 2)})
    print_masks(masks, "PruneAtInit: snip, sparsity 0.9")
    print_graphons(layer_graphons(masks), {}, {f"graphon/{name}/density": 0.0678 for name in masks})
    lines = capsys.readouterr().out.splitlines()
    assert [sum(name in line for line in lines) for name in masks] == [2, 2]
    assert max(map(len, lines)) <= 80


def test_table_of_a_resumed_run_is_not_printed_as_if_it_pruned(capsys, tmp_path):
    trainer = make_trainer(quiet("snip"))
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    capsys.readouterr()
    make_trainer(PruneAtInit("snip", 0.9), max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert "sparsity 0.9" not in capsys.readouterr().out


def test_layer_collapse_is_said_aloud():
    with pytest.warns(UserWarning, match=r"layer collapse: magnitude .* net\.0\.weight.*min_density"):
        make_trainer(quiet("magnitude")).fit(Classifier(), loader())


def test_importing_the_package_imports_no_loggers_and_no_lightning():
    import subprocess
    import sys

    code = (
        "import sys, lightning_graphon, lightning_graphon.pruning\n"
        "print([m for m in ('lightning', 'tensorboard', 'matplotlib') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_distances_from_the_predicted_limit_are_logged_and_printed_on_request(capsys):
    logger, pruner = Plain(), PruneAtInit("snip", 0.8, report_limits=True)
    make_trainer(pruner, logger=logger).fit(Classifier(), loader())
    (logged,) = [metrics for metrics, _ in logger.calls if "sparsity/total" in metrics]
    distances = {k: v for k, v in logged.items() if k.startswith("graphon/")}
    assert set(distances) == {f"graphon/net.{i}.weight/limit_distance" for i in (0, 2, 4)}
    assert all(0 < distance < 1 for distance in distances.values())
    printed = capsys.readouterr().out
    assert "limit" in printed
    assert all(f"{distance:.4f}" in printed for distance in distances.values())


def test_limits_do_not_change_masks_and_are_off_by_default(capsys):
    masks = []
    for asked in (False, True):
        pruner = PruneAtInit("synflow", 0.8, steps=3, report_limits=asked)
        make_trainer(pruner).fit(Classifier(), loader())
        masks.append(pruner.masks)
        assert ("limit" in capsys.readouterr().out.replace("limit_", "")) == asked
    assert all(bool((masks[0][name] == mask).all()) for name, mask in masks[1].items())
