"""`GraphonMonitor`: the graphon of every layer, in pictures and numbers, while any network trains."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lightning_graphon._shared.checks import check_choice, plain
from lightning_graphon._shared.choices import LayerOrder
from lightning_graphon._shared.weight_layout import in_rows
from lightning_graphon.callbacks._analysis.affordable_layers import PORTION, LayersInTurn, layer_numbers
from lightning_graphon.callbacks._analysis.graphon_flows import GraphonFlows
from lightning_graphon.callbacks._analysis.kernel_spectrum import KernelSpectrum, SpectrumOptions, spectrum_scalars
from lightning_graphon.callbacks._analysis.mask_snapshot import MaskSnapshot
from lightning_graphon.callbacks._analysis.masks_in_use import ensure_pruned, masks_in_use, masks_move, start_limits
from lightning_graphon.callbacks._analysis.monitor import Monitor
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._distributed.sharded_analysis import check_memory_on_all_ranks
from lightning_graphon.callbacks._logging.graphons import print_graphons, send_flow, send_graphons
from lightning_graphon.callbacks._logging.images import SCALE, send_picture
from lightning_graphon.callbacks._logging.scalars import log_layer_table, log_scalars, show
from lightning_graphon.graphon import HomogeneityTest, LayerFlow, StepGraphon, layer_graphons
from lightning_graphon.ntk import SpectralSummary
from lightning_graphon.plots import spectrum_image
from lightning_graphon.pruning import Masks, check_readable, summon_full_params

log = logging.getLogger(__name__)


class GraphonMonitor(Monitor):
    """Estimates the graphon of every layer when training starts, and again whenever masks have changed.

    Works with `PruneAtInit`, Lightning's `ModelPruning`, `torch.nn.utils.prune`, weights that are simply zero, and
    dense models, in any order of callbacks. Looks at the start of training, every `every_n_epochs` epochs or
    `every_n_steps` steps, and at the end; where no mask has changed since the last look nothing is computed. The masks
    of a `PruneAtInit` are taken as they are; weights that something else zeroes besides are seen if `include` or
    `exclude` is given, which makes it read the weights.

    Logged for every layer: `graphon/<layer>/density`, `/degree_cv` (coefficient of variation of the degrees beyond
    chance, the larger of both sides), `/c4_ratio` (t(C4) / t(K2)⁴, 1 for a random mask), `/p_value` (of the Erdős–Rényi
    null); TensorBoard has them in one table under Text, `graphon/layers`. The picture `graphons` goes to TensorBoard
    and W&B, at the first look also `graphons/<layer>`; of more than six layers six are shown, evenly spaced. With other
    loggers or none, PNG and NPZ files of all layers go to the log directory.

    Of masks that change the flow is followed, units where they stood at the start: `/moved` (L2 distance from the last
    look), `/moved_from_start`, `/moved_by_chance`, `/limit_distance`, `/churn`, `/dead_units`, `/revived_units`, and at
    the end the figure `graphon_flow`. Checkpoints have it, so that a resumed run goes on.

    At the start and the end of training, and every `spectrum.every_n_epochs` epochs, the spectrum of the tangent kernel
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
        spectrum: Which kernel's spectrum, on which samples, and when; see `SpectrumOptions`. None: no spectrum.
        alpha: Level of the homogeneity verdict.
        figure: Draw the figures.
        layer_scalars: Log the scalars of layers to TensorBoard, too, a chart for each.
        verbose: Print a table at the first look.
        raise_errors: Let an error in the analysis end the fit; by default it is reported and training goes on.
        time_budget: Share of the planned training time that all monitors of the trainer together may take, and three
            seconds at least; what that is too short for is computed for fewer samples or outputs, or less often, and
            said. `math.inf` removes the limit.

    Attributes:
        graphons: Layer -> its graphon at the last look.
        flows: Layer -> the path of its graphon, of layers whose masks have changed.
        tests: Layer -> its homogeneity test at the last look.
        spectrum: The kernel's spectrum at the last look; None before the first.

    Raises:
        ValueError: An argument has a value that is not allowed; (on fit) a pattern of `include` or `exclude` matches no
            weight.

    >>> GraphonMonitor(bins=32).graphons
    {}
    """

    transient = ("_seen", "_kernel")

    def __init__(
        self,
        *,
        bins: int = 64,
        order: LayerOrder = "degree",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        spectrum: SpectrumOptions | None = SpectrumOptions(),  # noqa: B008 - frozen
        alpha: float = 0.01,
        figure: bool = True,
        layer_scalars: bool = False,
        verbose: bool = True,
        raise_errors: bool = False,
        time_budget: float = 0.05,
    ) -> None:
        super().__init__(figure=figure, verbose=verbose, raise_errors=raise_errors, time_budget=time_budget)
        check_choice("order", order, get_args(LayerOrder))
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins!r}")
        if every_n_epochs < 0 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(
                f"every_n_epochs must be >= 0 and every_n_steps >= 1 or None, got {every_n_epochs!r}, {every_n_steps!r}"
            )
        self.bins, self.order, self.alpha = plain(bins), order, alpha
        self.include, self.exclude = include, exclude
        self.every_n_epochs, self.every_n_steps = plain(every_n_epochs), plain(every_n_steps)
        self.spectrum_options, self.layer_scalars = spectrum, layer_scalars
        self.spectrum: SpectralSummary | None = None
        self.graphons: dict[str, StepGraphon] = {}
        self.tests: dict[str, HomogeneityTest] = {}
        self._kernel: KernelSpectrum | None = None
        self._seen: dict[str, MaskSnapshot] = {}
        self._scalars: dict[str, float] = {}
        self._in_turn, self._next_look = LayersInTurn(), 0.0
        self._flow, self._fitting = GraphonFlows(self.bins, order), False

    @property
    def flows(self) -> dict[str, LayerFlow]:  # noqa: D102 - in the class's docstring
        return {name: self._flow.layers[name] for name in self.graphons if name in self._flow.layers}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._fitting = stage == "fit"

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_readable(pl_module, self.include, self.exclude)  # a misspelt name is no failure of the analysis

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ensure_pruned(trainer, pl_module)
        self._seen, self._scalars, self._told, self._next_look = {}, {}, set(), 0.0
        self._flow = self._flow if self._flow.resumed else GraphonFlows(self.bins, self.order)
        self._flow.begin(start_limits(trainer), masks_move(trainer))
        budget = TimeBudget.of(trainer)
        budget.start(trainer)
        self._kernel = None if self.spectrum_options is None else KernelSpectrum(self.spectrum_options, budget)
        self._look(trainer, pl_module)
        self._look_at_spectrum(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, options = trainer.current_epoch, self.spectrum_options
        if self.every_n_epochs and epoch % self.every_n_epochs == 0:
            self._look(trainer, pl_module)
        if epoch and options is not None and options.every_n_epochs and epoch % options.every_n_epochs == 0:
            self._look_at_spectrum(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._next_look, TimeBudget.of(trainer).reserved = 0.0, 0.0
        self._look(trainer, pl_module)
        self._look_at_spectrum(trainer, pl_module)
        self._kernel = None
        if self.flows and self.draws(trainer) and trainer.is_global_zero:
            if TimeBudget.of(trainer).left:
                self._attempt(trainer, "flow", lambda: send_flow(trainer, self.flows))
            else:
                log.warning("GraphonMonitor draws no figure of the flow, which is in `flows`: time_budget is used up")

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step < self._next_look:
            return
        budget, before, first = TimeBudget.of(trainer), TimeBudget.of(trainer).spent, not self._seen
        self._attempt(trainer, "graphons", lambda: self._estimate(trainer, pl_module))
        if not first and trainer.world_size == 1:  # several processes look together, and each has a clock of its own
            self._next_look = trainer.global_step + budget.spacing(budget.spent - before)

    def _look_at_spectrum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attempt(trainer, "spectrum", lambda: self._evaluate_spectrum(trainer, pl_module))

    def _attempt(self, trainer: pl.Trainer, what: str, analyse: Callable[[], None]) -> None:
        try:
            with self.analysing(trainer, what):
                analyse()
        except Exception as error:
            self.report_failure(trainer, error, what)

    @torch.no_grad()
    def _estimate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        masks = masks_in_use(trainer, pl_module, self.include, self.exclude)
        changed = [name for name, mask in masks.items() if name not in self._seen or not self._seen[name].is_now(mask)]
        if not changed:
            return
        first, step = not self._seen, trainer.global_step
        snapshots = {name: MaskSnapshot(masks[name]) for name in changed}
        own = in_rows(pl_module, {name: snapshot.content for name, snapshot in snapshots.items()})
        rows = Masks({**in_rows(pl_module, masks), **own})
        resumed, self._flow.resumed = self._flow.resumed and not self._begins_epoch(trainer), False
        follow = None if resumed else lambda name: self._flow.look(name, rows[name], step)
        numbers, skipped = self._estimate_in_turn(trainer, rows, changed, follow)
        # After a checkpoint the flow goes on at the next look, where that of an uninterrupted run is.
        late = {n: MaskSnapshot(masks[n][:0]) for n in numbers if not self._flow.is_up_to(n, rows[n])}
        self._seen.update({name: late.get(name, snapshots[name]) for name in numbers})
        if trainer.is_global_zero and numbers:
            self._publish(trainer, numbers, first)
        self._tell_skipped(trainer, skipped)

    def _begins_epoch(self, trainer: pl.Trainer) -> bool:
        # Of an epoch that a resumed run begins with, Lightning calls no on_train_epoch_start.
        now = trainer.fit_loop.epoch_progress.current
        return bool(self.every_n_epochs and now.ready == now.completed and now.completed % self.every_n_epochs == 0)

    def _estimate_in_turn(
        self, trainer: pl.Trainer, rows: Masks, changed: list[str],
        follow: Callable[[str], dict[str, float]] | None,
    ) -> tuple[dict[str, dict[str, float]], list[str]]:  # fmt: skip
        """Graphons and numbers of the layers that have changed, and which there was no time for."""
        joint = layer_graphons(rows, bins=self.bins, order="joint") if self.order == "joint" else {}
        found = {name: graphon for name, graphon in self.graphons.items() if name not in changed} | joint
        numbers: dict[str, dict[str, float]] = {}

        def estimate(name: str) -> None:
            found.update({} if joint else layer_graphons({name: rows[name]}, bins=self.bins, order=self.order))
            numbers[name], test = layer_numbers(rows[name], found[name], self.alpha)
            numbers[name].update({} if follow is None else follow(name))
            self.tests.update({name: test} if test else {})

        left = self._in_turn.run(estimate, changed, rows, TimeBudget.of(trainer).portion(PORTION))
        self.graphons = {name: found[name] for name in rows if name in found}
        self.tests = {name: self.tests[name] for name in rows if name in self.tests and name not in left}
        return {name: numbers[name] for name in rows if name in numbers}, left

    def _tell_skipped(self, trainer: pl.Trainer, names: list[str]) -> None:
        if names and trainer.is_global_zero and "skipped" not in self._told:
            self._told.add("skipped")
            log.warning(
                "GraphonMonitor has no time for %d layers at step %d and tries them at the next look: %s. "
                "time_budget=math.inf leaves out none.",
                len(names), trainer.global_step, ", ".join(names),
            )  # fmt: skip

    def _evaluate_spectrum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        kernel = self._kernel
        if kernel is None:
            return
        masks = masks_in_use(trainer, pl_module, self.include, self.exclude)
        check_memory_on_all_ranks(trainer.strategy, pl_module)
        with summon_full_params(pl_module):  # on every process; then the first one needs nobody
            if trainer.is_global_zero:
                self.spectrum = kernel.evaluate(trainer, pl_module, masks)
        if not trainer.is_global_zero or self.spectrum is None:
            return
        spectrum, step = self.spectrum, trainer.global_step
        log_scalars(trainer, spectrum_scalars(spectrum))
        if self.verbose:
            show(f"ntk/... at step {step}: {kernel.source}" + f"; {kernel.caution}" * bool(kernel.caution))
        if self.draws(trainer):
            title = f"{kernel.source}\nat step {step}"
            values = {"eigenvalues": spectrum.eigenvalues.cpu().numpy()}
            send_picture(trainer, "ntk_spectrum", spectrum_image(spectrum, title, scale=SCALE), values)

    def _publish(self, trainer: pl.Trainer, numbers: Mapping[str, Mapping[str, float]], first: bool) -> None:
        scalars: dict[str, float] = {}
        for name in numbers:
            scalars.update({f"graphon/{name}/{key}": value for key, value in numbers[name].items()})
        self._scalars.update(scalars)
        log_scalars(trainer, scalars, not_in_tensorboard=() if self.layer_scalars else scalars)
        log_layer_table(trainer, "graphon/layers", self._scalars)
        if first and self.verbose:
            print_graphons(self.graphons, self.tests, scalars)
        if self.draws(trainer):
            send_graphons(trainer, self.graphons, self.tests, each=first)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._flow.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting and state_dict:  # testing leaves the flow of training as it is
            self._flow = GraphonFlows.from_state(self.bins, self.order, state_dict)
