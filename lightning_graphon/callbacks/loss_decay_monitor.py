"""`LossDecayMonitor`: how fast the loss will fall, said before it falls, and how fast it did."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_graphon.callbacks._analysis.loss_session import FOREIGN, LossSession
from lightning_graphon.callbacks._analysis.masks_in_use import ensure_pruned
from lightning_graphon.callbacks._analysis.monitor import Monitor
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._analysis.wanted import Measuring, Predicting, Wanted
from lightning_graphon.callbacks._distributed.agreement import flattens_parameters
from lightning_graphon.callbacks._distributed.sharded_analysis import ShardedAnalysis
from lightning_graphon.callbacks._logging import loss_chart
from lightning_graphon.callbacks._logging.images import send_figure, takes_pictures
from lightning_graphon.callbacks._logging.scalars import show
from lightning_graphon.callbacks._module.training_step import ModuleLoss
from lightning_graphon.dynamics import Forecast, KernelPrediction, LossCurves, PredictedLoss
from lightning_graphon.metrics import LossDecay

log = logging.getLogger(__name__)


class LossDecayMonitor(Monitor):
    """Predicts the loss of training samples before it falls, and measures it as it does.

    - "kernel": the tangent kernel of the start moves the outputs (Jacot et al. 2018), at the rates and momentum really
      used; for Adam, AdamW and RMSprop that of step 10, preconditioned. Decay and clipping are left out, and said.
    - "replay": your optimizer, with its decay, schedule and clipping, on the network linearised at the start.
    - "rehearsal": copies of the module, trained as it will be, in several orders of batches, which span the band.
    - "sibling": networks redrawn from the graphons of masks and weights, trained likewise. 1/4 (two draws) and 1/8
      (four) of the width are extrapolated; where these keep fewer than 8 inputs per unit, two of the same width.

    By default kernel and rehearsal for plain SGD (no decay, no clipping) and wherever `kernel` has options of its own;
    else replay and rehearsal; with several optimizers the rehearsal alone. Printed before the first step: what is
    predicted, how far, what it took, and until which step theory stays inside the band (`lazy_until`).

    Two disjoint draws of the training data: the probe, whose loss is measured in eval mode and predicted, and the pool,
    which pushes; the probe's samples come among the pool's as often as in training. Nothing of the training is touched.
    With several processes the first one predicts, with the batch of all; from shards by the kernel alone.

    Logged: `loss_decay/observed`; `/predicted`, the kernel's, else the replay's, else the rehearsal's loss, and its
    `/relative_error`; `/rehearsed` (mean of the orders), `/sibling`, `/replayed` (beside a kernel), `/power_law` of the
    first 20 losses; `/kernel_drift`, the relative change of gᵀΘg for the gradient g of the loss in the outputs; after a
    refresh `/refreshed` and `/refreshed_error`; at the end `/rate_ratio` of fitted decay rates, `/log_correlation`,
    `/valid_until`, `/invalid_from`, `/lazy_until`. None beyond twice the largest loss seen. All are in one figure.

    A prediction no longer holds, which is said once (`invalid_from`), when the observed loss leaves the band widened by
    `tolerance`; where nothing is rehearsed, when the error passes it or the kernel has moved.

    Args:
        predict: One or several of "kernel", "replay", "rehearsal" and "sibling"; None: as above.
        horizon: Steps that copies train ahead, at most; None: all that are planned, or 1000, as far as there is time.
        batch_orders: Orders of batches that are rehearsed.
        taylor_order: Of a replay: 1 is linear; 2 helps ReLU networks, hurts others and takes 2.5 times as long.
        kernel: Which kernel predicts, from when on; see `KernelPrediction`.
        probe_size: Samples whose loss is measured and predicted.
        pool_size: Other training samples, at most; fewer than in the probe push no kernel: there the probe does.
        probe_seed: Seed of the draw of both, and of the orders of batches.
        every_n_steps: Measure the loss after every n-th optimizer step; at first at more steps, if there is time.
        tolerance: Relative distance from the band, or without one relative error, of a prediction that holds.
        loss_fn: `loss_fn(pl_module, batch)` -> scalar in place of `training_step`, for the probe.
        figure: Draw the figure at the end of training.
        verbose: Print what is predicted and what was found.
        raise_errors: Let an error in the analysis end the fit; by default it is reported and training goes on.
        time_budget: Share of the planned training time that all monitors of the trainer together may take, three
            seconds at least; what that is too short for is done for fewer samples, steps or outputs, and said. Copies
            get three fifths: a percent or two of a long run. None: no limit; all of training is rehearsed, which takes
            one training for each order, 1.7 for a replay, two for siblings.

    Raises:
        ValueError: An argument has a value that is not allowed.

    >>> LossDecayMonitor(predict=("replay", "rehearsal"), horizon=200).invalid_from is None
    True
    """

    transient = ("_sharded", "_session")

    def __init__(
        self,
        *,
        predict: str | Sequence[str] | None = None,
        horizon: int | None = None,
        batch_orders: int = 2,
        taylor_order: int = 1,
        kernel: KernelPrediction = KernelPrediction(),  # noqa: B008 - frozen
        probe_size: int = 128,
        pool_size: int = 2048,
        probe_seed: int = 0,
        every_n_steps: int = 50,
        tolerance: float = 0.1,
        loss_fn: ModuleLoss | None = None,
        figure: bool = True,
        verbose: bool = True,
        raise_errors: bool = False,
        time_budget: float | None = 0.05,
    ) -> None:
        super().__init__(figure=figure, verbose=verbose, raise_errors=raise_errors, time_budget=time_budget)
        predicting = Predicting(predict, horizon, batch_orders, taylor_order)
        measuring = Measuring(probe_size, pool_size, probe_seed, every_n_steps, tolerance)
        self.wanted = Wanted(kernel, predicting, measuring, loss_fn, verbose)
        self._testing = False
        self._reset()

    def _reset(self) -> None:
        self._sharded: ShardedAnalysis | None = None
        self._session: LossSession | None = None
        self._restored: dict[str, Any] | None = None
        self._curves = LossCurves()

    @property
    def curves(self) -> dict[str, Tensor]:
        """`step`, `observed`, `predicted` and `refreshed`, [K] each, float64; NaN where there is no value."""
        return self._curves.tensors()

    @property
    def metric(self) -> LossDecay:
        """Agreement of prediction and observation so far, of this process."""
        return loss_chart.agreement(self._curves, self.wanted.measuring.tolerance)

    @property
    def predictions(self) -> dict[str, PredictedLoss]:
        """What was predicted before training, under "rehearsal", "replay", "sibling" and "kernel"."""
        return {} if self._session is None else dict(self._session.ahead.predictions)

    @property
    def lazy_until(self) -> int | None:
        """First step at which theory leaves the band of the rehearsals; None while it does not, or without either."""
        return None if self._session is None else self._session.ahead.lazy_until

    @property
    def valid_until(self) -> int | None:
        """Last measured step at which the prediction made at the start held; None where there is none."""
        return self._curves.valid_until

    @property
    def invalid_from(self) -> int | None:
        """First measured step at which the prediction made at the start did not hold; None while it does."""
        return self._curves.invalid_from

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._testing = stage != "fit"

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is None:
            self._reset()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored, self._restored, self._sharded = self._restored, None, None
        if flattens_parameters(trainer):
            log.warning(
                "LossDecayMonitor does nothing under %s: it flattens the parameters. Use ModelParallelStrategy with "
                "fully_shard (FSDP2) in configure_model, strategy='ddp' or one device.",
                type(trainer.strategy).__name__,
            )
            return
        ensure_pruned(trainer, pl_module)
        self._sharded = sharded = ShardedAnalysis(trainer, pl_module)
        budget = TimeBudget.of(trainer)
        budget.start(trainer)
        session = LossSession(
            trainer, pl_module, sharded.optimizer, self.wanted, self._curves, budget, sharded.together
        )
        self._session = session
        if sharded.next < math.inf:
            with self.analysing(trainer, "loss"), sharded.meeting() as works:
                if works:
                    sharded.next = session.begin(restored)
                    if trainer.global_step >= sharded.next:
                        sharded.next = session.look()
            self._settle(trainer, sharded.failure)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._session is not None:
            try:
                self._session.advance()
            except Exception as error:
                self._settle(trainer, error)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sharded, session = self._sharded, self._session
        if sharded is not None and session is not None and trainer.global_step >= sharded.next:
            self._look(trainer, sharded, session)
            if takes_pictures(trainer) and loss_chart.picture_is_due(self._curves):
                self._draw(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sharded, session = self._sharded, self._session
        if sharded is None or session is None or sharded.next == math.inf:
            return
        if sharded.agree(session.short):
            self._look(trainer, sharded, session)
        try:
            self._report(trainer)
        except Exception as error:
            self._settle(trainer, error)

    def _look(self, trainer: pl.Trainer, sharded: ShardedAnalysis, session: LossSession) -> None:
        with self.analysing(trainer, "loss"), sharded.meeting() as works:
            if works:
                sharded.next = session.look()
        self._settle(trainer, sharded.failure)

    def _settle(self, trainer: pl.Trainer, failure: Exception | None) -> None:
        """After an error there is no next look; processes that no longer agree would wait for each other."""
        if failure is not None:
            self._session, self._curves.gave_up = None, f"the analysis failed at step {trainer.global_step}"
            if self.raise_errors or trainer.is_global_zero:
                self.report_failure(trainer, failure, "loss")

    def _report(self, trainer: pl.Trainer) -> None:
        """By the first process, when no other waits for it."""
        found = None if self._session is None else self._session.agreement()
        if self._session is None or found is None:
            return
        if self.verbose:
            show(loss_chart.summary(self._curves, self._session.theory or "prediction", found))
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        if not self._predicted or not self.draws(trainer):
            return
        try:
            with self.analysing(trainer, "chart"):
                send_figure(trainer, "loss_decay", self._figure(), {k: v.numpy() for k, v in self.curves.items()})
        except Exception as error:
            self._settle(trainer, error)

    def plot(self) -> Any:
        """Predicted and observed loss, and the modes of the kernel that carry the fall where one predicts.

        Returns:
            A matplotlib figure outside pyplot.

        Raises:
            RuntimeError: No prediction has been made.
        """
        if not self._predicted:
            raise RuntimeError("LossDecayMonitor has made no prediction in this process; fit with it first")
        return self._figure(with_modes=True)

    def _figure(self, with_modes: bool = False) -> Any:
        session = self._session
        assert session is not None  # noqa: S101
        return loss_chart.figure(
            self._curves, session.ahead, self._initial, ntk=self.wanted.kernel.ntk, with_modes=with_modes,
            tolerance=self.wanted.measuring.tolerance, probe=session.probe_size,
        )  # fmt: skip

    @property
    def _predicted(self) -> bool:
        return self._session is not None and (self._initial is not None or bool(self._session.ahead.predictions))

    @property
    def _initial(self) -> Forecast | None:
        tracker = None if self._session is None else self._session.tracker
        return None if tracker is None else tracker.initial

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._curves.rows or self._session is None:
            return {"curves": self._curves.state_dict()} if self._curves.rows else {}
        tracker = self._session.tracker
        return {
            "curves": self._curves.state_dict(),
            "tracker": None if tracker is None else tracker.state_dict(),
            "ahead": self._session.ahead.state_dict(),
            "settings": self._session.identity(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._testing:  # whatever checkpoint that is of, the curves of training stay
            return
        self._reset()
        if not state_dict:
            return
        try:
            self._curves, self._restored = LossCurves.from_state(state_dict["curves"]), state_dict
        except FOREIGN as error:
            self._reset()
            log.warning("LossDecayMonitor starts anew: the checkpoint's state is none of its own (%r)", error)
