"""`to_sparse`: Linear layers that skip zeros, where this is faster on this machine."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import as_kind, check_choice, checked
from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon._shared.model_io import call_model, device_of
from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon.compact.checks import check_compactable
from lightning_graphon.pruning import GivenMasks, Masks, as_masks

Layout = Literal["auto", "csr", "2:4", "dense"]
_REPEATS = 7
_MARGIN = 0.9  # of dense time that a sparse layout must stay under: timings of a busy machine differ by this


class CSRLinear(nn.Module):
    """A Linear layer whose weight has compressed rows; for inference.

    Args:
        weight: Weight [out, in] with zeros.
        bias: Bias [out], or None.

    >>> layer = CSRLinear(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), None)
    >>> layer(torch.tensor([[1.0, 3.0]]))
    tensor([[6., 0.]])
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rows = weight.detach().to_sparse_csr()
        # Half the indices: less to read.
        parts = rows.crow_indices().int(), rows.col_indices().int(), rows.values()
        self.register_buffer("weight", torch.sparse_csr_tensor(*parts, size=rows.shape))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Linear map of the last axis."""
        out = torch.sparse.mm(self.weight, x.reshape(-1, self.in_features).T).T
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and number of stored weights."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={self.weight._nnz()}"


@dataclass(frozen=True)
class LayerChoice:
    """One Linear layer.

    Attributes:
        layout: "csr", "2:4" or "dense".
        dense_seconds: Time of the dense layer on its input in the example; NaN where it was not measured.
        seconds: Of the layer that was chosen.
    """

    layout: str
    dense_seconds: float
    seconds: float


@dataclass(frozen=True)
class SparseNetwork:
    """What `to_sparse` gives.

    Attributes:
        model: A copy of the module, in eval mode, for inference.
        layers: Name of each Linear layer -> what was chosen.
    """

    model: nn.Module
    layers: dict[str, LayerChoice]


@checked
def to_sparse(
    model: nn.Module, masks: GivenMasks | None, example_inputs: Any, *, layout: Layout = "auto"
) -> SparseNetwork:
    """A copy whose Linear layers skip zeros, for inference; call `compact` first, which makes everything faster.

    Args:
        model: Any module; it is not changed. Convolutions stay dense.
        masks: `Masks`, a dict from parameter names to bool tensors, or a file of them; None: the zeros of the weights.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments, of the size to be fast for.
        layout: "auto" measures on this machine and takes the fastest, dense where nothing is faster by a tenth. "csr",
            "2:4" (semi-structured, on GPUs that have it) or "dense" for all layers.

    Raises:
        ValueError: A weight is computed or sharded, the masks were made for another model, or "2:4" is asked for where
            the machine or the masks do not have it.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> to_sparse(net, {"0.weight": torch.eye(8).bool()}, torch.rand(4, 8), layout="csr").layers["0"].layout
    'csr'
    """
    check_choice("layout", layout, get_args(Layout))
    check_compactable(as_kind("model", model, nn.Module))
    given = Masks({}) if masks is None else as_masks(masks)
    copied = copy.deepcopy(model).eval()
    given.apply_(copied)
    inputs = _layer_inputs(copied, example_inputs)
    layers: dict[str, LayerChoice] = {}
    for name, x in inputs.items():
        parent, _, key = name.rpartition(".")
        layer, layers[name] = _chosen(name, copied.get_submodule(name), x, layout)
        setattr(copied.get_submodule(parent), key, layer)
    return SparseNetwork(copied, layers)


def _layer_inputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """What every Linear layer reads."""
    found: dict[str, Tensor] = {}
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if name and type(module) is nn.Linear
    }

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.setdefault(names[module], args[0].detach())

    with preserve_module_state(model), eval_semantics(model, device_of(model)), torch.no_grad():
        for module in names:  # no subclass: it may compute something else
            module.register_forward_pre_hook(note)
        call_model(model, inputs)
    return found


def _chosen(name: str, layer: Any, x: Tensor, layout: Layout) -> tuple[nn.Module, LayerChoice]:
    if layout == "dense":
        return layer, LayerChoice("dense", torch.nan, torch.nan)
    candidates = {"csr": lambda: CSRLinear(layer.weight, layer.bias), "2:4": lambda: _semi_structured(name, layer)}
    if layout != "auto":
        return candidates[layout](), LayerChoice(layout, torch.nan, torch.nan)
    kind = "2:4" if _has_semi_structured(layer) else "csr"
    other = candidates[kind]()
    seconds, sparse = _seconds({"dense": lambda: layer(x), kind: lambda: other(x)}).values()
    if sparse < _MARGIN * seconds:
        return other, LayerChoice(kind, seconds, sparse)
    return layer, LayerChoice("dense", seconds, seconds)


@torch.no_grad()
def _seconds(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least time of each, measured in turn, so that other work on the machine is fair to all."""
    best = dict.fromkeys(runs, torch.inf)
    for repeat in range(_REPEATS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if repeat:  # the first is warm-up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _has_semi_structured(layer: nn.Linear) -> bool:
    """Whether the GPU has 2:4 sparsity for this weight, and the weight is 2:4."""
    weight = layer.weight
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    fits = weight.dtype in (torch.float16, torch.bfloat16) and len(weight) % 64 == 0 and weight.shape[1] % 64 == 0
    return fits and bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def _semi_structured(name: str, layer: nn.Linear) -> nn.Module:
    if not _has_semi_structured(layer):
        raise ValueError(
            f"layer {name!r} cannot be 2:4: it takes a GPU of compute capability 8.0, float16 or bfloat16, sizes that "
            "are multiples of 64, and a mask with at most two of every four inputs (allocation='2:4')"
        )
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    return new
