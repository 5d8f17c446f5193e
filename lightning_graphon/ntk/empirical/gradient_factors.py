"""Linear and convolution layers in one form: per sample the weight's gradient is Σ_t units_t ⊗ inputs_t.

For a linear layer t runs over extra dimensions (tokens), for a convolution over the output's positions and
`inputs` are patches; a transposed convolution is a convolution with the two sides exchanged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Structured = nn.Linear | nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Factors:
    """Two sides of the gradients of one weight.

    Attributes:
        units: [N, K or 1, T, groups, rows].
        inputs: [N, 1 or K, T, groups, cols]; K outputs are on one side only.
    """

    units: Tensor
    inputs: Tensor

    @property
    def samples(self) -> int:
        """N."""
        return self.units.shape[0]

    @property
    def outputs(self) -> int:
        """K."""
        return max(self.units.shape[1], self.inputs.shape[1])


def factors(module: nn.Module, samples: int, h: Tensor, delta: Tensor) -> Factors:
    """Factors of one call of a layer.

    Args:
        module: Linear or Conv.
        samples: N; the first dimension of `h` may be N times something, sample-major.
        h: The layer's input.
        delta: [K, *output shape], gradients of K outputs with respect to the layer's output.

    Returns:
        The two sides, T collecting all positions.
    """
    outputs = len(delta)
    if isinstance(module, nn.Linear):
        units = delta.reshape(outputs, samples, -1, 1, delta.shape[-1]).transpose(0, 1)
        return Factors(units, h.reshape(samples, 1, -1, 1, h.shape[-1]))
    assert isinstance(module, nn.modules.conv._ConvNd)  # noqa: S101
    flat = delta.reshape(-1, *delta.shape[2:])
    if module.transposed:
        spots = h.shape[2:]
        patches = _patches(flat, module, _zero_padding(module), spots)
        return Factors(_positions(h, module.groups, samples, 1), _regroup(patches, module.groups, samples, outputs))
    spots = delta.shape[3:]
    padded = _pad(h, module)
    patches = _patches(padded, module, None, spots)
    return Factors(_positions(flat, module.groups, samples, outputs), _regroup(patches, module.groups, samples, 1))


def concatenate(parts: list[Factors]) -> Factors:
    """Several calls of one layer: more positions."""
    if len(parts) == 1:
        return parts[0]
    return Factors(torch.cat([p.units for p in parts], 2), torch.cat([p.inputs for p in parts], 2))


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as [groups, rows, cols] of `Factors`."""
    groups = int(getattr(module, "groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _zero_padding(module: nn.modules.conv._ConvNd) -> list[int]:
    assert not isinstance(module.padding, str)  # noqa: S101 - transposed convolutions take numbers only
    return [p for pad in reversed(module.padding) for p in (pad, pad)]


def _pad(h: Tensor, module: nn.modules.conv._ConvNd) -> Tensor:
    """The input with the padding that the convolution itself uses."""
    amounts = module._reversed_padding_repeated_twice
    if not any(amounts):
        return h
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(h, amounts, mode=mode)


def _patches(t: Tensor, module: nn.modules.conv._ConvNd, padding: list[int] | None, spots: torch.Size) -> Tensor:
    """Windows [B, channels, *spots, *kernel] of t [B, channels, *space]."""
    if padding is not None and any(padding):
        t = nn.functional.pad(t, padding)
    for axis, (size, stride, dilation, count) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, spots, strict=True), start=2
    ):
        t = t.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation].narrow(axis, 0, count)
    return t


def _regroup(patches: Tensor, groups: int, samples: int, outputs: int) -> Tensor:
    """Windows [K*N, channels, *spots, *kernel] to [N, K, T, groups, cols]."""
    space = (patches.ndim - 2) // 2
    channels = patches.shape[1]
    moved = patches.permute(0, *range(2, 2 + space), 1, *range(2 + space, 2 + 2 * space))
    flat = moved.reshape(outputs, samples, -1, groups, channels // groups * _product(patches.shape[2 + space :]))
    return flat.transpose(0, 1)


def _positions(t: Tensor, groups: int, samples: int, outputs: int) -> Tensor:
    """[K*N, channels, *spots] to [N, K, T, groups, rows]."""
    moved = t.flatten(2).transpose(1, 2)
    return moved.reshape(outputs, samples, -1, groups, t.shape[1] // groups).transpose(0, 1)


def _product(sizes: torch.Size) -> int:
    out = 1
    for size in sizes:
        out *= size
    return out
