"""Lightning callbacks: thin hooks over the mathematics."""

try:
    import lightning.pytorch  # noqa: F401
except ImportError as error:  # pytorch_lightning alone has other base classes
    raise ImportError("lightning_graphon.callbacks needs the package `lightning`: pip install lightning") from error

from lightning_graphon.callbacks._analysis.kernel_spectrum import SpectrumOptions
from lightning_graphon.callbacks.dynamic_sparsity import DynamicSparsity
from lightning_graphon.callbacks.graphon_monitor import GraphonMonitor
from lightning_graphon.callbacks.loss_decay_monitor import LossDecayMonitor
from lightning_graphon.callbacks.prune_at_init import PruneAtInit
from lightning_graphon.dynamics import KernelPrediction

__all__ = [
    "DynamicSparsity",
    "GraphonMonitor",
    "KernelPrediction",
    "LossDecayMonitor",
    "PruneAtInit",
    "SpectrumOptions",
]
