"""Quantities of a network that methods score by: its loss on a batch, and its outputs on an input of ones."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon._shared.model_io import (
    call_model,
    divide_by_temperature,
    flat_outputs,
    floating_dtype,
    guess_inputs,
    is_float,
    ones_like_sample,
    output_rows,
)
from lightning_graphon._shared.objects.trees import tree_map

LossFn = Callable[[Any, Any], Tensor]


class Objective(Protocol):
    """Loss and flow of a network; `prune` computes them from (inputs, targets), the callback from a training_step."""

    def loss(self, batch: Any, temperature: float = 1.0) -> Tensor:
        """Scalar loss of one batch, with the network's outputs divided by `temperature`."""

    def outputs(self, batch: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Outputs [N, K] for inputs changed by a function of each floating-point tensor, in the model's precision."""

    def outputs_of_ones(self, batch: Any, scale: float = 1.0) -> Tensor:
        """All outputs [K], or of a batch [N · K], for inputs of ones times `scale`, shaped like those of `batch`."""


class SupervisedObjective:
    """Objective of a plain module on (inputs, targets) pairs.

    Args:
        model: Called as `model(inputs)`, or `model(**inputs)` for a dict, `model(*inputs)` for a tuple.
        loss_fn: `loss_fn(outputs, targets)` -> scalar tensor; None means cross-entropy with class indices.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn | None = None) -> None:
        self.model = model
        self.loss_fn = loss_fn or _cross_entropy

    def loss(self, batch: Any, temperature: float = 1.0) -> Tensor:
        """Scalar loss of one (inputs, targets) batch."""
        inputs, targets = split_batch(batch)
        outputs = call_model(self.model, inputs)
        return self.loss_fn(divide_by_temperature(outputs, temperature), targets)

    def outputs(self, batch: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Outputs [N, K] for changed inputs."""
        dtype = floating_dtype(self.model)
        inputs = tree_map(lambda x: change(x.to(dtype)) if is_float(x) else x, self._inputs(batch))
        return output_rows(call_model(self.model, inputs))

    def outputs_of_ones(self, batch: Any, scale: float = 1.0) -> Tensor:
        """All outputs [K] for one sample of ones times `scale`."""
        inputs = self._inputs(batch)
        return flat_outputs(call_model(self.model, ones_like_sample(inputs, self.model, scale)))

    def _inputs(self, batch: Any) -> Any:
        return guess_inputs(self.model) if batch is None else split_batch(batch)[0]


def split_batch(batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch.

    Raises:
        TypeError: `batch` is not a pair.
    """
    # A list of two tensors is what a default collate function returns.
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    kind = f"{type(batch).__name__} of length {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise TypeError(f"batches must yield (inputs, targets) pairs, got a {kind}; a single batch is [(inputs, targets)]")


def _cross_entropy(outputs: Any, targets: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or is_float(targets):
        kind = f"{targets.dtype} targets" if isinstance(targets, Tensor) else f"{type(targets).__name__} targets"
        raise ValueError(
            f"the default loss, cross-entropy, needs a tensor of logits and integer class targets, got {kind}: "
            "pass loss_fn(outputs, targets)"
        )
    return F.cross_entropy(outputs, targets)
