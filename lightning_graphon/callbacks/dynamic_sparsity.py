"""`DynamicSparsity`: train any LightningModule sparse with masks that change on the way."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_graphon._shared.checks import plain
from lightning_graphon._shared.choices import Rescore
from lightning_graphon._shared.weight_layout import in_rows
from lightning_graphon.callbacks._distributed import agreement
from lightning_graphon.callbacks._distributed.dense_gradients import averaged_gradients, loss_scale, whole_weights
from lightning_graphon.callbacks._logging.scalars import log_scalars, print_masks
from lightning_graphon.callbacks._module.scoring import score_module, untrained_parameters
from lightning_graphon.callbacks._module.training_step import ModuleLoss
from lightning_graphon.callbacks._sparsity.arguments import check_allocation, given_masks, refuse_beside_masks
from lightning_graphon.callbacks._sparsity.sparse_callback import SparseCallback
from lightning_graphon.graphon import score_limits
from lightning_graphon.pruning import (
    Enforcer,
    GivenMasks,
    GrowthConfig,
    Masks,
    MaskUpdater,
    PruningConfig,
    beginning_masks,
    methods,
    sparsity_of,
    without_copies,
)


class DynamicSparsity(SparseCallback):
    """Trains sparse from the first step on, with masks that drop weights and grow others every so many steps.

    All that `PruneAtInit` guarantees holds: dropped weights are exactly zero, masks are the same on all processes, a
    resumed run goes on bit for bit in the middle of the schedule, checkpoints have the keys of the dense model. Several
    of them, and of `PruneAtInit`, work side by side on different layers (`include`, `exclude`).

    Masks change after a step of the optimizers: each layer loses the share of its weights that is smallest in
    magnitude, and as many others grow. What grows begins at zero, with an optimizer state of zero; the step counts of
    optimizers such as Adam go on. Dense gradients, where a method needs them, are those of all batches of that step,
    averaged over processes; other steps cost nothing. Gradients that are not finite are left out, and so is an update
    that has no others. Under manual optimisation a batch counts as a step. Averages of weights that others keep outside
    the module, as SWA does, are denser than the network.

    Logged: `sparsity/...` as by `PruneAtInit` when training starts, and again when counts have changed; at each update
    `growth/<layer>/churn` and `growth/churn`, the share of the kept weights that have just grown, and
    `growth/fraction`, the share that was dropped to make room.

    Args:
        method: "rigl" (largest gradients), "set" (random), "snfs" (largest averages of gradients), "srigl" (RigL with
            a constant fan-in and units that are ablated), "graphon" (toward a target graphon), "gmp" (gradual magnitude
            pruning from a dense start), or your own (`register_growth`).
        sparsity: Fraction of the selected weights that is removed, in [0, 1); under "gmp" in the end.
        every_n_steps: Steps of the optimizers between two updates.
        fraction: Share of the kept weights that the first updates exchange; it falls to zero by a cosine.
        stop: When masks stay: a share of the planned training such as 0.75, or a number of steps such as 1000.
        start: Masks to begin with: a method of `prune` such as "snip", `Masks`, a dict of bool tensors, or the path of
            a file of them, which have a sparsity of their own; None: random, "gmp" dense.
        allocation: How the budget is spread over layers at the start: "erk", "er", "uniform", "global", or a dict from
            names or patterns to sparsities.
        redistribute: Let the counts of layers move to where gradients are large, as SNFS does; else each stays.
        include: Which weights, as in `PruneAtInit`.
        exclude: Which weights not.
        min_density: Least fraction kept in every layer, at every step.
        seed: Seed of random masks and of random growth.
        options: Options of the growth method: {"momentum": 0.9} of snfs, {"min_salient": 0.3} of srigl,
            {"graphons": ...} of graphon, which starts from the same graphons.
        batches: How many batches of the train dataloader to score on, or the batches themselves, if `start` needs any.
        loss_fn: `loss_fn(pl_module, batch)` -> scalar, in place of `training_step`, to score.
        eval_mode: Score in eval mode.
        report_limits: Fit the factorised saliency model to the scores of `start`, so that a `GraphonMonitor` shows how
            far graphons are from the limit of the start's method, and not from that of random masks.
        verbose: Print the table of sparsities.
        layer_scalars: Log the scalars of layers to TensorBoard, too, a chart for each.
        rescore: "redrawn": score weights that are drawn anew to find the first masks.

    Raises:
        FileNotFoundError: There is no file of masks there.
        TypeError: An argument has the wrong type, is missing, or has no meaning beside given masks.
        ValueError: An argument has a value that is not allowed; or (on fit) `stop` is a share of a training without a
            planned end, or another callback has masks of the same weights.
        MemoryError, RuntimeError: (on fit) As `PruneAtInit`.

    >>> DynamicSparsity("rigl", sparsity=0.9).masks is None  # until the fit starts
    True
    """

    moves: ClassVar[bool] = True

    def __init__(
        self,
        method: str,
        sparsity: float | None = None,
        *,
        every_n_steps: int = 100,
        fraction: float = 0.3,
        stop: float | int = 0.75,
        start: str | GivenMasks | None = None,
        allocation: str | Mapping[str, float] = "erk",
        redistribute: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        min_density: float | None = None,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        batches: int | Sequence[Any] = 4,
        loss_fn: ModuleLoss | None = None,
        eval_mode: bool = False,
        report_limits: bool = False,
        verbose: bool = True,
        layer_scalars: bool = False,
        rescore: Rescore | None = None,
    ) -> None:
        super().__init__(verbose, layer_scalars)
        self.growth = GrowthConfig(method, every_n_steps, fraction, stop, redistribute, options or {})
        self.config: PruningConfig | None = None
        self._given = Masks({})
        begins = self.growth.resolved.begins
        if start is not None and begins == "dense":
            raise ValueError(f"{method!r} begins dense: leave out start={start!r:.40}, or take a method that grows")
        if start is None or (isinstance(start, str) and start in methods()):
            own = {"graphons": self.growth.options.get("graphons")} if begins == "graphon" and start is None else {}
            first = start or ("graphon" if own else "random")
            check_allocation(allocation, begins)
            own_sparsity = sparsity_of(None, sparsity)
            self.config = PruningConfig(
                first, own_sparsity, allocation, "exponential", None, include, exclude, min_density, seed, own, rescore
            )
        else:
            self._given = given_masks(start)
            refuse_beside_masks(locals(), DynamicSparsity.__init__)
        self._start = "masks" if self.config is None else start or begins
        self.seed, self.batches = int(plain(seed)), plain(batches)
        if isinstance(self.batches, int) and self.batches < 1:
            raise ValueError(f"batches must be a number of batches, at least 1, or a list of batches, got {batches!r}")
        self.loss_fn, self.eval_mode, self.report_limits = loss_fn, eval_mode, report_limits
        self._updater: MaskUpdater | None = None
        self._restored: dict[str, Any] | None = None
        self._seen_step, self._scale = 0, 1.0

    @override
    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Masks:
        self._updater = None
        begins = self.growth.resolved.begins
        if self.config is None:
            return self._given
        if self._start in ("dense", "constant fan-in"):
            config = without_copies(pl_module, self.config, untrained_parameters(trainer, pl_module))
            return beginning_masks(pl_module, config, constant_fan_in=begins == "constant fan-in")
        first: dict[str, Tensor] = {}
        masks = score_module(
            trainer, pl_module, self.config, batches=self.batches, loss_fn=self.loss_fn, eval_mode=self.eval_mode,
            show_progress=self.verbose and trainer.is_global_zero,
            on_first_scores=first.update if self.report_limits else None,
        )  # fmt: skip
        rows = in_rows(pl_module, masks), in_rows(pl_module, first)
        self.start_limits = score_limits(*rows) if self.report_limits else {}
        return masks

    @override
    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Masks:
        masks = super()._find(trainer, pl_module)
        if self.verbose and trainer.is_global_zero:
            print_masks(masks, f"DynamicSparsity: {self.growth.method} from {self._start}", model=pl_module)
        return masks

    @override
    def _enforce(self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks) -> Enforcer:
        # Copies, as they are written to, beside the weights.
        pairs = zip(masks, masks.pairs(pl_module), strict=True)
        own = Masks({name: mask.to(parameter.device, copy=True) for name, (parameter, mask) in pairs})
        return super()._enforce(trainer, pl_module, own)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._seen_step, self.updates = trainer.global_step, 0
        self.plan(trainer, pl_module)

    @override
    def plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> MaskUpdater:
        if self._updater is None or (trainer.global_step == 0 and self._restored is None):
            schedule = self.growth.schedule(trainer.estimated_stepping_batches)
            masks = self._masks or Masks({})
            self._updater = MaskUpdater(pl_module, masks, self.growth, schedule, self.config, self.seed)
        if self._restored is not None:
            self._updater.load_state_dict(self._restored)
            self._restored = None
        return self._updater

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._updater is not None and self._enforcer is not None and self._updater.needs_gradients:
            self._enforcer.collect_gradients()
            self._scale = loss_scale(trainer)  # which may change after the step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._updater is None or self._enforcer is None or trainer.global_step == self._seen_step:
            return  # gradients are still accumulated
        self._seen_step = trainer.global_step
        collected, due = self._updater.needs_gradients, self._updater.step()
        if collected or due:
            self._follow_gradients(trainer, pl_module, self._updater, self._enforcer, due)

    def _follow_gradients(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, updater: MaskUpdater, enforcer: Enforcer, due: bool
    ) -> None:
        masks = self._masks or Masks({})
        found = averaged_gradients(pl_module, list(masks), enforcer.take_gradients(), self._scale)
        updater.add_to_momentum(found)
        if due:
            new = updater.update(whole_weights(pl_module, list(masks)), found, masks)
            if new:
                agreement.check_same_masks(trainer, pl_module, Masks(new))
                self._replace(trainer, pl_module, updater, enforcer, new)

    def _replace(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        updater: MaskUpdater,
        enforcer: Enforcer,
        new: Mapping[str, Tensor],
    ) -> None:
        masks = self._masks or Masks({})
        changes = updater.changes(masks, new)
        enforcer.update(new)
        self.updates += 1
        if self._copies is not None:
            self._copies.prune_again(pl_module, masks)
        before, kept, grown = (sum(numbers) for numbers in zip(*changes.values(), strict=True))
        layers = {f"growth/{name}/churn": came / max(1, now) for name, (_, now, came) in changes.items()}
        total = {"growth/churn": grown / max(1, kept)}
        if self.growth.resolved.begins != "dense":
            total["growth/fraction"] = updater.schedule.fraction_at(updater.steps)
        log_scalars(trainer, {**layers, **total}, () if self.layer_scalars else layers)
        if kept != before or self.growth.redistribute:
            self._log_sparsity(trainer)

    @property
    @override
    def state_key(self) -> str:
        config = self.config
        return self._generate_state_key(include=config and config.include, exclude=config and config.exclude)

    def _identity(self) -> dict[str, Any]:
        """Who the masks come from, and how they change; plain values."""
        growth, first = self.growth, agreement.identity(self.config, self._given, None)
        return {
            "method": growth.method,
            "sparsity": first["sparsity"],
            "allocation": first["allocation"],
            "start": self._start,
            "every_n_steps": growth.every_n_steps,
            "fraction": growth.fraction,
            "stop": growth.stop,
            "redistribute": growth.redistribute,
            "seed": self.seed,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._masks is None:
            return {}
        progress = self._restored if self._updater is None else self._updater.state_dict()
        return {**self._identity(), **self._masks.state_dict(), "progress": progress}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._resumes and self._masks is not None:  # another network may be tested, and is not changed
            return
        agreement.check_same(self._identity(), state_dict, "DynamicSparsity")
        masks = Masks({})
        masks.load_state_dict(state_dict)
        self._detach()
        self._masks, self._module, self._restored = masks, None, state_dict.get("progress")
        if self.verbose:
            rank_zero_info(f"DynamicSparsity goes on with the checkpoint's {masks}")
