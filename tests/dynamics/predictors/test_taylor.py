"""Expansions against torch's own derivatives, taken of the plain network in other ways."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp

from lightning_graphon.dynamics import UnsupportedTrainingError, linearize, taylor_expand, taylor_expand_
from tests.helpers.networks import Tied, seeded


class SmallGPT(nn.Module):
    """Tied embedding, causal attention, layer norm."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8) / 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=self.positions.dtype)
        hidden = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.block(hidden, src_mask=mask, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Parts(nn.Module):
    """Several inputs, keywords, and outputs of every kind."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a, *, b):
        left, right = self.left(a).tanh(), self.right(b).tanh()
        return {"product": left * right, "list": [left, (right.argmax(1), "text")]}


def cnn(norm):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), norm(4), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(36, 3)
    )


def images():
    return torch.randn(6, 2, 10, 10, dtype=torch.float64)


def tokens():
    return torch.arange(24).reshape(4, 6) % 11


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), lambda: torch.randn(5, 4).double()),
    "batch norm": (lambda: cnn(nn.BatchNorm2d), images),
    "group norm": (lambda: cnn(lambda n: nn.GroupNorm(2, n)), images),
    "instance norm": (lambda: cnn(nn.InstanceNorm2d), images),
    "silu": (lambda: nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3)), lambda: torch.randn(5, 4).double()),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)),
        lambda: torch.randn(5, 4).double(),
    ),
    "lstm": (Recurrent, lambda: torch.randn(3, 5, 4).double()),
    "tied": (Tied, tokens),
    "gpt": (SmallGPT, tokens),
}


def moved(model, direction, by):
    """A copy whose parameters are moved."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(by * direction[name])
    return model


def direction_of(model):
    return {name: torch.randn_like(p) / 10 for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_polynomial_equals_differences(case, order, training):
    """Of fourth order in a step of 1e-2 in float64: an error of about 1e-8 of the term."""
    model, x = seeded(CASES[case][0]).double().train(training), seeded(CASES[case][1])
    direction, h = direction_of(model), 1e-2
    with torch.no_grad():
        f = {k: moved(model, direction, k * h)(x) for k in range(-2, 3)}
    first = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
    second = (16 * (f[1] + f[-1]) - (f[2] + f[-2]) - 30 * f[0]) / (12 * h * h)
    change = first + (second / 2 if order == 2 else 0)
    expanded = moved(taylor_expand(model, order), direction, 1)
    got = expanded(x)
    assert float((got - f[0] - change).norm()) < 1e-6 * float(change.norm())
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in expanded.parameters())


def test_order_two_equals_the_hessian():
    model, x = seeded(CASES["mlp"][0]).double(), torch.ones(1, 4, dtype=torch.float64)
    weights = dict(model.named_parameters())
    sizes = {name: p.numel() for name, p in weights.items()}

    def f(flat):
        parts = flat.split(list(sizes.values()))
        return functional_call(model, {n: v.view_as(weights[n]) for n, v in zip(sizes, parts, strict=True)}, (x,))[0, 0]

    at = torch.cat([p.detach().flatten() for p in weights.values()])
    step = torch.randn_like(at) / 3
    hessian, gradient = torch.func.hessian(f)(at), torch.func.grad(f)(at)
    expanded = taylor_expand(model, 2)
    torch.nn.utils.vector_to_parameters(at + step, expanded.parameters())
    expected = f(at) + gradient @ step + step @ hessian @ step / 2
    assert float(expanded(x)[0, 0]) == pytest.approx(float(expected), rel=1e-12)


def test_order_three_of_a_cubic_is_the_cubic():
    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x):
            return self.w**3 * x

    model = Cubic()
    values = []
    for order in (1, 2, 3):
        expanded = taylor_expand(model, order)
        expanded.w.data += 1
        values.append(float(expanded(torch.ones((), dtype=torch.float64))))
    assert values == [8 + 12, 8 + 12 + 6, 27]


