"""Kernels of every shape as operators on the outputs [N, C] of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon.ntk.operators.operator import KernelOperator, KroneckerKernel


@dataclass(frozen=True)
class Eigen:
    """Eigenmodes of a kernel over outputs.

    Attributes:
        values: Eigenvalues, ascending, [K, 1] where all outputs share them and [K, C] where each has its own.
        vectors: [N, N], [C, N, N] or [N·C, N·C], columns.
        form: As in `OutputKernel`.
        mixtures: Of outputs, [C, C], columns; "kronecker" only.
    """

    values: Tensor
    vectors: Tensor
    form: str
    mixtures: Tensor | None = None

    def project(self, field: Tensor) -> Tensor:
        """Coefficients of a field [N, C]: [K, C], or [N·C, 1] for a full kernel."""
        if self.form == "full":
            return self.vectors.T @ field.reshape(-1, 1)
        if self.form == "per_output":
            return torch.einsum("cnk,nc->kc", self.vectors, field)
        return self.vectors.T @ (field if self.mixtures is None else field @ self.mixtures)

    def expand(self, coefficients: Tensor, outputs: int) -> Tensor:
        """Fields [..., N, C] of coefficients [..., K, *], the inverse of `project`."""
        if self.form == "full":
            return (self.vectors @ coefficients).reshape(*coefficients.shape[:-2], -1, outputs)
        if self.form == "per_output":
            return torch.einsum("cnk,...kc->...nc", self.vectors, coefficients)
        return self.vectors @ (coefficients if self.mixtures is None else coefficients @ self.mixtures.T)


@dataclass(frozen=True)
class OutputKernel:
    """A kernel with its meaning: `kernel @ field` maps [N, C] to [M, C].

    Attributes:
        kernel: [M, N] ("shared"), [C, M, N] ("per_output"), [M·C, N·C] ("full", sample-major), or an operator
            of the first or the last shape; or [N, N] beside `mixing` ("kronecker").
        form: Which of them.
        outputs: C.
        mixing: [C, C], how outputs move each other, or None.
    """

    kernel: Tensor | KernelOperator
    form: str
    outputs: int
    mixing: Tensor | None = None

    def __matmul__(self, field: Tensor) -> Tensor:
        """Kernel times a field [N, C]; float64 whatever an operator works in."""
        if self.form == "per_output":
            assert isinstance(self.kernel, Tensor)  # noqa: S101 - operators are shared or full
            return torch.einsum("cmn,nc->mc", self.kernel, field)
        if self.mixing is not None:
            field = field @ self.mixing
        given = field.reshape(-1) if self.form == "full" else field
        product = (self.kernel @ given).to(dtype=field.dtype, device=field.device)
        return product.reshape(-1, self.outputs)

    def dense(self, like: Tensor) -> "OutputKernel":
        """The same with the matrix written out, in the dtype and on the device of `like`."""
        if isinstance(self.kernel, Tensor):
            return self
        return OutputKernel(self.kernel.to_dense().to(like), self.form, self.outputs)

    def eigen(self, like: Tensor) -> Eigen:
        """Eigendecomposition, O(n³); an operator is written out first."""
        matrix = self.dense(like).kernel
        assert isinstance(matrix, Tensor)  # noqa: S101
        values, vectors = torch.linalg.eigh(matrix)
        if self.mixing is not None:
            factors, mixtures = torch.linalg.eigh(self.mixing)
            return Eigen(torch.outer(values, factors), vectors, self.form, mixtures)
        return Eigen(values.T if self.form == "per_output" else values[:, None], vectors, self.form)


def output_kernel(
    kernel: Tensor | KernelOperator, like: Tensor, *, rows: int | None = None, name: str = "kernel"
) -> OutputKernel:
    """Read the shape of a kernel against a batch of outputs.

    Args:
        kernel: [M, N], [C, M, N], [M, C, N, C] or [M·C, N·C], or an operator.
        like: Field [N, C] of the train points, whose dtype and device are taken.
        rows: M; None for the train points themselves, where the kernel must be symmetric.
        name: For messages.

    Raises:
        ValueError: The shape fits no reading, entries are not finite, or a square kernel is not symmetric.
    """
    n, c = like.shape
    m = n if rows is None else rows
    if isinstance(kernel, KroneckerKernel) and kernel.shape == (m * c, n * c):
        samples, mixing = output_kernel(kernel.samples, like), _symmetric(kernel.outputs.to(like))
        return OutputKernel(samples.kernel, "kronecker", c, mixing)
    if isinstance(kernel, KernelOperator):
        if tuple(kernel.shape) not in ((m, n), (m * c, n * c)):
            raise ValueError(_no_fit(name, tuple(kernel.shape), m, n, c))
        return OutputKernel(kernel, "shared" if kernel.shape == (m, n) else "full", c)
    matrix = kernel.detach().to(like)
    if matrix.shape == (m, c, n, c):
        matrix = matrix.reshape(m * c, n * c)
    forms = {(m * c, n * c): "full", (c, m, n): "per_output", (m, n): "shared"}  # C = 1: the last one wins
    if tuple(matrix.shape) not in forms:
        raise ValueError(_no_fit(name, tuple(kernel.shape), m, n, c))
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the {name} has entries that are not finite; look for NaN or overflow in the model")
    return OutputKernel(_symmetric(matrix) if rows is None else matrix, forms[tuple(matrix.shape)], c)


def _no_fit(name: str, shape: tuple[int, ...], m: int, n: int, c: int) -> str:
    return (
        f"a {name} of shape {list(shape)} does not fit outputs [{n}, {c}]; give [{m}, {n}] (the same for every "
        f"output), [{c}, {m}, {n}] (one an output), or the full [{m}, {c}, {n}, {c}] or [{m * c}, {n * c}]"
    )


def _symmetric(matrix: Tensor) -> Tensor:
    asymmetry = float((matrix - matrix.mT).abs().max())
    # float32 kernels are symmetric to their own rounding only.
    if asymmetry > 1e-4 * float(matrix.abs().max()):
        raise ValueError(f"a kernel must be symmetric; it and its transpose differ by {asymmetry:.3g}")
    return 0.5 * (matrix + matrix.mT)
