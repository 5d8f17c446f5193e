"""The pages: links lead somewhere, every script, preset and callback is on its page, and Sphinx has nothing to say."""

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
HELPERS = {"resumable", "rank_correlation", "loss_decay_figures", "loss_decay_metrics"}


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
    public |= {p.parent.name for p in (ROOT / "lightning_graphon").glob("*/__init__.py")}
    assert public == {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}


@pytest.mark.slow
def test_sphinx_has_no_warnings(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-c", "docs", "."]
    done = subprocess.run([*command, str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "docs" / "index.html").is_file()
