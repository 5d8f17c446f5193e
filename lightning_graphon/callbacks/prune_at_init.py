"""`PruneAtInit`: prune any LightningModule on fit start and train it sparse."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_graphon._shared.checks import check_choice, plain
from lightning_graphon._shared.choices import Rescale, Rescore, Schedule
from lightning_graphon._shared.weight_layout import in_rows
from lightning_graphon.callbacks._distributed import agreement
from lightning_graphon.callbacks._logging.scalars import limit_scalars, print_masks
from lightning_graphon.callbacks._module.scoring import score_module
from lightning_graphon.callbacks._module.training_step import ModuleLoss
from lightning_graphon.callbacks._sparsity.sparse_callback import SparseCallback
from lightning_graphon.pruning import (
    GivenMasks,
    Masks,
    PruningConfig,
    as_masks,
    rescale_,
    sparsity_of,
)


class PruneAtInit(SparseCallback):
    """Prunes the module when `fit` starts and keeps the pruned weights at zero during training.

    Batches come from the trainer's own train dataloader and the loss from the module's own `training_step`, so a module
    needs no change. Parameters keep their identity, checkpoints have the keys of the dense model and load without this
    package, and a resumed run has the very same masks. Under DDP scores are averaged over the data of all processes.
    Under `ModelParallelStrategy` (FSDP2, tensor parallelism) every process gathers the whole weights while it scores,
    and keeps its own shards at zero afterwards; where they do not fit, use `PruneAtInit.from_masks`
    with masks found elsewhere.

    Masks simulate sparsity: pruned weights are zero, training is neither faster nor smaller by itself. Keep the
    callback in the trainer as long as the network is to stay sparse. Two of them in one trainer need different
    `include` or `exclude`.

    Logged: `sparsity/<layer>`, `sparsity/total` and `sparsity/model`, the fraction removed of a layer's weights, of
    those selected and of all parameters, once when training starts; with `report_limits` also
    `graphon/<layer>/limit_distance`. TensorBoard has the layers in one table under Text, `sparsity/layers`.

    Args:
        method: A method of `prune`: "random", "magnitude", "snip", "grasp", "synflow", "synflow-l2", "px", "ntk-sap",
            "force", "prospr", "ramanujan", "graphon", or your own (`register_method`); or "given",
            with `options={"masks": ...}` and nothing that says how to find masks: see `from_masks`.
        sparsity: Fraction of the selected weights to remove, in [0, 1); an N:M allocation says it by itself.
        allocation: "global", "uniform", "er", "erk", a dict from names or patterns to sparsities, or "2:4" and other
            N:M: the N best of every M consecutive inputs of a unit.
        schedule: "exponential" or "linear" fall of the kept number over the rounds.
        steps: Number of rounds; None: the method's own, 100 for SynFlow and 1 for SNIP; under N:M at most M - N.
        include: Which weights: names, globs, "re:..." or class names; None: every Linear and Conv weight, and the like
            of other libraries. Frozen ones are scored if named, and masked when they thaw.
        exclude: Which weights not.
        min_density: Least fraction kept in every layer.
        seed: Seed of random methods and of dropout while scoring.
        options: Options of the method, such as {"absolute": True} for grasp.
        batches: How many batches of the train dataloader to score on, or the batches themselves.
        loss_fn: `loss_fn(pl_module, batch)` -> scalar, in place of `training_step`.
        eval_mode: Score in eval mode (batch norm with running statistics, no dropout), as the reference
            implementations do; by default the modules stay in the mode they are in.
        verbose: Print the table of sparsities.
        report_limits: Fit the factorised saliency model to the scores of the first round and report, by layer, the L2
            distance between the graphon that it predicts and that of the mask; seconds for millions of weights. For
            methods with several rounds it shows what the further rounds change.
        layer_scalars: Log the scalars of layers to TensorBoard, too, a chart for each.
        rescale: Scale the weights that stay, once, so that the sum of squares of every output unit ("unit") or layer
            ("layer") is that of the dense network; None: they keep their values. See `rescale_`.
        rescore: "redrawn": score weights that are drawn anew by the layers' own `reset_parameters`, not those that will
            train.

    Raises:
        FileNotFoundError: There is no file of masks there.
        TypeError: An argument has the wrong type, is missing, or has no meaning beside `masks`; or (on fit) the Trainer
            is that of `pytorch_lightning`.
        ValueError: An argument has a value that is not allowed, the file holds no masks, or (on fit) the masks were
            made for another model.
        MemoryError: (on fit) the whole weights of a sharded network do not fit on every process.
        RuntimeError: (on fit) the strategy flattens parameters (FSDPStrategy, DeepSpeed), or processes disagree on the
            masks.

    >>> PruneAtInit("snip", sparsity=0.9).masks is None
    True
    """

    def __init__(
        self,
        method: str | Callable[..., dict[str, Tensor]],
        sparsity: float | None = None,
        *,
        allocation: str | Mapping[str, float] = "global",
        schedule: Schedule = "exponential",
        steps: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        min_density: float | None = None,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        batches: int | Sequence[Any] = 4,
        loss_fn: ModuleLoss | None = None,
        eval_mode: bool = False,
        verbose: bool = True,
        report_limits: bool = False,
        layer_scalars: bool = False,
        rescale: Rescale | None = None,
        rescore: Rescore | None = None,
    ) -> None:
        super().__init__(verbose, layer_scalars)
        self.config: PruningConfig | None = None
        self._given = Masks({})
        if method == "given":
            _refuse_beside_masks(locals())
            self._given = as_masks((options or {}).get("masks", {}))
        else:
            own, options = sparsity_of(allocation, sparsity), options or {}
            self.config = PruningConfig(
                method, own, allocation, schedule, steps, include, exclude, min_density, seed, options,
                rescore,
            )  # fmt: skip
        if rescale is not None:
            check_choice("rescale", rescale, get_args(Rescale))
        self.batches: int | Sequence[Any] = plain(batches)
        if isinstance(self.batches, int) and self.batches < 1:
            raise ValueError(f"batches must be a number of batches, at least 1, or a list of batches, got {batches!r}")
        self.loss_fn = loss_fn
        self.eval_mode = eval_mode
        self.report_limits = report_limits
        self.rescale: Rescale | None = plain(rescale)
        self._limits: dict[str, float] = {}

    @classmethod
    def from_masks(cls, masks: GivenMasks, *, rescale: Rescale | None = None, verbose: bool = True) -> "PruneAtInit":
        """Train with masks that were found elsewhere, in place of a method and a sparsity.

        Args:
            masks: `Masks`, a dict from parameter names to bool tensors, or the path of a file that `Masks.save` wrote.
            rescale: As in the constructor.
            verbose: Print the table of sparsities.

        Raises:
            FileNotFoundError: There is no file of masks there.
            TypeError: Neither a mapping nor a path, or a value is no bool tensor.
            ValueError: The file holds no masks, or there is none.

        >>> import torch
        >>> PruneAtInit.from_masks({"net.weight": torch.tensor([[True, False]])}).masks is None  # until the fit starts
        True
        """
        return cls("given", options={"masks": masks}, rescale=rescale, verbose=verbose)

    @property
    @override
    def state_key(self) -> str:
        # Not by method or sparsity: a checkpoint of another sparsity must be refused, not overlooked.
        config = self.config
        return self._generate_state_key(include=config and config.include, exclude=config and config.exclude)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._masks is None:
            return {}
        return {**agreement.identity(self.config, self._given, self.rescale), **self._masks.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._resumes and self._masks is not None:  # another network may be tested, and is not changed
            return
        if self.config is not None:
            agreement.check_same(agreement.identity(self.config, self._given, self.rescale), state_dict)
        masks = Masks({})
        masks.load_state_dict(state_dict)
        if self.config is None and masks != self._given:
            raise ValueError(
                f"the checkpoint was trained with other masks ({masks}) than those given ({self._given}): give the "
                "same masks, or start anew from the checkpoint's weights"
            )
        self._detach()
        self._masks, self._module = masks, None
        if self.verbose:
            rank_zero_info(f"PruneAtInit goes on with the checkpoint's {masks}")

    @override
    def _layer_numbers(self) -> dict[str, float]:
        return self._limits

    @override
    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Masks:
        return self._given if self.config is None else self._score(trainer, pl_module, self.config)

    @override
    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Masks:
        masks = super()._find(trainer, pl_module)
        if self.rescale is not None:
            rescale_(pl_module, masks, self.rescale)
        if self.verbose and trainer.is_global_zero:
            title = "the masks given" if self.config is None else str(self.config)
            print_masks(masks, f"PruneAtInit: {title}", self._limits, pl_module)
        return masks

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, config: PruningConfig) -> Masks:
        first: dict[str, Tensor] = {}
        masks = score_module(
            trainer, pl_module, config, batches=self.batches, loss_fn=self.loss_fn, eval_mode=self.eval_mode,
            show_progress=self.verbose,
            on_first_scores=first.update if self.report_limits else None,
        )  # fmt: skip
        if trainer.is_global_zero:
            self._limits = limit_scalars(in_rows(pl_module, first), Masks(in_rows(pl_module, masks)))
        return masks


def _refuse_beside_masks(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that say how masks are to be found, where they are given.

    Raises:
        TypeError: One of them differs from its default; the message names it.
    """
    beside = ("self", "method", "options", "verbose", "rescale", "layer_scalars")
    defaults = {name: p.default for name, p in inspect.signature(PruneAtInit.__init__).parameters.items()}
    others = [n for n, default in defaults.items() if n not in beside and arguments[n] != default]
    if others:
        raise TypeError(f"masks are given, so nothing is scored: leave out {', '.join(others)}, or the masks")
