"""Nothing of ours unpickles foreign objects, starts a shell or talks to a network."""

import ast
import os
import pickle
from pathlib import Path

import pytest
import torch

import lightning_graphon
from lightning_graphon.callbacks import PruneAtInit
from lightning_graphon.pruning import Masks

PACKAGE = Path(lightning_graphon.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {
    "pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "socket", "urllib", "http",
    "requests", "ftplib", "smtplib", "ctypes", "multiprocessing",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "spawnl", "execv", "load_state_dict_from_url"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def calls(tree):
    """Dotted name and keywords of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def problems(source):
    """What in a module could run foreign code."""
    tree = ast.parse(source)
    found = [name for name in imported(tree) if name.split(".")[0] in FORBIDDEN]
    for name, keywords in calls(tree):
        last = name.rpartition(".")[2]
        if name in CALLS or (name.startswith("os.") and last in CALLS) or last == "load_state_dict_from_url":
            found.append(name)
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if last in ("load", "savez", "savez_compressed") and keywords.get("allow_pickle") == "True":
            found.append(f"{name} with pickles")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_foreign_code(path):
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from subprocess import run",
        "import urllib.request",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "os.system(text)",
        "torch.hub.load_state_dict_from_url(url)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_finds_what_it_looks_for(source):
    assert len(problems(source)) == 1


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch.save"])
def test_a_file_that_runs_code_when_unpickled_is_refused_and_runs_nothing(plain, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "masks.pt"
    if plain:
        path.write_bytes(pickle.dumps({"format": 1, "masks": Bomb(trace)}))
    else:
        torch.save({"format": 1, "masks": Bomb(trace)}, path)
    for read in (Masks.load, lambda p: PruneAtInit.from_masks(p)):
        with pytest.raises(ValueError, match="no file of masks"):
            read(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if not plain else pickle.loads(path.read_bytes())
    assert trace.exists(), "the bomb is none"
