"""Quantities of a network that methods score by: its loss on a batch, and its outputs on an input of ones."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

LossFn = Callable[[Any, Any], Tensor]


class Objective(Protocol):
    """Loss and flow of a network; `prune` computes them from (inputs, targets), the callback from a training_step."""

    def loss(self, batch: Any, temperature: float = 1.0) -> Tensor:
        """Scalar loss of one batch, with the network's outputs divided by `temperature`."""

    def outputs_of_ones(self, batch: Any, scale: float = 1.0) -> Tensor:
        """All outputs [K] for one input of ones times `scale`, shaped like those of `batch`."""


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
        outputs = call(self.model, inputs)
        return self.loss_fn(divide_by_temperature(outputs, temperature), targets)

    def outputs_of_ones(self, batch: Any, scale: float = 1.0) -> Tensor:
        """All outputs [K] for one sample of ones times `scale`."""
        inputs = guess_inputs(self.model) if batch is None else split_batch(batch)[0]
        return flat_outputs(call(self.model, ones_like_sample(inputs, self.model, scale)))


def split_batch(batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch.

    Raises:
        TypeError: `batch` is not a pair.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    kind = f"{type(batch).__name__} of length {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise TypeError(f"batches must yield (inputs, targets) pairs, got a {kind}; a single batch is [(inputs, targets)]")


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on inputs that may be a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def divide_by_temperature(outputs: Any, temperature: float) -> Any:
    """Divide every floating-point tensor of `outputs` by `temperature`."""
    if temperature == 1.0:
        return outputs
    return tree_map(lambda x: x / temperature if is_float(x) else x, outputs)


def flat_outputs(outputs: Any) -> Tensor:
    """The numbers [K] of every floating-point tensor in `outputs`.

    Raises:
        ValueError: There is none.
    """
    leaves = [leaf.flatten() for leaf in tree_leaves(outputs) if is_float(leaf)]
    if not leaves:
        raise ValueError(f"the model returned no floating-point tensor but {type(outputs).__name__}")
    return torch.cat(leaves)


def ones_like_sample(inputs: Any, model: nn.Module, scale: float = 1.0) -> Any:
    """One sample of ones (times `scale`) in the model's precision; integer inputs (tokens) keep their values."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        if not is_float(x):
            return x[:1]
        sample = x[:1] if len(x) else x.new_empty(1, *x.shape[1:])  # an empty batch has a shape as well
        return torch.full_like(sample, scale, dtype=dtype)

    return tree_map(one, inputs)


def guess_inputs(model: nn.Module) -> Any:
    """Inputs of the right shape without data: `example_input_array`, or for a first Linear layer.

    Raises:
        ValueError: The shape is unknown.
    """
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return example
    first = next((m for m in model.modules() if any(True for _ in m.parameters(recurse=False))), None)
    if isinstance(first, nn.Linear):
        return torch.ones(1, first.in_features, device=first.weight.device)
    raise ValueError(
        f"the shape of the inputs of {type(model).__name__} is not known: give one batch, "
        "batches=[(inputs, targets)] (only its shape is used), or set model.example_input_array"
    )


def _cross_entropy(outputs: Any, targets: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or is_float(targets):
        kind = f"{targets.dtype} targets" if isinstance(targets, Tensor) else f"{type(targets).__name__} targets"
        raise ValueError(
            f"the default loss, cross-entropy, needs a tensor of logits and integer class targets, got {kind}: "
            "pass loss_fn(outputs, targets)"
        )
    return F.cross_entropy(outputs, targets)


def is_float(x: Any) -> bool:
    """Whether `x` is a floating-point tensor."""
    return isinstance(x, Tensor) and x.is_floating_point()
