"""Networks of torchvision, timm and transformers, with masks of each method and with random dead units."""

import copy

import pytest
import torch

from lightning_graphon.compact import compact
from lightning_graphon.pruning import Masks, prune
from tests.helpers.compact_cases import random_masks, scramble

torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")

CONVOLUTIONS = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121", "googlenet"]
MORE = ["vgg11_bn", "mobilenet_v3_small", "squeezenet1_1", "efficientnet_b0", "regnet_y_400mf", "resnext50_32x4d",
        "convnext_tiny", "mnasnet0_5", "vit_b_32", "swin_t", "timm/resnetv2_50", "timm/seresnet18",
        "timm/tf_efficientnet_lite0", "timm/mixer_s32_224", "timm/deit_tiny_patch16_224"]  # fmt: skip
TOKENS = ("vit", "deit", "mixer", "swin")
QUICK = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "timm/vit_tiny_patch16_224"]


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name.startswith("timm/"):
            model = timm.create_model(name[5:], num_classes=10)
        else:
            options = {"init_weights": False} if name == "googlenet" else {}
            model = getattr(torchvision.models, name)(num_classes=10, **options)
    for key, parameter in model.named_parameters():  # no zeros: layers of many begin with them
        if not bool(parameter.any()):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
    return model


def images(name, count, seed):
    size = 224 if any(word in name for word in TOKENS) else 64
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calibrate(name, model, masks):
    """Running statistics of the masked network: with those of a new one signals vanish, and anything seems equal."""
    trained = copy.deepcopy(model).train()
    Masks(masks).apply_(trained)
    for module in trained.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        trained(images(name, 4, 0))
    for buffer, found in zip(model.buffers(), trained.buffers(), strict=True):
        buffer.data = found


def check(name, model, masks, mode, alive=True):
    model = model.double()
    calibrate(name, model, masks)
    small = compact(model, masks, images(name, 2, 1), mode=mode)
    dense = copy.deepcopy(model).eval()
    Masks(masks).apply_(dense)
    with torch.no_grad():
        x = images(name, 3, 2)
        expected, found = dense(x), small.model.eval()(x)
    assert not alive or (expected[0] - expected[1]).abs().max() > 1e-5 * expected.abs().max()
    # Small running variances amplify rounding.
    assert float((found - expected).abs().max()) < 1e-11 * max(1, float(expected.abs().max()))
    return small


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    "name", QUICK + [pytest.param(n, marks=pytest.mark.slow) for n in CONVOLUTIONS + MORE if n not in QUICK]
)
def test_random_dead_units(name, mode):
    model = build(name)
    small = check(name, model, random_masks(model, density=0.7, dead=0.3), mode)
    assert small.report.macs.after < small.report.macs.before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", ["random", "magnitude", "snip", "grasp", "synflow"])
def test_masks_of_each_method(name, method):
    model, x = build(name), images(name, 4, 3).float()
    masks = prune(
        model,
        method,
        sparsity=0.4 if "mobile" in name else 0.95,
        batches=[(x, torch.arange(4))],
        steps=3 if method == "synflow" else None,
    )
    check(name, model, masks, "inference", alive=False)  # some methods leave no path at such sparsities


def test_in_single_precision():
    model = build("resnet18")
    masks = random_masks(model, density=0.7, dead=0.3)
    small = compact(model, masks, images("", 2, 1).float())
    Masks(masks).apply_(model)
    x = images("", 3, 2).float()
    with torch.no_grad():
        expected, found = model.eval()(x), small.model.eval()(x)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_heads_of_timm_go():
    model = scramble(build("timm/vit_tiny_patch16_224")).double()
    masks = {f"blocks.{i}.attn.proj.weight": torch.ones(192, 192, dtype=torch.bool) for i in range(12)}
    for mask in masks.values():
        mask[:, 64:128] = False
    small = check("vit", model, masks, "inference")
    assert small.model.blocks[3].attn.num_heads == 2
    assert small.model.blocks[3].attn.qkv.out_features == 384


@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_language_models(kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(vocab_size=50)
    for key, value in {"hidden_size": 24, "intermediate_size": 40, "n_inner": 40, "num_hidden_layers": 2,
                       "num_attention_heads": 4}.items():  # fmt: skip
        setattr(config, key, value)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).double().eval()
    inner = "encoder.layer.0.output.dense.weight" if kind == "Bert" else "h.0.mlp.c_proj.weight"
    mask = torch.ones_like(dict(model.named_parameters())[inner], dtype=torch.bool)
    mask[(slice(None), slice(7)) if kind == "Bert" else slice(7)] = False
    small = compact(model, {inner: mask}, torch.randint(50, (2, 6)))
    tokens = torch.randint(50, (3, 6))
    Masks({inner: mask}).apply_(model)
    with torch.no_grad():
        expected, found = model(tokens).last_hidden_state, small.model(tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert small.report.parameters.before - small.report.parameters.after == 7 * (2 * config.hidden_size + 1)
