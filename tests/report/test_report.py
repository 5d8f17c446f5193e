"""The report of runs: what it reads, what it shows, and that nothing in it comes from elsewhere."""

import base64
import re
from html.parser import HTMLParser

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, SpectrumOptions
from lightning_graphon.report.report import report_html, write_report
from lightning_graphon.report.runs import Run, read_runs
from tests.helpers.modules import Classifier, loader, make_trainer, quiet

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags in order, text, table cells row by row; fails where tags do not match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.rows and {"td", "th"} & set(self.open) and "small" not in self.open:
            self.rows[-1][-1] += data

    def row(self, name):
        (found,) = [row for row in self.rows if row[0] == name]
        return found[1:]


def fit(folder, *, logger, method="snip", name=""):
    pl.seed_everything(0, verbose=False)
    callbacks = [
        *([quiet(method)] if method else []),
        GraphonMonitor(bins=8, verbose=False, spectrum=SpectrumOptions(probe_size=16)),
        LossDecayMonitor(probe_size=16, every_n_steps=2, verbose=False),
    ]
    made = logger(folder, name=name, version="") if logger else False
    trainer = make_trainer(*callbacks, logger=made, limit_train_batches=6, default_root_dir=folder, log_every_n_steps=1)
    trainer.fit(Classifier(), loader())
    return callbacks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with TensorBoard logs."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {name: fit(folder, logger=TensorBoardLogger, method=name, name=name) for name in ("snip", "random")}


def test_scalars_and_pictures_of_tensorboard_are_read(runs):
    folder, callbacks = runs
    found = read_runs(folder)
    assert [run.name for run in found] == ["random", "snip"]
    for run in found:
        pruner, monitor, decay = callbacks[run.name]
        assert run.last_step == 6
        assert run.scalars["sparsity/total"][0] == pytest.approx(pruner.masks.sparsity)
        observed = dict(zip(decay.curves["step"].tolist(), decay.curves["observed"].tolist(), strict=True))
        assert run.scalars["loss_decay/observed"] == pytest.approx(observed)  # single precision in the file
        assert {tag: sorted(steps) for tag, steps in run.pictures.items()} == {
            "graphons": [0],
            "ntk_spectrum": [0, 6],
            "loss_decay": [6],
        }
        assert len(monitor.graphons) == 3


def test_page_has_every_run_its_numbers_and_pictures(runs):
    folder, callbacks = runs
    page = Page(report_html(read_runs(folder), "digits"))
    assert page.row("snip")[:3] == ["6", "0.8999", "3"]
    decay = callbacks["snip"][2].curves
    first, last = (f"{float(decay['observed'][i]):.4g}" for i in (0, -1))
    assert f"{first} → {last}" in page.row("snip")
    assert page.row("observed")[1] == f"{first} → {last}"
    layers = [row for row in page.rows if row[0] == "net.0.weight"]
    assert len(layers) == 2
    assert all(len(row) == 7 for row in layers)
    for word in ("Overview", "Layer graphons", "Spectrum of the tangent kernel", "Predicted against observed loss"):
        assert word in page.text
    assert "Not logged" not in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * (1 + 2 + 1)
    for image in images:
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
        assert image["alt"]
    anchors = {a["href"].removeprefix("#") for tag, a in page.tags if tag == "a"}
    assert anchors == {a["id"] for tag, a in page.tags if tag == "section"}


def test_nothing_is_loaded_and_nothing_runs(runs):
    html = report_html(read_runs(runs[0]), "digits")
    assert not {tag for tag, _ in Page(html).tags} & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import|javascript:", html)


