"""Which models of torchvision and timm the Graphon NTK reads, and why it refuses the others.

Random weights, small inputs, nothing is downloaded; every model has a magnitude mask at 80 %. The kernel is that of
`graphon_ntk_from_model` with its defaults but 4 bins, on two samples, in float64.

    python benchmarks/model_zoo.py
    python benchmarks/model_zoo.py --models resnet18 vit_tiny_patch16_224 --timeout 120
"""

import argparse
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision.models as tv
from torch import nn

from lightning_graphon.ntk import graphon_ntk_from_model
from lightning_graphon.pruning import prune


def _timm(name: str, size: int, **options: Any) -> tuple[Callable[[], nn.Module], int]:
    return partial(timm.create_model, name, pretrained=False, num_classes=10, **options), size


def _average_pooled(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with average pooling of the same windows in place of max pooling."""
    model = build()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
    return model


def _vision(build: Callable[..., nn.Module], size: int) -> tuple[Callable[[], nn.Module], int]:
    return partial(build, num_classes=10, weights=None), size


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": _vision(tv.alexnet, 64),
    "vgg11": _vision(tv.vgg11, 32),
    "squeezenet1_1": _vision(tv.squeezenet1_1, 32),
    "resnet18": _vision(tv.resnet18, 32),
    "resnext50_32x4d": _vision(tv.resnext50_32x4d, 32),
    "densenet121": _vision(tv.densenet121, 32),
    "googlenet": (partial(tv.googlenet, num_classes=10, weights=None, aux_logits=False, init_weights=True), 32),
    "mobilenet_v2": _vision(tv.mobilenet_v2, 32),
    "mobilenet_v3_small": _vision(tv.mobilenet_v3_small, 32),
    "efficientnet_b0": _vision(tv.efficientnet_b0, 32),
    "regnet_x_400mf": _vision(tv.regnet_x_400mf, 32),
    "convnext_tiny": _vision(tv.convnext_tiny, 32),
    "vit_b_16": (partial(tv.vit_b_16, num_classes=10, weights=None, image_size=32), 32),
    "swin_t": _vision(tv.swin_t, 32),
    "timm resnet26d": _timm("resnet26d", 32),
    "timm seresnet18": _timm("legacy_seresnet18", 32),
    "timm vit_tiny": _timm("vit_tiny_patch16_224", 32, img_size=32),
    "timm vit_tiny, mean": _timm("vit_tiny_patch16_224", 32, img_size=32, class_token=False, global_pool="avg"),
    "timm mixer_s32": _timm("mixer_s32_224", 64, img_size=64),
    "timm gmlp_ti16": _timm("gmlp_ti16_224", 32, img_size=32),
    "timm resmlp_12": _timm("resmlp_12_224", 32, img_size=32),
    "timm cait_xxs24": _timm("cait_xxs24_224", 32, img_size=32),
    "timm poolformer_s12": _timm("poolformer_s12", 32),
    "timm nf_resnet26": _timm("nf_resnet26", 32),
}
for _name in ("vgg11", "squeezenet1_1", "resnet18", "resnext50_32x4d", "densenet121", "googlenet", "timm seresnet18"):
    MODELS[f"{_name}, AvgPool"] = partial(_average_pooled, MODELS[_name][0]), MODELS[_name][1]


def attempt(name: str, samples: int, queue: Any) -> None:
    """Read one model; puts what happened and the seconds into the queue."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    build, size = MODELS[name]
    model = build().eval()
    masks = prune(model, "magnitude", sparsity=0.8)
    x = torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    try:
        kernel = graphon_ntk_from_model(model, x, masks, bins=4)
        what = "read" if bool(torch.isfinite(kernel).all()) else "not finite"
    except ValueError as error:
        what = f"refused: {error}"
    except Exception:
        what = f"CRASH: {traceback.format_exc()}"
    queue.put((what, time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per model")
    args = parser.parse_args()
    print("| model | Graphon NTK | seconds |\n|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for name in args.models:
        queue = context.Queue()
        process = context.Process(target=attempt, args=(name, args.samples, queue))
        process.start()
        try:
            what, seconds = queue.get(timeout=args.timeout)
            taken = f"{seconds:.0f}"
        except Exception:
            process.terminate()
            what, taken = "no answer in time", f"> {args.timeout:.0f}"
        process.join()
        print(f"| {name} | {what} | {taken} |", flush=True)


if __name__ == "__main__":
    main()
