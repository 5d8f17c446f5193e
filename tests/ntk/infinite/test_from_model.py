"""Kernels of modules: what is read, what is refused, and how near the theory comes to the network."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk import empirical_ntk, graphon_ntk, graphon_ntk_from_model
from lightning_graphon.ntk.infinite.chain import read_chain
from lightning_graphon.tracing import trace
from tests.helpers.ntk_oracles import digits, relative

WIDTHS = [64, 256, 256, 256, 10]


def network(seed, act=nn.ReLU, bias=False, widths=WIDTHS):
    g = torch.Generator().manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layer = nn.Linear(a, b, bias=bias, dtype=torch.float64)
        layer.weight.data = torch.randn(b, a, generator=g, dtype=torch.float64) * (2 / a) ** 0.5
        if bias:
            layer.bias.data = 0.3 * torch.randn(b, generator=g, dtype=torch.float64)
        layers += [layer, act()]
    return nn.Sequential(*layers[:-1])


def keep_largest(scores, density=0.2):
    flat = torch.cat([s.flatten() for s in scores.values()])
    threshold = flat.quantile(1 - density) if flat.numel() < 1e6 else flat.sort().values[int((1 - density) * len(flat))]
    return {n: s >= threshold for n, s in scores.items()}


def masks_in_use(model, method, seed=0):
    weights = {n: p.detach() for n, p in model.named_parameters() if p.ndim == 2}
    if method == "dense":
        return None
    if method == "magnitude":
        return keep_largest({n: w.abs() for n, w in weights.items()})
    if method == "random":
        g = torch.Generator().manual_seed(1000 + seed)  # not the weights' seed
        return keep_largest({n: torch.rand(w.shape, generator=g, dtype=torch.float64) for n, w in weights.items()})
    x, y = digits(), torch.arange(64) % 10
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return keep_largest({n: (w * g).abs() for (n, w), g in zip(weights.items(), grads, strict=True)})


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bias", [False, True])
def test_dense_is_the_dense_kernel_with_its_own_energies(bias):
    """Every layer becomes one position, so the formula can be written with the layers' mean squares."""
    model, x = network(0, bias=bias), digits(10)
    kernel = graphon_ntk_from_model(model, x)
    linears = [m for m in model if isinstance(m, nn.Linear)]
    chain = []
    for i, m in enumerate(linears):
        energy = m.weight.detach().square()
        energy = (
            energy.mean(0, keepdim=True)
            if i == 0
            else energy.mean().reshape(1, 1)
            if i < 3
            else energy.mean(1, keepdim=True)
        )
        chain.append(StepGraphon(torch.ones_like(energy), energy=energy))
    squares = [m.bias.detach().square().mean().item() if bias else 0.0 for m in linears]
    truth = graphon_ntk(
        x, chain, propagate="energy", parameterization="standard", widths=WIDTHS, bias_variance=squares, train_bias=bias
    )
    assert relative(kernel, truth) < 1e-10


@pytest.mark.parametrize("method", ["dense", "random", "magnitude"])
def test_describes_the_network_that_is_trained(method):
    """Against the network's own kernel at n = 256, averaged over 4 seeds; seed to seed it moves by 0.25 to 0.34."""
    x, errors, paper = digits(48), [], []
    for seed in range(4):
        model = network(seed)
        masks = masks_in_use(model, method, seed)
        truth = empirical_ntk(model, x, masks=masks)
        errors.append(distance(graphon_ntk_from_model(model, x, masks), truth))
        paper.append(distance(graphon_ntk_from_model(model, x, masks, propagate="density", weight_variance=2.0), truth))
    assert sum(errors) / 4 < 0.25
    if method == "magnitude":  # large weights were kept, the paper's independence fails
        assert sum(paper) / 4 > 0.8


def test_drift_describes_snip():
    x, centred, drift = digits(48), [], []
    for seed in range(3):
        model = network(seed)
        masks = masks_in_use(model, "snip", seed)
        truth = empirical_ntk(model, x, masks=masks)
        centred.append(distance(graphon_ntk_from_model(model, x, masks), truth))
        drift.append(distance(graphon_ntk_from_model(model, x, masks, propagate="drift"), truth))
    assert min(centred) > 0.6
    assert max(drift) < 0.35  # the kernel itself moves by 0.28 from seed to seed


def test_other_activations_biases_and_outputs():
    x = digits(12)
    for act in (nn.Tanh, nn.GELU, nn.SiLU, nn.Hardtanh):
        model = network(1, act, bias=True, widths=[64, 1024, 1024, 10])
        truth = empirical_ntk(model, x, reduce="per_output")
        kernel = graphon_ntk_from_model(model, x, reduce=None)
        assert kernel.shape == (10, 12, 12)
        assert distance(kernel, truth) < 0.15  # fluctuation of one network of width 1024


def test_frozen_parameters_and_dtypes():
    model = network(0, bias=True, widths=[64, 512, 512, 10])
    x = digits(8)
    for p in list(model.parameters())[:4]:
        p.requires_grad_(False)
    last = graphon_ntk_from_model(model, x)
    assert distance(last, empirical_ntk(model, x)) < 0.25  # one network of width 512 moves by 0.2
    single = graphon_ntk_from_model(model.float(), x.float())
    assert single.dtype == torch.float64
    assert relative(single, last) < 1e-5


