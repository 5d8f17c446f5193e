"""Whether a layer uses the weight that it stores: weight standardisation subtracts means, and zeros are none then."""

import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import preserve_module_state, swap_tensors
from lightning_graphon._shared.weight_layout import swap_sides
from lightning_graphon.pruning.sharding import is_sharded

_TORCH = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def revives_zeros(module: nn.Module) -> bool:
    """Whether a subclass of a Linear or Conv layer uses other numbers than zero in place of zeros of its weight.

    Asked of its gradients: those of the weights of an input that is zero, as these weights are, vanish unless the
    weights act on other inputs. Layers that only scale their weights, or pad their inputs, are as they seem.

    >>> class Centred(nn.Linear):
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.weight - self.weight.mean(1, keepdim=True))
    >>> revives_zeros(Centred(3, 2)), revives_zeros(nn.Linear(3, 2))
    (True, False)
    """
    base = next((kind for kind in _TORCH if isinstance(module, kind)), None)
    if base is None or is_sharded(module.weight) or not module.weight.is_floating_point():  # type: ignore[arg-type, operator]
        return False
    if all(getattr(type(module), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward")):
        return False
    try:
        return bool(_gradient_at_zero(module).any())
    except Exception:  # whatever code of others raises for inputs that nobody announced to it
        return False


def _gradient_at_zero(module: nn.Module) -> Tensor:
    """Gradient of the weights of the first input, all of them zero, where that input is zero."""
    weight, transposed = module.weight.detach().clone(), int(getattr(module, "transposed", False))  # type: ignore[operator]
    swap_sides(weight, transposed)[:, 0] = 0
    trial, groups = nn.Parameter(weight), 1 if transposed else getattr(module, "groups", 1)
    with preserve_module_state(module, 0), swap_tensors(module, {module.weight: trial}), torch.enable_grad():  # type: ignore[dict-item]
        source = torch.rand(_input_shape(module), dtype=weight.dtype, device=weight.device)
        source.unflatten(1, (groups, -1))[:, :, 0] = 0  # the first input of every group
        output = type(module).forward(module.eval(), source)  # not through hooks
        (gradient,) = torch.autograd.grad((output * torch.rand_like(output)).sum(), [trial])
    return swap_sides(gradient, transposed)[:, 0]


def _input_shape(module: nn.Module) -> list[int]:
    """Two samples of the least size that a kernel fits in; of a Linear layer two rows."""
    if isinstance(module, nn.Linear):
        return [2, module.in_features]
    sides = zip(module.kernel_size, module.dilation, strict=True)  # type: ignore[arg-type]
    return [2, module.in_channels, *((size - 1) * step + 2 for size, step in sides)]
