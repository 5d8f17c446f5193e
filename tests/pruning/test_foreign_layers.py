"""Layers of other libraries: which are pruned, what is said of the others, and which axis is which."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_graphon._shared import weight_layout
from lightning_graphon._shared.weight_layout import WeightLayout, in_rows, layout_of
from lightning_graphon.graphon import layer_graphons
from lightning_graphon.pruning import Masks, prune, register_layer, rescale_, select_weights, theoretical_macs
from lightning_graphon.pruning.computed_weights import revives_zeros


class Conv1D(nn.Module):
    """A transposed Linear layer, as in GPT-2; its class is registered in tests only."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Experts(nn.Module):
    """Three matrices of 4 inputs and 6 outputs, stored in either way."""

    def __init__(self, shape: tuple[int, ...] = (3, 6, 4)) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(shape))


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations do not outlive a test."""
    monkeypatch.setattr(weight_layout, "_LAYERS", dict(weight_layout._LAYERS))
    monkeypatch.setattr(weight_layout, "_found", {})


def silently(model: nn.Module, **patterns: object) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return list(select_weights(model, **patterns))


def network() -> nn.Sequential:
    return nn.Sequential(Conv1D(8, 32), nn.ReLU(), Conv1D(32, 8), nn.Linear(8, 2))


def test_what_stays_dense_is_named_with_the_include_that_reaches_it() -> None:
    with pytest.warns(UserWarning, match=r"97% of the weights in matrices: 0\.weight, 2\.weight;.*'Conv1D'") as told:
        assert list(select_weights(network())) == ["3.weight"]
    assert len(told) == 1
    assert silently(network(), include=["*", "Conv1D"]) == ["0.weight", "2.weight", "3.weight"]
    assert silently(network(), exclude="Conv1D") == ["3.weight"]


def test_a_tenth_may_stay_dense_in_silence() -> None:
    parts = nn.ModuleList([nn.Embedding(10, 10), nn.Linear(30, 30)])
    assert silently(parts) == ["1.weight"]
    with pytest.warns(UserWarning, match=r"12% .* 0\.weight; include=\['\*', 'Embedding'\]"):
        select_weights(nn.ModuleList([nn.Embedding(12, 10), nn.Linear(30, 30)]))


def test_include_reaches_any_matrix_and_containers_mean_their_layers() -> None:
    net = nn.ModuleDict({"body": nn.ModuleList([nn.Embedding(9, 4), nn.Linear(4, 4)]), "frozen": nn.Linear(4, 4)})
    net.register_parameter("positions", nn.Parameter(torch.ones(3, 4)))
    net["frozen"].requires_grad_(False)
    assert silently(net, include="body") == ["body.1.weight"]
    assert silently(net, include="body.0") == ["body.0.weight"]
    assert silently(net, include="positions") == ["positions"]
    assert silently(net, include=["Linear", "frozen"]) == ["body.1.weight", "frozen.weight"]


def test_a_registered_class_and_its_subclasses_are_pruned_by_default() -> None:
    register_layer(Conv1D, weight="io")
    derived = type("Derived", (Conv1D,), {})
    assert silently(nn.Sequential(Conv1D(2, 3), derived(3, 2))) == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match=r"'weight' must be one of .*'eio'.*got 'ab'"):
        register_layer("a.b", weight="ab")


@pytest.mark.parametrize(
    ("layout", "shape", "rows"),
    [
        (WeightLayout(), (6, 4, 3), (6, 4, 3)),
        (WeightLayout(transposed=True), (4, 6), (6, 4)),
        (WeightLayout(transposed=True, groups=2), (4, 3, 5), (6, 2, 5)),
        (WeightLayout(experts=3), (3, 6, 4), (18, 4)),
        (WeightLayout(transposed=True, experts=3), (3, 4, 6), (18, 4)),
    ],
)
def test_rows_are_outputs_and_back(layout: WeightLayout, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert layout.rows(tensor).shape == rows
    assert torch.equal(layout.stored(layout.rows(tensor)), tensor)
    assert layout.matrix(tensor.shape) == (rows[0] // max(layout.experts, 1), *rows[1:])


def test_experts_are_cut_one_by_one() -> None:
    stored = torch.randn(3, 4, 6)
    rows = WeightLayout(transposed=True, experts=3).rows(stored)
    assert all(torch.equal(rows[6 * e : 6 * e + 6], stored[e].T) for e in range(3))


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk", "2:4"])
def test_transposed_weights_have_the_masks_of_their_transposes(allocation: str) -> None:
    register_layer(Conv1D, weight="io")
    net = nn.Sequential(Conv1D(8, 32), nn.ReLU(), Conv1D(32, 8))
    twin = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    for i in (0, 2):
        twin[i].weight.data = net[i].weight.data.T.clone()
    sparsity = None if allocation == "2:4" else 0.75
    ours, theirs = (prune(m, "magnitude", sparsity=sparsity, allocation=allocation) for m in (net, twin))
    assert all(torch.equal(ours[name].T, mask) for name, mask in theirs.items())
    assert [row["dead_in"] for row in ours.table(net)] == [row["dead_in"] for row in theirs.table()]
    assert theoretical_macs(net, torch.ones(5, 8), ours) == theoretical_macs(twin, torch.ones(5, 8), theirs)
    graphons = layer_graphons(theirs, model=twin, bins=4)
    for name, graphon in layer_graphons(ours, model=net, bins=4).items():
        assert torch.equal(graphon.values, graphons[name].values)
        assert torch.equal(graphon.energy, graphons[name].energy)
    for model, masks in ((net, ours), (twin, theirs)):
        rescale_(model, masks)
    assert all(torch.allclose(net[i].weight.T, twin[i].weight) for i in (0, 2))


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.ConvTranspose1d(6, 6, 1), Conv1D(6, 6)])
def test_a_graphon_is_drawn_with_outputs_as_rows(layer: nn.Module) -> None:
    register_layer(Conv1D, weight="io")
    values = torch.zeros(2, 2)
    values[0] = 1  # the first half of the outputs
    options = {"graphons": {"*": values}}
    mask = in_rows(layer, prune(layer, "graphon", sparsity=0.5, options=options))["weight"]
    assert mask[:3].all()
    assert not mask[3:].any()


def test_budgets_count_the_inputs_and_outputs_of_an_expert() -> None:
    register_layer(Experts, up="eoi")
    net = nn.ModuleList([Experts(), nn.Linear(4, 6, bias=False)])
    for allocation in ("er", "erk"):
        kept = prune(net, "magnitude", sparsity=0.75, allocation=allocation)
        assert [int(mask.sum()) for mask in kept.values()] == [18, 6]


def test_patterns_run_along_the_inputs_of_experts() -> None:
    register_layer(Experts, up="eio")
    net = Experts((3, 4, 6))
    assert prune(net, "magnitude", allocation="2:4")["up"].sum(1).eq(2).all()


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w / (w.std() + 1e-5), self.bias, groups=self.groups)


class Padded(nn.Conv2d):
    """Uses its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Cosine(nn.Linear):
    """Scales its weight and its input: zeros are zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class Strange(nn.Linear):
    """Wants something that nobody knows."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return x + other


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Standardised(4, 6, 3), True),
        (Standardised(4, 6, 3, groups=2), True),
        (Padded(4, 6, 3, groups=2), False),
        (Cosine(4, 6), False),
        (Strange(4, 6), False),
        (nn.Conv2d(4, 6, 3), False),
    ],
)
def test_layers_that_use_another_weight_than_they_store(layer: nn.Module, expected: bool) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = torch.get_rng_state()
    assert revives_zeros(layer) is expected
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_they_are_told_with_their_class() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Standardised(4, 6, 3))
    with pytest.warns(UserWarning, match=r"not zero where they are used: 1\.weight\. Standardised .*exclude="):
        select_weights(net)
    assert silently(net, exclude="Standardised") == ["0.weight"]


