"""The kernel of networks that are no chains, against neural-tangents and against wide networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model
from lightning_graphon.ntk.infinite import from_model
from tests.helpers.layers import Beside, Function, Residual, conv, linear
from tests.helpers.live_memory import LiveMemory
from tests.helpers.ntk_oracles import relative

FIXTURES = np.load(Path(__file__).parents[2] / "fixtures" / "networks" / "kernels.npz")
S, R, W = nn.Sequential, nn.ReLU, 16


def norm():
    return nn.LayerNorm(W, eps=1e-12, elementwise_affine=False)


def mlp(activation):
    return S(nn.Flatten(), linear(64, W), activation(), linear(W, W), activation(), linear(W, 1))


NETWORKS = {
    "mlp_relu": lambda: mlp(R),
    "cnn_flat": lambda: S(conv(1, W), R(), conv(W, W), R(), nn.Flatten(), linear(64 * W, 1)),
    "cnn_flat_bias_stride": lambda: S(
        conv(1, W, True), R(), conv(W, W, True, stride=2, padding=0), R(), nn.Flatten(), linear(9 * W, 1, True)
    ),
    "cnn_gap": lambda: S(conv(1, W), R(), conv(W, W), R(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(W, 1)),
    "res_mlp": lambda: S(
        nn.Flatten(), linear(64, W), Residual(R(), linear(W, W)), Residual(R(), linear(W, W)), R(), linear(W, 1)
    ),
    "res_cnn_flat": lambda: S(
        conv(1, W), Residual(R(), conv(W, W), R(), conv(W, W)), R(), nn.Flatten(), linear(64 * W, 1)
    ),
    "ln_mlp": lambda: S(nn.Flatten(), linear(64, W), norm(), R(), linear(W, W), norm(), R(), linear(W, 1)),
    "concat_mlp": lambda: S(
        nn.Flatten(), linear(64, W), R(), Beside(linear(W, W), S(linear(W, W), R(), linear(W, W))),
        linear(2 * W, W), R(), linear(W, 1),
    ),
    "mlp_gauss": lambda: mlp(lambda: Function(lambda z: torch.exp(-(z**2)))),
    "mlp_mono3": lambda: mlp(lambda: Function(lambda z: z * z * z)),
    "mlp_poly": lambda: mlp(lambda: Function(lambda z: 0.5 + z + 0.3 * z**2)),
}  # fmt: skip


def digit_images(n=16):
    return torch.from_numpy(FIXTURES["x"][:n])


@pytest.mark.parametrize("get", ["ntk", "nngp"])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_ones_masks_are_neural_tangents(name, get):
    model = NETWORKS[name]().double()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.constant_(parameter, 0.3)
    masks = {key: torch.ones_like(p) for key, p in model.named_parameters() if p.ndim > 1}
    kernel = graphon_ntk_from_model(
        model, digit_images(), masks, propagate="density", parameterization="ntk", weight_variance=2.0, get=get
    )
    assert relative(kernel, torch.from_numpy(FIXTURES[f"{name}/{get}"])) < 1e-10


class Words(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.word, self.place = nn.Embedding(11, n), nn.Embedding(5, n)
        self.hidden, self.out = nn.Linear(n, n), nn.Linear(n, 1)

    def forward(self, x):
        h = self.word(x) + self.place(torch.arange(x.shape[1]))
        return self.out(torch.relu(self.hidden(h)).mean(1))


class Tokens(nn.Module):
    """A class token, learned positions, a scaled branch after a LayerNorm."""

    def __init__(self, n):
        super().__init__()
        self.embed, self.norm, self.hidden, self.out = (
            nn.Linear(6, n),
            nn.LayerNorm(n),
            nn.Linear(n, n),
            nn.Linear(n, 1),
        )
        self.first, self.place = nn.Parameter(torch.randn(1, 1, n)), nn.Parameter(torch.randn(1, 6, n))
        self.scale = nn.Parameter(torch.full((n,), 0.5))

    def forward(self, x):
        h = torch.cat([self.first.expand(len(x), -1, -1), self.embed(x)], 1) + self.place
        return self.out(torch.relu(h + self.scale * self.hidden(torch.relu(self.norm(h))))[:, 0])


class Gated(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, n), nn.Linear(n, 2 * n), nn.Linear(n, 1)

    def forward(self, x):
        u, v = self.b(F.gelu(self.a(x))).chunk(2, -1)
        return self.c(F.silu(u) * v)


class Attentive(nn.Module):
    """Attention without its module, and causal; read at a token in the middle."""

    def __init__(self, n, heads=8):
        super().__init__()
        self.embed, self.qkv, self.joined, self.out = (nn.Linear(*s) for s in ((6, n), (n, 3 * n), (n, n), (n, 1)))
        self.heads = heads

    def forward(self, x):
        h = self.embed(x)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(torch.relu(h + self.joined(attended.transpose(1, 2).flatten(2)))[:, 2])


class Twice(nn.Module):
    """A stream that is added to what it has become, and a pooling minus its input."""

    def __init__(self, n):
        super().__init__()
        self.first, self.second, self.third = conv(2, n), conv(n, n), conv(n, n)
        self.out = nn.Linear(36 * n, 1)

    def forward(self, x):
        h = self.first(x)
        stream = h + self.second(torch.relu(h))
        stream = stream + self.third(torch.relu(stream)) - 0.5 * h
        pooled = F.avg_pool2d(stream, 3, 1, 1, count_include_pad=False) - stream
        return self.out(torch.tanh(pooled).flatten(1))


def transformer(n):
    layer = nn.TransformerEncoderLayer(n, 8, 2 * n, batch_first=True, norm_first=True, activation="gelu")
    return S(nn.Linear(6, n), layer, Function(lambda h: h.mean(1)), nn.Linear(n, 1))


def images():
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def vectors():
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sequences():
    return torch.randn(5, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def words():
    return torch.randint(0, 11, (5, 5), generator=torch.Generator().manual_seed(1))


def end(n, positions=1):
    return nn.Flatten(), nn.Linear(positions * n, 1)


WIDE = {
    "pooling": (lambda n: S(conv(2, n), R(), nn.AvgPool2d(2), conv(n, n), nn.Tanh(), *end(n, 9)), images),
    "erf and GAP": (
        lambda n: S(conv(2, n), Function(torch.erf), conv(n, n), Function(torch.erf),
                    Function(lambda h: h.mean((2, 3))), *end(n)), images,
    ),
    "residual with GAP": (
        lambda n: S(
            conv(2, n, True), Residual(R(), conv(n, n), R(), conv(n, n)), R(), nn.AdaptiveAvgPool2d(1), *end(n)
        ),
        images,
    ),
    "groups and strides": (lambda n: S(conv(2, n), R(), conv(n, n, groups=4, stride=2), R(), *end(n, 9)), images),
    "one dimension": (
        lambda n: S(Function(lambda x: x.mT), nn.Conv1d(6, n, 3, dilation=2, padding=2), R(), nn.Conv1d(n, n, 1),
                    nn.SiLU(), *end(n, 5)), sequences,
    ),
    "gates": (Gated, vectors),
    "GLU": (lambda n: S(nn.Linear(8, 2 * n), nn.GLU(), nn.Linear(n, 2 * n), nn.GLU(), nn.Linear(n, 1)), vectors),
    "LayerNorm after ReLU": (
        lambda n: S(nn.Linear(8, n), R(), nn.LayerNorm(n), nn.Linear(n, n), nn.LayerNorm(n), R(), nn.Linear(n, 1)),
        vectors,
    ),
    "RMSNorm": (lambda n: S(nn.Linear(8, n), R(), nn.RMSNorm(n), nn.Linear(n, n), R(), nn.Linear(n, 1)), vectors),
    "GroupNorm": (lambda n: S(conv(2, n), R(), nn.GroupNorm(4, n), conv(n, n), R(), *end(n, 36)), images),
    "LayerNorm of maps": (lambda n: S(conv(2, n), nn.LayerNorm([n, 6, 6]), R(), conv(n, n), R(), *end(n, 36)), images),
    "fresh BatchNorm": (
        lambda n: S(conv(2, n), nn.BatchNorm2d(n), R(), conv(n, n), nn.BatchNorm2d(n), R(), *end(n, 36)), images
    ),
    "the same twice": (Twice, images),
    "words": (Words, words),
    "tokens": (Tokens, sequences),
    "causal attention": (Attentive, sequences),
    "transformer": (transformer, sequences),
}  # fmt: skip


def against_wide_networks(name, prepare=lambda model: None, **options):
    """Distance of the kernel to the mean of 16 wide networks' own, and that mean's standard error, both relative."""
    build, samples = WIDE[name]
    x, kernels, limits = samples(), [], []
    for seed in range(16):
        torch.manual_seed(seed)
        model = build(96).double()
        prepare(model)
        kernels.append(empirical_ntk(model, x))
        if seed % 4 == 0:
            limits.append(graphon_ntk_from_model(model, x, **options))
    kernels, limit = torch.stack(kernels), torch.stack(limits).mean(0)
    mean = kernels.mean(0)
    error = float((kernels.var(0).sum() / len(kernels)).sqrt() / mean.norm())
    return float((limit - mean).norm() / mean.norm()), error


@pytest.mark.parametrize("name", WIDE)
def test_is_the_mean_of_wide_networks(name):
    distance, error = against_wide_networks(name)
    assert distance < 2 * error + 0.02  # twice the standard error of the mean, and 2 % for the width


def with_means(model):
    """Weights whose mean is of the order of 1 / fan-in, so that sums of them are of order one."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, 0.7 / fan_in, (1.5 / fan_in) ** 0.5)


