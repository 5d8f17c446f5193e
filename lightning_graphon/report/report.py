"""One page of HTML about finished runs: graphons, spectra, predicted and observed losses, in pictures and tables.

Every word of the page is in `template.html`; here are the numbers and the pictures that it asks for.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lightning_graphon import __version__
from lightning_graphon._shared.checks import checked
from lightning_graphon._shared.files import write_file
from lightning_graphon.report.runs import Run, Series, read_runs

_OWN = ("sparsity/", "graphon/", "ntk/", "loss_decay/")


@checked
def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of all runs under a folder.

    Args:
        run_dir: A run's log directory, or a folder with several.
        output: File to write; None: `report.html` in `run_dir`.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is no such folder or no run in it.
    """
    folder = Path(run_dir)
    html = report_html(read_runs(folder), folder.resolve().name)
    target = Path(output) if output is not None else folder / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, html.encode(errors="replace"))  # names of files may have bytes that are no text
    return target


def report_html(runs: Sequence[Run], title: str) -> str:
    """The page: everything inside it, nothing to load, no script.

    Args:
        runs: At least one.
        title: Name of the whole.

    >>> "<h1>Sparse training: demo</h1>" in report_html([Run("snip", {"sparsity/total": {0: 0.9}})], "demo")
    True
    """
    return _template().render(
        title=title,
        version=__version__,
        runs=runs,
        names=[_name(run) for run in runs],
        spans=lambda key: [_span(run, key) for run in runs],
        logged=partial(_logged, runs),
        foreign=[key for key in _logged(runs) if not key.startswith(_OWN) and key not in ("epoch", "hp_metric")],
    )


@cache
def _template() -> Template:
    loader = PackageLoader("lightning_graphon.report", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.globals.update(
        held=_held,
        last=_last,
        layer_numbers=_layer_numbers,
        layers=_layers,
        loss_pictures=_loss_pictures,
        name=_name,
        not_random=_not_random,
        number=_number,
        pictures=_pictures,
        span=_span,
    )
    return environment.get_template("template.html")


class Picture(NamedTuple):
    """A picture for the page.

    Attributes:
        png: The file, in base64.
        step: When it was drawn; None where that was now.
    """

    png: str
    step: int | None = None


def _pictures(run: Run, tag: str) -> list[Picture]:
    """The first and the last picture of a tag."""
    files = run.pictures.get(tag, {})
    return [_picture(files[step], step) for step in sorted({min(files), max(files)} if files else {})]


def _loss_pictures(run: Run) -> list[Picture]:
    """The callback's own picture, the last one; drawn from the scalars where the run was cut off before it drew one."""
    if pictures := _pictures(run, "loss_decay"):
        return pictures[-1:]
    keys = {name: f"loss_decay/{name}" for name in ("observed", "predicted", "refreshed")}
    curves = {name: run.scalars[key] for name, key in keys.items() if key in run.scalars}
    return [_picture(_drawn(curves))] if len(curves.get("observed", {})) > 1 else []


def _picture(png: bytes, step: int | None = None) -> Picture:
    return Picture(base64.b64encode(png).decode("ascii"), step)


def _drawn(curves: dict[str, Series]) -> bytes:
    from lightning_graphon.plots import plot_loss_decay

    buffer = io.BytesIO()
    plot_loss_decay(curves, title="Loss of the probe batch").savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _name(run: Run) -> str:
    return "this run" if run.name == "." else run.name


def _logged(runs: Iterable[Run], prefix: str = "") -> list[str]:
    """What the keys in any of the runs go on with after a prefix, sorted."""
    keys = {key for run in runs for key in run.scalars if key.startswith(prefix)}
    return sorted(key.removeprefix(prefix) for key in keys)


def _layers(run: Run) -> list[str]:
    """Names of the layers with a mask, in the order of the network."""
    pruned = [key.removeprefix("sparsity/") for key in run.scalars if key.startswith("sparsity/")]
    watched = [
        k.removeprefix("graphon/").removesuffix("/density")
        for k in run.scalars
        if k.startswith("graphon/") and k.endswith("/density")
    ]
    return [name for name in dict.fromkeys([*pruned, *watched]) if name not in ("total", "model")]


def _layer_numbers(run: Run, layer: str) -> list[str]:
    keys = (f"graphon/{layer}/{key}" for key in ("density", "degree_cv", "c4_ratio", "p_value", "moved"))
    return [_number(_last(run, key)) for key in (f"sparsity/{layer}", *keys)]


def _not_random(run: Run) -> str:
    """In how many layers a random mask is ruled out, of those that were tested."""
    values = [_last(run, f"graphon/{layer}/p_value") for layer in _layers(run)]
    tested = [value for value in values if value is not None]
    return f"{sum(p < 0.01 for p in tested)} of {len(tested)}" if tested else "–"


def _held(run: Run) -> str:
    """Until which step the first prediction of the loss held."""
    until, observed = _last(run, "loss_decay/valid_until"), run.scalars.get("loss_decay/observed")
    if until is None or not observed:
        return "–"
    return f"step {until:.0f}" + (" (the last)" if until >= max(observed) else f" of {max(observed)}")


def _last(run: Run, key: str) -> float | None:
    series = run.scalars.get(key)
    return series[max(series)] if series else None


def _span(run: Run, key: str) -> str:
    """The first and the last value, once where they are the same."""
    series = run.scalars.get(key)
    if not series:
        return "–"
    first, last = _number(series[min(series)]), _number(series[max(series)])
    return last if len(series) == 1 else f"{first} → {last}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
