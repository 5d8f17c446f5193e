"""The loss of a `training_step` as a function of the network's outputs, recorded once as tensor operations.

A prediction needs the gradient of the loss at every step. Running `training_step` for each would run the network too;
the recording holds only what lies between the outputs and the loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_graphon.dynamics.probed_network import ProbedNetwork, UnsupportedTrainingError

Loss = Callable[[Tensor], Tensor]
# How far from the measured outputs a recording has to agree with the loss. Code that reads values (`loss.item()`, a
# metric's checks) may branch on them: such a recording has to agree in more places.
_PLACES, _MORE_PLACES = (0.0, 1.0), (0.0, 0.01, 0.1, 0.3, 1.0, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class RecordedLoss:
    """A loss of outputs [N, ...], for outputs and results in float64.

    Attributes:
        program: Outputs -> loss.
        slope: Outputs -> loss and its gradient.
        dtype: What both compute in.
        reads_values: Whether the code reads values of tensors, on which it may branch.
    """

    program: Loss
    slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    dtype: torch.dtype
    reads_values: bool

    def __call__(self, outputs: Tensor, targets: None = None) -> Tensor:
        """Loss, differentiable."""
        return self.program(outputs.to(self.dtype)).double()

    def value_and_gradient(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and its gradient in the outputs, both without history."""
        with torch.no_grad():
            value, gradient = self.slope(outputs.to(self.dtype))
            return value.double(), gradient.double()


def recorded_loss(network: ProbedNetwork, outputs: Tensor) -> RecordedLoss:
    """`network.loss` in eval mode, without the network.

    Args:
        network: Its module's flags, gradients and random numbers are as before afterwards.
        outputs: [N, ...], measured ones, without history.

    Returns:
        For outputs of this shape; computes in float64 where the loss can, else in the outputs' dtype.

    Raises:
        UnsupportedTrainingError: The loss is no function of the outputs alone, or does not depend on them.
    """
    with network.evaluated(), torch.enable_grad():
        _check_depends_on_outputs_only(network, outputs)
        for reads_values in (False, True):
            for dtype in dict.fromkeys((torch.float64, outputs.dtype)):
                recording = _record(network.loss, outputs.to(dtype), reads_values)
                if recording is not None and _agrees(recording, network.loss, outputs.double()):
                    return recording
    raise UnsupportedTrainingError(
        "the loss in training_step does something else each time, or branches on the outputs"
    )


def _check_depends_on_outputs_only(network: ProbedNetwork, outputs: Tensor) -> None:
    leaf = outputs.clone().requires_grad_()
    loss = network.loss(leaf)
    others = [p for p in network.root.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss, [leaf, *others], allow_unused=True) if loss.requires_grad else [None]
    if slopes[0] is None or not bool(slopes[0].any()):
        raise UnsupportedTrainingError("the loss in training_step does not depend on the network's outputs")
    if any(slope is not None and bool(slope.any()) for slope in slopes[1:]):
        raise UnsupportedTrainingError(
            "the loss in training_step depends on weights otherwise than through the network's outputs"
        )


def _record(loss: Loss, at: Tensor, reads_values: bool) -> RecordedLoss | None:
    """A recording of `loss`, not yet tried; None where there is none."""
    try:
        program = _program(lambda outputs: loss(outputs), at, reads_values)
        slope = _program(lambda outputs: _value_and_gradient(program, outputs), at, reads_values)
    except Exception:  # whatever user code does that cannot be recorded
        return None
    return RecordedLoss(program, slope, at.dtype, reads_values)


def _places(recording: RecordedLoss, outputs: Tensor) -> Iterator[Tensor]:
    """Outputs in random directions, and downhill, where training goes."""
    scales = _MORE_PLACES if recording.reads_values else _PLACES
    generator = torch.Generator().manual_seed(0)
    gradient = recording.value_and_gradient(outputs)[1]
    downhill = -gradient * outputs.numel() ** 0.5 / gradient.norm().clamp_min(1e-300)
    for scale in scales:
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
        yield outputs + scale * noise
        yield outputs + scale * downhill


def _program(fn: Callable[[Tensor], Any], at: Tensor, reads_values: bool) -> Callable[[Tensor], Any]:
    """What `fn` does with tensors."""
    program: GraphModule = make_fx(fn, _error_on_data_dependent_ops=not reads_values)(at)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])  # the same tensor again, a few microseconds each at every step
    program.graph.eliminate_dead_code(_has_effect)
    program.recompile()
    return program.forward


def _has_effect(node: Node) -> bool:
    """Whether an operation without users matters: one that writes into a value of the recording.

    Not one that writes into a tensor of the module (a counter, a metric's state), nor one that draws random numbers.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op in ("placeholder", "output")
    random = torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
    return bool(schema.is_mutable) and not random and _base(node).op != "get_attr"


def _base(node: Node) -> Node:
    """Where the tensor that an operation works on comes from."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _value_and_gradient(fn: Loss, outputs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        value = fn(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]


def _agrees(recording: RecordedLoss, loss: Loss, outputs: Tensor) -> bool:
    """Whether values and gradients are the same to the rounding of the recording's dtype, wherever they are tried."""
    rounding = 1e-9 if recording.dtype == torch.float64 else 1e-3
    for place in _places(recording, outputs):
        value, slope = (t.double() for t in _value_and_gradient(loss, place.to(recording.dtype)))
        for a, b in (recording.value_and_gradient(place), _value_and_gradient(recording, place)):
            same = (a - value).abs() <= rounding * value.abs() and (b - slope).norm() <= rounding * slope.norm()
            if not bool(same):
                return False
    return True
