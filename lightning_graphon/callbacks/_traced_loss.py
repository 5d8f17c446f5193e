"""The loss of a `training_step` as a function of the network's outputs, recorded once as tensor operations.

A prediction needs the gradient of the loss at every step. Running `training_step` for each would run the network too;
the recording holds only what lies between the outputs and the loss.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_graphon.callbacks._network import Network, NotReadableError

Loss = Callable[[Tensor], Tensor]


def traced_loss(network: Network, outputs: Tensor) -> Loss:
    """`network.loss` in eval mode, without the network.

    Args:
        network: Its module's flags, gradients and random numbers are as before afterwards.
        outputs: [N, ...], measured ones, without history.

    Returns:
        A function of float64 outputs of this shape; works in float64 where the loss does, else in the outputs' dtype.

    Raises:
        NotReadableError: The loss is no function of the outputs alone, or does not depend on them.
    """
    with network.evaluated(), torch.enable_grad():
        _check_depends_on_outputs_only(network, outputs)
        for dtype in (torch.float64, outputs.dtype):
            loss = _recorded(network.loss, outputs, dtype)
            if loss is not None:
                return loss
    raise NotReadableError("the loss in training_step does something else each time, or reads values of the outputs")


def _check_depends_on_outputs_only(network: Network, outputs: Tensor) -> None:
    leaf = outputs.clone().requires_grad_()
    loss = network.loss(leaf)
    others = [p for p in network.root.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss, [leaf, *others], allow_unused=True) if loss.requires_grad else [None]
    if slopes[0] is None or not bool(slopes[0].any()):
        raise NotReadableError("the loss in training_step does not depend on the network's outputs")
    if any(slope is not None and bool(slope.any()) for slope in slopes[1:]):
        raise NotReadableError(
            "the loss in training_step depends on weights otherwise than through the network's outputs"
        )


def _recorded(loss: Loss, outputs: Tensor, dtype: torch.dtype) -> Loss | None:
    """A recording that agrees with `loss` at two places; None where there is none."""
    try:
        program = make_fx(lambda outputs: loss(outputs))(outputs.to(dtype))
    except Exception:  # whatever user code does that cannot be recorded
        return None
    program.graph.eliminate_dead_code()
    program.recompile()
    recording = _In(program, dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
    same = all(_agree(recording, loss, x, dtype) for x in (outputs.double(), outputs.double() + noise))
    return recording if same else None


class _In:
    """A function of tensors of one dtype, for float64 arguments."""

    def __init__(self, fn: Loss, dtype: torch.dtype) -> None:
        self.fn, self.dtype = fn, dtype

    def __call__(self, outputs: Tensor) -> Tensor:
        return self.fn(outputs.to(self.dtype)).double()

    def __deepcopy__(self, memo: dict[int, object]) -> "_In":
        return _In(copy.deepcopy(self.fn, memo), self.dtype)


def _agree(recording: Loss, loss: Loss, outputs: Tensor, dtype: torch.dtype) -> bool:
    """Whether values and gradients are the same to the rounding of `dtype`."""
    rounding = 1e-9 if dtype == torch.float64 else 1e-3
    values = []
    for fn, x in ((recording, outputs), (loss, outputs.to(dtype))):
        leaf = x.clone().requires_grad_()
        value = fn(leaf)
        values.append((value.detach().double(), torch.autograd.grad(value, leaf)[0].double()))
    (a, slope_a), (b, slope_b) = values
    return bool((a - b).abs() <= rounding * b.abs()) and bool((slope_a - slope_b).norm() <= rounding * slope_b.norm())
