"""The finite-width kernel without its full matrix: products by a VJP and a JVP, or a Kronecker approximation."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon.ntk.empirical.functional_model import (
    Inputs,
    batch_size,
    detach_inputs,
    functional_model,
    select_samples,
)
from lightning_graphon.ntk.empirical.kernel import empirical_kernels
from lightning_graphon.ntk.empirical.layer_shares import ntk_layer_shares
from lightning_graphon.ntk.operators.operator import KernelOperator, KroneckerKernel
from lightning_graphon.ntk.operators.tiling import TileShard


@checked
def kronecker_ntk(
    model: nn.Module,
    x: Inputs,
    *,
    masks: Mapping[str, Tensor] | None = None,
    preconditioner: Mapping[str, Tensor] | None = None,
    max_memory: int | None = None,
    group: object | None = None,
) -> KroneckerKernel:
    """Tangent kernel of a module as a Kronecker product, for little more than the cost of its mean over outputs.

    K is that mean; B is the mean over samples of the kernel of each sample with itself, between all pairs of outputs.
    The product has both means of the full kernel, and its trace. It is exact where only the last layer is trained.

    Args:
        model: As in `empirical_ntk`.
        x: As in `empirical_ntk`.
        masks: As in `empirical_ntk`.
        preconditioner: As in `empirical_ntk`.
        max_memory: As in `empirical_ntk`.
        group: As in `empirical_ntk`.

    Raises:
        KeyError, ValueError: As in `empirical_ntk`.

    >>> kernel = kronecker_ntk(nn.Linear(3, 2, bias=False).double(), torch.eye(3, dtype=torch.float64))
    >>> kernel.samples.diagonal().tolist(), kernel.outputs.tolist()
    ([1.0, 1.0, 1.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    fm = functional_model(model, masks, preconditioner, "standard", 1.0, 1.0)
    shard = TileShard.from_group(group)
    return KroneckerKernel(*empirical_kernels(fm, x, None, ("mean", "samples"), max_memory, shard))


class EmpiricalNTK(KernelOperator):
    """Tangent kernel of a module as a linear operator: v ↦ J P Jᵀ v, never a matrix.

    One product costs about two passes through the network, C times that for `reduce="mean"`.

    Args:
        model: As in `empirical_ntk`.
        x: As in `empirical_ntk`.
        masks: As in `empirical_ntk`.
        preconditioner: As in `empirical_ntk`.
        reduce: None for the kernel over all N·C outputs, sample-major; "mean" for the N by N mean over outputs.
        batch: Samples per pass; all by default.

    Raises:
        KeyError, ValueError: As in `empirical_ntk`.

    >>> operator = EmpiricalNTK(nn.Linear(3, 2, bias=False).double(), torch.eye(3, dtype=torch.float64))
    >>> operator.shape, round(operator.trace(), 6)
    ((6, 6), 6.0)
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        x: Inputs,
        *,
        masks: Mapping[str, Tensor] | None = None,
        reduce: Literal["mean"] | None = None,
        preconditioner: Mapping[str, Tensor] | None = None,
        batch: int | None = None,
    ) -> None:
        check_choice("reduce", "mean" if reduce is None else reduce, ("mean",))
        self._mean = reduce == "mean"
        self._given = (model, x, masks, preconditioner)
        self._fm = functional_model(model, masks, preconditioner, "standard", 1.0, 1.0)
        # Frozen parameters are left out of the tangent space.
        self._values = {n: self._fm.values[n] for n in self._fm.trainable}
        self._x, self._n = detach_inputs(x), batch_size(x)
        self._batch = batch or self._n
        first = x if isinstance(x, Tensor) else x[0]
        self.device = first.device
        with eval_semantics(model, self.device), torch.no_grad():
            out = self._fm({}, select_samples(self._x, slice(0, 1)))
        self.outputs, self.dtype = out.shape[1], out.dtype
        self.size = self._n if self._mean else self._n * self.outputs

    def matvec(self, vector: Tensor) -> Tensor:
        """Kernel times a vector [N·C], or [N] for the mean over outputs."""
        with eval_semantics(self._fm.model, self.device):
            if not self._mean:
                return self._product(vector.reshape(self._n, self.outputs)).reshape(-1)
            total = torch.zeros_like(vector)
            # The mean of the outputs' own kernels: a vector of one output, back to the same output.
            for k in range(self.outputs):
                field = vector.new_zeros(self._n, self.outputs)
                field[:, k] = vector
                total += self._product(field)[:, k]
            return total / self.outputs

    def trace(self) -> float:
        """Exact trace, from activations and signals."""
        model, x, masks, preconditioner = self._given
        shares = ntk_layer_shares(model, x, masks=masks, preconditioner=preconditioner)
        total = sum(s.trace for s in shares)
        return total / self.outputs if self._mean else total

    def _product(self, field: Tensor) -> Tensor:
        """J P Jᵀ applied to [N, C]."""
        # Jᵀ v over all samples first, then P, then J: the kernel needs two passes and no matrix.
        tangent = {n: torch.zeros_like(v) for n, v in self._values.items()}
        for part in self._parts():
            _, vjp = cast(Any, torch.func.vjp(partial(self._outputs, part), self._values))
            for name, g in vjp(field[part])[0].items():
                tangent[name] += g
        return self._moved(tangent)

    def jvp(self, direction: Mapping[str, Tensor]) -> Tensor:
        """J P v: the slope [N, C] of the outputs along a direction of the parameters.

        Args:
            direction: Parameter name -> v of its shape; parameters that are not named stand still.

        >>> operator = EmpiricalNTK(nn.Linear(2, 1, bias=False), torch.eye(2))
        >>> operator.jvp({"weight": torch.tensor([[3.0, 4.0]])}).tolist()
        [[3.0], [4.0]]
        """
        tangent = {n: direction[n].to(v) if n in direction else torch.zeros_like(v) for n, v in self._values.items()}
        with eval_semantics(self._fm.model, self.device):
            return self._moved(tangent)

    def _moved(self, tangent: dict[str, Tensor]) -> Tensor:
        """J P applied to a tangent of the parameters."""
        weights = {name: self._fm.weight(name) for name in tangent}
        tangent = {n: t if (weight := weights[n]) is None else t * weight for n, t in tangent.items()}
        rows = [_jvp(partial(self._outputs, part), self._values, tangent) for part in self._parts()]
        return torch.cat(rows).detach()

    def _outputs(self, part: slice, values: dict[str, Tensor]) -> Tensor:
        return self._fm(values, select_samples(self._x, part))

    def _parts(self) -> list[slice]:
        return [slice(i, min(i + self._batch, self._n)) for i in range(0, self._n, self._batch)]


def _jvp(function: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor], tangent: dict[str, Tensor]) -> Tensor:
    """J · tangent."""
    try:
        product: Tensor = torch.func.jvp(function, (at,), (tangent,))[1]
    except NotImplementedError:
        # Operations without forward mode, as in weight_norm: Jᵀ u is linear in u, so its own VJP is J.
        outputs, vjp = cast(Any, torch.func.vjp(function, at))
        product = torch.func.vjp(lambda u: vjp(u)[0], torch.zeros_like(outputs))[1](tangent)[0]
    return product
