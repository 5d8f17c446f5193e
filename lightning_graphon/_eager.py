"""Compiled code as plain Python, for the time of an analysis."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def eager() -> Iterator[None]:
    """Modules and functions that `torch.compile` compiled run uncompiled, and nothing is compiled anew.

    Compiled graphs have no double backward and no per-sample gradients, torch.fx refuses to trace them, and each new
    shape or mode would cost a compilation.

    >>> compiled = torch.compile(torch.sin)
    >>> with eager():
    ...     compiled(torch.zeros(1))
    tensor([0.])
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:  # nothing has been compiled in this process
        yield
        return
    with torch.compiler.set_stance("force_eager"), dynamo.config.patch(error_on_nested_fx_trace=False):
        yield
