"""Slow and obvious references for kernels: nothing here shares code or algebra with the library."""

import copy
import json
from pathlib import Path

import numpy as np
import torch

FIXTURES = Path(__file__).parents[1] / "fixtures" / "kernels"


def digits(n=64):
    return torch.from_numpy(np.load(FIXTURES / "inputs.npz")["x_train_u8"][:n] / 16.0)


def fixture(act, hidden, bias, which):
    """Kernel of neural-tangents 0.6.5 in float64, [64, 64], with its weight and bias standard deviations."""
    key = f"{act}_L{hidden}_b{bias:g}"
    entry = json.loads((FIXTURES / "index.json").read_text())["entries"][key]
    K = np.zeros((64, 64))
    K[np.triu_indices(64)] = np.load(FIXTURES / f"kernels_{act}.npz")[f"{key}_{which}"]
    return torch.from_numpy(K + np.triu(K, 1).T), entry["W_std"], entry["b_std"]


def _panels(low, high, knots, count=40):
    """Composite Gauss-Legendre nodes between the knots; arrays broadcast over leading dimensions."""
    base, weight = np.polynomial.legendre.leggauss(count)
    inner = [np.clip(k, low, high) for k in knots]
    grid = [np.full_like(inner[0], e) for e in np.linspace(low, high, 7)]
    edges = np.sort(np.stack([*grid, *inner], -1), -1)
    a, b = edges[..., :-1, None], edges[..., 1:, None]
    nodes = (b - a) / 2 * base + (a + b) / 2
    weights = (b - a) / 2 * weight
    return nodes.reshape(*nodes.shape[:-2], -1), weights.reshape(*weights.shape[:-2], -1)


def gaussian_pair(f, mx, my, qx, qy, k, knots=(0.0,)):
    """E[f(z) f(z')] by nested quadrature whose panels end at the knots of f, ~1e-13."""
    sx, sy = qx**0.5, qy**0.5
    rho = k / (sx * sy)
    t, w = _panels(-9.0, 9.0, [np.array((c - mx) / sx) for c in knots])
    middle, spread = my + sy * rho * t, sy * (1 - rho**2) ** 0.5
    s, v = _panels(-9.0, 9.0, [(c - middle) / spread for c in knots])
    density = lambda u: np.exp(-u * u / 2) / (2 * np.pi) ** 0.5  # noqa: E731
    inner = (f(middle[:, None] + spread * s) * density(s) * v).sum(1)
    return float((f(mx + sx * t) * density(t) * w * inner).sum())


def relu_moments(qx, qy, k):
    """Arc-cosine kernels of order 1 and 0 of ReLU (Cho & Saul 2009), by arccos, numpy."""
    norm = np.sqrt(qx * qy)
    angle = np.arccos(np.clip(k / norm, -1, 1))
    return norm / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * np.cos(angle)), (np.pi - angle) / (2 * np.pi)


def graphon_ntk_backward(x, values, measures, energies, widths, gammas, bias=0.0, bias_parameter=0.0):
    """Section 5 of the design with its own backward recursion and Python loops over positions; [C, N, N].

    measures: of every neuron layer, inputs first; widths likewise; energies E = E[w² M].
    """
    n = len(x)
    hidden = len(values) - 1
    S, dots = [np.einsum("nj,mj->jnm", x, x)], []
    for layer in range(hidden + 1):
        E, mu = energies[layer], np.asarray(measures[layer])
        K = (
            np.stack([sum(widths[layer] * E[u, v] * mu[v] * S[-1][v] for v in range(len(mu))) for u in range(len(E))])
            + bias
        )
        if layer < hidden:
            diag = np.einsum("unn->un", K)
            moments = [relu_moments(d[:, None], d[None], k) for d, k in zip(diag, K, strict=True)]
            S.append(np.stack([m[0] for m in moments]))
            dots.append(np.stack([m[1] for m in moments]))
    out = []
    for c in range(len(values[-1])):
        D = [None] * (hidden + 1)
        D[hidden] = np.zeros((len(values[-1]), n, n))
        D[hidden][c] = 1.0
        counts = [widths[i] * np.asarray(measures[i]) for i in range(hidden + 2)]
        for layer in range(hidden - 1, -1, -1):
            back = np.einsum("uv,u,unm->vnm", energies[layer + 1], counts[layer + 2], D[layer + 1])
            D[layer] = dots[layer] * back
        total = 0.0
        for layer in range(hidden + 1):
            own = np.einsum("uv,v,vnm->unm", values[layer], counts[layer], S[layer]) * gammas[layer] + bias_parameter
            total = total + np.einsum("u,unm,unm->nm", counts[layer + 1], D[layer], own)
        out.append(total)
    return np.stack(out)


def jacobian_kernel(model, x, masks=None, preconditioner=None):
    """[N, C, N, C] from the dense Jacobian (torch.func.jacrev) of the model in eval at its masked weights."""
    model = copy.deepcopy(model).eval()
    values = {n: p.detach() * (masks[n] if masks and n in masks else 1) for n, p in model.named_parameters()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]

    def outputs(some):
        return torch.func.functional_call(model, {**values, **some}, (x,)).reshape(len(x), -1)

    jacobian = torch.func.jacrev(outputs)({n: values[n] for n in trained})
    total = 0.0
    for n in trained:
        j = jacobian[n].flatten(2)
        weight = torch.ones(j.shape[-1], dtype=j.dtype)
        for given in (masks, preconditioner):
            if given and n in given:
                weight = weight * given[n].flatten()
        total = total + torch.einsum("ncp,mdp->ncmd", j * weight, j)
    return total


def relative(a, b):
    """Largest difference over the largest entry."""
    return float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max() / torch.as_tensor(b).abs().max())
