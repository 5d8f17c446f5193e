"""What goes into somebody's model and what comes out: one call for all kinds of inputs, outputs as one vector."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon._shared.objects.trees import tree_leaves, tree_map


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model` on inputs that may be a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def divide_by_temperature(outputs: Any, temperature: float) -> Any:
    """Divide every floating-point tensor of `outputs` by `temperature`."""
    if temperature == 1.0:
        return outputs
    return tree_map(lambda x: x / temperature if is_float(x) else x, outputs)


def output_rows(outputs: Any) -> Tensor:
    """The numbers [N, K] of every floating-point tensor in `outputs`, a row for each sample.

    A single row where they share no first axis.

    Raises:
        ValueError: There is no such tensor.
    """
    leaves = [leaf for leaf in tree_leaves(outputs) if is_float(leaf)]
    if not leaves:
        raise ValueError(f"the model returned no floating-point tensor but {type(outputs).__name__}")
    sizes = {leaf.shape[:1] for leaf in leaves}
    samples = leaves[0].shape[0] if len(sizes) == 1 and leaves[0].ndim else 1
    return torch.cat([leaf.reshape(samples, -1) for leaf in leaves], dim=1)


def flat_outputs(outputs: Any) -> Tensor:
    """The numbers [N · K] of every floating-point tensor in `outputs`, sample by sample.

    Raises:
        ValueError: There is none.
    """
    return output_rows(outputs).flatten()


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The precision of a model: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of a model is; the CPU where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def ones_like_sample(inputs: Any, model: nn.Module, scale: float = 1.0) -> Any:
    """One sample of ones (times `scale`) in the model's precision; integer inputs (tokens) keep their values."""
    dtype = floating_dtype(model)

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        if not is_float(x):
            return x[:1]
        sample = x[:1] if len(x) else x.new_empty(1, *x.shape[1:])  # an empty batch has a shape, too
        return torch.full_like(sample, scale, dtype=dtype)

    return tree_map(one, inputs)


def guess_inputs(model: nn.Module) -> Any:
    """Inputs of the right shape without data: `example_input_array`, else from a first Linear layer.

    Raises:
        ValueError: The shape cannot be known.
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


def is_float(x: Any) -> bool:
    """Whether `x` is a floating-point tensor."""
    return isinstance(x, Tensor) and x.is_floating_point()
