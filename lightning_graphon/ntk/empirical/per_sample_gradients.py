"""Per-sample gradients of any parameter, by torch.func in chunks: norms, embeddings, attention, tied weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon._shared.memory import is_out_of_memory
from lightning_graphon.ntk.empirical.functional_model import FunctionalModel, Inputs, batch_size, select_samples


def gradients(fm: FunctionalModel, x: Inputs, names: Sequence[str], outputs: int) -> Tensor:
    """Gradients [N, C, p] of every output with respect to the named parameters, one after the other."""
    try:
        vectorised = _vectorised(fm, x, names)
        if _matches_autograd(vectorised[0], fm, x, names):
            return vectorised
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
    # torch.func cannot batch every module: data-dependent branches, custom autograd functions, PReLU.
    return _one_by_one(fm, x, names, outputs)


def entry_weights(fm: FunctionalModel, names: Sequence[str]) -> Tensor | None:
    """Weights [p] of the named parameters' entries, or None for ones."""
    given = [fm.weight(n) for n in names]
    if all(w is None for w in given):
        return None
    filled = [torch.ones_like(fm.values[n]) if w is None else w for n, w in zip(names, given, strict=True)]
    return torch.cat([w.reshape(-1) for w in filled])


def split_by_size(fm: FunctionalModel, names: Sequence[str], floats: int) -> list[list[str]]:
    """Split names into groups of at most `floats` entries, or of one parameter."""
    out: list[list[str]] = []
    size = 0
    for name in names:
        n = fm.values[name].numel()
        if not out or size + n > floats:
            out.append([])
            size = 0
        out[-1].append(name)
        size += n
    return out


def _vectorised(fm: FunctionalModel, x: Inputs, names: Sequence[str]) -> Tensor:
    values = {n: fm.values[n] for n in names}

    def one(values: dict[str, Tensor], sample: Inputs) -> Tensor:
        batched = sample[None] if isinstance(sample, Tensor) else tuple(s[None] for s in sample)
        return fm(values, batched)[0]

    # Dropout is off in eval mode; modules with own random numbers draw them anew for each sample.
    jacobian = torch.func.vmap(torch.func.jacrev(one), in_dims=(None, 0), randomness="different")(values, x)
    return torch.cat([jacobian[n].flatten(2) for n in names], dim=2).detach()


def _matches_autograd(gradient: Tensor, fm: FunctionalModel, x: Inputs, names: Sequence[str]) -> bool:
    """Whether autograd finds the same gradient [C, p] of the first sample, along one direction of the outputs."""
    # With as many samples as outputs torch 2.14 batches the backward pass of PReLU wrongly, without an error.
    leaves = {n: fm.values[n].detach().requires_grad_() for n in names}
    out = fm(leaves, select_samples(x, slice(0, 1)))[0]
    direction = torch.randn(len(out), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
    true = _flat_gradient(out @ direction, leaves)
    tolerance = 10 * torch.finfo(true.dtype).eps ** 0.5  # a wrong gradient is off by its own size
    return float((direction @ gradient - true).norm()) <= tolerance * float(true.norm())


def _one_by_one(fm: FunctionalModel, x: Inputs, names: Sequence[str], outputs: int) -> Tensor:
    rows = []
    for i in range(batch_size(x)):
        leaves = {n: fm.values[n].detach().requires_grad_() for n in names}
        out = fm(leaves, select_samples(x, slice(i, i + 1)))[0]
        rows += [_flat_gradient(out[k], leaves) for k in range(outputs)]
    return torch.stack(rows).reshape(batch_size(x), outputs, -1)


def _flat_gradient(scalar: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    if not scalar.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in leaves.values()])
    # The graph is needed again for the next output.
    grads = torch.autograd.grad(scalar, list(leaves.values()), retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), grads, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled])
