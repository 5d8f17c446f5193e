"""A traced network at other numbers of hidden units: which neuron's place each of its units takes, and how it is built.

Units keep their order: layers that read or write the same units are resized together, as all blocks of a residual
stream.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon._shared.weight_layout import correct_sizes
from lightning_graphon.tracing import NotReadableError, Trace, trace
from lightning_graphon.tracing.axes import exchangeable_groups, same_units
from lightning_graphon.tracing.steps import Affine, Attention, BatchNorm, Embedding, Norm, Parameter, Step

_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def samples_for(model: nn.Module, inputs: Tensor | None) -> Tensor:
    """Two of the inputs; where there are none, zeros that the model's first layer takes, if that is a Linear layer.

    Raises:
        ValueError: It is not.
    """
    if inputs is not None:
        return inputs[:2]
    first = next((m for m in model.modules() if isinstance(m, _LAYERS)), None)
    if not isinstance(first, nn.Linear):
        what = "has no Linear layer" if first is None else f"begins with a {type(first).__name__}"
        raise ValueError(f"{type(model).__name__} {what}: pass inputs=, samples of the model, so that it can be read")
    like = next((p for p in first.parameters()), torch.empty(0))
    return torch.zeros(2, first.in_features, dtype=like.dtype, device=like.device)


def read_network(model: nn.Module, inputs: Tensor) -> Trace:
    """Steps of a module whose units may be drawn anew.

    Raises:
        ValueError: It cannot be read, or has units that cannot be drawn; the message names the layer.
    """
    try:
        found = trace(model, inputs)
    except NotReadableError as error:
        raise ValueError(f"cannot be redrawn: {error}") from error
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{type(model).__name__} does not run on samples of shape {tuple(inputs.shape[1:])}: pass inputs=, samples "
            f"of the model ({error})"
        ) from error
    if not any(isinstance(step, Affine) for step in found.steps):
        raise ValueError(f"the forward of {type(model).__name__} has no Linear layer and no convolution")
    parameters = dict(model.named_parameters())
    for step in found.steps:
        _check(step, parameters)
    return found


def check_runs(twin: nn.Module, model: nn.Module, inputs: Tensor) -> None:
    """Run a resized network.

    Raises:
        ValueError: It returns something else than the model, as with `view(-1, 512)` in its forward.
    """
    with torch.no_grad(), eval_semantics(model, inputs.device), eval_semantics(twin, inputs.device):
        expected = model(inputs).shape
        try:
            found = twin(inputs).shape
            what = f"it returns {tuple(found)} and not {tuple(expected)}" if found != expected else ""
        except RuntimeError as error:
            what = str(error)
    if what:
        raise ValueError(
            f"the forward of {type(model).__name__} holds sizes as numbers, which other widths do not have ({what})"
        )


def _check(step: Step, parameters: Mapping[str, nn.Parameter]) -> None:
    if isinstance(step, Attention) or (isinstance(step, Affine) and step.rows is not None):
        raise ValueError(f"{step.label}: attention cannot be redrawn, as its units belong to heads")
    if isinstance(step, Affine) and step.groups > 1:
        raise ValueError(f"{step.label}: a convolution with groups cannot be redrawn")
    if isinstance(step, Norm) and len(step.groups.unique()) > 1:
        raise ValueError(f"{step.label}: normalisation over groups of units cannot be redrawn, which would mix them")
    for name in parameter_names(step):
        if name not in parameters:
            raise ValueError(f"{step.label}, whose weight is computed (pruning hooks), cannot be redrawn")
        if not bool(parameters[name].isfinite().all()):
            raise ValueError(f"{step.label} has parameters that are not finite")


def parameter_names(step: Step) -> list[str]:
    """Names of the parameters of a step."""
    found = [getattr(step, key, None) for key in ("weight_name", "bias_name")]
    if isinstance(step, Parameter):
        found.append(step.name)
    return [name for name in found if name is not None]


@dataclass(frozen=True)
class Matrix:
    """How a layer's weight is a matrix of cells: classes of units at its rows, of units at taps at its columns.

    Attributes:
        step: The layer.
        rows: Class [out] of each row's unit.
        columns: Class [features] of each column's unit.
        taps: Tap [features] of each column.
    """

    step: Affine
    rows: Tensor
    columns: Tensor
    taps: Tensor


class Units:
    """Classes of a network's units that are the same, and groups of classes that are resized together."""

    def __init__(self, steps: Trace) -> None:
        self.trace = steps
        self.classes = same_units(steps)
        self._group = exchangeable_groups(steps, self.classes)
        written = [self.classes[s.units] for s in steps.steps if isinstance(s, Affine | Embedding)]
        free = torch.zeros_like(self._group, dtype=torch.bool)
        free[torch.cat(written)] = True  # others are parameters for all units
        self._group[~free] = -1

    @cached_property
    def hidden(self) -> dict[int, Tensor]:
        """Group -> its classes, in the order in which every layer has them."""
        found: dict[int, Tensor] = {}
        for step in self.trace.steps:
            classes = self.classes[step.units]
            for group in self._group[classes].unique().tolist():
                if group >= 0 and group not in found:
                    own = classes[self._group[classes] == group]
                    found[group] = own[: int((self._group == group).sum())]
        return found

    def order(self, step: Step, chosen: Mapping[int, Tensor]) -> Tensor:
        """Place [new units] among a step's units of each unit of the resized step.

        Args:
            step: The step.
            chosen: For each group the places among its classes that its new units take.

        Raises:
            ValueError: The step has its units in another order, or some of them only.
        """
        classes, found, at = self.classes[step.units], [], 0
        groups = self._group[classes].tolist()
        while at < len(groups):
            group = groups[at]
            if group < 0:
                end = next((i for i in range(at, len(groups)) if groups[i] >= 0), len(groups))
                found.append(torch.arange(at, end))
                at = end
                continue
            members = self.hidden[group]
            if not torch.equal(classes[at : at + len(members)], members):
                raise ValueError(f"{step.label} has its units in another order than layers before it: not redrawn")
            found.append(at + chosen[group])
            at += len(members)
        return torch.cat(found)

    def matrices(self) -> list[Matrix]:
        """The layers with weights, in the order of the forward pass."""
        found = []
        for step in self.trace.steps:
            if isinstance(step, Affine):
                columns = self.classes[self._source(step).units][step.features]
                found.append(Matrix(step, self.classes[step.units], columns, step.tap_of))
        return found

    def resized(self, step: Affine, chosen: Mapping[int, Tensor]) -> Matrix:
        """Rows and columns of a layer of the resized network: the classes whose places they take.

        Raises:
            ValueError: Its features are in an order that another number of units cannot have.
        """
        source = self._source(step)
        before, taps = self.classes[source.units], len(step.taps)
        units, every = torch.arange(len(before)), torch.arange(taps)
        new = before[self.order(source, chosen)]
        rows = self.classes[step.units][self.order(step, chosen)]
        # Convolutions and nn.Flatten have a unit's taps side by side, flattened tokens a tap's units.
        if _equal(step, units.repeat_interleave(taps), every.repeat(len(units))):
            return Matrix(step, rows, new.repeat_interleave(taps), every.repeat(len(new)))
        if _equal(step, units.repeat(taps), every.repeat_interleave(len(units))):
            return Matrix(step, rows, new.repeat(taps), every.repeat_interleave(len(new)))
        raise ValueError(f"{step.label} reads its features in an order that cannot be redrawn")

    def ratios(self, chosen: Mapping[int, Tensor]) -> dict[str, tuple[float, float]]:
        """Parameter name -> inputs and outputs of the resized network over those of this one."""
        ratio = {step: len(self.order(step, chosen)) / len(step.units) for step in self.trace.steps}
        found: dict[str, tuple[float, float]] = {}
        for step in self.trace.steps:
            found |= dict.fromkeys(parameter_names(step), (1.0, ratio[step]))
            if isinstance(step, Affine):
                found[step.weight_name] = (ratio[self._source(step)], ratio[step])
        return found

    def is_last(self, step: Affine) -> bool:
        """Whether a layer leads from hidden units to the outputs."""
        columns = self.classes[self._source(step).units]
        return bool((self._group[columns] >= 0).any() and (self._group[self.classes[step.units]] < 0).all())

    def _source(self, step: Affine) -> Step:
        return self.trace.steps[step.inputs[0]]


