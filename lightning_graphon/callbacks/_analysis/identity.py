"""What must agree between a checkpoint and the run that resumes it."""

from collections.abc import Mapping
from typing import Any

from lightning_graphon.pruning.config import PruningConfig
from lightning_graphon.pruning.masks import Masks


def identity(plan: PruningConfig | None, given: Masks, rescale: str | None) -> dict[str, Any]:
    """Who found the masks and what was done to the weights; plain values."""
    if plan is None:
        return {"method": "given masks", "sparsity": given.sparsity, "allocation": None, "rescale": rescale}
    allocation = plan.allocation
    return {
        "method": plan.resolved.name,
        "sparsity": float(plan.sparsity),
        "allocation": dict(allocation) if isinstance(allocation, Mapping) else allocation,
        "rescale": rescale,
    }


def check_same(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse to resume what was pruned in another way.

    Raises:
        ValueError: It was; the message names the argument.
    """
    for name, value in mine.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the checkpoint was pruned with {name}={saved.get(name)!r} but this PruneAtInit has {name}={value!r}: "
                "resume with the same arguments, or start anew from the checkpoint's weights"
            )
