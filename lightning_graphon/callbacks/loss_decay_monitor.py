"""`LossDecayMonitor`: how fast the loss will fall, said before it falls, and how fast it did."""

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_graphon._checks import check_choice
from lightning_graphon.callbacks._distributed import shards_parameters
from lightning_graphon.callbacks._loss_watch import LossWatch, Options, passed
from lightning_graphon.callbacks._masks_of import masks_of
from lightning_graphon.callbacks._network import NotReadableError, read_network
from lightning_graphon.callbacks._pickling import state_without_module
from lightning_graphon.callbacks._pictures import send_figure
from lightning_graphon.callbacks._probe import draw_probe, samples
from lightning_graphon.callbacks._report import log_scalars
from lightning_graphon.callbacks._training_step import ModuleLoss, TrainingStepObjective
from lightning_graphon.metrics import LossDecay
from lightning_graphon.plots import plot_loss_decay
from lightning_graphon.pruning.shards import is_sharded
from lightning_graphon.pruning.untouched import untouched

log = logging.getLogger(__name__)
Work: TypeAlias = Callable[[pl.Trainer, pl.LightningModule], None]
_CURVES = ("step", "observed", "predicted", "refreshed")
_UNKNOWN_SIZE = 10**9
# What reading the state of another program, or of another version, may raise.
_FOREIGN = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
_SHARDED = (
    "LossDecayMonitor does nothing under %s: it shards the parameters, and the probe is run by one process alone. Use "
    "strategy='ddp' or one device."
)
# Curves that belong together in one chart, under TensorBoard's "Custom scalars".
_LAYOUT = {
    "loss decay": {
        "predicted and observed loss": ["Multiline", [r"^loss_decay/(observed|predicted|refreshed)$"]],
        "how far off": ["Multiline", [r"^loss_decay/(relative_error|refreshed_error|kernel_drift)$"]],
    }
}


