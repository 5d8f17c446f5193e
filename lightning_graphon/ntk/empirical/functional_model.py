"""A module as a pure function of its parameters; the module itself is not changed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.attention
from torch import Tensor, nn

from lightning_graphon._shared.checks import nearest
from lightning_graphon._shared.choices import Parameterization
from lightning_graphon._shared.unmasked_zeros import trainable_weights, warn_of_unmasked_zeros
from lightning_graphon.ntk.empirical.gradient_factors import Convolution

Inputs = Tensor | tuple[Tensor, ...]


def batch_size(x: Inputs) -> int:
    """Number of samples, the first dimension.

    Raises:
        ValueError: Not a tensor or a tuple of tensors with the same first dimension, or no samples.
    """
    parts = (x,) if isinstance(x, Tensor) else tuple(x)
    if not parts or any(not isinstance(p, Tensor) or p.ndim == 0 for p in parts):
        raise ValueError("x must be a tensor [N, ...], or a tuple of tensors that the model takes as arguments")
    if len({len(p) for p in parts}) != 1 or len(parts[0]) == 0:
        raise ValueError(f"x must hold the same positive number of samples everywhere, got {[len(p) for p in parts]}")
    return len(parts[0])


def select_samples(x: Inputs, part: slice | Tensor) -> Inputs:
    """Some samples of the inputs."""
    return x[part] if isinstance(x, Tensor) else tuple(p[part] for p in x)


def detach_inputs(x: Inputs) -> Inputs:
    """Inputs without gradients; inference tensors, which autograd refuses, are copied."""
    if isinstance(x, Tensor):
        return x.clone() if x.is_inference() else x.detach()
    return tuple(p.clone() if p.is_inference() else p.detach() for p in x)


def input_device(x: Inputs) -> torch.device:
    """Device of the samples."""
    return x.device if isinstance(x, Tensor) else x[0].device


@dataclass(frozen=True)
class FunctionalModel:
    """A module, its masked parameter values, and the weights of squared gradients in the kernel.

    Attributes:
        model: The module.
        values: Detached parameters by qualified name, multiplied by their masks.
        weights: Mask times preconditioner of each parameter, of its shape, or None for ones.
        factors: The parameterisation's factor γ of each parameter.
        trainable: Names of parameters that contribute: `requires_grad` and floating point.
    """

    model: nn.Module
    values: dict[str, Tensor]
    weights: dict[str, Tensor | None]
    factors: dict[str, float]
    trainable: tuple[str, ...]

    def __call__(self, values: Mapping[str, Tensor], x: Inputs) -> Tensor:
        """Outputs [N, C] (further dimensions flattened) at the given parameter values.

        Raises:
            TypeError: The model does not return a tensor.
            ValueError: The first dimension of its output is not the number of samples.
        """
        # Parameters that are not varied keep their masked values.
        args = (x,) if isinstance(x, Tensor) else x
        out = torch.func.functional_call(self.model, {**self.values, **values}, args)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"the model returns {type(out).__name__}, not a tensor; wrap it so that forward returns the logits"
            )
        if out.ndim == 0 or len(out) != len(args[0]):
            raise ValueError(
                f"the model's output has shape {tuple(out.shape)} for {len(args[0])} samples; outputs must be [N, ...]"
            )
        return out.reshape(len(out), -1)

    def leaves(self) -> dict[str, Tensor]:
        """The trainable values as new leaves for autograd."""
        return {name: self.values[name].detach().requires_grad_() for name in self.trainable}

    def weight(self, name: str) -> Tensor | None:
        """Weights of the squared gradients of one parameter, γ included; None for ones."""
        given, factor = self.weights[name], self.factors[name]
        if given is None:
            return None if factor == 1.0 else torch.full_like(self.values[name], factor)
        return given if factor == 1.0 else given * factor


def functional_model(
    model: nn.Module, masks: Mapping[str, Tensor] | None, preconditioner: Mapping[str, Tensor] | None,
    parameterization: Parameterization, weight_variance: float, bias_variance: float, *, trained: bool = True,
) -> FunctionalModel:  # fmt: skip
    """Read a module's parameters, of which with `trained` some must be trainable.

    Raises:
        KeyError: A mask or preconditioner names no parameter.
        ValueError: Its shape is not the parameter's, or no parameter is trainable.
    """
    named = dict(model.named_parameters())
    trainable = tuple(n for n, p in named.items() if p.requires_grad and p.is_floating_point())
    if trained and not trainable:
        raise ValueError("no parameter of the model has requires_grad=True; its tangent kernel is zero")
    # Zeros that are trained and zeros that are pruned have different kernels.
    warn_of_unmasked_zeros(trainable_weights(model), masks)
    names = _aliases(model)
    given = [_resolve(m, names, named, what) for m, what in ((masks, "mask"), (preconditioner, "preconditioner"))]
    values, weights = {}, {}
    for name, p in named.items():
        kept = given[0].get(name)
        # Autograd refuses tensors that were made in inference mode.
        value = p.detach().clone() if p.is_inference() else p.detach()
        values[name] = value if kept is None else value * kept.to(value)
        weights[name] = _product(kept, given[1].get(name), value)
    factors = _factors(model, named, weight_variance, bias_variance) if parameterization == "ntk" else {}
    return FunctionalModel(model, values, weights, {n: factors.get(n, 1.0) for n in named}, trainable)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter, of tied ones too, to the one that `named_parameters` lists."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _resolve(
    given: Mapping[str, Tensor] | None, names: Mapping[str, str], named: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    resolved = {}
    for name, t in (given or {}).items():
        if name not in names:
            raise KeyError(f"{what} {name!r} names no parameter of the model. {nearest(name, names)}")
        if t.shape != named[names[name]].shape:
            raise ValueError(
                f"{what} {name!r} has shape {tuple(t.shape)}, its parameter {tuple(named[names[name]].shape)}"
            )
        resolved[names[name]] = t
    return resolved


def _product(kept: Tensor | None, scale: Tensor | None, value: Tensor) -> Tensor | None:
    parts = [t.to(value) for t in (kept, scale) if t is not None]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] * parts[1]


def _factors(
    model: nn.Module, named: Mapping[str, Tensor], weight_variance: float, bias_variance: float
) -> dict[str, float]:
    """γ of the NTK parameterisation for Linear and Conv layers: σ_w²/fan_in and σ_b²."""
    first = {id(p): name for name, p in named.items()}
    factors: dict[str, float] = {}
    for module in model.modules():
        if not isinstance(module, nn.Linear | Convolution):
            continue
        # A transposed convolution stores [in, out / groups, *taps].
        groups = int(module.groups) if getattr(module, "transposed", False) else 0  # type: ignore[arg-type]
        fan_in = module.weight[:, 0].numel() // groups if groups else module.weight[0].numel()
        factors[first.get(id(module.weight), "")] = weight_variance / fan_in
        if module.bias is not None:
            factors[first.get(id(module.bias), "")] = bias_variance
    return factors
