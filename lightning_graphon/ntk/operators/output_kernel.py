"""Kernels of all shapes as operators on the outputs [N, C] of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon.ntk.operators.operator import KernelOperator, KroneckerKernel


@dataclass(frozen=True)
class Eigen:
    """Eigenmodes of a kernel over outputs.

    Attributes:
        values: Ascending eigenvalues, [K, 1] where all outputs share them and [K, C] where each has its own.
        vectors: Eigenvectors as columns, [N, N], [C, N, N] or [N·C, N·C].
        form: As in `OutputKernel`.
        mixtures: Eigenvectors [C, C] of `mixing` as columns, for "kronecker".
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
    """A kernel whose product `kernel @ field` maps outputs [N, C] to [M, C].

    Attributes:
        kernel: Matrix or operator [M, N] ("shared") or [M·C, N·C] ("full", sample-major), matrices [C, M, N]
            ("per_output"), or [N, N] together with `mixing` ("kronecker").
        form: Name of the shape.
        outputs: Number C of outputs.
        mixing: How outputs act on each other [C, C], or None.
    """

    kernel: Tensor | KernelOperator
    form: str
    outputs: int
    mixing: Tensor | None = None

    def __matmul__(self, field: Tensor) -> Tensor:
        """Kernel times a field [N, C], in the dtype of the field."""
        if self.form == "per_output":
            assert isinstance(self.kernel, Tensor)  # noqa: S101 - operators are shared or full
            return torch.einsum("cmn,nc->mc", self.kernel, field)
        # (K ⊗ B) v is K V B for the field V, as B is symmetric.
        if self.mixing is not None:
            field = field @ self.mixing
        given = field.reshape(-1) if self.form == "full" else field
        product = (self.kernel @ given).to(dtype=field.dtype, device=field.device)
        return product.reshape(-1, self.outputs)

    def dense(self, like: Tensor) -> "OutputKernel":
        """The same with a matrix in place of an operator, in the dtype and on the device of `like`."""
        if isinstance(self.kernel, Tensor):
            return self
        return OutputKernel(self.kernel.to_dense().to(like), self.form, self.outputs)

    def eigen(self, like: Tensor) -> Eigen:
        """Eigendecomposition, O(n³); an operator becomes a matrix first."""
        matrix = self.dense(like).kernel
        assert isinstance(matrix, Tensor)  # noqa: S101
        values, vectors = torch.linalg.eigh(matrix)
        if self.mixing is not None:
            # Eigenvalues of a Kronecker product are the products of both matrices' eigenvalues.
            factors, mixtures = torch.linalg.eigh(self.mixing)
            return Eigen(torch.outer(values, factors), vectors, self.form, mixtures)
        return Eigen(values.T if self.form == "per_output" else values[:, None], vectors, self.form)


def output_kernel(
    kernel: Tensor | KernelOperator, like: Tensor, *, rows: int | None = None, name: str = "kernel"
) -> OutputKernel:
    """Read the shape of a kernel against a batch of outputs.

    Args:
        kernel: Matrix [M, N], [C, M, N], [M, C, N, C] or [M·C, N·C], or an operator.
        like: Field [N, C] of the train points; gives dtype and device.
        rows: Number M of rows; None for the train points themselves, whose kernel must be symmetric.
        name: Name in messages.

    Raises:
        ValueError: The shape does not fit, entries are not finite, or a square kernel is not symmetric.
    """
    n, c = like.shape
    m = n if rows is None else rows
    if isinstance(kernel, KroneckerKernel) and kernel.shape == (m * c, n * c):
        samples, mixing = output_kernel(kernel.samples, like), symmetrised(kernel.outputs.to(like))
        return OutputKernel(samples.kernel, "kronecker", c, mixing)
    if isinstance(kernel, KernelOperator):
        if tuple(kernel.shape) not in ((m, n), (m * c, n * c)):
            raise ValueError(_no_fit(name, tuple(kernel.shape), m, n, c))
        return OutputKernel(kernel, "shared" if kernel.shape == (m, n) else "full", c)
    matrix = kernel.detach().to(like)
    if matrix.shape == (m, c, n, c):
        matrix = matrix.reshape(m * c, n * c)
    forms = {(m * c, n * c): "full", (c, m, n): "per_output", (m, n): "shared"}  # for C = 1 the last one
    if tuple(matrix.shape) not in forms:
        raise ValueError(_no_fit(name, tuple(kernel.shape), m, n, c))
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the {name} has entries that are not finite; look for NaN or overflow in the model")
    return OutputKernel(symmetrised(matrix) if rows is None else matrix, forms[tuple(matrix.shape)], c)


def _no_fit(name: str, shape: tuple[int, ...], m: int, n: int, c: int) -> str:
    return (
        f"a {name} of shape {list(shape)} does not fit outputs [{n}, {c}]; give [{m}, {n}] (the same for every "
        f"output), [{c}, {m}, {n}] (one per output), or the full [{m}, {c}, {n}, {c}] or [{m * c}, {n * c}]"
    )


def symmetrised(matrix: Tensor) -> Tensor:
    """The mean of [..., n, n] and its transpose, checked to be the same.

    Raises:
        ValueError: They differ by more than rounding.
    """
    asymmetry = float((matrix - matrix.mT).abs().max())
    # Float32 kernels are symmetric only up to their rounding.
    if asymmetry > 1e-4 * float(matrix.abs().max()):
        raise ValueError(f"a kernel must be symmetric; it and its transpose differ by {asymmetry:.3g}")
    return 0.5 * (matrix + matrix.mT)