class LossDecayMonitor(Callback):
    """Predicts the loss of a probe batch from the tangent kernel at the start, and measures it during training.

    The prediction follows gradient descent in function space with the kernel frozen (Jacot et al. 2018; Lee et al.
    2019), at the learning rates and the momentum that the optimizer really uses: SGD, or Adam, AdamW and RMSprop with
    their own preconditioner, taken from the optimizer's state after 10 steps. The probe batch is drawn once from the
    training data. It is evaluated in eval mode; random numbers, gradients, batch norm and the order of the data are
    not touched.

    Kernels of real networks move, and then the prediction is worth nothing. The monitor measures by how much and says
    once, in the log, from which step on the prediction no longer holds (`void_from`).

    Logged at optimizer steps: `loss_decay/observed`, `/predicted`, `/relative_error` = |predicted − observed| /
    |observed|, and `/kernel_drift`, the relative change of gᵀΘg for the gradient g of the loss in the outputs. With
    `refresh_every_n_steps` also `/refreshed` and `/refreshed_error`, of the prediction made at the last refresh. At the
    end of training `/rate_ratio` (fitted decay rate, predicted over observed), `/log_correlation` and `/valid_until`.
    TensorBoard shows the curves in one chart under "Custom scalars", and the figure `loss_decay`.

    Where no prediction can be made (several optimizers, a loss that is no function of the network's outputs) one
    sentence says why, and the observed loss is logged all the same. Weight decay and gradient clipping are not part of
    the prediction.

    Args:
        kernel: "empirical", the network's own, or "graphon", the infinite-width kernel of its graphons (Linear chains).
        propagate: "energy", "density" or "drift", for the Graphon NTK.
        probe_size: Samples in the probe batch.
        probe_seed: Seed of the probe batch.
        every_n_steps: Measure the loss after every n-th optimizer step.
        drift_every_n_steps: Measure the kernel's drift at least so often; more often in the beginning.
        refresh_every_n_steps: Compute the kernel anew after every n-th step, measure the loss there and predict ahead;
            None: never.
        start_step: Optimizer step of the prediction; None: 0 for SGD, 10 for adaptive optimizers.
        tolerance: Largest relative error of a prediction that holds.
        drift_tolerance: Largest kernel drift of a prediction that holds.
        full_kernel: Use the kernel between all pairs of outputs, [N·C, N·C], instead of the mean of the outputs' own,
            [N, N]: better for SNIP's masks, and a few milliseconds a step.
        loss_fn: `loss_fn(pl_module, batch)` -> scalar in place of `training_step`.
        figure: Draw the figure at the end of training.
        verbose: Print what was found.
        raise_errors: Let an error in the analysis end the fit; by default it is reported and training goes on.

    Raises:
        ValueError: An argument has a value that is not allowed.

    >>> LossDecayMonitor(probe_size=64).void_from is None
    True
    """

    def __init__(
        self,
        *,
        kernel: str = "empirical",
        propagate: str = "energy",
        probe_size: int = 128,
        probe_seed: int = 0,
        every_n_steps: int = 50,
        drift_every_n_steps: int = 200,
        refresh_every_n_steps: int | None = None,
        start_step: int | None = None,
        tolerance: float = 0.1,
        drift_tolerance: float = 0.5,
        full_kernel: bool = False,
        loss_fn: ModuleLoss | None = None,
        figure: bool = True,
        verbose: bool = True,
        raise_errors: bool = False,
    ) -> None:
        check_choice("kernel", kernel, ("empirical", "graphon"))
        check_choice("propagate", propagate, ("energy", "density", "drift"))
        _check_positive(probe_size=probe_size, every_n_steps=every_n_steps, drift_every_n_steps=drift_every_n_steps)
        refresh = refresh_every_n_steps
        _check_positive(refresh_every_n_steps=refresh, tolerance=tolerance, drift_tolerance=drift_tolerance)
        if start_step is not None and start_step < 0:
            raise ValueError(f"start_step must be 0 or more, or None, got {start_step!r}")
        self.options = Options(
            kernel, propagate, every_n_steps, drift_every_n_steps, refresh, start_step, tolerance,
            drift_tolerance, full_kernel,
        )  # fmt: skip
        self.probe_size, self.probe_seed, self.loss_fn = probe_size, probe_seed, loss_fn
        self.figure, self.verbose, self.raise_errors = figure, verbose, raise_errors
        self._reset()

    def _reset(self) -> None:
        self._watch: LossWatch | None = None
        self._observe_only: Callable[[], float] | None = None
        self._restored: dict[str, Any] | None = None
        self._rows: list[list[float]] = []
        self._active = False
        self._void_from: int | None = None
        self._gave_up: str | None = None

    @property
    def curves(self) -> dict[str, Tensor]:
        """`step`, `observed`, `predicted` and `refreshed`, [K] each, float64; NaN where there is no value."""
        rows = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, len(_CURVES))
        return dict(zip(_CURVES, rows.T, strict=True))

    @property
    def metric(self) -> LossDecay:
        """Agreement of prediction and observation so far, of this process."""
        metric, curves = LossDecay(self.options.tolerance, sync_on_compute=False), self.curves
        made = curves["predicted"].isfinite()
        metric.update(curves["predicted"][made], curves["observed"][made], curves["step"][made])
        return metric

    @property
    def void_from(self) -> int | None:
        """Optimizer step from which the prediction made at the start no longer holds; None while it does."""
        return self._void_from

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is None:
            self._reset()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._active = trainer.is_global_zero
        self._guarded(self._begin, trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._guarded(self._advance, trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._guarded(self._look, trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._guarded(self._finish, trainer, pl_module)

    def _guarded(self, work: Work, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training is not lost because of an analysis."""
        if not self._active:
            return
        try:
            work(trainer, pl_module)
        except NotReadableError as error:
            self._give_up(trainer, pl_module, str(error))
        except Exception:
            if self.raise_errors:
                raise
            self._active, self._watch, self._gave_up = False, None, f"the analysis failed at step {trainer.global_step}"
            log.exception("LossDecayMonitor failed at step %d; training goes on without it", trainer.global_step)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored, self._restored = self._restored, None
        if shards_parameters(trainer) or any(map(is_sharded, pl_module.parameters())):
            self._active = False
            log.warning(_SHARDED, type(trainer.strategy).__name__)
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(_LAYOUT)
        objective = TrainingStepObjective(trainer, pl_module, self.loss_fn)
        batch = draw_probe(trainer, pl_module, self.probe_size, self.probe_seed)
        self._observe_only = lambda: _loss(objective, pl_module, batch)
        if len(trainer.optimizers) != 1:
            raise NotReadableError(f"there are {len(trainer.optimizers)} optimizers, and one is needed")
        if self._gave_up is not None:
            raise NotReadableError(self._gave_up)
        network = read_network(objective, pl_module, batch)
        size = max(_training_points(trainer), samples(batch))
        loader, masks = trainer.train_dataloader, masks_of(trainer, pl_module)
        batch_size = getattr(loader, "batch_size", None)
        what = (self.options, network, trainer.optimizers[0], masks, size, trainer.global_step, batch_size)
        self._watch = LossWatch(*what)
        if restored and not self._resume(restored, trainer):
            self._watch = LossWatch(*what)
        self._look(trainer, pl_module)

    def _resume(self, restored: dict[str, Any], trainer: pl.Trainer) -> bool:
        """Go on from a checkpoint's state; a state that does not fit is left, with a word."""
        assert self._watch is not None  # noqa: S101
        try:
            if restored["settings"] != self._settings():
                raise ValueError(f"it was made with {restored['settings']}, and now it is {self._settings()}")
            self._watch.load_state_dict(restored["watch"])
        except _FOREIGN as error:
            log.warning(
                "LossDecayMonitor starts anew at step %d: the checkpoint's prediction does not fit, %s",
                trainer.global_step, error,
            )  # fmt: skip
            self._rows, self._void_from = [], None
            return False
        self._void_from = None if self._watch.void is None else self._watch.void[0]
        return True

    def _settings(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on with the other's prediction."""
        names = ("kernel", "propagate", "full_kernel")
        chosen = {name: getattr(self.options, name) for name in names}
        return {**chosen, "probe_size": self.probe_size, "probe_seed": self.probe_seed}

    def _advance(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watch is not None:
            self._watch.advance()

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, last: bool = False) -> None:
        """Measure where it is time to, or at the last step."""
        step, before = trainer.global_step, int(self._rows[-1][0]) if self._rows else -1
        if self._watch is not None:
            if last or self._watch.due(step, before):
                self._record(trainer, self._watch.observe(step, before))
                self._tell_void()
        elif self._observe_only is not None and (last or passed(self.options.every, step, before)):
            self._record(trainer, {"observed": self._observe_only()})

    def _record(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        step = trainer.global_step
        log_scalars(trainer, {f"loss_decay/{name}": value for name, value in values.items()})
        self._rows.append([float(step), *(values.get(name, torch.nan) for name in _CURVES[1:])])

    def _tell_void(self) -> None:
        if self._watch is None or self._watch.void is None or self._void_from is not None:
            return
        step, reason = self._watch.void
        self._void_from = step
        log.warning("LossDecayMonitor: from step %d on the prediction of the start no longer holds: %s", step, reason)

    def _give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str) -> None:
        """No prediction from here on; the observed loss goes on."""
        self._watch, self._gave_up = None, reason
        log.warning(
            "LossDecayMonitor predicts nothing from step %d on: %s. The observed loss is logged.",
            trainer.global_step, reason,
        )  # fmt: skip
        self._guarded(self._look, trainer, pl_module)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._rows and 1 in (len(self._rows), self._predicted()) and trainer.global_step > self._rows[-1][0]:
            self._look(trainer, pl_module, last=True)  # of a short fit: a curve has two points
        if self._watch is None or self._watch.initial is None or self._predicted() < 2:
            return
        values = {k: float(v) for k, v in self.metric.compute().items()}
        kept = {k: values[k] for k in ("rate_ratio", "log_correlation", "valid_until")}
        log_scalars(trainer, {f"loss_decay/{k}": v for k, v in kept.items() if v == v})
        if self.verbose:
            Console().print(self._summary(values))
        if self.figure and not getattr(trainer, "fast_dev_run", False):
            send_figure(trainer, "loss_decay", self.plot(), {k: v.numpy() for k, v in self.curves.items()})

    def _predicted(self) -> int:
        """Number of points with a prediction; the first is where it was made."""
        return int(self.curves["predicted"].isfinite().sum())

    def _summary(self, values: dict[str, float]) -> str:
        until = f"until step {self.void_from}" if self.void_from is not None else "to the end"
        return (
            f"loss_decay/...: the prediction held {until}; over {int(values['points'])} points it was "
            f"{values['relative_error']:.1%} off, its decay rate {values['rate_ratio']:.2f} times the observed one"
        )

    def plot(self) -> Any:
        """Predicted and observed loss, the band of the finite probe, and the modes that carry the fall.

        Returns:
            A matplotlib figure outside pyplot.

        Raises:
            RuntimeError: No prediction has been made.
        """
        if self._watch is None or self._watch.initial is None:
            raise RuntimeError("LossDecayMonitor has made no prediction in this process; fit with it first")
        initial = self._watch.initial
        band, shares = initial.band(), initial.shares()
        steps = None if band is None else initial.start + torch.arange(len(band[0]))
        title = f"Loss of {len(initial.outputs)} training samples, predicted from the {self.options.kernel} NTK"
        return plot_loss_decay(
            self._curves_by_step(),
            band=None if band is None or steps is None else (steps, *band),
            void_from=self.void_from,
            shares=shares,
            title=title,
        )

    def _curves_by_step(self) -> dict[str, dict[int, float]]:
        """Name -> step -> loss, without the places where there is no value."""
        curves = {name: values.tolist() for name, values in self.curves.items()}
        steps = [int(step) for step in curves.pop("step")]
        return {n: {s: v for s, v in zip(steps, values, strict=True) if v == v} for n, values in curves.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._rows:
            return {}
        return {
            "watch": None if self._watch is None else self._watch.state_dict(),
            "gave_up": self._gave_up,
            "settings": self._settings(),
            "rows": torch.tensor(self._rows, dtype=torch.float64),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reset()
        try:
            self._take_over(state_dict)
        except _FOREIGN as error:
            self._reset()
            log.warning("LossDecayMonitor starts anew: the checkpoint's state is none of its own (%r)", error)

    def _take_over(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._gave_up = state_dict["gave_up"]
            self._rows = state_dict["rows"].reshape(-1, len(_CURVES)).tolist()
            self._restored = state_dict

    def __getstate__(self) -> dict[str, Any]:
        return state_without_module(self, "_watch", "_observe_only")


@torch.no_grad()
def _loss(objective: TrainingStepObjective, pl_module: pl.LightningModule, batch: Any) -> float:
    with untouched(pl_module):
        pl_module.eval()
        return float(objective.loss(batch))


def _training_points(trainer: pl.Trainer) -> int:
    """Samples of one epoch over all processes; a very large number where the loader has no length."""
    loader: Any = trainer.train_dataloader
    try:
        count = len(loader.dataset)
    except (AttributeError, TypeError):
        return _UNKNOWN_SIZE
    share = trainer.limit_train_batches
    return int(count * share) if isinstance(share, float) else count


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
