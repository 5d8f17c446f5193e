"""Sparse training in plain loops over single weights in float64, from the pseudocode of the papers.

SET: Mocanu et al. 2018, Algorithm 1. RigL: Evci et al. 2020, Algorithm 1. SRigL: Lasby et al. 2023, section 3.1.
The optimizer is SGD with momentum, by hand. Masks are lists of 0 and 1, and a network's weights are functions of them:
nothing is enforced, the loss is that of weights times masks.
"""

import math

import torch
from torch import nn

from lightning_graphon._shared.random import generator

EVERY, FRACTION, UPDATES = 2, 0.5, 20
LAST = EVERY * UPDATES + 1


def mlp64():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10)).double()


def cnn64():
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)]
    return nn.Sequential(*layers).double()


def run(method, net, masks, counts, batches, lr, momentum, seed=0):
    """Masks after each update, and the weights at the end, of training on `batches` one after the other.

    `counts`: how many weights each layer has room for, of which a constant fan-in may leave a few unused.
    """
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    masks = {name: mask.clone() for name, mask in masks.items()}
    velocity, history = {name: torch.zeros_like(p) for name, p in params.items()}, []
    for name, mask in masks.items():
        params[name] = params[name] * mask
    for step, (x, y) in enumerate(batches, 1):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(net, leaves, (x.double(),)), y)
        dense = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name, p in params.items():
            gradient = dense[name] * masks[name] if name in masks else dense[name]
            velocity[name] = gradient if step == 1 else momentum * velocity[name] + gradient
            params[name] = p - lr * velocity[name]
        if step % EVERY == 0 and step < LAST:
            fraction = FRACTION / 2 * (1 + math.cos(math.pi * step / LAST))
            for name, mask in masks.items():
                source = generator(seed, f"growth of {name_in_module(name)} at update {step // EVERY}")
                random = torch.rand(mask.shape, generator=source)
                last = name == list(masks)[-1]
                new = STEPS[method](params[name], mask, dense[name], random, fraction, counts[name], last)
                both = new & mask
                params[name], velocity[name] = params[name] * both, velocity[name] * both
                masks[name] = new
            history.append({name: mask.clone() for name, mask in masks.items()})
    return history, params


def name_in_module(name):
    return f"net.{name}"


def _drop(weight, active, count):
    """The active weights without the `count` smallest; of equal ones the later leave."""
    return set(active) - set(sorted(active, key=lambda i: (abs(weight[i]), -i))[:count])


def _exchange(weight, mask, scores, fraction):
    weights, kept, scores = weight.flatten().tolist(), mask.flatten().tolist(), scores.flatten().tolist()
    active = [i for i, flag in enumerate(kept) if flag]
    count = int(fraction * len(active) + 1e-9)
    stay = _drop(weights, active, count)
    others = [i for i in range(len(weights)) if i not in stay]
    grown = sorted(others, key=lambda i: (-scores[i], i))[:count]
    return _as_mask(stay | set(grown), mask)


def _as_mask(places, mask):
    flags = [i in places for i in range(mask.numel())]
    return torch.tensor(flags, dtype=torch.bool).reshape(mask.shape)


def set_step(weight, mask, dense, random, fraction, count, last):
    return _exchange(weight, mask, random, fraction)


def rigl_step(weight, mask, dense, random, fraction, count, last):
    return _exchange(weight, mask, dense.abs(), fraction)


def srigl_step(weight, mask, dense, random, fraction, count, last, share=0.3):
    units, inputs = mask.shape[0], mask[0].numel()
    weights, kept = weight.flatten().tolist(), mask.flatten().tolist()
    gradient = dense.abs().flatten().tolist()
    active = [i for i, flag in enumerate(kept) if flag]
    dropped = int(fraction * len(active) + 1e-9)
    stay = _drop(weights, active, dropped)
    grown = set(sorted(range(len(weights)), key=lambda i: (-gradient[i], i))[:dropped])
    salient = [sum(i // inputs == unit for i in stay | grown) for unit in range(units)]
    fan_in = min(inputs, max(1, count // units))
    least = max(1, int(share * fan_in + 1e-9))
    needed = max(1, math.ceil(count / inputs))
    best = set(sorted(range(units), key=lambda unit: (-salient[unit], unit))[:needed])
    alive = [unit for unit in range(units) if last or salient[unit] >= least or unit in best]
    fan_in = min(inputs, max(1, count // len(alive)))
    places = set()
    for unit in alive:
        row = range(unit * inputs, (unit + 1) * inputs)
        mine = sorted((i for i in row if i in stay), key=lambda i: (-abs(weights[i]), i))[:fan_in]
        others = sorted((i for i in row if i not in mine), key=lambda i: (-gradient[i], i))
        places |= set(mine) | set(others[: fan_in - len(mine)])
    return _as_mask(places, mask)


STEPS = {"set": set_step, "rigl": rigl_step, "srigl": srigl_step}
