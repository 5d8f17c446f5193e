"""The YAML presets, through LightningCLI."""

import dataclasses
import inspect
import sys

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_graphon.callbacks import DynamicSparsity, GraphonMonitor, LossDecayMonitor, PruneAtInit
from lightning_graphon.presets import preset_path, presets
from lightning_graphon.pruning import prune
from lightning_graphon.pruning.growth import get_growth
from lightning_graphon.pruning.scoring.registry import get_method
from tests.helpers.modules import METHODS as FIRST
from tests.helpers.modules import PUBLISHED, Classifier, loader, pruned_max

METHODS = [*FIRST, *PUBLISHED]
BASE = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  limit_train_batches: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: never, strict: false}
"""


class Toy(Classifier):
    def __init__(self, width: int = 3):
        super().__init__()
        self.width = width

    def train_dataloader(self):
        return loader()


@pytest.fixture
def cli(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)

    def run(*configs, command=(), run=False):
        arguments = ["--config", str(tmp_path / "base.yaml")]
        for config in configs:
            arguments += ["--config", str(config)]
        return LightningCLI(
            Toy, args=[*command, *arguments], run=run, save_config_callback=None, seed_everything_default=1
        )

    return run


def test_one_for_every_method():
    assert set(METHODS) <= set(presets())
    with pytest.raises(ValueError, match=r"snipp.*Did you mean 'snip'"):
        preset_path("snipp")


@pytest.mark.parametrize("name", METHODS)
def test_loads_beside_ones_own_callbacks(name, cli):
    made = cli(preset_path(name))
    kinds = [type(c).__name__ for c in made.trainer.callbacks]
    assert "EarlyStopping" in kinds
    (pruner,) = [c for c in made.trainer.callbacks if isinstance(c, PruneAtInit)]
    assert pruner.config.resolved.name == name


@pytest.mark.parametrize("name", METHODS)
def test_writes_out_every_default(name):
    (entry,) = yaml.safe_load(preset_path(name).read_text())["trainer"]["callbacks+"]
    assert entry["class_path"] == "lightning_graphon.callbacks.PruneAtInit"
    given = entry["init_args"]
    parameters = dict(inspect.signature(PruneAtInit.__init__).parameters)
    del parameters["self"]
    assert list(given) == list(parameters)
    assert given["method"] == name
    allowed = {"sparsity": (0.9,), "options": (None, {})}  # a copy with another method has that method's rounds
    for key, parameter in parameters.items():
        if key == "options" and given[key]:
            options = inspect.signature(get_method(name).score).parameters
            assert given[key] == {k: p.default for k, p in options.items() if p.kind is p.KEYWORD_ONLY}
        elif key != "method":
            assert given[key] in allowed.get(key, (parameter.default,)), key


def defaults_of(callback):
    """Name -> default of every argument, groups of arguments as dicts."""
    defaults = {k: p.default for k, p in inspect.signature(callback.__init__).parameters.items() if k != "self"}
    return {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in defaults.items()}


def test_full_is_pruning_and_both_monitors(cli):
    entries = yaml.safe_load(preset_path("full").read_text())["trainer"]["callbacks+"]
    parts = [yaml.safe_load(preset_path(name).read_text()) for name in ("snip", "monitor", "loss_decay")]
    assert entries == [entry for part in parts for entry in part["trainer"]["callbacks+"]]
    made = cli(preset_path("full"))
    own = [c for c in made.trainer.callbacks if type(c).__module__.startswith("lightning_graphon")]
    assert [type(c).__name__ for c in own] == ["PruneAtInit", "GraphonMonitor", "LossDecayMonitor"]


def test_monitor_writes_out_every_default():
    (entry,) = yaml.safe_load(preset_path("monitor").read_text())["trainer"]["callbacks+"]
    assert entry["init_args"] == defaults_of(GraphonMonitor)


def test_loss_decay_writes_out_every_default():
    (entry,) = yaml.safe_load(preset_path("loss_decay").read_text())["trainer"]["callbacks+"]
    assert entry["class_path"] == "lightning_graphon.callbacks.LossDecayMonitor"
    assert entry["init_args"] == defaults_of(LossDecayMonitor)
    assert list(entry["init_args"]) == list(defaults_of(LossDecayMonitor))


def test_loss_decay_trains_beside_pruning(cli, tmp_path):
    made = cli(preset_path("snip"), preset_path("loss_decay"))
    made.trainer.fit_loop.epoch_loop.max_steps = 2
    (watch,) = [c for c in made.trainer.callbacks if isinstance(c, LossDecayMonitor)]
    watch.figure = watch.verbose = False
    made.trainer.fit(made.model)
    predicted, observed = watch.curves["predicted"], watch.curves["observed"]
    assert float(predicted[0]) == pytest.approx(float(observed[0]))
    assert watch.curves["step"].tolist() == [0.0, 1.0, 2.0], (
        "a fit that ends before the second look is measured at its end"
    )
    assert float(predicted[2]) == pytest.approx(float(observed[2]), rel=1e-2)  # after two steps of minibatches


def test_a_pattern_is_quoted(cli, tmp_path, capsys):
    """YAML reads 2:4 as a number of base sixty."""
    changed = tmp_path / "changed.yaml"
    text = preset_path("magnitude").read_text().replace("sparsity: 0.9", "sparsity: null")
    changed.write_text(text.replace("allocation: global", 'allocation: "2:4"'))
    (pruner,) = [c for c in cli(changed).trainer.callbacks if isinstance(c, PruneAtInit)]
    assert pruner.config.sparsity == 0.5
    changed.write_text(text.replace("allocation: global", "allocation: 2:4"))
    with pytest.raises(SystemExit):
        cli(changed)
    assert "124" in capsys.readouterr().err


def test_several_presets_compose(cli, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text(
        preset_path("magnitude").read_text().replace("include: null", "include: net.0").replace("0.9 ", "0.5 ")
    )
    first = tmp_path / "first.yaml"
    first.write_text(preset_path("snip").read_text().replace("exclude: null", "exclude: net.0"))
    made = cli(first, second)
    pruners = [c for c in made.trainer.callbacks if isinstance(c, PruneAtInit)]
    assert [p.config.resolved.name for p in pruners] == ["snip", "magnitude"]
    made.trainer.fit(made.model)
    assert [p.masks.sparsity for p in pruners] == pytest.approx([0.9, 0.5], abs=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_trains(name, cli):
    made = cli(preset_path(name))
    (pruner,) = [c for c in made.trainer.callbacks if isinstance(c, PruneAtInit)]
    pruner.verbose = False
    made.trainer.fit(made.model)
    assert pruner.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert pruned_max(made.model, pruner.masks) == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_printed_config_loads_again(name, cli, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli(preset_path(name), command=["--print_config"])
    printed = capsys.readouterr().out
    # --print_config prints what it has read so far: give it last.
    (tmp_path / "printed.yaml").write_text(printed)
    assert printed.strip()
    with pytest.raises(SystemExit):
        LightningCLI(
            Toy,
            args=["--config", str(tmp_path / "base.yaml"), "--config", str(preset_path(name)), "--print_config"],
            run=False,
            save_config_callback=None,
        )
    whole = capsys.readouterr().out
    (tmp_path / "whole.yaml").write_text(whole)
    again = LightningCLI(Toy, args=["--config", str(tmp_path / "whole.yaml")], run=False, save_config_callback=None)
    (pruner,) = [c for c in again.trainer.callbacks if isinstance(c, PruneAtInit)]
    (entry,) = yaml.safe_load(preset_path(name).read_text())["trainer"]["callbacks+"]
    assert pruner.config.resolved.name == name
    assert pruner.config.rounds == (entry["init_args"]["steps"] or get_method(name).steps)
    shown = [c for c in yaml.safe_load(whole)["trainer"]["callbacks"] if c["class_path"].endswith("PruneAtInit")]
    assert shown[0]["init_args"] == entry["init_args"]


def test_nothing_of_the_preset_is_code():
    for name in presets():
        assert yaml.safe_load(preset_path(name).read_text())
    assert not any(module.startswith("lightning_graphon._presets.") for module in sys.modules)


MOVING = ["rigl", "set", "srigl", "gmp"]


@pytest.mark.parametrize("name", MOVING)
def test_presets_of_masks_that_move_write_out_every_default_and_train(name, cli):
    (entry,) = yaml.safe_load(preset_path(name).read_text())["trainer"]["callbacks+"]
    given, defaults = entry["init_args"], defaults_of(DynamicSparsity)
    assert list(given) == list(defaults)
    options = get_growth(name).defaults
    assert given == {**defaults, "method": name, "sparsity": 0.9, "options": options}
    made = cli(preset_path(name))
    (pruner,) = [c for c in made.trainer.callbacks if isinstance(c, DynamicSparsity)]
    assert pruner.growth.method == name
    pruner.verbose, pruner.growth = False, dataclasses.replace(pruner.growth, every_n_steps=1, stop=2)
    made.trainer.fit(made.model)
    # A constant fan-in is rounded down.
    assert pruner.masks.sparsity == pytest.approx(0.9, abs=2e-2 if name == "srigl" else 1e-3)
    assert pruned_max(made.model, pruner.masks) == 0.0


def test_a_file_of_masks_or_a_method_to_start_with_can_be_named(cli, tmp_path):
    prune(Toy(), "magnitude", sparsity=0.5).save(tmp_path / "masks.pt")
    text = preset_path("rigl").read_text()
    changed = tmp_path / "changed.yaml"
    for start, sparsity in ((str(tmp_path / "masks.pt"), "null"), ("snip", "0.5")):
        changed.write_text(
            text.replace("start: null", f"start: {start}")
            .replace("sparsity: 0.9", f"sparsity: {sparsity}")
            .replace("verbose: true", "verbose: false")
        )
        made = cli(changed)
        (pruner,) = [c for c in made.trainer.callbacks if isinstance(c, DynamicSparsity)]
        made.trainer.fit(made.model)
        assert pruner.masks.sparsity == pytest.approx(0.5, abs=1e-3)
