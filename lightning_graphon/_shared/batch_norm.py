"""Running statistics of batch norm that has seen too little data to be evaluated with."""

from collections.abc import Callable, Iterable
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
    """Replace statistics in which the initial values still count; the caller restores them.

    Running statistics are (1 − w) times those of the data and w = (1 − momentum)^batches times the initial ones. Where
    a layer has seen no batch, they are measured.

    Args:
        modules: Layers that began with the initial statistics.
        run: A pass of data through the network in eval mode.
    """
    with ExitStack() as stack, torch.no_grad():
        measured = False
        for module in modules:
            if _is_unused(module):
                # Measured on the way: in train mode a synchronised layer would wait for other processes.
                stack.callback(module.register_forward_pre_hook(_measure).remove)
                measured = True
            elif module.momentum is not None and module.num_batches_tracked is not None:
                initial = (1 - module.momentum) ** int(module.num_batches_tracked)
                if _SETTLED < initial < 1:
                    assert module.running_mean is not None and module.running_var is not None  # noqa: S101, PT018
                    module.running_mean = module.running_mean / (1 - initial)
                    module.running_var = ((module.running_var - initial) / (1 - initial)).clamp_min(0)
        if measured:
            run()


def _is_unused(module: BatchNorm) -> bool:
    mean, var = module.running_mean, module.running_var
    return mean is not None and var is not None and not bool(mean.any()) and bool((var == 1).all())


def _measure(module: Any, args: tuple[Tensor, ...]) -> None:
    across = [axis for axis in range(args[0].ndim) if axis != 1]
    module.running_mean = args[0].mean(across).to(module.running_mean)
    module.running_var = args[0].var(across, correction=0).to(module.running_var)