def test_gradient_is_that_of_the_linear_model():
    model, x = seeded(CASES["mlp"][0]).double(), torch.randn(5, 4).double()
    direction = direction_of(model)
    linear = moved(linearize(model), direction, 1)
    linear(x).square().sum().backward()
    values, tangents = jvp(lambda p: functional_call(model, p, (x,)), (dict(model.named_parameters()),), (direction,))
    model(x).backward(2 * (values + tangents).detach())
    for p, q in zip(linear.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_every_output_is_expanded():
    model, a, b = seeded(Parts).double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    out = linearize(model)(a, b=b)
    torch.testing.assert_close(out["product"], model(a, b=b)["product"])
    assert out["list"][1][1] == "text"
    assert not out["list"][1][0].is_floating_point()
    assert out["list"][0].requires_grad


def test_running_statistics_move_as_those_of_the_network():
    """Of the network at θ0, in both orders; measured in eval mode with them."""
    for order in (1, 2):
        model, x = seeded(CASES["batch norm"][0]).double(), images()
        expanded = taylor_expand(model, order)
        model(x), expanded(x)
        for a, b in zip(model.buffers(), expanded.buffers(), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(model.eval()(x), expanded.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_mixed_precision(training):
    """To the three digits of bfloat16."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).train(training)
    linear, x = linearize(model), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(x), model(x), rtol=2e-2, atol=2e-2)
        linear(x).float().sum().backward()


def test_dropout_draws():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)).double()
    linear, x = linearize(model), torch.ones(1, 4).double()
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(linear(x), expected)
    assert not torch.equal(linear(x), linear(x))


def test_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    linear, x = linearize(model), torch.randn(2, 4)
    linear(x).sum().backward()
    assert linear[0].weight.grad is None
    with torch.no_grad():
        linear[1].weight.mul_(3), model[1].weight.mul_(3)
    torch.testing.assert_close(linear(x), model(x))  # linear in its last layer


def test_copies_are_their_own():
    model, x = seeded(CASES["mlp"][0]).double(), torch.randn(2, 4).double()
    linear = linearize(model)
    other = copy.deepcopy(linear)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    torch.testing.assert_close(linear(x), model(x))
    assert not torch.allclose(other(x), model(x))
    assert linear.state_dict().keys() == model.state_dict().keys()
    assert type(linear) is type(model)


def test_in_place_of_a_submodule():
    """As a LightningModule's own training_step calls it."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

        def training_step(self, x):
            return self.net(x).sum()

    module, x = seeded(Step).double(), torch.randn(2, 4).double()
    taylor_expand_(module.net)
    at = module.training_step(x)
    start = [p.detach().clone() for p in module.net.parameters()]
    values = []
    for factor in (1, 2):
        with torch.no_grad():
            for p, s in zip(module.net.parameters(), start, strict=True):
                p.copy_(s + factor)
            values.append(module.training_step(x) - at)
    torch.testing.assert_close(values[1], 2 * values[0])
    taylor_expand_(module.net)  # around the weights now
    with pytest.raises(ValueError, match="net is expanded already"):
        taylor_expand_(module)


def test_a_loss_inside_the_module_is_that_of_the_expanded_outputs():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model, x, labels = seeded(WithLoss), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    out = moved(linearize(model), direction_of(model), 5)(x, labels=labels)
    torch.testing.assert_close(out["loss"], F.cross_entropy(out["logits"], labels))
    with pytest.raises(UnsupportedTrainingError, match="computes its loss itself"):
        taylor_expand(model, 2)(x, labels)


def test_what_cannot_be_expanded_is_named():
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    class Custom(nn.Linear):
        def forward(self, x):
            return Fused.apply(super().forward(x))

    for order in (1, 2):
        with pytest.raises(UnsupportedTrainingError, match="by a rehearsal"):
            taylor_expand(Custom(2, 2), order)(torch.ones(1, 2))

    class Distances(nn.Linear):
        def forward(self, x):
            return torch._weight_norm_interface(self.weight, self.bias)[0]

    with pytest.raises(UnsupportedTrainingError, match="^_weight_norm_interface cannot"):
        linearize(Distances(1, 2))(torch.ones(1, 2))


@pytest.mark.parametrize("order", [0, -1, True, 1.5])
def test_order_is_checked(order):
    with pytest.raises(ValueError, match="order must be 1 or more"):
        taylor_expand(nn.Linear(1, 1), order)


def test_inference_mode_and_other_errors_pass():
    linear = linearize(nn.Linear(2, 2))
    with torch.inference_mode():
        assert linear(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.ones(1, 3))


def test_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = seeded(lambda: transformers.GPT2LMHeadModel(config)).eval()
    linear, x = linearize(model), torch.arange(16).reshape(2, 8)
    torch.testing.assert_close(linear(input_ids=x, labels=x).loss, model(input_ids=x, labels=x).loss)
    for p in linear.parameters():
        p.data += 0.02
    out = linear(input_ids=x, labels=x)
    assert type(out) is type(model(input_ids=x))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
    out.loss.backward()
    assert all(p.grad is not None for p in linear.parameters())