def test_file_lands_in_the_run_or_where_it_is_asked_for(runs, tmp_path):
    folder, _ = runs
    assert write_report(folder / "snip") == folder / "snip" / "report.html"
    target = write_report(folder, tmp_path / "new" / "page.html")
    page = Page(target.read_text(encoding="utf-8"))
    assert page.row("random")[0] == "6"
    assert "this run" in Page((folder / "snip" / "report.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize("logger", [CSVLogger, None])
def test_without_tensorboard(tmp_path, logger):
    fit(tmp_path, logger=logger)
    (run,) = read_runs(tmp_path)
    page = Page(report_html([run], "files"))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4
    if logger:
        assert page.row("this run")[:3] == ["6", "0.8999", "3"]
        assert len(run.scalars["loss_decay/observed"]) == 7  # the rehearsed steps, all at first


def test_dense_and_foreign_runs_say_what_is_missing(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,val/acc\n0,4,0.5\n1,9,0.75\n")
    (run,) = read_runs(tmp_path)
    assert run.scalars["val/acc"] == {4: 0.5, 9: 0.75}
    page = Page(report_html([run], "theirs"))
    assert page.row("val/acc") == ["0.5 → 0.75"]
    assert page.row("this run") == ["9", *["–"] * 6]
    for name in ("GraphonMonitor", "LossDecayMonitor"):
        assert f"add {name}" in page.text


@pytest.mark.parametrize(
    "name", ['<img src=x onerror="boom">&', "[/INST]", "[cls]", "<b>", "x" * 300, "../", "{{ 7 * 7 }}", "a' b"]
)
def test_names_of_users_are_words_and_nothing_else(name):
    """Of runs, layers, logged keys, files and the page."""
    scalars = {f"sparsity/{name}": {0: 0.5}, name: {0: 1.0}, "loss_decay/observed": {0: 2.0}}
    run = Run(name, scalars, {"loss_decay": {3: b"png"}}, {name: name})
    html = report_html([run], name)
    page = Page(html)
    for tag in ("b", "cls", "script"):
        assert tag not in {tag for tag, _ in page.tags}
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == f"Predicted and observed loss of {name} at step 3"
    assert f"Sparse training: {name}" in page.text
    assert page.row("key") == [name]
    assert len([row for row in page.rows if row[0] == name]) == 3  # the run, the layer, the key
    assert f"{name}: {name} could not be read to its end ({name})" in page.text


def write_events(folder):
    writer = SummaryWriter(folder)
    for step in range(10):
        writer.add_scalar("val/acc", step / 10, step)
    writer.close()
    (path,) = folder.glob("events*")
    return path


DAMAGE = {
    "garbage": lambda data: b"nothing of this kind" * 9,
    "cut off": lambda data: data[:-7],
    "one bit": lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_event_file_is_named_and_the_rest_is_shown(kind, tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        path = write_events(tmp_path / name)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    (tmp_path / "bad" / "metrics.csv").write_text("step,loss\n0,4.0\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.row("loss") == ["4", "–"]
    read, whole = page.row("val/acc")
    assert whole == "0 → 0.9"
    assert read == ("–" if kind == "garbage" else {"cut off": "0 → 0.8", "one bit": "0 → 0.3"}[kind])
    assert f"bad: {path.name} could not be read to its end (EOFError: damaged or cut off after" in page.text
    assert "good: " not in page.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"step,loss\n0,3.0\n1,what\n", "could not convert string to float: 'what'"),
        (b"step,loss\n0,3.0\n1,\xff\xfe\n", "UnicodeDecodeError"),
        (b"step,loss\n0,3.0\n1,2.0,5.0\n", "TypeError"),
        (b"step,loss\n0,3.0\ninf,2.0\n", "OverflowError"),
    ],
    ids=["a word", "no text", "too many cells", "no step"],
)
def test_a_damaged_table_is_named_and_the_rest_is_shown(content, reason, tmp_path):
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_bytes(b"step,loss\n0,3.0\n2,1.0\n" if name == "good" else content)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.row("loss")[1] == "3 → 1"
    assert "bad: metrics.csv could not be read to its end (" in page.text
    assert reason in page.text


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    for name in ("bad", "good"):
        (tmp_path / name / "graphons").mkdir(parents=True)
        (tmp_path / name / "graphons" / "step_1.png").write_bytes(b"png")
    (tmp_path / "bad" / "graphons" / "step_2.png").mkdir()
    (tmp_path / "bad" / "graphons" / "step_\u00b2.png").write_bytes(b"png")  # a digit, but no number
    bad, good = read_runs(tmp_path)
    assert bad.pictures == good.pictures == {"graphons": {1: b"png"}}
    assert set(bad.damaged) == {"step_2.png", "step_\u00b2.png"}
    assert not good.damaged


def test_files_without_damage_are_not_named(tmp_path):
    write_events(tmp_path)
    (run,) = read_runs(tmp_path)
    assert run.damaged == {}
    assert "Damaged" not in Page(report_html([run], "whole")).text


def test_a_run_that_was_cut_off_has_its_losses_drawn():
    curve = {0: 2.0, 10: 1.5, 20: 1.2}
    run = Run("cut", {"loss_decay/observed": curve, "loss_decay/predicted": {0: 2.0, 10: 1.4}})
    page = Page(report_html([run], "cut"))
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert "loss of cut" in image["alt"]


def test_losses_that_are_not_finite_are_shown_as_they_are():
    run = Run("exploded", {"loss_decay/observed": {0: 2.0, 10: float("nan"), 20: float("inf")}, "ntk/trace": {0: 2e5}})
    page = Page(report_html([run], "exploded"))
    assert page.row("observed") == ["2 → inf"]
    assert page.row("trace") == ["200,000"]


def test_versions_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1):
        folder = tmp_path / f"version_{number}"
        folder.mkdir()
        (folder / "metrics.csv").write_text("step,a\n0,1\n")
    assert [run.name for run in read_runs(tmp_path)] == ["version_1", "version_9", "version_10"]


def test_errors_say_where_runs_are(tmp_path):
    run = tmp_path / "project" / "lightning_logs" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no runs under .*lightning-graphon fit --preset full"):
        read_runs(tmp_path / "project")
    (run / "metrics.csv").write_text("step,a\n0,1\n")
    with pytest.raises(FileNotFoundError, match=r"no runs under .*checkpoints'.*There is one in .*version_0'"):
        read_runs(run / "checkpoints")
    (run.parent / "version_1").mkdir()
    with pytest.raises(FileNotFoundError, match=r"There are runs in .*lightning_logs': version_0\."):
        read_runs(run.parent / "version_1")
    with pytest.raises(FileNotFoundError, match=r"Did you mean '.*lightning_logs'"):
        read_runs(tmp_path / "project" / "lightning_log")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*Did you mean '.*version_1'"):
        read_runs(run.parent / "version_11" / "checkpoints")
