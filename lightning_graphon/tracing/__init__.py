"""Read the forward pass of a module: its steps, and which of its units are the same."""

from lightning_graphon.tracing.trace import Trace, trace
from lightning_graphon.tracing.tracer import NotReadableError

__all__ = ["NotReadableError", "Trace", "trace"]
