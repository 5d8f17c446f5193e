"""The README's own code runs."""

import re
from pathlib import Path

import pytest

from lightning_graphon.callbacks import PruneAtInit

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  (our own text)
    if isinstance(names.get("prune"), PruneAtInit):
        assert abs(names["prune"].masks.sparsity - names["prune"].plan.sparsity) < 1e-9
    else:
        assert names["masks"].sparsity > 0


def test_quick_start_is_short():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 10


def test_every_preset_and_method_is_named():
    from lightning_graphon.pruning import methods

    text = README.read_text(encoding="utf-8")
    builtin = {"random", "magnitude", "snip", "grasp", "synflow", "graphon"}
    assert builtin <= set(methods())
    assert all(f"`{name}`" in text for name in builtin)
