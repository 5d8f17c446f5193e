"""Attention that is written out reads as attention; without a softmax it has a formula of its own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graphon.ntk import graphon_ntk_from_model
from lightning_graphon.tracing import NotReadableError, trace

TOKENS, HEADS, WIDTH = 5, 2, 8
CAUSAL = torch.tril(torch.ones(TOKENS, TOKENS))
X = torch.randn(4, TOKENS, 3, generator=torch.Generator().manual_seed(1)).double()


class Attending(nn.Module):
    """Projections, a function of queries, keys and values [N, heads, tokens, width], and a readout of each token."""

    def __init__(self, attend, width=WIDTH, heads=HEADS, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, width, bias=bias) for _ in range(3))
        self.joined = nn.Linear(width, 2, bias=bias)
        self.attend, self.heads = attend, heads
        self.register_buffer("mask", CAUSAL[None, None])
        self.temperature = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.ones(TOKENS, TOKENS))

    def forward(self, x):
        q, k, v = (p(x).view(len(x), TOKENS, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = self.attend(self, q, k, v)
        return self.joined(out.transpose(1, 2).reshape(len(x), TOKENS, -1)).mean(1)


def flash(m, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def nano_gpt(m, q, k, v):
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(m.mask[:, :, :TOKENS, :TOKENS] == 0, float("-inf"))
    att = F.dropout(F.softmax(att, dim=-1), 0.1, m.training)
    return att @ v


def annotated(m, q, k, v):
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(k.size(-1))
    weights = scores.masked_fill(m.mask == 0, -1e9).softmax(dim=-1)
    return torch.matmul(weights, v)


def batched(m, q, k, v):
    """Heads in the batch, a mask that is added, a change of dtype on the way."""
    q, k, v = (t.reshape(-1, TOKENS, t.shape[-1]) for t in (q * q.shape[-1] ** -0.5, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(-1, m.heads, TOKENS, TOKENS)
    added = torch.zeros(TOKENS, TOKENS, dtype=q.dtype).masked_fill(CAUSAL == 0, torch.finfo(q.dtype).min)
    scores = (scores + added).view(-1, TOKENS, TOKENS)
    out = torch.bmm(nn.functional.softmax(scores.double(), dim=-1).type_as(v), v)
    return out.view(-1, m.heads, TOKENS, out.shape[-1])


def summed(m, q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = torch.where(CAUSAL.bool(), scores, torch.tensor(-torch.inf, dtype=q.dtype))
    return torch.einsum("bhqk, bkhd -> bhqd", scores.softmax(3), v)


def turned(m, q, k, v):
    """Weights on the right, as in SAGAN."""
    scores = k @ q.mT / q.shape[-1] ** 0.5
    weights = scores.mT.add(CAUSAL.log().to(q)).softmax(-1)
    return (v.mT @ weights.mT).mT


@pytest.mark.parametrize("written", [nano_gpt, annotated, batched, summed, turned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("get", ["ntk", "nngp"])
def test_is_that_of_scaled_dot_product_attention(written, get):
    torch.manual_seed(0)
    model = Attending(flash).double()
    truth = graphon_ntk_from_model(model, X, get=get, bins=4)
    model.attend = written
    assert [type(step).__name__ for step in trace(model, X).steps].count("Attention") == 1
    torch.testing.assert_close(graphon_ntk_from_model(model, X, get=get, bins=4), truth, rtol=1e-12, atol=0)


REFUSED = {
    "softmax over queries": lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v,
    "softmax of keys and values": lambda m, q, k, v: q @ (k.mT @ v).softmax(-1),
    "softmax twice": lambda m, q, k, v: (q @ k.mT).softmax(-1).softmax(-1) @ v,
    "along the queries": lambda m, q, k, v: (q @ k.mT).softmax(-1).mT @ v,
    "relu of scores": lambda m, q, k, v: (q @ k.mT).relu() @ v,
    "squared scores": lambda m, q, k, v: (q @ k.mT).mul(2).add(1) @ v,
    "mask after the softmax": lambda m, q, k, v: (q @ k.mT).softmax(-1) * m.mask.to(q) @ v,
    "normalised by their sum": lambda m, q, k, v: (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True) @ v,
    "trained bias": lambda m, q, k, v: (q @ k.mT + m.bias).softmax(-1) @ v,
    "trained temperature": lambda m, q, k, v: (q @ k.mT * m.temperature).softmax(-1) @ v,
    "a temperature for each query": lambda m, q, k, v: (q @ k.mT * torch.arange(1, 6)[:, None]).softmax(-1) @ v,
    "some of the weights": lambda m, q, k, v: (q @ k.mT)[..., :3].softmax(-1) @ v[..., :3, :],
    "weights squared": lambda m, q, k, v: (w := (q @ k.mT).softmax(-1)) @ w @ v,
    "over samples": lambda m, q, k, v: (q[:1] @ k.mT).softmax(-1) @ v,
    "a product with a weight": lambda m, q, k, v: v @ m.q.weight[:4, :1].expand(4, 4),
    "queries that are keys": lambda m, q, k, v: (q @ q.mT).softmax(-1) @ v,
    "mask of each sample": lambda m, q, k, v: (
        (q @ k.mT + torch.randn(2, 1, 1, 5)[: len(q)]).softmax(-1) @ v if len(q) == 2 else v
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name):
    model = Attending(REFUSED[name]).double()
    with pytest.raises(ValueError, match="sampled_ntk"):
        graphon_ntk_from_model(model, X[:2])


def test_weights_that_are_returned_are_refused():
    model = Attending(lambda m, q, k, v: v).double()

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            q, k = self.inner.q(x), self.inner.k(x)
            return nn.functional.linear((q @ k.mT).softmax(-1), self.inner.v.weight[:, :1].expand(-1, 5))

    with pytest.raises(ValueError, match="sampled_ntk"):
        graphon_ntk_from_model(Weights().double(), X)
    assert issubclass(NotReadableError, ValueError)


class Rectified(nn.Module):
    """Values have a mean, and an activation after the attention asks for it."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 32) for _ in range(3))
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        q, k, v = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        return self.head(F.scaled_dot_product_attention(q, k, v.relu())[:, 0].relu()).mean(1)


