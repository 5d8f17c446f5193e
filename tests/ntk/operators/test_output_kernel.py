"""Kernels of every shape act on outputs as the full matrix does."""

import pytest
import torch

from lightning_graphon.ntk import DenseOperator, KroneckerKernel
from lightning_graphon.ntk.operators.output_kernel import output_kernel

N, C = 5, 3
FIELD = torch.linspace(-1, 1, N * C, dtype=torch.float64).reshape(N, C) ** 3


def positive(size, seed):
    a = torch.randn(size, size + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T


def shapes():
    """Name -> the kernel as given, and as a matrix [N·C, N·C]."""
    shared, full = positive(N, 0), positive(N * C, 1)
    each = torch.stack([positive(N, seed) for seed in range(C)])
    product = KroneckerKernel(positive(N, 3), positive(C, 4))
    eye = torch.eye(C, dtype=torch.float64)
    return {
        "shared": (shared, torch.kron(shared, eye)),
        "operator": (DenseOperator(shared), torch.kron(shared, eye)),
        "per output": (each, torch.einsum("cnm,cd->ncmd", each, eye).reshape(N * C, N * C)),
        "full": (full, full),
        "four axes": (full.reshape(N, C, N, C), full),
        "kronecker": (product, product.to_dense()),
    }


@pytest.mark.parametrize("name", shapes())
def test_products_and_modes_are_those_of_the_full_matrix(name):
    given, matrix = shapes()[name]
    kernel = output_kernel(given, FIELD)
    expected = (matrix @ FIELD.flatten()).reshape(N, C)
    torch.testing.assert_close(kernel @ FIELD, expected)
    modes = kernel.eigen(FIELD)
    torch.testing.assert_close(modes.expand(modes.project(FIELD), C), FIELD)
    torch.testing.assert_close(modes.expand(modes.values * modes.project(FIELD), C), expected)


def test_rows_of_other_samples_need_no_symmetry():
    cross = torch.randn(2, N, dtype=torch.float64)
    torch.testing.assert_close(output_kernel(cross, FIELD, rows=2) @ FIELD, cross @ FIELD)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (torch.eye(4), r"a kernel of shape \[4, 4\] does not fit outputs \[5, 3\]"),
        (torch.ones(N, N).triu(), "must be symmetric"),
        (torch.full((N, N), torch.nan), "not finite"),
        (DenseOperator(torch.eye(4)), "does not fit"),
    ],
)
def test_refuses(kernel, message):
    with pytest.raises(ValueError, match=message):
        output_kernel(kernel, FIELD)