def test_layers_under_torch_prune_are_told() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.prune.l1_unstructured(net[0], "weight", amount=0.3)
    with pytest.warns(UserWarning, match=r"weights of 0 are computed .*torch\.nn\.utils\.prune"):
        assert list(select_weights(net)) == ["1.weight"]
    nn.utils.prune.l1_unstructured(net[1], "weight", amount=0.3)
    with pytest.raises(ValueError, match=r"no weight to prune.*weights of 0, 1 are computed"):
        select_weights(net)


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, **size))
    assert len(silently(gpt2)) == 5
    name = "transformer.h.0.mlp.c_fc.weight"
    assert in_rows(gpt2, Masks({name: torch.ones(16, 64).bool()}))[name].shape == (64, 16)
    small = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 4, "head_dim": 4, **size,
    }  # fmt: skip
    for family, axes in (("Mixtral", "eoi"), ("GptOss", "eio")):
        config = getattr(transformers, f"{family}Config")(**small)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        name = "model.layers.0.mlp.experts.down_proj"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the embedding stays dense
            assert {name, name.replace("down", "gate_up")} <= select_weights(model).keys()
        assert layout_of(model, name) == WeightLayout(axes == "eio", 1, 4)
        assert layout_of(model, name).matrix(model.get_parameter(name).shape) == (8, 16)


def test_pytorch_geometric() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    net = nn.ModuleList([geometric.GCNConv(8, 16), geometric.GATConv(16, 16), geometric.SAGEConv(16, 4)])
    assert silently(net) == ["0.lin.weight", "1.lin.weight", "2.lin_l.weight", "2.lin_r.weight"]


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    assert revives_zeros(timm.layers.StdConv2d(3, 4, 3))
    assert revives_zeros(timm.layers.ScaledStdConv2d(3, 4, 3))
    assert not revives_zeros(timm.layers.Conv2dSame(3, 4, 3))
    assert not revives_zeros(timm.layers.Linear(3, 4))
