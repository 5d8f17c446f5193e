"""The wheel in an empty environment; its dependencies come from the package index, gigabytes where torch has CUDA."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import pytest

from tests.test_readme import ROOT, blocks

pytestmark = pytest.mark.slow

# Lightning's own smallest module; its batches have no labels, and it was written without this library in mind.
BORING = """
from importlib.util import find_spec

import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit

assert not [name for name in ("sklearn", "torchvision", "ot", "jsonargparse") if find_spec(name)]
pruner, graphons = PruneAtInit("snip", sparsity=0.5), GraphonMonitor(raise_errors=True)
losses = LossDecayMonitor(every_n_steps=10, raise_errors=True)
trainer = pl.Trainer(max_epochs=1, limit_val_batches=1, accelerator="cpu", callbacks=[pruner, graphons, losses])
trainer.fit(BoringModel())
assert pruner.masks.sparsity == 0.5
assert graphons.graphons.keys() == pruner.masks.keys()
assert graphons.spectrum is not None
assert losses.curves["step"].tolist() == [0, 10, 20, 30, 40, 50, 60]
assert losses.curves["predicted"].isfinite().all()
"""


def call(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)  # from the sdist, which is tested with it
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel):
    """An interpreter that has the wheel and what it depends on, and nothing else."""
    with TemporaryDirectory() as folder:  # pytest would keep its own folders, of 6 GB, for three more runs
        call(sys.executable, "-m", "venv", folder, cwd=folder)
        found = Path(folder, "bin", "python")
        call(found, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
        yield found


def run(python, code, folder):
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    return call(python, "-I", script, cwd=folder)  # isolated: no PYTHONPATH leads to the source tree


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(ZipFile(wheel).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lightning_graphon").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    presets = {f"lightning_graphon/_presets/{path.name}" for path in (ROOT / "callbacks").glob("*.yaml")}
    assert "lightning_graphon/py.typed" in package
    assert {name for name in names if ".dist-info/" not in name} == package | presets


def test_without_extras_lightnings_boring_model_is_pruned_and_monitored(python, tmp_path):
    run(python, BORING, tmp_path)


def test_command_finds_its_presets(python, tmp_path):
    preset = call(python.with_name("lightning-graphon"), "presets", "full", cwd=tmp_path).strip()
    assert preset.endswith("site-packages/lightning_graphon/_presets/full.yaml")


def test_first_example_of_the_readme_runs_with_the_extra(python, wheel, tmp_path):
    call(python, "-m", "pip", "install", "--quiet", f"{wheel}[examples]", cwd=tmp_path)
    run(python, f"{blocks('README.md')[0]}\nassert monitor.invalid_from is None", tmp_path)
    assert list((tmp_path / "runs").glob("**/events.out.tfevents.*"))
