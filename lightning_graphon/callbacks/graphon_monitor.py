"""`GraphonMonitor`: the graphon of every layer, in pictures and numbers, while any network trains."""

import logging
from collections.abc import Callable
from typing import Any, TypeAlias, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from lightning_graphon._shared.checks import check_choice
from lightning_graphon._shared.choices import LayerOrder, Propagate
from lightning_graphon.callbacks._analysis.kernel_spectrum import KERNELS, KernelSpectrum, spectrum_scalars
from lightning_graphon.callbacks._analysis.masks_in_use import ensure_pruned, masks_in_use
from lightning_graphon.callbacks._analysis.pickling import state_without_module
from lightning_graphon.callbacks._distributed.memory import InsufficientMemoryError, check_memory_on_all_ranks
from lightning_graphon.callbacks._logging.images import send_picture
from lightning_graphon.callbacks._logging.scalars import layer_table, log_scalars
from lightning_graphon.callbacks._module.network import UnreadableStepError
from lightning_graphon.graphon import (
    HomogeneityTest,
    StepGraphon,
    homogeneity_test,
    l2_distance,
    layer_graphons,
    motif_densities,
)
from lightning_graphon.ntk import SpectralSummary
from lightning_graphon.plots.graphon_pixels import graphon_pixels
from lightning_graphon.plots.graphons import p_value_text
from lightning_graphon.plots.spectrum_pixels import spectrum_pixels
from lightning_graphon.pruning.allocation.on_cpu import equal
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.read_masks import check_readable
from lightning_graphon.pruning.sharding import summon_full_params

log = logging.getLogger(__name__)
Work: TypeAlias = Callable[[pl.Trainer, pl.LightningModule], None]

# Counting four-cycles multiplies a mask with itself: a few seconds for a layer of this many weights.
_LARGEST_FOR_CYCLES = 1 << 24


