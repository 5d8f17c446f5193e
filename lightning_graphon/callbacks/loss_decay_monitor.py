"""`LossDecayMonitor`: how fast the loss will fall, said before it falls, and how fast it did."""

import logging
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_graphon._shared.choices import Propagate
from lightning_graphon.callbacks._analysis.masks_in_use import ensure_pruned
from lightning_graphon.callbacks._analysis.pickling import state_without_module
from lightning_graphon.callbacks._distributed.agreement import flattens_parameters
from lightning_graphon.callbacks._distributed.sharded_analysis import ShardedAnalysis
from lightning_graphon.callbacks._logging.images import send_figure
from lightning_graphon.callbacks._loss import report
from lightning_graphon.callbacks._loss.options import Options
from lightning_graphon.callbacks._loss.record import LossRecord
from lightning_graphon.callbacks._loss.run import FOREIGN, LossRun
from lightning_graphon.callbacks._module.training_step import ModuleLoss
from lightning_graphon.metrics import LossDecay

log = logging.getLogger(__name__)


class LossDecayMonitor(Callback):
    """Predicts the loss of a probe batch from the tangent kernel at the start, and measures it during training.

    The prediction follows gradient descent in function space with the kernel frozen (Jacot et al. 2018; Lee et al.
    2019), at the learning rates and the momentum that the optimizer really uses: SGD, or Adam, AdamW and RMSprop with
    their own preconditioner, taken from the optimizer's state after 10 steps. The probe batch is drawn once from the
    training data. It is evaluated in eval mode; random numbers, gradients, batch norm and the order of the data are
    not touched. With several processes the first one measures and predicts, for a probe of its own data; under FSDP2
    and tensor parallelism all gather the whole weights for it.

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
        full_kernel: Use the kernel between all pairs of outputs, [N·C, N·C], instead of a Kronecker product for it
            (`kronecker_ntk`): better for networks of few units, and a few milliseconds a step.
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
        propagate: Propagate = "energy",
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
        self.options = Options(
            kernel, propagate, probe_size, probe_seed, every_n_steps, drift_every_n_steps, refresh_every_n_steps,
            start_step, tolerance, drift_tolerance, full_kernel,
        )  # fmt: skip
        self.loss_fn, self.figure, self.verbose, self.raise_errors = loss_fn, figure, verbose, raise_errors
        self._reset()

    def _reset(self) -> None:
        self._meetings: ShardedAnalysis | None = None
        self._run: LossRun | None = None
        self._restored: dict[str, Any] | None = None
        self._record = LossRecord()

    @property
    def curves(self) -> dict[str, Tensor]:
        """`step`, `observed`, `predicted` and `refreshed`, [K] each, float64; NaN where there is no value."""
        return self._record.curves()

    @property
    def metric(self) -> LossDecay:
        """Agreement of prediction and observation so far, of this process."""
        return self._record.metric(self.options.tolerance)

    @property
    def void_from(self) -> int | None:
        """Optimizer step from which the prediction made at the start no longer holds; None while it does."""
        return self._record.void_from

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is None:
            self._reset()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored, self._restored, self._meetings = self._restored, None, None
        if flattens_parameters(trainer):
            log.warning(
                "LossDecayMonitor does nothing under %s: it flattens the parameters. Use ModelParallelStrategy with "
                "fully_shard (FSDP2) in configure_model, strategy='ddp' or one device.",
                type(trainer.strategy).__name__,
            )
            return
        ensure_pruned(trainer, pl_module)
        self._meetings = ShardedAnalysis(trainer, pl_module)
        self._meet(trainer, lambda: self._begin(trainer, pl_module, restored))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._run is not None:
            self._guarded(trainer, self._run.advance)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._meetings is not None and trainer.global_step >= self._meetings.next:
            self._meet(trainer, self._look)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._meetings is None or self._meetings.next == math.inf:
            return
        if self._meetings.agree(self._run is not None and self._run.short):
            self._meet(trainer, self._look)
        self._guarded(trainer, lambda: self._report(trainer))

    def _meet(self, trainer: pl.Trainer, work: Callable[[], float]) -> None:
        """Errors outside of `work` end the fit: processes that no longer agree would wait for each other."""
        assert self._meetings is not None  # noqa: S101
        if self._meetings.next < math.inf:
            self._meetings.hold(lambda: self._guarded(trainer, work))

    def _guarded(self, trainer: pl.Trainer, work: Callable[[], Any]) -> Any:
        """Training is not lost because of an analysis: after an error there is no next look."""
        try:
            return work()
        except Exception:
            if self.raise_errors:
                raise
            self._run, self._record.gave_up = None, f"the analysis failed at step {trainer.global_step}"
            log.exception("LossDecayMonitor failed at step %d; training goes on without it", trainer.global_step)
            return math.inf

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, restored: dict[str, Any] | None) -> float:
        assert self._meetings is not None  # noqa: S101
        optimizer = self._meetings.optimizer
        self._run = LossRun(trainer, pl_module, optimizer, self.options, self.loss_fn, self._record)
        return self._run.begin(restored)

    def _look(self) -> float:
        return math.inf if self._run is None else self._run.look()

    def _report(self, trainer: pl.Trainer) -> None:
        """By the first process, when no other waits for it."""
        agreement = None if self._run is None else self._run.agreement()
        if agreement is None:
            return
        if self.verbose:
            Console().print(report.summary(self._record, agreement))
        if self.figure and not getattr(trainer, "fast_dev_run", False):
            send_figure(trainer, "loss_decay", self.plot(), {k: v.numpy() for k, v in self.curves.items()})

    def plot(self) -> Any:
        """Predicted and observed loss, the band of the finite probe, and the modes that carry the fall.

        Returns:
            A matplotlib figure outside pyplot.

        Raises:
            RuntimeError: No prediction has been made.
        """
        watch = None if self._run is None else self._run.watch
        if watch is None or watch.initial is None:
            raise RuntimeError("LossDecayMonitor has made no prediction in this process; fit with it first")
        return report.figure(self._record, watch.initial, self.options.kernel)

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._record.rows:
            return {}
        watch = None if self._run is None else self._run.watch
        return {
            "watch": None if watch is None else watch.state_dict(),
            "gave_up": self._record.gave_up,
            "settings": self.options.identity(),
            "rows": self._record.table(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reset()
        try:
            self._take_over(state_dict)
        except FOREIGN as error:
            self._reset()
            log.warning("LossDecayMonitor starts anew: the checkpoint's state is none of its own (%r)", error)

    def _take_over(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._record = LossRecord.from_table(state_dict["rows"], state_dict["gave_up"])
            self._restored = state_dict

    def __getstate__(self) -> dict[str, Any]:
        return state_without_module(self, "_meetings", "_run")
