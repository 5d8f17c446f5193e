"""The exact kernel of a finite network against the dense Jacobian, and what must be left as it was."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon.ntk import empirical_ntk, kronecker_ntk, ntk_layer_shares
from lightning_graphon.ntk.empirical import masked_gram as rowgram
from lightning_graphon.ntk.empirical.functional_model import functional_model
from lightning_graphon.ntk.empirical.layer_signals import make_plan
from lightning_graphon.ntk.empirical.masked_gram import row_gram
from tests.helpers.ntk_oracles import jacobian_kernel, relative

N = 5


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)
        for norm in (self.na, self.nb):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.relu(self.na(self.a(x)), inplace=True)
        x = F.relu(x + self.nb(self.b(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 7, bias=False)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head.weight = self.embed.weight  # tied

    def forward(self, x):
        return self.head(self.norm(self.block(self.embed(x))).mean(1))


class Reused(nn.Module):
    """One layer called twice, another one's weight used by a functional call besides."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x))))) + x @ self.b.weight.T


class TimeFirst(nn.Module):
    """Layers that see time before samples, or samples and time in one dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x.transpose(0, 1)))
        h = torch.tanh(self.c(h.transpose(0, 1).reshape(-1, 4))).reshape(len(x), -1, 4)
        return self.b(h.mean(1))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def grouped():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(6, 6, 3, groups=6, padding="same", padding_mode="circular"), nn.Flatten(), nn.Linear(54, 2),
    )  # fmt: skip


def transposed():
    up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    return nn.Sequential(up, nn.Tanh(), nn.Flatten(), nn.Linear(216, 2))


def one_dimensional():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, dilation=2, padding=2, padding_mode="reflect"), nn.SiLU(),
        nn.ConvTranspose1d(4, 3, 4, stride=2, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(57, 2),
    )  # fmt: skip


def three_dimensional():
    return nn.Sequential(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.ConvTranspose3d(3, 2, 2), nn.Flatten(), nn.Linear(54, 2))


CASES = {
    "mlp": (mlp, lambda: torch.randn(N, 5)),
    "residual": (Residual, lambda: torch.randn(N, 2, 5, 5)),
    "transformer": (Transformer, lambda: torch.randint(0, 7, (N, 4))),
    "reused": (Reused, lambda: torch.randn(N, 5)),
    "time_first": (TimeFirst, lambda: torch.randn(N, 6, 5)),
    "time_first_square": (TimeFirst, lambda: torch.randn(N, N, 5)),
    "time_first_three": (TimeFirst, lambda: torch.randn(N, 3, 5)),
    "grouped": (grouped, lambda: torch.randn(N, 4, 6, 6)),
    "transposed": (transposed, lambda: torch.randn(N, 4, 3, 3)),
    "1d": (one_dimensional, lambda: torch.randn(N, 2, 7)),
    "3d": (three_dimensional, lambda: torch.randn(N, 2, 3, 3, 3)),
}


def build(name):
    make, data = CASES[name]
    x = data()
    return make().double().train(), x.double() if x.is_floating_point() else x


def random_masks(model, density):
    return {n: torch.rand(p.shape) < density for n, p in model.named_parameters() if p.ndim > 1}


def quietly(*args):
    with warnings.catch_warnings():  # torch.func warns of slow fallbacks inside the oracle's attention
        warnings.simplefilter("ignore")
        return jacobian_kernel(*args)


@pytest.mark.parametrize("density", [None, 0.3, 0.8])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_jacobian(name, density):
    model, x = build(name)
    masks = None if density is None else random_masks(model, density)
    scale = {n: torch.rand(p.shape).double() for n, p in model.named_parameters()} if density == 0.8 else None
    truth = quietly(model, x, masks, scale)
    c = truth.shape[1]
    wanted = {None: truth, "mean": torch.einsum("ncmc->nm", truth) / c, "per_output": torch.einsum("ncmc->cnm", truth)}
    for reduce, kernel in wanted.items():
        for memory in (
            (None, 20_000) if reduce == "mean" or density == 0.3 else (None,)
        ):  # all at once, and a sample or two at a time
            mine = empirical_ntk(model, x, masks=masks, reduce=reduce, preconditioner=scale, max_memory=memory)
            assert mine.shape == kernel.shape
            assert relative(mine, kernel) < 1e-12
    cross = empirical_ntk(model, x[:2], masks=masks, reduce=None, preconditioner=scale, x2=x[2:])
    assert relative(cross, truth[:2, :, 2:]) < 1e-12


@pytest.mark.parametrize("density", [None, 0.3, 0.8])
@pytest.mark.parametrize("name", CASES)
def test_kronecker_factors_are_the_means_of_the_full_kernel(name, density):
    model, x = build(name)
    masks = None if density is None else random_masks(model, density)
    scale = {n: torch.rand(p.shape).double() for n, p in model.named_parameters()} if density == 0.8 else None
    full = empirical_ntk(model, x, masks=masks, reduce=None, preconditioner=scale)
    mean, gram = torch.einsum("ncmc->nm", full) / full.shape[1], torch.einsum("ncnd->cd", full)
    for memory in (None, 20_000):
        mine = kronecker_ntk(model, x, masks=masks, preconditioner=scale, max_memory=memory)
        assert relative(mine.samples, mean) < 1e-12
        assert relative(mine.outputs, gram * len(gram) / gram.trace()) < 1e-12
        assert mine.trace() == pytest.approx(float(torch.einsum("ncnc->", full)))


def test_kronecker_product_is_the_kernel_where_one_layer_alone_is_trained():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 3)).double()
    for layer in (model[0], model[3]):
        layer.requires_grad_(False)
    x = torch.randn(N, 5).double()
    full, product = empirical_ntk(model, x, reduce=None), kronecker_ntk(model, x)
    mixing = model[3].weight.detach() @ model[3].weight.detach().T
    assert relative(product.outputs, mixing * 3 / mixing.trace()) < 1e-12, "the outputs of one layer mix"
    assert relative(product.to_dense(), full.reshape(3 * N, 3 * N)) < 1e-12


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_shares_sum_to_the_trace(name, density):
    model, x = build(name)
    masks = None if density is None else random_masks(model, density)
    shares = ntk_layer_shares(model, x, masks=masks)
    trace = float(torch.einsum("ncnc->", empirical_ntk(model, x, masks=masks, reduce=None)))
    assert sum(s.trace for s in shares) == pytest.approx(trace)
    assert sum(s.share for s in shares) == pytest.approx(1.0)
    assert [s.name for s in shares] == [n for n, _ in model.named_parameters()]
    kept = sum(int(m.sum()) for m in masks.values()) if masks else 0
    assert not masks or sum(s.entries for s in shares if s.name in masks) == kept


def test_structured_where_it_holds_generic_where_not():
    expected = {
        "mlp": set(), "grouped": set(), "transposed": set(), "1d": set(), "3d": set(), "reused": {"b.weight"},
        "time_first": {"a.weight", "a.bias"}, "residual": {"na.weight", "na.bias", "nb.weight", "nb.bias"},
    }  # fmt: skip
    for name, generic in expected.items():
        model, x = build(name)
        fm = functional_model(model, None, None, "standard", 1.0, 1.0)
        with eval_semantics(model, x.device):
            assert set(make_plan(fm, x).generic) == generic, name


@pytest.mark.parametrize("name", ["residual", "transformer", "mlp"])
def test_leaves_no_trace(name):
    model, x = build(name)
    next(iter(model.children())).eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    flags = [m.training for m in model.modules()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = empirical_ntk(model, x)
    with torch.no_grad():
        assert torch.equal(first, empirical_ntk(model, x))
    with torch.inference_mode():
        inside = empirical_ntk(model, x.clone())
    assert torch.equal(first, inside.clone())
    assert not first.requires_grad
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())
    copy.deepcopy(model)


def test_equals_the_physically_smaller_network():
    big, x = mlp().double(), torch.randn(N, 5, dtype=torch.float64)
    alive = [torch.tensor([0, 2, 3, 7]), torch.tensor([1, 4, 5])]
    small = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    masks = {f"{i}.weight": torch.zeros_like(big[i].weight).bool() for i in (0, 2, 4)}
    masks |= {f"{i}.bias": torch.zeros_like(big[i].bias).bool() for i in (0, 2)}
    rows = [alive[0], alive[1], torch.arange(3)]
    cols = [torch.arange(5), alive[0], alive[1]]
    for i, r, c in zip((0, 2, 4), rows, cols, strict=True):
        masks[f"{i}.weight"][r[:, None], c] = True
        if i < 4:
            masks[f"{i}.bias"][r] = True
        small[i].weight.data = big[i].weight.data[r[:, None], c]
        small[i].bias.data = big[i].bias.data[r]
    assert relative(empirical_ntk(big, x, masks=masks), empirical_ntk(small, x)) < 1e-12


def test_frozen_parameters_do_not_count():
    model, x = build("mlp")
    model[0].weight.requires_grad_(False)
    assert relative(empirical_ntk(model, x, reduce=None), jacobian_kernel(model, x)) < 1e-12
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        empirical_ntk(model, x)


def test_ntk_parameterization_scales_each_layer():
    model, x = build("mlp")
    scale = {n: torch.ones_like(p) * (2.0 / p.shape[1] if p.ndim == 2 else 0.3) for n, p in model.named_parameters()}
    mine = empirical_ntk(model, x, parameterization="ntk", bias_variance=0.3)
    assert relative(mine, empirical_ntk(model, x, preconditioner=scale)) < 1e-12


def test_a_module_that_torch_func_cannot_batch():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(3).double())

        def forward(self, x):
            out = self.a(x) * self.scale
            return out if out.sum().item() > -1e9 else -out

    model, x = Branching().double(), torch.randn(N, 5, dtype=torch.float64)
    truth = torch.stack([_loop_gradient(model, x[i : i + 1], c) for i in range(N) for c in range(3)])
    assert relative(empirical_ntk(model, x, reduce=None).reshape(3 * N, -1), truth @ truth.T) < 1e-12


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_a_module_that_torch_func_batches_wrongly(samples):
    """PReLU, where there are as many samples as outputs."""
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(samples, 4, dtype=torch.float64)
    assert relative(empirical_ntk(model, x, reduce=None), jacobian_kernel(model, x)) < 1e-12


def _loop_gradient(model, x, c):
    return torch.cat([g.flatten() for g in torch.autograd.grad(model(x)[0, c], list(model.parameters()))])


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="depends on the other samples"):
        empirical_ntk(model, torch.randn(6, 5))


def cpu_allocator():
    """What torch raises when the memory of the CPU runs out."""
    try:
        torch.empty(1 << 52)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), cpu_allocator()], ids=["gpu", "python", "cpu"]
)
def test_out_of_memory_halves_the_chunk_and_says_so_once(error, monkeypatch):
    model, x = build("mlp")
    truth, seen = empirical_ntk(model, x), []
    from lightning_graphon.ntk.empirical import kernel as empirical

    whole = empirical._sum_tiles

    def tight(task, budget, chunk):
        seen.append(chunk)
        if chunk > 1:
            raise error
        return whole(task, budget, chunk)

    monkeypatch.setattr(empirical, "_sum_tiles", tight)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(empirical_ntk(model, x, max_memory=1 << 20), truth)
    assert seen == [5, 2, 1]
    words = [str(w.message) for w in said if "out of memory" in str(w.message)]
    assert len(words) == 1
    assert "with 5 samples at a time and went on with 1, max_memory=262144 bytes" in words[0]


def test_out_of_memory_at_a_single_sample_and_other_errors_are_raised(monkeypatch):
    from lightning_graphon.ntk.empirical import kernel as empirical

    model, x = build("mlp")
    for error, message in ((MemoryError("full"), "full"), (RuntimeError("shapes"), "shapes")):

        def broken(*args, error=error):
            raise error

        monkeypatch.setattr(empirical, "_sum_tiles", broken)
        with pytest.raises(type(error), match=message):
            empirical_ntk(model, x)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_row_gram(density, symmetric):
    H, G = torch.randn(150, 40).double(), torch.randn(150, 3, 50).double()
    H2, G2 = (H, G) if symmetric else (torch.randn(7, 40).double(), torch.randn(7, 3, 50).double())
    for P in ((torch.rand(50, 40) < density).double(), (torch.rand(50, 40) < density) * torch.randn(50, 40).double()):
        truth = torch.einsum("ij,nki,mki,nj,mj->nm", P, G, G2, H, H2)
        torch.testing.assert_close(row_gram(H, G, H2, G2, P), truth, rtol=1e-10, atol=1e-9)


def test_row_gram_in_blocks_of_other_devices(monkeypatch):
    """Blocks that fill a GPU within the bytes it may use; the numbers are the same."""
    P, H, G = (torch.rand(50, 40) < 0.3).double(), torch.randn(150, 40).double(), torch.randn(150, 3, 50).double()
    expected = row_gram(H, G, H, G, P)
    for budget in (1, 1 << 20, 1 << 28):
        units, edge = rowgram._blocking(300, 20, 8, budget)
        assert 8 * units * (20 * 300 + 2 * edge**2) <= budget or units == 1
        monkeypatch.setattr(rowgram, "_CPU_BLOCK", (units, edge))
        torch.testing.assert_close(row_gram(H, G, H, G, P), expected, rtol=1e-12, atol=1e-12)
    assert (units, edge) == (32, 512)


def test_messages():
    model, x = build("mlp")
    with pytest.raises(KeyError, match=r"Did you mean '0\.weight'"):
        empirical_ntk(model, x, masks={"0.wieght": torch.ones(8, 5)})
    with pytest.raises(ValueError, match="has shape"):
        empirical_ntk(model, x, masks={"0.weight": torch.ones(5, 8)})
    with pytest.raises(ValueError, match="unknown reduce 'trace'"):
        empirical_ntk(model, x, reduce="trace")
    with pytest.raises(ValueError, match="samples"):
        empirical_ntk(model, x[:0])

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match="returns tuple"):
        empirical_ntk(Pair(5, 2).double(), x)
