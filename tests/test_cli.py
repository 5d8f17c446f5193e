"""The command `lightning-graphon`."""

import importlib
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_graphon.cli import _with_presets, main
from lightning_graphon.presets import preset_path, presets

ROOT = Path(__file__).parents[1]
QUIET = ["accelerator=cpu", "devices=1", "max_epochs=1", "limit_val_batches=1"]
QUIET += ["enable_progress_bar=false", "enable_model_summary=false", "enable_checkpointing=false"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with somebody's project, as the working directory; nothing of it stays imported."""
    (tmp_path / "their_project.py").write_text((ROOT / "examples" / "train_cli.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with warnings.catch_warnings():
        yield tmp_path
    sys.modules.pop("their_project", None)


def fit(*arguments):
    options = [f"--trainer.{option}" for option in QUIET]
    model = ["--model", "their_project.Classifier", "--data", "their_project.Digits", "--model.width", "32"]
    return main(["fit", *arguments, *model, *options])


def test_fit_with_a_preset_and_report(project, capsys):
    assert fit("--preset", "full") == 0
    printed = capsys.readouterr().out
    run = project / "lightning_logs" / "version_0"
    assert f"lightning-graphon report {run}" in printed
    assert main(["report", str(run)]) == 0
    html = (run / "report.html").read_text(encoding="utf-8")
    assert html.count("<img") == 4
    assert "Not logged" not in html
    assert main(["report", "lightning_logs", "--output", "page.html"]) == 0
    assert "version_0" in (project / "page.html").read_text(encoding="utf-8")


def test_fit_needs_a_model(project, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--preset", "snip"])
    assert stop.value.code == 2
    assert "no model given" in (message := capsys.readouterr().err)
    assert "class_path: my_module.MyModel" in message


@pytest.mark.parametrize("arguments", [["--preset=snipp"], ["--preset", "snipp"]])
def test_unknown_presets_name_the_nearest(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code == 2
    assert "Did you mean 'snip'" in capsys.readouterr().err


def test_presets_stand_where_they_were_given():
    given = ["--config", "a.yaml", "--preset=snip", "--preset", "monitor", "--trainer.max_epochs", "2"]
    snip, monitor = str(preset_path("snip")), str(preset_path("monitor"))
    assert _with_presets(given) == [*given[:2], "--config", snip, "--config", monitor, *given[-2:]]


def test_configurations_come_before_presets_wherever_they_stand():
    """Most configurations have `callbacks:`, which would replace what a preset has added."""
    given = [
        "--data",
        "d",
        "--preset",
        "snip",
        "--trainer.callbacks.sparsity",
        "0.95",
        "--config",
        "a.yaml",
        "-c=b.yaml",
    ]
    made = ["--data", "d", "--config", "a.yaml", "-c=b.yaml", "--config", str(preset_path("snip"))]
    assert _with_presets(given) == [*made, "--trainer.callbacks.sparsity", "0.95"]


def test_a_preset_before_the_configuration_prunes(project, capsys):
    stopping = "class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss, strict: false}"
    (project / "mine.yaml").write_text(f"trainer: {{callbacks: [{{{stopping}}}]}}\n")
    assert fit("--preset", "snip", "--config", "mine.yaml") == 0
    assert "PruneAtInit: snip" in capsys.readouterr().out


def test_presets_are_listed_with_what_they_do(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == presets()
    assert all(len(line.split()) > 3 and "#" not in line for line in lines)
    assert main(["presets", "full"]) == 0
    assert Path(capsys.readouterr().out.strip()) == preset_path("full")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], "there is no folder 'nowhere'"),
        (["report", "."], "no runs under '.'"),
        (["presets", "ful"], "Did you mean 'full'"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_end_with_status_2_and_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_help_of_fit_names_presets(capsys):
    assert main(["fit"]) == 0
    assert "--preset NAME" in (printed := capsys.readouterr().out)
    assert ", ".join(presets()) in printed


def test_the_command_is_installed_under_its_name():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert lines[lines.index("[project.scripts]") + 1] == 'lightning-graphon = "lightning_graphon.cli:main"'


SMALL = """
import lightning.pytorch as pl
import torch
from torch import nn

class Classifier(pl.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
        self.example_input_array = torch.rand(1, 6)

    def forward(self, x):
        return self.net(x)

class Plain(nn.Linear):
    pass
"""


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Of a network of width 12, of whose units three are dead."""
    (tmp_path / "their_network.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("their_network").Classifier(12)
    module.net[0].weight.data[:3] = 0
    state = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {"width": 12},
        "pytorch-lightning_version": pl.__version__,
    }
    torch.save(state, tmp_path / "sparse.ckpt")
    yield module
    sys.modules.pop("their_network", None)


@pytest.mark.parametrize("name", ["small.pt", "small.pt2"])
def test_compact(checkpoint, name, capsys):
    assert main(["compact", "sparse.ckpt", "--module", "their_network.Classifier", "-o", name]) == 0
    assert "net.0.weight: inputs 6 -> 6, outputs 12 -> 9" in capsys.readouterr().out
    small = torch.load(name, weights_only=False) if name.endswith(".pt") else torch.export.load(name).module()
    x = torch.rand(5, 6)  # of another size than the example
    torch.testing.assert_close(small(x), checkpoint(x))
    assert sum(p.numel() for p in small.parameters()) == 9 * 7 + 3 * 10


@pytest.mark.parametrize(
    ("path", "module", "message"),
    [
        ("none.ckpt", "their_network.Classifier", "no checkpoint"),
        ("sparse.ckpt", "their_network.Nobody", "cannot be imported"),
        ("sparse.ckpt", "nobody", "cannot be imported"),
        ("sparse.ckpt", "their_network.Plain", "no LightningModule"),
    ],
)
def test_compact_says_what_is_wrong(checkpoint, path, module, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compact", path, "--module", module, "-o", "small.pt"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
