"""Design graphons: optimise their cells, at a fixed density, for a target of the Graphon NTK.

The kernel is a differentiable function of the graphons' values, so its fit to the labels, or any other target, can be
maximised by gradient ascent before any weight is drawn. Masks drawn from the result with
`prune(model, "graphon", options={"graphons": ...})` do not depend on the weights, so the density kernel is theirs.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import DesignForm, DesignTarget
from lightning_graphon._shared.random import generator
from lightning_graphon.graphon import StepGraphon, constant, values_at_density
from lightning_graphon.ntk.activations.registry import ActivationLike
from lightning_graphon.ntk.generalisation.design_targets import Objective, kernel_objective
from lightning_graphon.ntk.infinite.graphon_ntk import graphon_ntk


@dataclass(frozen=True)
class DesignedGraphons:
    """Outcome of a design.

    Attributes:
        graphons: One per layer, input side first; the best of all steps.
        history: The target at every step; the first is that of nearly constant graphons.
        value: The target of `graphons`, the largest of `history`.
        interrupted: Whether Ctrl-C ended the search early.
    """

    graphons: list[StepGraphon]
    history: list[float]
    value: float
    interrupted: bool


@checked
def design_graphons(
    x: Tensor,
    *,
    density: float | Sequence[float],
    outputs: int,
    hidden: Sequence[int] = (16, 16),
    labels: Tensor | None = None,
    target: DesignTarget | Objective = "fit",
    ridge: float = 0.01,
    form: DesignForm = "product",
    free: Sequence[int] | None = None,
    activation: ActivationLike = "relu",
    steps: int = 200,
    lr: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> DesignedGraphons:
    """Graphons of given densities that maximise a target of the Graphon NTK on some samples.

    Every input coordinate and every output has its own position, so that the first layer can choose its inputs;
    hidden neurons share `hidden` positions of equal size. The search is gradient ascent by Adam on the log-odds of the
    cells, from a nearly constant graphon, at the exact density throughout (`values_at_density`).

    Args:
        x: Samples [N, d], floating point; use float64 and some hundreds of them. The gradient holds about 15
            tensors [positions, N, N] per layer.
        density: Fraction of weights kept, in (0, 1], one number or one per layer; a layer at 1 stays dense.
        outputs: Number C of outputs of the network.
        hidden: Number of positions of every hidden layer.
        labels: Class numbers [N] or targets [N, C]; needed by all named targets but "energy".
        target: Quantity to maximise. "fit": the share of the labels' square that ridge regression fits,
            1 - ρ tr Yᵀ(Θ + ρ)⁻¹Y / ‖Y‖² for centred one-hot Y. "speed": tr YᵀΘY / ‖Y‖², the initial rate of the
            squared error. "alignment": the centred kernel-target alignment. "energy": the share of the five largest
            eigenvalues. The last two do not depend on the scale of the kernel, and networks drawn from such designs
            train badly (docs/results/generalisation.md). Or a function of the kernel [N, N] that returns a scalar.
        ridge: The ρ of "fit" as a share of the mean diagonal of the constant graphons' kernel.
        form: "product" has one factor for each row and one for each column of the odds, W / (1 - W) = c f(u) g(v);
            "block" has one parameter for each cell. For the product c f(u) g(v) the shape of the ReLU kernel depends on
            the first layer's g only: the dense kernel of inputs scaled by sqrt(g)
            (docs/reference/theory-generalisation.md).
        free: Indices of the layers to design, 0 the first; the others stay constant graphons. Default: all.
        activation: Activation of all hidden layers.
        steps: Number of gradient steps.
        lr: Learning rate of Adam on the log-odds.
        seed: Seed of the initial noise that distinguishes hidden positions; the global generator is not changed.
        progress: Show a progress bar with the target. Ctrl-C ends the search and returns the best so far.

    Returns:
        `DesignedGraphons`; pass its graphons by layer as the option "graphons" of `prune(model, "graphon", ...)`.

    Raises:
        ValueError: An unknown choice, densities or positions that do not fit, no labels where the target needs
            them, or a target that is not finite.

    Warns:
        UserWarning: Stopped by Ctrl-C.

    >>> x, labels = torch.eye(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    >>> design = design_graphons(x, density=0.5, outputs=2, hidden=[2], labels=labels, steps=20)
    >>> [round(g.density, 12) for g in design.graphons], design.value > design.history[0]
    ([0.5, 0.5], True)
    """
    check_choice("form", form, get_args(DesignForm))
    sides = [x.shape[1], *hidden, outputs]
    densities = _densities(density, len(sides) - 1)
    _check_sides(sides, steps)

    def kernel(graphons: Sequence[StepGraphon]) -> Tensor:
        return graphon_ntk(x, graphons, activation=activation)

    objective = _objective(target, labels, ridge, lambda: kernel([constant(rho) for rho in densities]))
    parameters = _initial_log_odds(sides, form, _layers(free, len(densities)), seed, x)

    def evaluate() -> tuple[list[StepGraphon], Tensor]:
        # A layer's log-odds are a sum: of one matrix, or of a row and a column vector.
        graphons = [
            StepGraphon(values_at_density(sum(p[1:], p[0]), rho)) for p, rho in zip(parameters, densities, strict=True)
        ]
        return graphons, objective(kernel(graphons))

    trainable = [t for group in parameters for t in group if t.requires_grad]
    return _maximise(evaluate, trainable, steps, lr, progress)


def _maximise(
    evaluate: Callable[[], tuple[list[StepGraphon], Tensor]],
    parameters: Sequence[Tensor],
    steps: int,
    lr: float,
    progress: bool,
) -> DesignedGraphons:
    """Adam; the best of all steps is kept."""
    optimizer = torch.optim.Adam(parameters, lr=lr, maximize=True)
    history: list[float] = []
    best: list[StepGraphon] = []
    interrupted = False
    try:
        with torch.enable_grad(), _progress_bar(steps, progress) as advance:
            for step in range(steps + 1):
                # The last evaluation has no step after it.
                graphons, value = evaluate()
                _check_value(value, step)
                if not history or float(value.detach()) > max(history):
                    best = [StepGraphon(g.values.detach(), g.row_measure, g.col_measure) for g in graphons]
                history.append(float(value.detach()))
                if step < steps:
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
                    advance(max(history))
    except KeyboardInterrupt:
        if not history:  # there is no result to return
            raise
        interrupted = True
        warnings.warn(f"stopped by Ctrl-C after {len(history)} of {steps + 1} evaluations", stacklevel=4)
    return DesignedGraphons(best, history, max(history), interrupted)


def _initial_log_odds(
    sides: Sequence[int], form: DesignForm, free: set[int], seed: int, like: Tensor
) -> list[list[Tensor]]:
    """Log-odds of every layer as summands that broadcast to [rows, cols]: noise around the constant graphon, or 0."""
    source = generator(seed, "designed graphons")

    def noise(*shape: int) -> Tensor:
        return (0.1 * torch.randn(shape, generator=source, dtype=torch.float64)).to(like).requires_grad_()

    def layer(rows: int, cols: int) -> list[Tensor]:
        return [noise(rows, cols)] if form == "block" else [noise(rows, 1), noise(1, cols)]

    shapes = [(rows, cols) for cols, rows in pairwise(sides)]
    return [layer(*shape) if i in free else [like.new_zeros(shape)] for i, shape in enumerate(shapes)]


def _layers(free: Sequence[int] | None, count: int) -> set[int]:
    chosen = set(range(count)) if free is None else set(free)
    if not chosen or not chosen <= set(range(count)):
        raise ValueError(f"free must name some of the layers 0 to {count - 1}, got {sorted(chosen)}")
    return chosen


def _objective(
    target: DesignTarget | Objective, labels: Tensor | None, ridge: float, constants: Callable[[], Tensor]
) -> Objective:
    """The target as a function of the kernel; `ridge` is a share of the constant graphons' mean diagonal."""
    if callable(target):
        return target
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be a finite number > 0, got {ridge!r}")
    # In units of the kernel, whose scale depends on the densities.
    scale = float(constants().diagonal().mean()) if target == "fit" else 1.0
    return kernel_objective(target, labels, ridge * scale)


def _densities(density: float | Sequence[float], layers: int) -> list[float]:
    densities = [float(density)] * layers if isinstance(density, (int, float)) else [float(d) for d in density]
    if len(densities) != layers:
        raise ValueError(f"density must be one number or {layers}, one per layer, got {len(densities)}")
    for index, value in enumerate(densities):
        if not 0 < value <= 1:
            raise ValueError(f"density of layer {index} is the fraction kept and must lie in (0, 1], got {value}")
    return densities


def _check_sides(sides: Sequence[int], steps: int) -> None:
    for name, value in (("outputs", sides[-1]), *(("hidden", side) for side in sides[1:-1])):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")


def _check_value(value: Tensor, step: int) -> None:
    if value.numel() != 1 or not bool(value.isfinite().all()) or not value.requires_grad:
        raise ValueError(
            f"the target is {value.tolist()} at step {step}; it must be one finite number that depends on the kernel "
            "(are all samples zero, or do all labels agree?)"
        )


@contextmanager
def _progress_bar(steps: int, progress: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar with the best target so far, or nothing."""
    if not progress:
        yield lambda best: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("design {task.completed}/{task.total}, best {task.fields[best]:.4f}"), BarColumn(16))
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=steps, best=float("nan"))
        yield lambda best: bar.update(task, advance=1, best=best)