def test_an_activation_after_values_with_a_mean_is_refused_in_a_sentence():
    with pytest.raises(
        ValueError, match="over values that have a mean, which a later step asks for.*use `sampled_ntk`"
    ):
        graphon_ntk_from_model(Rectified().double(), torch.rand(3, 4, 8).double())


# ---- without a softmax


def linear(m, q, k, v):
    return (q @ k.mT / q.shape[-1]) @ v


def masked(m, q, k, v):
    return (q @ k.mT).tril() * 0.3 @ v


def one_head_masked(m, q, k, v):
    """Another mask for each head."""
    both = torch.stack([CAUSAL, CAUSAL.T]).to(q)
    return (q @ k.mT * both) @ v


@pytest.mark.parametrize("attend", [linear, masked, one_head_masked], ids=lambda f: f.__name__)
def test_linear_attention_is_the_mean_over_networks_of_any_width(attend):
    """The formula has no limit in it: means over 4,000 networks of two heads of width 2, within standard errors."""
    model, draws = Attending(attend, width=4).double(), 4000
    torch.manual_seed(0)
    deviation = {n: 0.7 if p.ndim == 1 else p.shape[1] ** -0.5 for n, p in model.named_parameters() if "." in n}
    drawn = {n: s * torch.randn(draws, *model.get_parameter(n).shape).double() for n, s in deviation.items()}

    def outputs(parameters):
        return torch.func.functional_call(model, parameters, X)

    f = torch.vmap(outputs)(drawn)
    jacobians = torch.vmap(torch.func.jacrev(outputs), chunk_size=500)(drawn)
    kernels = sum(torch.einsum("dncp,dmcp->dnm", j, j) / 2 for j in (j.flatten(3) for j in jacobians.values()))
    with torch.no_grad():  # the limit reads the mean square of biases
        for layer in (model.q, model.k, model.v, model.joined):
            layer.bias.fill_(0.7)
    options = {"propagate": "density", "weight_variance": 1.0, "bins": 1}
    for sample, get in ((kernels, "ntk"), (f @ f.mT / 2, "nngp")):
        limit = graphon_ntk_from_model(model, X, get=get, **options)
        error = sample.std(0) / draws**0.5
        # Four standard errors in each of ten entries.
        assert ((sample.mean(0) - limit).abs() < 4 * error).all()
        assert float(error.norm() / limit.norm()) < 0.1


def keys_and_values_first(m, q, k, v):
    return q @ (k.mT @ v) / q.shape[-1]


def keys_and_values_summed(m, q, k, v):
    both = torch.einsum("bhmd,bhme->bhed", k, v) / q.shape[-1]
    return torch.einsum("bhed,bhnd->bhne", both, q)


@pytest.mark.parametrize("attend", [keys_and_values_first, keys_and_values_summed], ids=lambda f: f.__name__)
def test_keys_and_values_may_be_multiplied_first(attend):
    torch.manual_seed(0)
    model = Attending(linear).double()
    truth = graphon_ntk_from_model(model, X, bins=100)
    model.attend = attend
    torch.testing.assert_close(graphon_ntk_from_model(model, X, bins=100), truth, rtol=1e-12, atol=0)


def test_two_sets_of_samples_and_bins_of_linear_attention():
    """With a bin for each unit rows and columns of masks are told apart; parts of a kernel are those of the whole."""
    torch.manual_seed(0)
    model = Attending(masked).double()
    masks = {"q.weight": torch.rand(WIDTH, 3) < 0.5, "v.weight": torch.rand(WIDTH, 3) < 0.5}
    whole = graphon_ntk_from_model(model, X, masks, bins=100)
    torch.testing.assert_close(graphon_ntk_from_model(model, X[:2], masks, bins=100, x2=X[2:]), whole[:2, 2:])
    small = graphon_ntk_from_model(model, X, masks, bins=100, max_memory=1 << 12)
    torch.testing.assert_close(small, whole)


def test_bins_of_queries_and_keys_belong_to_each_other():
    """Signs redrawn independently: with a bin for each unit the mean of the products of outputs is exact."""
    torch.manual_seed(0)
    model, draws = Attending(linear, width=4, bias=False).double(), 3000
    masks = {"q.weight": torch.rand(4, 3) < 0.6, "k.weight": torch.rand(4, 3) < 0.6}
    limit = graphon_ntk_from_model(model, X, masks, bins=100, positions="energy", get="nngp")
    start = {n: p.detach() * masks.get(n, 1) for n, p in model.named_parameters() if p.ndim == 2 and n != "bias"}
    found = torch.empty(draws, 4, 4).double()
    for draw in range(draws):
        for name, weight in start.items():
            model.get_parameter(name).data = weight * (torch.randint(0, 2, weight.shape) * 2 - 1)
        f = model(X).detach()
        found[draw] = f @ f.T / 2
    assert ((found.mean(0) - limit).abs() < 4 * found.std(0) / draws**0.5).all()


def test_linear_attention_of_means_is_refused():
    model = Attending(lambda m, q, k, v: q.exp() @ k.exp().mT @ v).double()
    with pytest.raises(ValueError, match="both have a mean"):
        graphon_ntk_from_model(model, X)