@pytest.mark.parametrize("propagate", ["energy", "drift"])
def test_model_and_samples_of_different_dtypes(propagate):
    model, x = network(0, widths=[64, 32, 32, 10]).float(), digits(6)
    truth = graphon_ntk_from_model(model, x.float(), propagate=propagate)
    mixed = graphon_ntk_from_model(model, x, propagate=propagate)
    assert mixed.dtype == torch.float64
    assert relative(mixed, truth) < 1e-14  # the digits are exact in float32
    assert relative(graphon_ntk_from_model(model.double(), x.float(), propagate=propagate), truth) < 1e-14


class Written(nn.Module):
    """The same chain with functions, methods, reshapes and dropout, and two names for the activations."""

    def __init__(self, source):
        super().__init__()
        self.a, self.b, self.c, self.d = (m for m in source if isinstance(m, nn.Linear))
        self.drop, self.flat = nn.Dropout(0.5), nn.Flatten()

    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = self.drop(F.relu(self.a(self.flat(x)), inplace=True))
        x = F.dropout(self.b(x).relu(), training=self.training)
        return self.d(torch.relu(self.c(x)).reshape(x.shape[0], -1))


def test_reads_functions_methods_and_reshapes():
    source = network(0)
    x = digits(6)
    written = Written(source).train()
    torch.testing.assert_close(graphon_ntk_from_model(written, x.reshape(6, 8, 8)), graphon_ntk_from_model(source, x))
    assert written.training
    assert written.drop.training
    masks = {"b.weight": torch.rand(256, 256) < 0.5}
    torch.testing.assert_close(
        graphon_ntk_from_model(written, x, masks), graphon_ntk_from_model(source, x, {"2.weight": masks["b.weight"]})
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return F.gelu(self.linear(x))


def sequences():
    act, linear = nn.ReLU(), nn.Linear
    return {
        "flat": nn.Sequential(nn.Flatten(), linear(64, 16), act, nn.Dropout(), linear(16, 3)),
        "nested": nn.Sequential(nn.Sequential(linear(64, 16), nn.Sequential(nn.Tanh())), nn.Sequential(linear(16, 3))),
        "one activation twice": nn.Sequential(linear(64, 16), act, linear(16, 16), act, linear(16, 3)),
        "a module of its own": nn.Sequential(linear(64, 16), nn.ReLU(), Block(), linear(16, 3)),
    }


@pytest.mark.parametrize("name", sequences())
def test_sequences_are_chains(name):
    model, x = sequences()[name], digits(4).float()
    found = read_chain(trace(model, x))
    linears = {f"{path}.weight": m.weight for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {layer.step.weight_name: layer.step.weight for layer in found} == linears
    assert [layer.dual is None for layer in found] == [False] * (len(found) - 1) + [True]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


class Branching(nn.Linear):
    def __init__(self):
        super().__init__(64, 3)

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x[:, :3]


def tied():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    net[2].weight = net[0].weight
    return net


class Decides(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Copies(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.gain = nn.Linear(64, 3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.linear(x) * self.gain


def conv_net(*middle):
    layers = nn.Conv2d(1, 4, 3, padding=1), *middle, nn.Flatten(), nn.LazyLinear(3)
    net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers).double()
    net(torch.zeros(1, 64, dtype=torch.float64))
    return net


def calibrated():
    net = conv_net(nn.BatchNorm2d(4))
    net[2].running_mean.fill_(0.1)
    return net


REFUSED = {
    "layer '' .ParametrizedLinear., whose weight is computed": lambda: spectral_norm(nn.Linear(64, 3)),
    "layer '2' .Linear., which shares its weight": tied,
    "layer '2' .BatchNorm2d. has statistics.*sampled_ntk": calibrated,
    "layer '1' .Softmax.": lambda: nn.Sequential(nn.Linear(64, 8), nn.Softmax(-1), nn.Linear(8, 3)),
    "activation follows the last": lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU()),
    "used twice": Twice,
    "layer '2' .MaxPool2d.*AvgPool": lambda: conv_net(nn.MaxPool2d(2)),
    "layer '2' .Conv2d., which is depthwise": lambda: conv_net(nn.Conv2d(4, 4, 3, groups=4)),
    "the operation 'detach'": lambda: Copies(64, 3),
    "the operation 'sum'": lambda: Decides(64, 3),
    "one trained number for all units": Scales,
    "layer '1' .GRU.": lambda: nn.Sequential(nn.Unflatten(1, (8, 8)), nn.GRU(8, 4)),
    "PReLU with 16 slopes": lambda: nn.Sequential(nn.Linear(64, 16), nn.PReLU(16), nn.Linear(16, 3)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refuses_by_name(words):
    with pytest.raises(ValueError, match=f"{words}.*empirical_ntk"):
        graphon_ntk_from_model(REFUSED[words]().double(), digits(4))


def test_refuses_other_masks():
    with pytest.raises(KeyError, match=r"Did you mean '0\.weight'"):
        graphon_ntk_from_model(network(0), digits(3), {"0.weigth": torch.ones(256, 64)})


def test_linear_model_alone():
    model = nn.Linear(64, 3).double()
    torch.testing.assert_close(graphon_ntk_from_model(model, digits(5)), empirical_ntk(model, digits(5)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("propagate", ["density", "energy", "drift"])
def test_the_kernel_is_the_sum_of_its_layers(propagate, bias):
    """Each layer's own part is the kernel where all other parameters are frozen."""
    model, x = network(0, bias=bias, widths=[64, 24, 24, 3]), digits(12)
    masks = masks_in_use(model, "random")
    whole = graphon_ntk_from_model(model, x, masks, propagate=propagate)
    parts = []
    for layer in (m for m in model if isinstance(m, nn.Linear)):
        model.requires_grad_(False)
        layer.requires_grad_(True)
        parts.append(graphon_ntk_from_model(model, x, masks, propagate=propagate))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=1e-10)
