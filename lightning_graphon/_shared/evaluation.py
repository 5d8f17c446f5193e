"""Evaluate a module eagerly and in full precision while it is analysed."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.attention
from torch import nn


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run `model` uncompiled, without TensorFloat-32 or sparse gradients, and with second derivatives of all it does.

    Compiled graphs have no double backward and no per-sample gradients, and torch.fx refuses to trace them. TF32 keeps
    three digits, too few for a kernel's small eigenvalues, and cuDNN uses it in convolutions by default.

    >>> compiled = torch.compile(torch.sin)
    >>> with uncompiled(nn.Identity()):
    ...     compiled(torch.zeros(1))
    tensor([0.])
    """
    with ExitStack() as stack:
        dynamo: Any = sys.modules.get("torch._dynamo")
        # Private: torch.compiler has no switch for what the second line allows, tracing a compiled module by torch.fx.
        # Without dynamo nothing has been compiled in this process, and importing it would take seconds.
        if dynamo is not None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(dynamo.config.patch(error_on_nested_fx_trace=False))
        if torch.cuda.is_initialized():
            stack.enter_context(_full_float32_precision())
        # cuDNN's recurrent layers have no backward pass in eval mode and no second derivative.
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
                stack.callback(setattr, module, "sparse", True)  # such gradients have no arithmetic
                module.sparse = False
        yield


@contextmanager
def eval_semantics(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, gradients on, full precision, own random numbers, uncompiled; all flags are restored on leaving."""
    flags = {module: module.training for module in model.modules()}
    cuda = [device] if device.type == "cuda" else []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in flags:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no per-sample gradients
        with (
            uncompiled(model),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng(devices=cuda),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in flags.items():
            module.training = training


@contextmanager
def _full_float32_precision() -> Iterator[None]:
    """Products and convolutions of float32 numbers without TF32."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    # torch has two interfaces for this, and refuses the older one once a user has used the newer one.
    switches: list[tuple[Any, str, Any]] = [(cuda.matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    if hasattr(cuda.matmul, "fp32_precision"):  # torch 2.9
        switches = [(part, "fp32_precision", "ieee") for part in (cuda.matmul, cudnn.conv, cudnn.rnn)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in switches]
    try:
        for switch in switches:
            setattr(*switch)
        yield
    finally:
        for switch in before:
            setattr(*switch)
