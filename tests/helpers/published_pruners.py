"""Published pruning methods written anew from their pseudocode, on functional networks in float64, for the tests."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.pruning.allocation.schedules import kept_after
from tests.helpers.networks import classes, mlp, seeded
from tests.helpers.pruning_oracles import keep_largest_by_sorting

Named = dict[str, Tensor]
Act = Callable[[Tensor], Tensor]


def convolutional() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 9, 4),
    )
    for name in ("weight", "bias", "running_mean", "running_var"):
        nn.init.uniform_(getattr(net[1], name), 0.5, 1.5)
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(width=40), (32, 8)),
    "cnn": (convolutional, (32, 2, 8, 8)),
}


def example(kind: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network in float64 and two batches."""
    build, shape = NETS[kind]
    x, y = classes(shape)
    return seeded(build).double(), [(x[:20].double(), y[:20]), (x[20:].double(), y[20:])]


def run(kind: str, p: Mapping[str, Tensor], x: Tensor, act: Act = F.relu, training: bool = False) -> Tensor:
    """The outputs of these networks, written out."""
    if kind == "mlp":
        h = act(x @ p["0.weight"].T + p["0.bias"])
        h = act(h @ p["2.weight"].T + p["2.bias"])
        return h @ p["4.weight"].T + p["4.bias"]
    h = F.conv2d(x, p["0.weight"], p["0.bias"], padding=1)
    if training:
        mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)
    else:
        mean, var = p["1.running_mean"], p["1.running_var"]
    scale = p["1.weight"] / (var + 1e-5).sqrt()
    h = act((h - mean[:, None, None]) * scale[:, None, None] + p["1.bias"][:, None, None])
    h = act(F.conv2d(h, p["3.weight"], p["3.bias"], stride=2))
    return h.flatten(1) @ p["6.weight"].T + p["6.bias"]


def values(model: nn.Module) -> Named:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if t.is_floating_point()}


def weights(model: nn.Module) -> list[str]:
    """The weights that are pruned: of two or more dimensions."""
    return [name for name, p in model.named_parameters() if p.ndim > 1]


def rounds(model: nn.Module, score: Callable[[Named], Named], sparsity: float, steps: int, revives: bool) -> Named:
    """Masks after so many rounds: score, keep the largest, again."""
    masks = {name: torch.ones_like(model.get_parameter(name)) for name in weights(model)}
    total = sum(m.numel() for m in masks.values())
    for step in range(1, steps + 1):
        scores = score(masks)
        if not revives:
            scores = {n: torch.where(masks[n] > 0, s, -torch.inf) for n, s in scores.items()}
        keep = kept_after(total, 1 - sparsity, round((1 - sparsity) * total), step, steps)
        masks = {n: m.double() for n, m in keep_largest_by_sorting(scores, keep).items()}
    return {name: mask.bool() for name, mask in masks.items()}


def masked(p: Named, masks: Named) -> Named:
    return {name: t * masks[name] if name in masks else t for name, t in p.items()}


def synflow_l2(kind: str, model: nn.Module, batches: Sequence, masks: Named) -> Named:
    p = {name: t.square() for name, t in masked(values(model), masks).items()}
    for name in masks:
        p[name].requires_grad_()
    flow = run(kind, p, torch.ones_like(batches[0][0][:1])).sum()
    grads = torch.autograd.grad(flow, [p[name] for name in masks])
    return {name: p[name].detach() * g for name, g in zip(masks, grads, strict=True)}


def px(kind: str, model: nn.Module, batches: Sequence, masks: Named) -> Named:
    """In each batch: gates of the network; z1 of ones on x² through them; z2 of squares on ones; gradients, squared."""
    p = masked(values(model), masks)
    squares = {name: t.square() for name, t in p.items()}
    ones = {name: torch.zeros_like(t) for name, t in p.items()} | masks
    if kind == "cnn":
        ones |= {key: torch.ones_like(p[key]) for key in ("1.weight", "1.running_var")}
    total = {name: torch.zeros_like(m) for name, m in masks.items()}
    for x, _ in batches:
        gates: list[Tensor] = []

        def note(h: Tensor, gates: list[Tensor] = gates) -> Tensor:
            gates.append((h > 0).double())
            return F.relu(h)

        run(kind, p, x, note)
        open_gates = iter(gates)
        z1 = run(kind, ones, x.square(), lambda h, g=open_gates: h * next(g))
        leaves = {name: squares[name].clone().requires_grad_() for name in masks}
        z2 = run(kind, squares | leaves, torch.ones_like(x), lambda h: h)
        for name, grad in zip(masks, torch.autograd.grad((z1 * z2).sum(), list(leaves.values())), strict=True):
            total[name] += grad.square()
    return {name: total[name] * squares[name] for name in masks}


def force(kind: str, model: nn.Module, batches: Sequence, masks: Named) -> Named:
    p = values(model)
    leaves = {name: t.requires_grad_() for name, t in masked(p, masks).items() if name in masks}
    loss = sum(F.cross_entropy(run(kind, p | leaves, x, training=True), y) for x, y in batches) / len(batches)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {name: (p[name] * g).abs() for name, g in zip(leaves, grads, strict=True)}


def prospr(kind: str, model: nn.Module, batches: Sequence, masks: Named, steps: int, lr: float, beta: float) -> Named:
    p, m = values(model), {name: mask.clone().requires_grad_() for name, mask in masks.items()}
    now = {n: t * m[n] if n in m else t.requires_grad_() for n, t in p.items() if "running" not in n}
    speed = {n: torch.zeros_like(t) for n, t in now.items()}
    for step in range(steps + 1):
        x, y = batches[step % len(batches)]
        loss = F.cross_entropy(run(kind, now, x, training=True), y)
        if step == steps:
            break
        grads = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        speed = {n: beta * speed[n] + g for n, g in zip(now, grads, strict=True)}
        now = {n: t - lr * speed[n] for n, t in now.items()}
    return {n: g.abs() for n, g in zip(m, torch.autograd.grad(loss, list(m.values())), strict=True)}


def ntk_sap(kind: str, draws: Sequence[tuple[Named, Named, Tensor]], masks: Named, epsilon: float) -> Named:
    """Draws: parameters, the noise of weights, inputs; for each batch."""
    m = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
    total = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for p, noise, x in draws:
        if kind == "cnn":  # the statistics of these inputs, unbiased as batch norm keeps them, constant for gradients
            h = F.conv2d(x, p["0.weight"] * masks["0.weight"], p["0.bias"], padding=1)
            p = p | {"1.running_mean": h.mean((0, 2, 3)), "1.running_var": h.var((0, 2, 3), correction=1)}
        here = run(kind, p | {n: p[n] * m[n] for n in m}, x)
        there = run(kind, p | {n: (p[n] + epsilon * noise[n]) * m[n] for n in m}, x)
        grads = torch.autograd.grad((here - there).square().sum(), list(m.values()))
        for name, grad in zip(m, grads, strict=True):
            total[name] += grad
    return {name: total[name].abs() * masks[name] for name in m}
