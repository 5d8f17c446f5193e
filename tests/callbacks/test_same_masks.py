"""The callback finds the masks that `prune` finds on the same batches, however the module calls its network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_graphon.pruning import prune
from tests.helpers.modules import METHODS, Autoencoder, Classifier, cnn, disagreement, loader, make_trainer, mlp, quiet


class ByNet(Classifier):
    """Calls self.net, not self."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class ByLayers(Classifier):
    """Calls the layers one by one."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        for layer in self.net:
            x = layer(x)
        return F.cross_entropy(x, y)


class ByFunctions(Classifier):
    """Calls the layers and functions between them."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = F.relu(self.net[2](F.relu(self.net[0](x))))
        return F.nll_loss(F.log_softmax(self.net[4](x), dim=1), y)


class LogsAfterwards(Classifier):
    """Another loss module with weights that are not trained follows the network."""

    def __init__(self, net=mlp):
        super().__init__(net)
        self.judge = torch.nn.Linear(10, 1).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("judged", self.judge(logits.detach()).mean())
        return F.cross_entropy(logits, y)


def direct(net, method, loss_fn=None, batches=4, **kwargs):
    given = [batch for batch, _ in zip(loader(), range(batches), strict=False)]
    steps = 10 if method == "synflow" else None
    return prune(net, method, **{"sparsity": 0.9, "batches": given, "loss_fn": loss_fn, "steps": steps, **kwargs})


@pytest.mark.parametrize("kind", [Classifier, ByNet, ByLayers, ByFunctions, LogsAfterwards])
@pytest.mark.parametrize("method", METHODS)
def test_equals_prune_however_the_network_is_called(method, kind):
    pruner, model = quiet(method), kind()
    expected = direct(model.net, method)
    make_trainer(pruner).fit(model, loader())
    assert disagreement({k.removeprefix("net."): v for k, v in pruner.masks.items()}, expected) == 0.0


@pytest.mark.parametrize("kind", [Classifier, ByNet, ByLayers])
@pytest.mark.parametrize("method", METHODS)
def test_equals_prune_with_batch_norm_in_train_mode_and_dropout(method, kind):
    pruner, model = quiet(method, seed=3), kind(cnn)
    expected = direct(model.net, method, seed=3)
    make_trainer(pruner).fit(model, loader())
    assert disagreement({k.removeprefix("net."): v for k, v in pruner.masks.items()}, expected) < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_temperature_acts_on_the_logits(temperature):
    """Against the definition: gradient and Hessian-vector product of the loss of logits / T."""
    model = Classifier()
    x, y = next(iter(loader()))
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    grads = torch.autograd.grad(F.cross_entropy(model(x) / temperature, y), list(weights.values()), create_graph=True)
    dot = sum((g * g.detach()).sum() for g in grads)
    products = torch.autograd.grad(dot, list(weights.values()))
    flat = torch.cat([(w * h).flatten() for w, h in zip(weights.values(), products, strict=True)])
    threshold = flat.sort(descending=True).values[round(len(flat) / 10) - 1]
    expected = {n: w * h >= threshold for (n, w), h in zip(weights.items(), products, strict=True)}

    found = {}
    for kind in (Classifier, ByNet, ByLayers, ByFunctions):
        pruner = quiet("grasp", batches=1, options={"temperature": temperature})
        make_trainer(pruner).fit(kind(), loader())
        found[kind] = pruner.masks
        assert disagreement(pruner.masks, expected) < 1e-3, kind
    other = quiet("grasp", batches=1, options={"temperature": 201 - temperature})
    make_trainer(other).fit(Classifier(), loader())
    assert disagreement(other.masks, expected) > 1e-2, "the temperature must matter for this test to say anything"


@pytest.mark.parametrize("method", METHODS)
def test_encoder_and_decoder_are_one_network(method):
    model, pruner = Autoencoder(), quiet(method, 0.8)
    chain = torch.nn.Sequential(*model.encoder, *model.decoder)
    images = [(x, x) for x, _ in list(loader())[:4]]
    steps = 10 if method == "synflow" else None
    expected = prune(chain, method, sparsity=0.8, batches=images, loss_fn=F.mse_loss, steps=steps)
    make_trainer(pruner).fit(model, loader())
    assert disagreement(dict(zip(expected, pruner.masks.values(), strict=True)), expected) < 1e-3


