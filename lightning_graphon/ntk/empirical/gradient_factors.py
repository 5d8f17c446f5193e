"""Factors of weight gradients: of each sample the gradient of a layer's weight is Σ_t row_factor_t ⊗ col_factor_t.

For a linear layer t runs over extra dimensions (tokens), row factors are derivatives δ with respect to the outputs and
column factors inputs. For a convolution t runs over the output's positions and column factors are patches of the
input. In a transposed convolution the roles are exchanged: row factors are inputs, column factors patches of δ.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

Convolution: TypeAlias = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)


@dataclass(frozen=True)
class GradientFactors:
    """Factors of the gradients of one weight.

    Attributes:
        row_factors: Factors [N, K or 1, T, groups, rows] for K outputs.
        col_factors: Factors [N, 1 or K, T, groups, cols]; only one of the two depends on the output.
    """

    row_factors: Tensor
    col_factors: Tensor

    @property
    def samples(self) -> int:
        """Number of samples N."""
        return self.row_factors.shape[0]

    @property
    def outputs(self) -> int:
        """Number of outputs K."""
        return max(self.row_factors.shape[1], self.col_factors.shape[1])

    @property
    def is_outer_product(self) -> bool:
        """Whether there is one position and one group, as in a linear layer without tokens."""
        return self.row_factors.shape[2] == 1 and self.row_factors.shape[3] == 1 and self.col_factors.shape[1] == 1


def gradient_factors(module: nn.Module, samples: int, h: Tensor, delta: Tensor) -> GradientFactors:
    """Factors of one call of a layer, from its input h and derivatives δ [K, *output shape] with respect to its output.

    The first dimension of `h` may be a multiple of the number of samples, sample-major.
    """
    outputs = len(delta)
    if isinstance(module, nn.Linear):
        deltas = delta.reshape(outputs, samples, -1, 1, delta.shape[-1]).transpose(0, 1)
        return GradientFactors(deltas, h.reshape(samples, 1, -1, 1, h.shape[-1]))
    assert isinstance(module, Convolution)  # noqa: S101
    flat = delta.reshape(-1, *delta.shape[2:])
    # The weight of a transposed convolution is [in, out, *taps]: its rows belong to the inputs.
    if module.transposed:
        patches = _patches(flat, module, _zero_padding(module), h.shape[2:])
        rows, cols = _by_position(h, module.groups, samples, 1), _regroup(patches, module.groups, samples, outputs)
        return GradientFactors(rows, cols)
    patches = _patches(_pad(h, module), module, None, delta.shape[3:])
    rows, cols = _by_position(flat, module.groups, samples, outputs), _regroup(patches, module.groups, samples, 1)
    return GradientFactors(rows, cols)


def concatenate(parts: list[GradientFactors]) -> GradientFactors:
    """Factors of several calls of one layer, whose gradients add up: more positions."""
    if len(parts) == 1:
        return parts[0]
    return GradientFactors(torch.cat([p.row_factors for p in parts], 2), torch.cat([p.col_factors for p in parts], 2))


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as [groups, rows, cols]."""
    groups = int(getattr(module, "groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _zero_padding(module: Convolution) -> list[int]:
    assert not isinstance(module.padding, str)  # noqa: S101 - transposed convolutions take numbers only
    return [p for pad in reversed(module.padding) for p in (pad, pad)]


def _pad(h: Tensor, module: Convolution) -> Tensor:
    """The input with the padding that the convolution itself uses."""
    # Patches of other padding modes hold copies of inputs, so the input is padded as the layer does it.
    amounts = module._reversed_padding_repeated_twice  # private; only there are the numbers of padding="same"
    if not any(amounts):
        return h
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(h, amounts, mode=mode)


def _patches(t: Tensor, module: Convolution, padding: list[int] | None, sizes: torch.Size) -> Tensor:
    """Patches [B, channels, *sizes, *kernel] of t [B, channels, *space] at `sizes` positions."""
    if padding is not None and any(padding):
        t = nn.functional.pad(t, padding)
    for axis, (size, stride, dilation, count) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, sizes, strict=True), start=2
    ):
        # A stride may leave a rest at the end, which `narrow` cuts off.
        t = t.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation].narrow(axis, 0, count)
    return t


def _regroup(patches: Tensor, groups: int, samples: int, outputs: int) -> Tensor:
    """Patches [K*N, channels, *sizes, *kernel] to [N, K, T, groups, cols]."""
    space = (patches.ndim - 2) // 2
    channels = patches.shape[1]
    moved = patches.permute(0, *range(2, 2 + space), 1, *range(2 + space, 2 + 2 * space))
    flat = moved.reshape(outputs, samples, -1, groups, channels // groups * math.prod(patches.shape[2 + space :]))
    return flat.transpose(0, 1)


def _by_position(t: Tensor, groups: int, samples: int, outputs: int) -> Tensor:
    """[K*N, channels, *sizes] to [N, K, T, groups, rows]."""
    moved = t.flatten(2).transpose(1, 2)
    return moved.reshape(outputs, samples, -1, groups, t.shape[1] // groups).transpose(0, 1)
