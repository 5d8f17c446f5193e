"""Running statistics of batch norm that has seen too little data to be evaluated with."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

_SETTLED = 1e-3  # share of the initial values in the running ones that no longer matters


def batch_norms(root: nn.Module) -> dict[str, BatchNorm]:
    """Layers that normalise by running statistics, by name."""
    return {n: m for n, m in root.named_modules() if isinstance(m, BatchNorm) and m.running_mean is not None}


def unused_batch_norms(root: nn.Module) -> frozenset[str]:
    """Those whose statistics are still the initial ones, means of 0 and variances of 1."""
    return frozenset(name for name, module in batch_norms(root).items() if _is_unused(module))


def settle_batch_norms(modules: Iterable[BatchNorm], run: Callable[[], Any]) -> None:
    """Measure statistics in which the initial values still count for more than 0.1 %; the caller restores them.

    Of running statistics the initial values are (1 − momentum)^batches. To divide them out would leave the statistics
    of one or two small batches, in which a channel may have no variance at all.

    Args:
        modules: Layers that began with the initial statistics.
        run: A pass of data through the network in eval mode.
    """
    measure_batch_norms([module for module in modules if _initial_share(module) > _SETTLED], run)


def measure_batch_norms(modules: Sequence[BatchNorm], run: Callable[[], Any]) -> None:
    """Give layers the statistics of one pass of data through the network in eval mode; the caller restores them."""
    with ExitStack() as stack, torch.no_grad():
        for module in modules:
            # Measured on the way: in train mode a synchronised layer would wait for other processes.
            stack.callback(module.register_forward_pre_hook(_measure).remove)
        if modules:
            run()


def _initial_share(module: BatchNorm) -> float:
    if module.momentum is None or module.num_batches_tracked is None:
        return float(_is_unused(module))
    return float((1 - module.momentum) ** int(module.num_batches_tracked))


def _is_unused(module: BatchNorm) -> bool:
    mean, var = module.running_mean, module.running_var
    return mean is not None and var is not None and not bool(mean.any()) and bool((var == 1).all())


def _measure(module: Any, args: tuple[Tensor, ...]) -> None:
    across = [axis for axis in range(args[0].ndim) if axis != 1]
    x = args[0].detach()
    module.running_mean = x.mean(across).to(module.running_mean)
    module.running_var = x.var(across, correction=0).to(module.running_var)
