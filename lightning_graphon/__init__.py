"""Pruning at initialisation, layer graphons and the Graphon NTK for PyTorch.

The mathematics lives in `pruning`, `graphon`, `ntk`, `dynamics` and `metrics` and needs no Lightning;
`lightning_graphon.callbacks` connects it to a `Trainer`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lightning-graphon")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
