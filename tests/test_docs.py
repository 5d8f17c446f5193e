"""The pages: links lead somewhere, every script, preset and callback is on its page, and Sphinx has nothing to say."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_graphon import callbacks
from lightning_graphon.presets import presets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "examples/README.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("**/*.md"))
HELPERS = {"image_data", "resumable", "rank_correlation", "loss_decay_figures", "loss_decay_metrics"}


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if not target.startswith(("http", "#", "mailto:"))]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_every_script_is_listed_and_has_a_test():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - HELPERS
    assert not [name for name in scripts if f"]({name}.py)" not in text("examples/README.md")]
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "examples").glob("test_*.py")}
    assert scripts <= tests


def test_every_callback_and_preset_is_on_the_map():
    page = text("docs/index.md")
    assert all(f"`{name}`" in page for name in (*callbacks.__all__, *presets()))


def test_every_module_has_a_page():
    public = {p.stem for p in (ROOT / "lightning_graphon").glob("*.py") if not p.stem.startswith("_")}
    public |= {p.parent.name for p in (ROOT / "lightning_graphon").glob("[!_]*/__init__.py")}
    assert public == {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}


def documented():
    """Name -> what the module pages show: public functions, classes and their members."""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        module = importlib.import_module(f"lightning_graphon.{page.stem}")
        own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            yield name, getattr(module, name)
            members = vars(getattr(module, name)) if inspect.isclass(getattr(module, name)) else {}
            yield from ((f"{name}.{key}", member) for key, member in members.items())


def test_no_sentence_is_taken_for_a_type():
    """Napoleon reads what is before a colon as a type: at the head of a property, and of what is returned."""
    heads = {}
    for name, thing in documented():
        text = inspect.getdoc(thing) or ""
        returned = re.search(r"^Returns:\n +(.*)$", text, re.MULTILINE)
        heads[name] = text.partition("\n")[0] if isinstance(thing, property) else returned[1] if returned else ""
    assert heads["StepGraphon.density"]
    assert not [f"{name}: {head}" for name, head in heads.items() if ":" in head]


@pytest.mark.slow
def test_sphinx_has_no_warnings(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-c", "docs", "."]
    done = subprocess.run([*command, str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "docs" / "index.html").is_file()
