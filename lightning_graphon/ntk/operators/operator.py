"""Kernels as linear operators that need no matrix, and their largest eigenvalues by Lanczos."""

from abc import ABC, abstractmethod

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked


class KernelOperator(ABC):
    """A symmetric linear operator on vectors [n], one entry per sample or per pair of sample and output.

    Subclasses define `size`, `dtype`, `device`, `matvec` and `trace`.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """Kernel times a vector [n] of the operator's dtype and device."""

    @abstractmethod
    def trace(self) -> float:
        """Exact trace."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self.size, self.size

    def __matmul__(self, other: Tensor) -> Tensor:
        """Kernel times a vector [n] or a matrix [n, m].

        Raises:
            ValueError: The first dimension is not n.
        """
        if other.ndim not in (1, 2) or len(other) != self.size:
            raise ValueError(
                f"a {self.size} x {self.size} kernel cannot multiply a tensor of shape {tuple(other.shape)}"
            )
        other = other.to(dtype=self.dtype, device=self.device)
        if other.ndim == 1:
            return self.matvec(other)
        return torch.stack([self.matvec(column) for column in other.T], dim=1)

    def to_dense(self) -> Tensor:
        """The matrix [n, n], symmetrised, by n products."""
        matrix = self @ torch.eye(self.size, dtype=self.dtype, device=self.device)
        return 0.5 * (matrix + matrix.T)

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator for scipy's iterative methods, with float64 vectors."""

        def product(vector: np.ndarray) -> np.ndarray:
            # scipy passes vectors [n] or columns [n, 1], which may be views of its own workspace.
            given = torch.as_tensor(np.ascontiguousarray(vector).reshape(-1)).to(dtype=self.dtype, device=self.device)
            return self.matvec(given).to(torch.float64).cpu().numpy()

        return scipy.sparse.linalg.LinearOperator(self.shape, matvec=product, rmatvec=product, dtype=np.float64)


class DenseOperator(KernelOperator):
    """A matrix [n, n] behind the operator interface.

    >>> (DenseOperator(torch.eye(2)) @ torch.tensor([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """

    @checked
    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        """Matrix times vector."""
        return self.matrix @ vector

    def trace(self) -> float:
        """Trace of the matrix."""
        return float(self.matrix.diagonal().sum())


class KroneckerKernel(KernelOperator):
    r"""A full kernel between N samples and C outputs as a Kronecker product of two small matrices.

    :math:`Θ_{nc,md} ≈ K_{nm} B_{cd}` with B of trace C, so that K is the mean over outputs, as it is for Θ. Exact where
    all outputs share one kernel up to a mixing matrix; positive semi-definite where K and B are.

    Args:
        samples: Kernel K [N, N], symmetric.
        outputs: Matrix B [C, C], symmetric, of any scale; zeros stand for the identity. The attribute has trace C.

    >>> kernel = KroneckerKernel(torch.eye(2), torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    >>> kernel.outputs.tolist(), (kernel @ torch.tensor([1.0, 0, 0, 0])).tolist()
    ([[1.5, 0.5], [0.5, 0.5]], [1.5, 0.5, 0.0, 0.0])
    """

    @checked
    def __init__(self, samples: Tensor, outputs: Tensor) -> None:
        # Only the product of both scales matters; trace C makes K the mean over outputs.
        c, trace = len(outputs), float(outputs.trace())
        self.samples = samples
        self.outputs = outputs * (c / trace) if trace > 0 else torch.eye(c).to(outputs)
        self.size, self.dtype, self.device = len(samples) * c, samples.dtype, samples.device

    def matvec(self, vector: Tensor) -> Tensor:
        """Kernel times a vector [N·C], sample-major."""
        return (self.samples @ (vector.reshape(len(self.samples), -1) @ self.outputs)).reshape(-1)

    def trace(self) -> float:
        """Trace of the product."""
        return float(self.samples.trace() * self.outputs.trace())


@checked
def top_eigenpairs(
    kernel: Tensor | KernelOperator, k: int = 10, *, tolerance: float = 1e-8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues and their eigenvectors, by Lanczos (ARPACK's `eigsh`).

    Args:
        kernel: Symmetric [n, n], [N, C, N, C], or an operator.
        k: Number of eigenpairs; from k = n - 1 on all are computed exactly.
        tolerance: Relative accuracy of the eigenvalues.
        seed: Seed of the start vector; torch's global generator is not changed.

    Returns:
        Eigenvalues [k], float64, descending, and eigenvectors [n, k] as columns, on the CPU.

    Raises:
        ValueError: `k` is below 1.

    >>> values, vectors = top_eigenpairs(torch.diag(torch.arange(50.0, dtype=torch.float64)), 2)
    >>> [round(v, 6) for v in values.tolist()]
    [49.0, 48.0]
    """
    if k < 1:
        raise ValueError(f"k is the number of eigenpairs and must be at least 1, got {k}")
    if isinstance(kernel, Tensor):
        kernel = DenseOperator(kernel.reshape(int(kernel.numel() ** 0.5 + 0.5), -1))
    if k >= kernel.size - 1:
        # ARPACK finds at most n - 1 eigenpairs.
        values, vectors = torch.linalg.eigh(kernel.to_dense().to(torch.float64).cpu())
        return values.flip(0)[:k], vectors.flip(1)[:, :k]
    # A fixed start vector: ARPACK's own is random, and the last digits would differ from call to call.
    start = np.random.default_rng(seed).standard_normal(kernel.size)
    found, basis = scipy.sparse.linalg.eigsh(kernel.to_scipy(), k=k, which="LA", tol=tolerance, v0=start)
    order = np.argsort(found)[::-1].copy()
    return torch.from_numpy(found[order]), torch.from_numpy(basis[:, order].copy())
