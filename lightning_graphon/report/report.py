"""One page of HTML about finished runs: graphons, spectra, predicted and observed losses, in pictures and tables."""

import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from lightning_graphon import __version__
from lightning_graphon.report.html import card, details, figure, grid, page, paragraph, section, table
from lightning_graphon.report.runs import Run, Series, read_runs

_SPECTRUM = {
    "decay_rate": "α of the power law λ_k ∝ k^(−α) of the eigenvalues; larger: later directions are learned later",
    "effective_rank": "trace / λ₁: how many directions are learned at a similar speed",
    "spectral_gap": "λ₁ / λ₂: how far the first direction is ahead",
    "energy_top5": "share of the five largest eigenvalues in the trace",
    "lambda_max": "largest eigenvalue; bounds the stable learning rate",
    "lambda_min": "smallest eigenvalue",
    "trace": "sum of the eigenvalues",
    "condition_number": "λ_max / λ_min",
    "alignment": "kernel-target alignment: 1 where the kernel is that of the labels",
}
_LOSS = {
    "observed": "loss of the probe batch, measured",
    "predicted": "the same, predicted from the kernel at the start",
    "relative_error": "|predicted − observed| / |observed|",
    "refreshed": "predicted from the kernel of the last refresh",
    "refreshed_error": "relative error of that prediction",
    "kernel_drift": "how far the kernel has moved: relative change of gᵀΘg",
    "rate_ratio": "fitted decay rate of the loss, predicted over observed",
    "log_correlation": "correlation of the two curves' logarithms",
    "valid_until": "first step at which the prediction no longer held (error or drift), or the last step measured",
}
_LAYER = ("density", "degree_cv", "c4_ratio", "p_value", "moved")
_GRAPHONS_TEXT = (
    "The graphon of a layer is the probability that a weight is kept, outputs against inputs, the best connected units "
    "first; its colours run from 0 to 1. Random pruning gives one even colour. A layer whose p-value is small is not "
    "random: some units keep far more weights than others."
)
_SPECTRUM_TEXT = (
    "Eigenvalues of the neural tangent kernel on a probe batch. Gradient descent learns the direction of an "
    "eigenvector at a speed proportional to its eigenvalue: with a steep spectrum it learns a few directions fast and "
    "the rest hardly at all. The picture's title says which kernel it is. Arrows: start → end of training."
)
_LOSS_TEXT = (
    "The loss of a fixed probe batch of training data as it fell, and as the tangent kernel at the start of training "
    "said that it would fall. The prediction holds as long as the kernel stays what it was. Arrows: first → last value."
)
_MISSING = {
    "graphons": "Layer graphons: add GraphonMonitor (preset monitor).",
    "spectrum": "Spectra of the tangent kernel: add GraphonMonitor with kernel other than none (preset monitor).",
    "loss": "Predicted against observed loss: add LossDecayMonitor (preset loss_decay).",
}
_OWN = ("sparsity/", "graphon/", "ntk/", "loss_decay/")


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
    target.write_text(html, encoding="utf-8")
    return target


def report_html(runs: Sequence[Run], title: str) -> str:
    """The page: everything inside it, nothing to load, no script.

    Args:
        runs: At least one.
        title: Name of the whole.

    >>> "<h1>Sparse training: demo</h1>" in report_html([Run("snip", {"sparsity/total": {0: 0.9}})], "demo")
    True
    """
    made = {anchor: make(runs) for anchor, (_, make) in _SECTIONS.items()}
    content = {anchor: parts for anchor, parts in made.items() if parts}
    there = {"overview": "Overview", **{anchor: _SECTIONS[anchor][0] for anchor in content}}
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading in there.items())
    parts = [section(anchor, there[anchor], *pieces) for anchor, pieces in content.items()]
    absent = [hint for anchor, hint in _MISSING.items() if anchor not in content]
    if absent:
        parts.append(section("missing", "Not logged in these runs", *(paragraph(hint) for hint in absent)))
    heading = f"Sparse training: {title}"
    top = [*_heading(heading, runs), f"<nav>{links}</nav>", section("overview", "Overview", _overview(runs))]
    return page(heading, [*top, *parts])


def _heading(heading: str, runs: Sequence[Run]) -> list[str]:
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    about = (
        f"{count[0].upper()}{count[1:]}, written by lightning-graphon {__version__}. Masks simulate sparsity: pruned "
        "weights stay exactly zero, and tensors keep their size."
    )
    return [f"<h1>{escape(heading)}</h1>", paragraph(about)]


def _overview(runs: Sequence[Run]) -> str:
    header = (
        "run",
        "steps",
        "sparsity",
        "layers",
        "not random",
        "effective rank",
        "probe loss",
        "prediction held until",
    )
    caption = "“Not random”: layers whose mask differs from a random one, p-value below 0.01. Arrows: start → end."
    return table(caption, header, [_summary(run) for run in runs])


def _summary(run: Run) -> list[str]:
    layers = _layers(run)
    tested = [value for layer in layers if (value := _last(run, f"graphon/{layer}/p_value")) is not None]
    unlike = f"{sum(p < 0.01 for p in tested)} of {len(tested)}" if tested else "–"
    return [
        _name(run),
        str(run.last_step),
        _number(_last(run, "sparsity/total")),
        str(len(layers) or "–"),
        unlike,
        _span(run, "ntk/effective_rank"),
        _span(run, "loss_decay/observed"),
        _held(run),
    ]


