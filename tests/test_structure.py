"""The house: which rooms there are, who may use whom, and what the package says it needs."""

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_graphon"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each may import what stands before it, in an earlier row; those of one row do not know each other.
STOREYS = [
    {"_shared"},
    {"tracing"},
    {"graphon"},
    {"pruning", "ntk"},
    {"dynamics", "compact"},
    {"plots"},
    {"metrics"},
    {"report", "presets"},
    {"callbacks", "cli"},
]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def exported(package):
    """What a package's `__init__` offers; a function may have the name of its file."""
    init = ROOT.joinpath(*package.split("."), "__init__.py")
    text = init.read_text(encoding="utf-8") if init.exists() else ""
    listed = text.partition("__all__ = [")[2].partition("]")[0]
    return set(re.findall(r'"(\w+)"', listed))


@cache
def imports():
    """Module -> modules of the package that it imports, by `from a import b` the module b where it is one."""
    known = {name_of(path) for path in FILES}
    found = {}
    for path in FILES:
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                modules = {
                    f"{node.module}.{alias.name}" for alias in node.names if alias.name not in exported(node.module)
                }
                targets |= modules & known or {node.module}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name_of(path)] = {target for target in targets if target.split(".")[0] == "lightning_graphon"}
    return found


def children(package):
    """Child of a package -> other children that it imports; the package's own `__init__` only re-exports."""
    depth = package.count(".") + 1
    graph = {}
    for module, targets in imports().items():
        if module.startswith(package + "."):
            child = module.split(".")[depth]
            inside = {t.split(".")[depth] for t in targets if t.startswith(package + ".")}
            graph.setdefault(child, set()).update(inside - {child})
    return graph


PACKAGES = sorted(name_of(path) for path in FILES if path.name == "__init__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package):
    """Of files and folders, at every level."""
    try:
        tuple(TopologicalSorter(children(package)).static_order())
    except CycleError as error:
        pytest.fail(f"in {package}: {' -> '.join(error.args[1])}")


def test_a_circle_would_be_found():
    with pytest.raises(CycleError):
        tuple(TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).static_order())


@pytest.mark.parametrize("package", PACKAGES)
def test_nobody_inside_imports_the_package_that_holds_it(package):
    """Its `__init__` imports them."""
    inside = {module: targets for module, targets in imports().items() if module.startswith(package + ".")}
    assert not [module for module, targets in inside.items() if package in targets and package != "lightning_graphon"]


def test_imports_run_downwards():
    storey = {name: number for number, names in enumerate(STOREYS) for name in names}
    graph = children("lightning_graphon")
    assert graph.keys() <= storey.keys()
    wrong = [f"{a} imports {b}" for a, targets in graph.items() for b in targets if storey[b] >= storey[a]]
    # The command calls everything.
    assert not wrong


def test_callbacks_import_the_public_surface():
    inner = {
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if module.startswith("lightning_graphon.callbacks")
        if target.count(".") > 1 and not target.startswith(("lightning_graphon.callbacks", "lightning_graphon._shared"))
    }
    assert not inner


def test_lightning_is_for_callbacks_and_the_command():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in FILES
        if re.search(r"^\s*(from|import) lightning\b", path.read_text(), re.M)
    }
    assert users <= {"callbacks", "cli.py"}


def test_rooms():
    """Private are folders, not files; a folder has a dozen rooms or so, and a room one idea."""
    assert not [path.name for path in FILES if re.match(r"_[^_]", path.name)]
    sizes = {
        folder: len([p for p in folder.iterdir() if p.suffix == ".py" and p.name != "__init__.py"])
        for folder in {f.parent for f in FILES}
    }
    assert {folder.name: count for folder, count in sizes.items() if count > 14} == {}
    assert {name_of(path): lines for path in FILES if (lines := len(path.read_text().splitlines())) > 300} == {}


def test_what_is_imported_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("\ndependencies = [") :]
    declared = {
        name.lower().replace("-", "_") for name in re.findall(r'"([A-Za-z0-9_-]+)[\[>]', block[: block.index("\n]")])
    }
    optional = {"jsonargparse", "pot"}
    distributions = packages_distributions()
    roots = (
        {
            alias.name.split(".")[0] if isinstance(node, ast.Import) else (node.module or "").split(".")[0]
            for path in FILES
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        - set(sys.stdlib_module_names)
        - {"lightning_graphon", ""}
    )
    used = {distributions[root][0].lower().replace("-", "_") for root in roots}
    assert used - optional == declared
    assert used & optional <= {"jsonargparse", "pot"}


def test_packages_are_listed_for_the_wheel():
    listed = re.findall(r'^  "(lightning_graphon[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert set(listed) == {*PACKAGES, "lightning_graphon._presets"}