@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings_with_a_mean(padding):
    """Words and places whose rows have a mean of the size of their spread; a padding word is zero."""

    def prepare(model):
        with torch.no_grad():
            model.word.weight += 0.8
            model.place.weight -= 0.3
            if padding is not None:
                model.word.padding_idx = padding
                model.word.weight[padding] = 0

    distance, error = against_wide_networks("words", prepare)
    assert distance < 2 * error + 0.02  # as above


DRIFTING = ["pooling", "residual with GAP", "groups and strides", "one dimension", "gates", "LayerNorm after ReLU",
            "GroupNorm", "fresh BatchNorm"]  # fmt: skip


@pytest.mark.parametrize("name", DRIFTING)
def test_drift_is_the_mean_of_wide_networks_with_means(name):
    distance, error = against_wide_networks(name, with_means, propagate="drift", bins=1)
    assert distance < 3 * error + 0.03  # three standard errors, as the limits of 4 networks are averaged, not of all
    if name in ("residual with GAP", "one dimension", "fresh BatchNorm"):
        centred, _ = against_wide_networks(name, with_means, propagate="energy", bins=1)
        assert centred > 3 * distance


EXACT = [name for name in WIDE if name not in ("words", "causal attention", "transformer")]


@pytest.mark.parametrize("name", EXACT)
def test_drift_with_a_bin_for_each_unit_is_the_exact_kernel(name):
    """Then cells hold single weights, and nothing is left to chance."""
    build, samples = WIDE[name]
    torch.manual_seed(0)
    model, x = build(8).double(), samples()[:3]
    layers = {
        f"{key}.weight": m for key, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    masks = {key: torch.rand(m.weight.shape) < 0.7 for key, m in layers.items()}
    kernel = graphon_ntk_from_model(model, x, masks, propagate="drift", positions="energy", bins=1000)
    assert relative(kernel, empirical_ntk(model, x, masks=masks)) < 1e-12


@pytest.mark.parametrize("positions", ["degree", "spectral"])
@pytest.mark.parametrize("reduce", ["mean", None])
def test_drift_of_a_chain_is_that_of_its_own_recursion(positions, reduce, monkeypatch):
    torch.manual_seed(0)
    model = S(linear(64, 24), R(), linear(24, 20), nn.Tanh(), linear(20, 3)).double()
    with_means(model)
    masks = {"2.weight": torch.rand(20, 24) < 0.5, "4.weight": torch.rand(3, 20) < 0.5}
    x, options = digit_images(9).flatten(1), {"propagate": "drift", "positions": positions, "reduce": reduce, "bins": 4}
    chain = graphon_ntk_from_model(model, x, masks, **options)
    monkeypatch.setattr(from_model, "read_chain", lambda trace: None)
    walk = graphon_ntk_from_model(model, x, masks, **options)
    assert relative(walk, chain) < 1e-7  # the digits of bivariate normal probabilities at correlation 1
    small = graphon_ntk_from_model(model, x[:4], masks, x2=x[4:], max_memory=1 << 16, **options)
    torch.testing.assert_close(small, walk[..., :4, 4:], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("get", ["ntk", "nngp"])
def test_the_walk_of_a_chain_is_its_recursion(get, monkeypatch):
    torch.manual_seed(0)
    model = S(nn.Linear(64, 24), R(), nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 3)).double()
    masks = {"2.weight": torch.rand(20, 24) < 0.5}
    x = digit_images(9).flatten(1)
    chain = graphon_ntk_from_model(model, x, masks, get=get, bins=1)
    monkeypatch.setattr(from_model, "read_chain", lambda trace: None)
    assert relative(graphon_ntk_from_model(model, x, masks, get=get, bins=1), chain) < 1e-12


def half(shape):
    """A mask that keeps every other input at each tap of each output."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0::2, 0::2] = mask[1::2, 1::2] = True
    return mask


def test_the_constant_graphon_has_its_law():
    """Half of the inputs everywhere: the kernel is that of the dense network times 1/2 for each masked layer."""
    model = NETWORKS["res_cnn_flat"]().double()
    plain = NETWORKS["cnn_flat"]().double()
    options = {"propagate": "density", "parameterization": "ntk", "weight_variance": 2.0, "bins": 1}
    x = digit_images(6)
    masks = {"2.weight": half((W, W, 3, 3)), "5.weight": half((1, W, 64)).flatten(1)}
    dense = graphon_ntk_from_model(plain, x, **options)
    assert relative(graphon_ntk_from_model(plain, x, masks, **options), dense / 4) < 1e-12
    branch = {"1.f.1.weight": half((W, W, 3, 3))}
    masked, dense = (graphon_ntk_from_model(model, x, m, **options) for m in (branch, None))
    assert not torch.allclose(masked, dense / 2, rtol=0.1)  # the stream itself is not masked


def test_two_sets_and_each_output():
    torch.manual_seed(0)
    model = S(conv(1, W), R(), nn.AvgPool2d(2), nn.Flatten(), linear(16 * W, 3)).double()
    x = digit_images(7)
    whole = graphon_ntk_from_model(model, x, reduce=None)
    assert whole.shape == (3, 7, 7)
    torch.testing.assert_close(whole.mean(0), graphon_ntk_from_model(model, x))
    torch.testing.assert_close(graphon_ntk_from_model(model, x[:3], x2=x[3:], reduce=None), whole[:, :3, 3:])
    parts = []
    for layer in (model[0], model[4]):
        model.requires_grad_(False)
        layer.requires_grad_(True)
        parts.append(graphon_ntk_from_model(model, x, reduce=None))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=1e-10)


def keep_largest(model, density):
    scores = {name: p.detach().abs() for name, p in model.named_parameters() if p.ndim > 1}
    threshold = torch.cat([s.flatten() for s in scores.values()]).quantile(1 - density)
    return {name: score >= threshold for name, score in scores.items()}


def test_energy_describes_what_magnitude_keeps():
    x, errors = digit_images(8), {"energy": [], "density": []}
    for seed in range(3):
        torch.manual_seed(seed)
        model = S(conv(1, 64), R(), conv(64, 64), R(), nn.Flatten(), linear(64 * 64, 4)).double()
        for parameter in model.parameters():
            nn.init.kaiming_normal_(parameter)
        masks = keep_largest(model, 0.2)
        truth = empirical_ntk(model, x, masks=masks)
        for propagate, found in errors.items():
            kernel = graphon_ntk_from_model(
                model, x, masks, propagate=propagate, weight_variance=2.0 if propagate == "density" else None
            )
            found.append(float((kernel - truth).norm() / truth.norm()))
    assert sum(errors["energy"]) < 0.6 * sum(errors["density"])


@pytest.mark.parametrize(("name", "budget"), [("cnn_gap", 8 << 20), ("res_cnn_flat", 1 << 19)])
def test_keeps_to_the_memory(name, budget):
    model, x = NETWORKS[name]().double(), digit_images(16)
    masks = {key: half(p.shape) for key, p in model.named_parameters() if p.ndim == 4 and p.shape[1] > 1}
    whole, peaks = graphon_ntk_from_model(model, x, masks, bins=4), []
    for limit in (budget, 1 << 30):
        with LiveMemory() as memory:
            found = graphon_ntk_from_model(model, x, masks, bins=4, max_memory=limit)
        torch.testing.assert_close(found, whole)
        peaks.append(memory.peak)
    # What all tiles share comes on top: half a MiB to read the network, and the numbers of 9 taps' pairs of positions.
    shared = (1 << 19) + 16 * 9 * 8 * (4096 if name == "cnn_gap" else 64)
    assert peaks[0] < budget + shared
    assert peaks[1] > 1.5 * peaks[0]  # the limit is what kept it small


class Scaled(nn.Module):
    """A trained scale and shift for each channel, in one call or written out."""

    def __init__(self, n, fused):
        super().__init__()
        self.first, self.last, self.fused = nn.Linear(8, n), nn.Linear(n, 2), fused
        self.scale, self.shift = nn.Parameter(torch.linspace(0.5, 1.5, n)), nn.Parameter(torch.linspace(-1, 1, n))

    def forward(self, x):
        h = self.first(x)
        h = torch.addcmul(self.shift, self.scale, h, value=0.7) if self.fused else self.shift + 0.7 * (self.scale * h)
        return self.last(torch.relu(h))


def test_addcmul_is_its_sum_and_product():
    torch.manual_seed(0)
    fused = Scaled(12, True).double()
    written = Scaled(12, False).double()
    written.load_state_dict(fused.state_dict())
    options = {"propagate": "drift", "positions": "energy", "bins": 1000}  # a bin for each unit
    kernels = [graphon_ntk_from_model(m, vectors(), **options) for m in (fused, written)]
    assert relative(kernels[0], kernels[1]) < 1e-12
    assert relative(kernels[0], empirical_ntk(fused, vectors())) < 1e-12


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (S(conv(1, W), R(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "after an activation"),
        (S(nn.Flatten(), Function(lambda x: x[:, :4])), "without a Linear layer or convolution has no infinite"),
        (S(nn.Flatten(), linear(64, W), Residual(norm()), linear(W, 1)), "depend on the same weights, has"),
    ],
)
def test_refusals_are_sentences_that_name_the_alternative(model, reason):
    with pytest.raises(ValueError, match=reason) as error:
        graphon_ntk_from_model(model.double(), digit_images(2))
    assert ",;" not in str(error.value)
    assert str(error.value).endswith("use `sampled_ntk` or `empirical_ntk`, which take any module")
