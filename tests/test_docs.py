"""The pages: links lead somewhere, everything public is on its page, words are few, and Sphinx has nothing to say."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_graphon import callbacks
from lightning_graphon.presets import presets
from lightning_graphon.pruning import methods
from tests.helpers.modules import PUBLISHED, Classifier, loader, make_trainer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SHELVES = ("tutorials", "how-to", "reference", "results")
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "benchmarks/README.md")
PAGES = [ROOT / name for name in OUTSIDE] + sorted(DOCS.glob("**/*.md"))
HELPERS = {
    "image_data",
    "resumable",
    "rank_correlation",
    "graphon_flow_figures",
    "loss_decay_figures",
    "loss_decay_metrics",
}


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def words(path):
    return len(path.read_text(encoding="utf-8").split())


def each_page(paths=PAGES):
    return pytest.mark.parametrize("page", paths, ids=lambda path: path.relative_to(ROOT).as_posix())


def anchors(page):
    """What GitHub and Sphinx make of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page()
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        name, _, anchor = target.partition("#")
        if target.startswith(("http", "mailto:")):
            continue
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@each_page()
def test_files_that_are_named_exist(page):
    named = re.findall(
        r"`((?:tests|examples|benchmarks|callbacks|lightning_graphon|docs)/[\w./-]*)[^`]*`",
        page.read_text(encoding="utf-8"),
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_page_is_on_its_shelf_and_on_the_map():
    pages = {path.relative_to(DOCS) for path in DOCS.glob("**/*.md")} - {Path("index.md")}
    assert {path.parts[0] for path in pages} == set(SHELVES)
    on_map = {Path(target.split("#")[0]) for target in re.findall(r"\]\(([\w/.-]+)", text("docs/index.md"))}
    assert not pages - on_map


def test_few_words():
    assert words(ROOT / "README.md") <= 600
    assert sum(map(words, DOCS.glob("**/*.md"))) < 36_000


def test_every_script_is_listed_and_has_a_test():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - HELPERS
    assert not [name for name in scripts if f"]({name}.py)" not in text("examples/README.md")]
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "examples").glob("test_*.py")}
    assert scripts <= tests


def test_every_benchmark_is_listed():
    names = {path.name for path in (ROOT / "benchmarks").glob("[!_]*.py")} - {"run.py"}
    assert not [name for name in names if f"]({name})" not in text("benchmarks/README.md")]


def test_every_callback_and_preset_is_on_the_map():
    page = text("docs/index.md")
    assert all(f"`{name}`" in page for name in (*callbacks.__all__, *presets()))


def test_every_method_is_on_its_page():
    builtin = {"random", "magnitude", "snip", "grasp", "synflow", "graphon", *PUBLISHED}
    assert builtin <= set(methods())
    page = text("docs/reference/methods.md")
    assert all(f"| `{name}` |" in page for name in builtin)


def test_every_module_has_a_page():
    public = {p.stem for p in (ROOT / "lightning_graphon").glob("*.py") if not p.stem.startswith("_")}
    public |= {p.parent.name for p in (ROOT / "lightning_graphon").glob("[!_]*/__init__.py")}
    assert public == {path.stem for path in (DOCS / "reference" / "api").glob("*.md")}


class Keys(pl.loggers.CSVLogger):
    """Remembers what is logged."""

    def __init__(self, folder):
        super().__init__(folder)
        self.seen = set()

    def log_metrics(self, metrics, step=None):
        self.seen |= metrics.keys()


def test_every_logged_key_is_on_its_page(tmp_path):
    logger = Keys(tmp_path)
    prune = callbacks.PruneAtInit("snip", sparsity=0.5, report_limits=True, verbose=False)
    decay = callbacks.LossDecayMonitor(
        every_n_steps=1, kernel=callbacks.KernelPrediction(refresh_every_n_steps=2), verbose=False, raise_errors=True
    )
    graphons = callbacks.GraphonMonitor(verbose=False, raise_errors=True)
    data: DataLoader = loader()
    trainer = make_trainer(prune, graphons, decay, logger=logger, limit_train_batches=1.0, max_epochs=3)
    trainer.fit(Classifier(), data)
    layers = "|".join(map(re.escape, prune.masks))
    own = {key for key in logger.seen if key.startswith(("sparsity/", "graphon/", "ntk/", "loss_decay/"))}
    keys = {re.sub(rf"/({layers})", "/<layer>", key) for key in own}
    assert {"sparsity/<layer>", "graphon/<layer>/limit_distance", "ntk/trace", "loss_decay/valid_until"} <= keys
    page = text("docs/reference/logged-keys.md")
    assert not [key for key in keys if f"`{key}`" not in page]


def documented():
    """Name -> what the module pages show: public functions, classes and their members."""
    for page in (DOCS / "reference" / "api").glob("*.md"):
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
