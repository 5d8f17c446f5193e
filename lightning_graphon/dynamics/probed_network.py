"""A network as a function of a fixed batch of samples (the probe), and the loss as a function of its outputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_graphon._shared.batch_norm import batch_norms, settle_batch_norms, unused_batch_norms
from lightning_graphon._shared.checks import checked
from lightning_graphon._shared.choices import Propagate
from lightning_graphon._shared.evaluation import uncompiled
from lightning_graphon._shared.module_state import preserve_module_state, swap_tensors
from lightning_graphon.ntk import graphon_ntk_from_model

_Kernel = TypeVar("_Kernel")
Inputs = Tensor | tuple[Tensor, ...]


class UnsupportedTrainingError(ValueError):
    """A training that is no network with outputs, a loss of them and one optimizer; why, in one sentence."""


class ProbedNetwork:
    """A network together with its probe batch: what every prediction and every kernel is computed from.

    Args:
        module: Maps `inputs` to the outputs [N, ...].
        inputs: [N, ...], or a tuple of tensors that the module takes as arguments.
        loss: Outputs [N, ...] -> scalar, at the probe's targets.
        masks: Names of parameters inside `root` -> bool tensors, True = kept.
        root: The module that holds `module`; what is evaluated leaves it as it was. None: `module` itself.
        labels: Class numbers [N], where there are any.
        part_of: The network on all samples, whose statistics batch norm is measured with.

    >>> from lightning_graphon.ntk import empirical_ntk
    >>> net, x, y = nn.Linear(2, 1), torch.ones(3, 2), torch.zeros(3, 1)
    >>> network = ProbedNetwork(net, x, lambda outputs: nn.functional.mse_loss(outputs, y))
    >>> network.empirical(empirical_ntk).shape
    torch.Size([3, 3])
    """

    @checked
    def __init__(
        self,
        module: nn.Module,
        inputs: Inputs,
        loss: Callable[[Tensor], Tensor],
        *,
        masks: Mapping[str, Tensor] | None = None,
        root: nn.Module | None = None,
        labels: Tensor | None = None,
        part_of: "ProbedNetwork | None" = None,
    ) -> None:
        self.module, self.inputs, self.loss = module, inputs, loss
        self.masks, self.root, self.labels = masks or {}, module if root is None else root, labels
        # Batch norm without data has statistics of nothing: its kernel would be that of a network nobody trains.
        self.unused_norms: frozenset[str] = unused_batch_norms(self.root) if part_of is None else part_of.unused_norms
        self._whole: ProbedNetwork = self if part_of is None else part_of._whole

    @property
    def count(self) -> int:
        """Number N of samples."""
        return len(_as_tuple(self.inputs)[0])

    def first(self, count: int) -> "ProbedNetwork":
        """The same network on the first `count` samples, without a loss."""
        first = tuple(t[:count] for t in _as_tuple(self.inputs))
        inputs = first if isinstance(self.inputs, tuple) else first[0]
        return ProbedNetwork(self.module, inputs, _no_loss, masks=self.masks, root=self.root, part_of=self)

    def beside(self, other: "ProbedNetwork") -> "ProbedNetwork":
        """The same network on these samples and, after them, on those of another, without a loss."""
        pairs = zip(_as_tuple(self.inputs), _as_tuple(other.inputs), strict=True)
        joined = tuple(torch.cat(pair) for pair in pairs)
        inputs = joined if isinstance(self.inputs, tuple) else joined[0]
        return ProbedNetwork(self.module, inputs, _no_loss, masks=self.masks, root=self.root, part_of=self)

    def selected(self, outputs: Tensor) -> "ProbedNetwork":
        """The same network with some of its flattened outputs, by their numbers [K], without a loss."""
        module = _SelectedOutputs(self.module, outputs)
        return ProbedNetwork(module, self.inputs, _no_loss, masks=self.masks, root=self.root, part_of=self)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Eval mode, full precision; the module, its gradients and the random numbers are as before afterwards.

        Batch norm that began without data is evaluated with the statistics of what it has seen since, or of the probe.
        """
        with preserve_module_state(self.root), uncompiled(self.root):
            self.root.eval()
            if self.unused_norms:
                norms = batch_norms(self.root)
                settle_batch_norms([norms[n] for n in self.unused_norms if n in norms], self._whole.outputs)
            yield

    def outputs(self) -> Tensor:
        """Outputs [N, ...] of the probe batch in the modules' present mode."""
        outputs: Tensor = self.module(*_as_tuple(self.inputs))
        return outputs

    def measured(self) -> Tensor:
        """Outputs [N, ...] in eval mode, without history."""
        with self.evaluated(), torch.no_grad():
            return self.outputs().detach()

    def inside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks, or other tensors of parameters' shapes, by the names that the parameters have inside `module`."""
        by_parameter = {p: tensors[n] for n, p in self.root.named_parameters(remove_duplicate=False) if n in tensors}
        own = self.module.named_parameters()
        return {name: by_parameter[p].to(p.device) for name, p in own if p in by_parameter}

    def empirical(self, compute: Callable[..., _Kernel], dtype: torch.dtype | None = None, **options: Any) -> _Kernel:
        """Kernel of the network itself, under its masks.

        Args:
            compute: `empirical_ntk` or `kronecker_ntk`.
            dtype: To compute in; the module's own where its code or the device does not allow it. None: float64 for
                modules that hold any, else float32, since half precision is too coarse for a kernel.
            options: For `compute`.
        """
        dtypes = {parameter.dtype for parameter in self.module.parameters()}
        dtype = dtype or (torch.float64 if torch.float64 in dtypes else torch.float32)
        own = partial(compute, self.module, masks=self.inside(self.masks), **options)
        if dtypes != {dtype}:
            with self.evaluated(), swap_tensors(self.module, _cast(self.module, dtype)):
                try:
                    return own(self._inputs(lambda x: x.to(dtype) if x.is_floating_point() else x))
                except (RuntimeError, TypeError):
                    pass
        with self.evaluated():
            return own(self._inputs(lambda x: x))

    def graphon(self, propagate: Propagate, bins: int | None = None) -> Tensor:
        """Graphon NTK [N, N], float64; `bins` and its default as in `graphon_ntk_from_model`.

        Raises:
            ValueError: The network is no chain of Linear layers on one tensor.
        """
        if isinstance(self.inputs, tuple):
            raise ValueError("training_step is not one call of one module with one tensor: it has no Graphon NTK")
        masks = self.inside(self.masks)
        return graphon_ntk_from_model(self.module, self.inputs, masks, bins=bins, propagate=propagate)

    def _inputs(self, cast: Callable[[Tensor], Tensor]) -> Inputs:
        return tuple(map(cast, self.inputs)) if isinstance(self.inputs, tuple) else cast(self.inputs)


class _SelectedOutputs(nn.Module):
    def __init__(self, module: nn.Module, outputs: Tensor) -> None:
        super().__init__()
        self.module, self._outputs = module, outputs

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.module(*inputs)
        return out.flatten(1)[:, self._outputs.to(out.device)]


def _as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _no_loss(outputs: Tensor) -> Tensor:
    raise NotImplementedError("part of a probe has no loss of its own")


def _cast(module: nn.Module, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Parameters and buffers of the module in a floating dtype."""
    cast: dict[Tensor, Tensor] = {b: b.to(dtype) for b in module.buffers() if b.is_floating_point()}
    for parameter in module.parameters():
        cast[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    return cast
