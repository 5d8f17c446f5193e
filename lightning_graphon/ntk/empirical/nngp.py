"""The covariance of a finite network's outputs, as one network shows it: f(x) f(x')."""

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import Reduce
from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon.ntk.empirical.functional_model import (
    FunctionalModel,
    Inputs,
    batch_size,
    detach_inputs,
    functional_model,
    input_device,
    select_samples,
)

_CHUNK = 256  # samples at a time


@checked
def empirical_nngp(
    model: nn.Module,
    x: Inputs,
    *,
    masks: Mapping[str, Tensor] | None = None,
    reduce: Reduce | None = "mean",
    x2: Inputs | None = None,
) -> Tensor:
    """Products of a module's outputs between all pairs of samples, what neural-tangents' `empirical_nngp_fn` gives.

    Its mean over initialisations is the NNGP kernel (Lee et al. 2018) of the network at its width; one network has a
    single draw of each output, so this estimate has rank one per output. `sampled_ntk(get="nngp")` takes the mean over
    networks with redrawn signs, with its standard error; `graphon_ntk_from_model(get="nngp")` is the limit of width.

    Args:
        model: As in `empirical_ntk`; evaluated in eval mode at its masked weights. Frozen parameters count.
        x: Samples [N, ...], or a tuple of tensors that forward takes as arguments.
        masks: Qualified parameter name to a tensor of the weight's shape, non-zero where kept.
        reduce: "mean" averages over the C outputs, "per_output" gives each output's own, None the products of all pairs
            of outputs.
        x2: Other samples; the products between `x` and `x2` then.

    Returns:
        [N, M] for "mean", [C, N, M] for "per_output", [N, C, M, C] for None; the outputs' dtype and device.

    Raises:
        KeyError: A mask names no parameter.
        ValueError: Shapes or options.
        TypeError: The model does not return a tensor.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    >>> empirical_nngp(model, torch.eye(2, dtype=torch.float64))
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    check_choice("reduce", "mean" if reduce is None else reduce, get_args(Reduce))
    fm = functional_model(model, masks, None, "standard", 1.0, 1.0, trained=False)
    left = _outputs(fm, x)
    right = left if x2 is None else _outputs(fm, x2)
    if reduce is None:
        return torch.einsum("nc,md->ncmd", left, right)
    if reduce == "per_output":
        return torch.einsum("nc,mc->cnm", left, right)
    return left @ right.T / left.shape[1]


def _outputs(fm: FunctionalModel, x: Inputs) -> Tensor:
    """Outputs [N, C]."""
    with eval_semantics(fm.model, input_device(x)), torch.no_grad():
        given = detach_inputs(x)
        starts = range(0, batch_size(x), _CHUNK)
        return torch.cat([fm({}, select_samples(given, slice(start, start + _CHUNK))) for start in starts])
