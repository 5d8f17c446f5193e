"""Everything but the callbacks works without Lightning."""

import subprocess
import sys

import pytest

CODE = """
import sys
import lightning_graphon.{package}
found = sorted(m for m in sys.modules if m.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"))
print(len(found), *found[:5])
"""


@pytest.mark.parametrize("package", ["pruning", "graphon", "ntk", "metrics"])
def test_does_not_import_lightning(package: str) -> None:
    result = subprocess.run([sys.executable, "-c", CODE.format(package=package)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "0", result.stdout


def test_the_public_names_are_there() -> None:
    import lightning_graphon.pruning as pruning

    assert all(hasattr(pruning, name) for name in pruning.__all__)
    names = {"prune", "Masks", "register_method", "methods", "select_weights", "LayerCollapseWarning"}
    assert names <= set(pruning.__all__)