class GraphonMonitor(Callback):
    """Estimates the graphon of every layer when training starts, and again whenever masks have changed.

    Works with `PruneAtInit`, Lightning's `ModelPruning`, `torch.nn.utils.prune`, weights that are simply zero, and
    dense models, in any order of callbacks. Looks at the start of training, every `every_n_epochs` epochs or
    `every_n_steps` steps, and at the end; where no mask has changed since the last look nothing is computed. The masks
    of a `PruneAtInit` are taken as they are; weights that something else zeroes besides are seen if `include` or
    `exclude` is given, which makes it read the weights.

    Logged for every layer: `graphon/<layer>/density`, `/degree_cv` (coefficient of variation of the degrees beyond
    chance, the larger of both sides), `/c4_ratio` (t(C4) / t(K2)⁴, 1 for a random mask), `/p_value` (of the Erdős–Rényi
    null) and `/moved` (L2 distance of the graphon from the last look). The figure `graphons` goes to TensorBoard and
    W&B; with other loggers or none, PNG and NPZ files go to the log directory.

    At the start and the end of training, and every `spectrum_every_n_epochs` epochs, the spectrum of the tangent kernel
    on a fixed probe batch of training data is logged: `ntk/decay_rate`, `ntk/effective_rank`, `ntk/spectral_gap`,
    `ntk/energy_top5`, `ntk/lambda_max`, `ntk/lambda_min`, `ntk/trace`, `ntk/condition_number`, `ntk/alignment` (with
    class labels) and the figure `ntk_spectrum`. It is the Graphon NTK where the network is a chain of Linear layers,
    the exact kernel of the finite network ("empirical NTK") otherwise; the console and the figure say which. Networks
    are evaluated in eval mode: batch norm that has seen no data yet does not normalise at step 0. Under FSDP2 and
    tensor parallelism every process gathers the whole weights for it, and the first one computes; where they do not fit
    on every process, the look is skipped.

    Args:
        bins: Intervals of each axis of a graphon.
        order: "degree" (each mask sorted for itself, the pictures of arXiv:2510.17515), "spectral" (tells neurons of
            equal degree apart, see `estimate_graphon`), "joint" or "none".
        include: Which layers: names, globs, "re:..." or class names; None: every Linear and Conv weight.
        exclude: Which layers not.
        every_n_epochs: Look at the start of every n-th epoch; 0: never.
        every_n_steps: Look after every n-th optimizer step; None: never.
        kernel: "auto", "graphon", "empirical", or "none".
        propagate: "energy" (from the weights), "density" (arXiv:2510.17515) or "drift", for the Graphon NTK.
        kernel_bins: Positions of a hidden layer for the Graphon NTK, at most. None: 9 (3 x 3 quantiles of degrees), or
            8 for "drift", whose cells need many weights. Against 64 that changes the kernel by 2 % (3.4 % at most: all
            methods, 4x256 on digits before and after training, 4x1024 on MNIST), its distance from the network's own
            kernel by less than 0.02, and takes a third of the time.
        probe_size: Samples in the probe batch.
        probe_seed: Seed of the probe batch.
        spectrum_every_n_epochs: Look at the spectrum at the start of every n-th epoch too; 0: never.
        figure: Draw the figures.
        alpha: Level of the homogeneity verdict.
        verbose: Print a table at the first look.
        raise_errors: Let an error in the analysis end the fit; by default it is reported and training goes on.

    Raises:
        ValueError: An argument has a value that is not allowed; (on fit) a pattern of `include` or `exclude` matches no
            weight.

    >>> GraphonMonitor(bins=32).graphons
    {}
    """

    def __init__(
        self,
        *,
        bins: int = 64,
        order: LayerOrder = "degree",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        kernel: str = "auto",
        propagate: Propagate = "energy",
        kernel_bins: int | None = None,
        probe_size: int = 128,
        probe_seed: int = 0,
        spectrum_every_n_epochs: int = 0,
        figure: bool = True,
        alpha: float = 0.01,
        verbose: bool = True,
        raise_errors: bool = False,
    ) -> None:
        check_choice("order", order, get_args(LayerOrder))
        check_choice("kernel", kernel, (*KERNELS, "none"))
        check_choice("propagate", propagate, get_args(Propagate))
        self.kernel_bins = (8 if propagate == "drift" else 9) if kernel_bins is None else kernel_bins
        for name, value in (("bins", bins), ("kernel_bins", self.kernel_bins), ("probe_size", probe_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if every_n_epochs < 0 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(
                f"every_n_epochs must be >= 0 and every_n_steps >= 1 or None, got {every_n_epochs!r}, {every_n_steps!r}"
            )
        self.bins, self.order, self.alpha = bins, order, alpha
        self.include, self.exclude = include, exclude
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.figure, self.verbose, self.raise_errors = figure, verbose, raise_errors
        self.spectrum_every_n_epochs = spectrum_every_n_epochs
        self.kernel, self.propagate = kernel, propagate
        self.probe_size, self.probe_seed = probe_size, probe_seed
        self.spectrum: SpectralSummary | None = None
        self._spectra: KernelSpectrum | None = None
        self.graphons: dict[str, StepGraphon] = {}
        self.tests: dict[str, HomogeneityTest] = {}
        self._seen: dict[str, MaskSnapshot] = {}
        self._told: set[str] = set()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_readable(pl_module, self.include, self.exclude)  # a misspelt name is no failure of the analysis

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ensure_pruned(trainer, pl_module)
        self._seen, self._told = {}, set()
        self._spectra = KernelSpectrum(self.kernel, self.propagate, self.probe_size, self.probe_seed, self.kernel_bins)
        self._look(trainer, pl_module)
        self._guarded("spectrum", self._log_spectrum, trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and trainer.current_epoch % self.every_n_epochs == 0:
            self._look(trainer, pl_module)
        every = self.spectrum_every_n_epochs
        if every and trainer.current_epoch and trainer.current_epoch % every == 0:
            self._guarded("spectrum", self._log_spectrum, trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)
        self._guarded("spectrum", self._log_spectrum, trainer, pl_module)
        self._spectra = None

    def __getstate__(self) -> dict[str, Any]:
        return state_without_module(self, "_seen", "_spectra")

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._guarded("graphons", self._estimate, trainer, pl_module)

    def _guarded(self, shown: str, work: Work, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training is not lost because of an analysis."""
        try:
            work(trainer, pl_module)
        except (UnreadableStepError, InsufficientMemoryError) as error:
            if self.raise_errors:
                raise
            if trainer.is_global_zero and self._is_news(f"no {shown}: {error}"):
                log.warning("GraphonMonitor shows no %s at step %d: %s", shown, trainer.global_step, error)
        except Exception as error:
            if self.raise_errors:
                raise
            if self._is_news(str(error)):
                log.exception("GraphonMonitor failed at step %d; training goes on without it", trainer.global_step)

    def _is_news(self, failure: str) -> bool:
        """Whether it was not told yet: once a fit, not at every look."""
        told, self._told = self._told, self._told | {failure}
        return failure not in told

    @torch.no_grad()
    def _estimate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        masks = self._read(trainer, pl_module)
        changed = [name for name, mask in masks.items() if name not in self._seen or not self._seen[name].is_now(mask)]
        if not changed:
            return
        first = not self._seen
        graphons = layer_graphons(masks, bins=self.bins, order=self.order)
        moved = {n: l2_distance(g, self.graphons[n], align=False) for n, g in graphons.items() if n in self.graphons}
        self.graphons = graphons
        self._seen = {name: MaskSnapshot(mask) for name, mask in masks.items()}
        if trainer.is_global_zero:
            self._publish(trainer, masks, changed, moved, first)

    def _log_spectrum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._spectra is None or self.kernel == "none":
            return
        masks = self._read(trainer, pl_module)
        check_memory_on_all_ranks(trainer.strategy, pl_module)
        with summon_full_params(pl_module):  # on every process; then the first one needs nobody
            if trainer.is_global_zero:
                self.spectrum = self._spectra.evaluate(trainer, pl_module, masks)
        if trainer.is_global_zero and self.spectrum is not None:
            self._publish_spectrum(trainer, self.spectrum, self._spectra.source)

    def _publish_spectrum(self, trainer: pl.Trainer, spectrum: SpectralSummary, source: str) -> None:
        log_scalars(trainer, spectrum_scalars(spectrum))
        if self.verbose:
            Console().print(f"ntk/... at step {trainer.global_step}: {source}")
        if self.figure and not getattr(trainer, "fast_dev_run", False):
            title = f"{source} on {self.probe_size} training samples at step {trainer.global_step}"
            values = {"eigenvalues": spectrum.eigenvalues.cpu().numpy()}
            send_picture(trainer, "ntk_spectrum", lambda scale: spectrum_pixels(spectrum, title, scale=scale), values)

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Masks:
        return masks_in_use(trainer, pl_module, self.include, self.exclude)

    def _publish(
        self, trainer: pl.Trainer, masks: Masks, changed: list[str], moved: dict[str, float], first: bool
    ) -> None:
        scalars: dict[str, float] = {}
        for name in changed:
            scalars.update({f"graphon/{name}/{key}": value for key, value in self._numbers(name, masks[name]).items()})
        scalars.update({f"graphon/{name}/moved": distance for name, distance in moved.items()})
        log_scalars(trainer, scalars)
        if first and self.verbose:
            _print_table(self.graphons, self.tests, scalars)
        if self.figure and not getattr(trainer, "fast_dev_run", False):
            title = f"Layer graphons at step {trainer.global_step}"
            graphons, tests = self.graphons, self.tests
            arrays = {name: graphon.values.cpu().numpy() for name, graphon in graphons.items()}
            send_picture(trainer, "graphons", lambda scale: graphon_pixels(graphons, tests, title, scale=scale), arrays)

    def _numbers(self, name: str, mask: Tensor) -> dict[str, float]:
        """Density, spread of degrees, four-cycles and the homogeneity test of one layer."""
        if mask.numel() > _LARGEST_FOR_CYCLES:
            spread = motif_densities(self.graphons[name])
            return {"density": spread.edge, "degree_cv": max(spread.row_degree_cv, spread.col_degree_cv)}
        test = homogeneity_test(mask, alpha=self.alpha)
        self.tests[name] = test
        return {
            "density": self.graphons[name].density,
            "degree_cv": max(test.row_degree_cv, test.col_degree_cv),
            "c4_ratio": test.c4_ratio,
            "p_value": test.p_value,
        }


class MaskSnapshot:
    """A mask as it was at the last look."""

    def __init__(self, mask: Tensor) -> None:
        self._mask, self._content = mask, mask.clone()
        self._writes = None if mask.is_inference() else mask._version  # tensors of inference mode do not count writes

    def is_now(self, mask: Tensor) -> bool:
        """Whether it is still the same; one that nobody wrote to, as those of PruneAtInit, is not read again."""
        unwritten = mask is self._mask and self._writes is not None and self._writes == mask._version
        return unwritten or equal(mask, self._content)


def _print_table(
    graphons: dict[str, StepGraphon], tests: dict[str, HomogeneityTest], scalars: dict[str, float]
) -> None:
    table = layer_table("Layer graphons", ["layer", "density", "degree\nCV", "C4\nratio", "p-value", "verdict"])
    for name in graphons:
        numbers = [scalars.get(f"graphon/{name}/{key}") for key in ("density", "degree_cv", "c4_ratio")]
        tested = ("", "too large to test")
        if name in tests:
            tested = p_value_text(tests[name].p_value).removeprefix("= "), tests[name].verdict
        table.add_row(name, *("" if number is None else f"{number:.3g}" for number in numbers), *tested)
    Console().print(table)