def _held(run: Run) -> str:
    until, observed = _last(run, "loss_decay/valid_until"), run.scalars.get("loss_decay/observed")
    if until is None or not observed:
        return "–"
    return f"step {until:.0f}" + (" (the last)" if until >= max(observed) else f" of {max(observed)}")


def _graphons(runs: Sequence[Run]) -> list[str]:
    cards = [
        card(_name(run), *content)
        for run in runs
        if (content := _pictures(run, "graphons", "Layer graphons") + _layer_table(run))
    ]
    return [paragraph(_GRAPHONS_TEXT), *cards] if cards else []


def _layer_table(run: Run) -> list[str]:
    layers = _layers(run)
    if not layers:
        return []
    header = ("layer", "sparsity", "density", "degree CV", "C4 ratio", "p-value", "moved")
    rows = [
        [layer, *(_number(_last(run, key)) for key in (f"sparsity/{layer}", *(f"graphon/{layer}/{k}" for k in _LAYER)))]
        for layer in layers
    ]
    caption = (
        "Degree CV: spread of the degrees beyond chance, 0 is random. C4 ratio: four-cycles relative to a random mask, "
        "1 is random. Moved: L2 distance of the graphon from the last look."
    )
    return [details("Numbers by layer", table(caption, header, rows))]


def _spectra(runs: Sequence[Run]) -> list[str]:
    cards = [
        card(_name(run), *pictures)
        for run in runs
        if (pictures := _pictures(run, "ntk_spectrum", "Spectrum of the tangent kernel"))
    ]
    numbers = _quantities(runs, "ntk/", _SPECTRUM, "Tangent kernel on the probe batch")
    return [paragraph(_SPECTRUM_TEXT), *numbers, grid(cards)] if cards or numbers else []


def _losses(runs: Sequence[Run]) -> list[str]:
    cards = [card(_name(run), *pictures) for run in runs if (pictures := _loss_pictures(run))]
    numbers = _quantities(runs, "loss_decay/", _LOSS, "Loss of the probe batch")
    return [paragraph(_LOSS_TEXT), *numbers, grid(cards)] if cards or numbers else []


def _loss_pictures(run: Run) -> list[str]:
    """The callback's own picture; drawn from the scalars where the run was cut off before it drew one."""
    label = "Predicted and observed loss"
    pictures = _pictures(run, "loss_decay", label, only_last=True)
    curves = {
        name: run.scalars[f"loss_decay/{name}"]
        for name in ("observed", "predicted", "refreshed")
        if f"loss_decay/{name}" in run.scalars
    }
    if pictures or len(curves.get("observed", {})) < 2:
        return pictures
    return [figure(_drawn(curves), f"{label} of {_name(run)}", "Drawn from the logged scalars.")]


def _drawn(curves: dict[str, Series]) -> bytes:
    from lightning_graphon.plots import plot_loss_decay

    buffer = io.BytesIO()
    plot_loss_decay(curves, title="Loss of the probe batch").savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _others(runs: Sequence[Run]) -> list[str]:
    keys = sorted({key for run in runs for key in run.scalars if not key.startswith(_OWN)} - {"epoch", "hp_metric"})
    rows = [[key, *(_span(run, key) for run in runs)] for key in keys]
    return [table("First → last value.", ("key", *map(_name, runs)), rows)] if rows else []


def _quantities(runs: Sequence[Run], prefix: str, meanings: dict[str, str], caption: str) -> list[str]:
    """A table with one row a quantity, one column a run."""
    keys = [key for key in meanings if any(prefix + key in run.scalars for run in runs)]
    rows = [[key, *(_span(run, prefix + key) for run in runs)] for key in keys]
    return [table(caption, ("", *map(_name, runs)), rows, meanings)] if rows else []


def _pictures(run: Run, tag: str, label: str, *, only_last: bool = False) -> list[str]:
    """The first and the last picture of a tag."""
    steps = sorted(run.pictures.get(tag, {}))
    shown = steps[-1:] if only_last else sorted({*steps[:1], *steps[-1:]})
    wide = tag == "graphons"
    return [
        figure(run.pictures[tag][step], f"{label} of {_name(run)} at step {step}", f"Step {step}.", wide=wide)
        for step in shown
    ]


def _layers(run: Run) -> list[str]:
    """Names of the layers with a mask, in the order of the network."""
    pruned = [key.removeprefix("sparsity/") for key in run.scalars if key.startswith("sparsity/")]
    watched = [
        k.removeprefix("graphon/").removesuffix("/density")
        for k in run.scalars
        if k.startswith("graphon/") and k.endswith("/density")
    ]
    return [name for name in dict.fromkeys([*pruned, *watched]) if name != "total"]


def _name(run: Run) -> str:
    return "this run" if run.name == "." else run.name


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


_SECTIONS: dict[str, tuple[str, Callable[[Sequence[Run]], list[str]]]] = {
    "graphons": ("Layer graphons", _graphons),
    "spectrum": ("Spectrum of the tangent kernel", _spectra),
    "loss": ("Predicted against observed loss", _losses),
    "other": ("Everything else that was logged", _others),
}