@pytest.mark.parametrize(
    "kwargs",
    [
        {"allocation": "erk"},
        {"allocation": "uniform"},
        {"min_density": 0.099},
        {"allocation": {"net.0": 0.5}},
        {"steps": 3, "schedule": "linear"},
        {"exclude": "net.4"},
    ],
)
def test_every_argument_reaches_prune(kwargs):
    pruner, model, plain = quiet("snip", **kwargs), Classifier(), Classifier()
    given = [batch for batch, _ in zip(loader(), range(4), strict=False)]
    expected = prune(plain, "snip", sparsity=0.9, batches=given, **kwargs)
    assert expected != direct(plain, "snip"), "the argument must matter"
    make_trainer(pruner).fit(model, loader())
    assert disagreement(pruner.masks, expected) == 0.0


def test_eval_mode_scores_with_running_statistics():
    pruner, model = quiet("snip", eval_mode=True), Classifier(cnn)
    net = Classifier(cnn).net.eval()
    make_trainer(pruner).fit(model, loader())
    assert disagreement({k.removeprefix("net."): v for k, v in pruner.masks.items()}, direct(net, "snip")) == 0.0
    assert disagreement(direct(net, "snip"), direct(net.train(), "snip")) > 1e-3


def test_seed_changes_random_masks_and_nothing_else_does():
    def masks(**kwargs):
        pruner = quiet("random", **kwargs)
        make_trainer(pruner).fit(Classifier(seed=kwargs.get("seed", 0) + 5), loader())
        return pruner.masks

    first = masks()
    torch.manual_seed(99)
    assert masks() == first
    assert masks(seed=1) != first


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_precision_changes_less_than_one_weight_in_a_thousand(method, precision):
    full, other = quiet(method), quiet(method)
    make_trainer(full).fit(Classifier(), loader())
    model = Classifier()
    make_trainer(other, precision=precision).fit(model, loader())
    assert disagreement(full.masks, other.masks) < 1e-3
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_bf16_true_trains_with_exact_zeros(method):
    full, pruner, model = quiet(method), quiet(method), Classifier()
    make_trainer(full).fit(Classifier(), loader())
    make_trainer(pruner, precision="bf16-true").fit(model, loader())
    named = dict(model.named_parameters())
    for name, mask in pruner.masks.items():
        assert named[name].dtype == torch.bfloat16
        assert named[name][~mask].count_nonzero() == 0
    assert pruner.masks.kept == full.masks.kept
    # Weights rounded to eight bits give other scores: most of the masks agree, not all.
    assert disagreement(full.masks, pruner.masks) < 0.02


class TwoViews(Classifier):
    """Calls its network twice, on two views."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        a, b = self(x), self(x - 3 * x.flip(1))
        return F.cross_entropy(a, y) + F.cross_entropy(b, y)


def test_synflow_looks_at_no_data_however_often_the_network_is_called():
    once, twice = quiet("synflow"), quiet("synflow")
    make_trainer(once).fit(Classifier(), loader())
    make_trainer(twice).fit(TwoViews(), loader())
    assert once.masks == twice.masks


def test_two_heads_are_both_cooled():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.trunk, self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 10), nn.Linear(32, 10)

        def forward(self, x):
            h = self.trunk(x).relu()
            return self.a(h), self.b(h)

    def two(outputs, y):
        return sum(F.cross_entropy(o, y) for o in outputs)

    class Heads(Classifier):
        def __init__(self):
            super().__init__(Net)

        def training_step(self, batch, batch_idx):
            x, y = batch
            h = self.net.trunk(x).relu()
            return two((self.net.a(h), self.net.b(h)), y)

    pruner, model = quiet("grasp"), Heads()
    batches = list(loader())[:4]
    expected = prune(model.net, "grasp", sparsity=0.9, batches=batches, loss_fn=two)
    make_trainer(pruner).fit(model, loader())
    assert disagreement({k[4:]: v for k, v in pruner.masks.items()}, expected) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_functional_weights(method):
    class Functional(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            for layer in self.net:
                x = F.linear(x, layer.weight, layer.bias) if hasattr(layer, "weight") else x.relu()
            return F.cross_entropy(x, y)

    # Where no module is called nobody knows which tensor holds the logits.
    options = {"temperature": 1.0} if method == "grasp" else {}
    pruner, plain = quiet(method, options=options), quiet(method, options=options)
    make_trainer(pruner).fit(Functional(), loader())
    make_trainer(plain).fit(Classifier(), loader())
    assert disagreement(pruner.masks, plain.masks) == 0.0
    if method == "grasp":
        with pytest.warns(UserWarning, match="temperature 1"):
            make_trainer(quiet(method)).fit(Functional(), loader())