def _equal(step: Affine, features: Tensor, taps: Tensor) -> bool:
    return torch.equal(step.features, features) and torch.equal(step.tap_of, taps)


# ---- building


@torch.no_grad()
def built(model: nn.Module, units: Units, chosen: Mapping[int, Tensor], weights: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of the model with these weights; parameters and buffers of single units are those of the places."""
    twin = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    for step in units.trace.steps:
        place = units.order(step, chosen)
        if isinstance(step, Affine):
            _replace(twin, step.weight_name, weights[step.weight_name].reshape(len(place), -1, *step.weight.shape[2:]))
            if step.bias_name is not None:
                _take(twin, step.bias_name, 0, place)
        elif isinstance(step, Norm | BatchNorm):
            _take_units(twin.get_submodule(names[step.module]), step, place)
        elif isinstance(step, Embedding):
            _take(twin, step.weight_name, 1, place)
        elif isinstance(step, Parameter):
            _take_parameter(twin, step, place)
    for module in twin.modules():
        correct_sizes(module)
    return twin


def _take_units(module: nn.Module, step: Norm | BatchNorm, place: Tensor) -> None:
    """Weights, biases and running statistics of the places."""
    count = len(step.units)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim and len(tensor) == count:
            _take(module, name, 0, place)
        elif tensor.ndim:
            raise ValueError(f"{step.label} has its units on another axis of {name!r} than the first: not redrawn")
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = (len(place), *module.normalized_shape[1:])
    if isinstance(module, nn.GroupNorm):
        module.num_channels = len(place)


def _take_parameter(twin: nn.Module, step: Parameter, place: Tensor) -> None:
    """Units of an added or multiplied parameter, along the axis that they are on."""
    if torch.equal(place, torch.arange(len(step.units))):
        return
    numbers = torch.arange(step.tensor.numel()).reshape(step.tensor.shape)
    for axis in range(numbers.ndim):
        if step.name and torch.equal(numbers.movedim(axis, 0).reshape(len(step.units), -1), step.entries):
            _take(twin, step.name, axis, place)
            return
    raise ValueError(f"{step.label} with a value for each of {len(step.units)} units cannot be redrawn")


def _take(module: nn.Module, name: str, axis: int, place: Tensor) -> None:
    """Some entries of a parameter or buffer along an axis."""
    path, _, key = name.rpartition(".")
    old = getattr(module.get_submodule(path), key).detach()
    _replace(module, name, old.index_select(axis, place.to(old.device)))


def _replace(model: nn.Module, name: str, values: Tensor) -> None:
    """A parameter or buffer of another shape, with the dtype, device and gradient flag of the old one."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, key)
    new = values.to(old).clone()
    setattr(module, key, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
