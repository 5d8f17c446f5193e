"""Agreement: of the processes of a run, and of a checkpoint with the run that resumes it."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch import distributed as dist

from lightning_graphon.pruning import Masks, PruningConfig

# Strategies that hide parameters in flat buffers, where a weight has neither its shape nor a gradient of its own.
_FLATTENING = ("FSDPStrategy", "DeepSpeedStrategy")


def refuse_flattened(trainer: pl.Trainer, who: str = "PruneAtInit") -> None:
    """Raise where parameters are flattened and cut over processes.

    Raises:
        RuntimeError: The strategy does so; the message says what to use.
    """
    if flattens_parameters(trainer):
        raise RuntimeError(
            f"{who} does not support {type(trainer.strategy).__name__}: it flattens the parameters and cuts "
            "them into shards, where masks of weights would silently do nothing. Use ModelParallelStrategy with "
            "fully_shard (FSDP2) in configure_model, strategy='ddp' or one device."
        )


def flattens_parameters(trainer: pl.Trainer) -> bool:
    """Whether the strategy hides parameters in flat buffers and cuts these into shards."""
    return _is_one_of(trainer, _FLATTENING)


def refuse_other_package(trainer: pl.Trainer, who: str = "PruneAtInit") -> None:
    """Raise where the trainer is that of `pytorch_lightning`, whose classes are others under the same names.

    Raises:
        TypeError: It is.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"{who} works with lightning.pytorch, but the Trainer comes from {type(trainer).__module__}: "
            "use `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`"
        )


def _is_one_of(trainer: pl.Trainer, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(trainer.strategy).__mro__)


def average(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all processes, summed in float64; the tensor itself on a single one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    total = tensor.detach().to(torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(tensor.dtype)


def check_same_masks(trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks) -> None:
    """Compare digests of the masks over all processes.

    Raises:
        RuntimeError: They differ; the message names the layers and the ranks.
    """
    if trainer.world_size == 1:
        return
    mine = torch.tensor(list(masks.digests().values()), device=pl_module.device)
    everyone = trainer.strategy.all_gather(mine).reshape(-1, len(mine)).cpu()
    wrong = (everyone != everyone[0]).nonzero().tolist()
    if wrong:
        names = list(masks)
        places = ", ".join(f"{names[layer]!r} on rank {rank}" for rank, layer in wrong[:5])
        raise RuntimeError(
            f"the masks differ between processes ({places} against rank 0): the processes do not start from the same "
            "weights or do not run the same code. Seed them alike (seed_everything) before building the model."
        )


def identity(config: PruningConfig | None, given: Masks, rescale: str | None) -> dict[str, Any]:
    """Who found the masks and what was done to the weights; plain values."""
    if config is None:
        return {"method": "given masks", "sparsity": given.sparsity, "allocation": None, "rescale": rescale}
    allocation = config.allocation
    return {
        "method": config.resolved.name,
        "sparsity": float(config.sparsity),
        "allocation": dict(allocation) if isinstance(allocation, Mapping) else allocation,
        "rescale": rescale,
    }


def check_same(mine: Mapping[str, Any], saved: Mapping[str, Any], who: str = "PruneAtInit") -> None:
    """Refuse to resume what was pruned in another way.

    Raises:
        ValueError: It was; the message names the argument.
    """
    for name, value in mine.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the checkpoint was pruned with {name}={saved.get(name)!r} but this {who} has {name}={value!r}: "
                "resume with the same arguments, or start anew from the checkpoint's weights"
            )
