import subprocess
import sys

import lightning_graphon.graphon as package


def test_everything_named_is_there():
    assert len(set(package.__all__)) == len(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)


def test_neither_lightning_nor_matplotlib_nor_pot_is_imported():
    code = "import sys, lightning_graphon.graphon; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("lightning", "pytorch_lightning", "matplotlib", "ot"):
        assert f"'{name}'" not in loaded
