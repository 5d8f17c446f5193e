"""Which weights are pruned: defaults, patterns, fused weights, ties."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_graphon.pruning import prune, select_weights
from tests.helpers.networks import CASES, Tied, mlp


class Zoo(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        torchmetrics = pytest.importorskip("torchmetrics")

        class Judge(torchmetrics.Metric):
            def __init__(self) -> None:
                super().__init__()
                self.inception = nn.Linear(3, 3)

            def update(self) -> None: ...

            def compute(self) -> None: ...

        self.embedding = nn.Embedding(5, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        self.conv1 = nn.Conv1d(2, 3, 3)
        self.conv2 = nn.Conv2d(2, 3, 3)
        self.conv3 = nn.Conv3d(2, 3, 3)
        self.up1 = nn.ConvTranspose1d(2, 3, 3)
        self.up2 = nn.ConvTranspose2d(2, 3, 3)
        self.up3 = nn.ConvTranspose3d(2, 3, 3)
        self.batchnorm, self.groupnorm = nn.BatchNorm2d(3), nn.GroupNorm(1, 3)
        self.prelu = nn.PReLU(3)
        self.free = nn.Parameter(torch.ones(3, 3))
        self.perceptual = nn.Linear(3, 3).requires_grad_(False)
        self.judge = Judge()
        self.head = nn.Linear(6, 2)


def test_default_targets_are_linear_and_convolution_weights_only() -> None:
    assert list(select_weights(Zoo())) == [
        "encoder.0.weight",
        "encoder.2.weight",
        "conv1.weight",
        "conv2.weight",
        "conv3.weight",
        "up1.weight",
        "up2.weight",
        "up3.weight",
        "head.weight",
    ]


def test_the_selected_are_the_live_parameters() -> None:
    net = mlp()
    chosen = select_weights(net)
    assert all(chosen[name] is net.get_parameter(name) for name in chosen)


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("head", ["head.weight"]),
        ("head.weight", ["head.weight"]),
        ("encoder.*", ["encoder.0.weight", "encoder.2.weight"]),
        ("conv?", ["conv1.weight", "conv2.weight", "conv3.weight"]),
        (r"re:^up\d", ["up1.weight", "up2.weight", "up3.weight"]),
        (nn.Conv2d, ["conv2.weight"]),
        ("ConvTranspose2d", ["up2.weight"]),
        ([nn.Conv3d, "encoder.0", "head.*"], ["encoder.0.weight", "conv3.weight", "head.weight"]),
        (("conv1", "re:conv1"), ["conv1.weight"]),
    ],
)
def test_include_takes_names_globs_regular_expressions_and_types(include: object, expected: list[str]) -> None:
    assert list(select_weights(Zoo(), include)) == expected


@pytest.mark.parametrize(
    ("exclude", "missing"),
    [
        ("encoder.0", {"encoder.0.weight"}),  # keep the first layer dense
        ("head", {"head.weight"}),  # keep the last layer dense
        (["re:^up", nn.Conv1d], {"up1.weight", "up2.weight", "up3.weight", "conv1.weight"}),
        ("Linear", {"encoder.0.weight", "encoder.2.weight", "head.weight"}),
    ],
)
def test_exclude_really_excludes(exclude: object, missing: set[str]) -> None:
    zoo = Zoo()
    assert set(select_weights(zoo)) - set(select_weights(zoo, exclude=exclude)) == missing
    masks = prune(zoo, "random", sparsity=0.5, exclude=exclude)
    assert not missing & set(masks)


def test_include_and_exclude_combine() -> None:
    assert list(select_weights(Zoo(), "encoder.*", "encoder.2")) == ["encoder.0.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_the_nearest(argument: str) -> None:
    message = rf"{argument} pattern 'encodr\.0\.weight' matches no prunable weight\. Did you mean 'encoder\.0\.weight'"
    with pytest.raises(ValueError, match=message):
        select_weights(Zoo(), **{argument: ["head", "encodr.0.weight"]})


@pytest.mark.parametrize(("pattern", "meant"), [("haed", "head"), ("encodr", "encoder"), ("conv1D", "Conv1d")])
def test_the_nearest_may_be_a_module_or_a_class(pattern: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"Did you mean '{meant}'\? Allowed: 'encoder\.0\.weight'"):
        select_weights(Zoo(), exclude=pattern)


@pytest.mark.parametrize("pattern", ["batchnorm", "judge.inception", nn.LayerNorm, "embedding.bias"])
def test_what_can_not_be_pruned_is_not_matched(pattern: object) -> None:
    with pytest.raises(ValueError, match="matches no prunable weight"):
        select_weights(Zoo(), pattern)


def test_a_conflict_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"include and exclude both name \['head'\]"):
        select_weights(Zoo(), ["head", "conv1"], ["head"])


@pytest.mark.parametrize("pattern", [[3], [torch.Tensor], [None]])
def test_a_pattern_of_another_type_is_refused(pattern: list) -> None:
    with pytest.raises(TypeError, match=r"include takes names, globs, 're:\.\.\.' or nn\.Module types, got"):
        select_weights(Zoo(), pattern)


def test_an_empty_selection_says_what_is_pruned_and_what_is_frozen() -> None:
    with pytest.raises(ValueError, match=r"no weight to prune in Sequential.*Linear, Conv and ConvTranspose"):
        select_weights(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"frozen \(requires_grad=False\): \['0\.weight'"):
        select_weights(mlp().requires_grad_(False))
    with pytest.raises(ValueError, match="no weight to prune"):
        select_weights(mlp(), nn.Linear, "*")


def test_a_lazy_layer_is_named_and_prunable_once_it_is_built() -> None:
    net = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"layer '0\.weight' is lazy .* run one forward pass"):
        select_weights(net)
    net(torch.ones(2, 8))
    assert prune(net, "magnitude", sparsity=0.5).kept == 36


FUSED = {
    "transformer": ["encoder.layers.0.self_attn.in_proj_weight"],
    "lstm": ["rnn.weight_ih_l0", "rnn.weight_hh_l0"],
    "gru": ["rnn.weight_ih_l0", "rnn.weight_hh_l0"],
    "bilinear": ["mix.weight"],
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_weights_are_skipped_with_one_clear_line(name: str) -> None:
    with pytest.warns(UserWarning, match="not pruned: fused weights") as caught:
        chosen = select_weights(CASES[name].model())
    assert len(caught) == 1
    assert all(weight in str(caught[0].message) for weight in FUSED[name])
    assert not set(FUSED[name]) & set(chosen)
    assert "head.weight" in chosen


@pytest.mark.parametrize("name", FUSED)
def test_fused_weights_are_pruned_when_named(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = select_weights(CASES[name].model(), include=FUSED[name])
    assert list(chosen) == FUSED[name]


def test_excluding_fused_weights_silences_the_line() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(select_weights(CASES["lstm"].model(), exclude=nn.LSTM)) == ["head.weight"]


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_computed_weights_are_skipped_with_one_clear_line(norm: Callable[[nn.Module], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the older weight_norm
        net = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="not pruned: the weights of 0 are computed") as caught:
        assert list(select_weights(net)) == ["1.weight"]
    assert len(caught) == 1


def test_a_tied_weight_is_counted_once_and_found_under_both_names() -> None:
    net = Tied()
    assert list(select_weights(net)) == ["embedding.weight", "body.weight"]
    assert list(select_weights(net, "lm_head")) == list(select_weights(net, "embedding")) == ["embedding.weight"]
    masks = prune(net, "magnitude", sparsity=0.5)
    assert masks.total == 11 * 6 + 6 * 6
    assert masks.kept == masks.total // 2
    masks.apply_(net)
    assert torch.equal(net.lm_head.weight != 0, masks["embedding.weight"])


def test_a_module_used_twice_is_counted_once() -> None:
    shared = nn.Linear(4, 4)
    assert list(select_weights(nn.Sequential(shared, nn.ReLU(), shared))) == ["0.weight"]
