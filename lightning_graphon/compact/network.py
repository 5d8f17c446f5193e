"""`compact`: a physically smaller network that computes the same function."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_graphon._shared.checks import as_kind, check_choice, checked
from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon._shared.model_io import call_model, device_of, is_float
from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon._shared.objects.trees import tree_leaves, tree_map
from lightning_graphon.compact.checks import check_compactable, largest_error
from lightning_graphon.compact.reading import install
from lightning_graphon.compact.reading.watcher import Reading, Watcher
from lightning_graphon.compact.removal import Removal, plan_removal
from lightning_graphon.compact.report import Change, CompactReport, LayerReport, most_frequent
from lightning_graphon.compact.surgery import cut, kept_indices, registered, take
from lightning_graphon.pruning import GivenMasks, Masks, as_masks, theoretical_macs

Mode = Literal["inference", "training"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_ROUNDING = 1e-2  # a wrong network differs by more


@dataclass(frozen=True)
class CompactNetwork:
    """What `compact` gives.

    Attributes:
        model: The smaller module, of the class of the original, with its names.
        masks: Masks of its weights, for `PruneAtInit.from_masks`.
        report: What became smaller, and what stays and why.
        kept: Indices that stay along each axis, by name in the state dict.
        dense: State dict of the masked original.
        mode: "inference" or "training".
    """

    model: nn.Module
    masks: Masks
    report: CompactReport
    kept: dict[str, list[tuple[int, Tensor]]]
    dense: dict[str, Tensor]
    mode: Mode

    @torch.no_grad()
    def expand_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """State dict of the dense network that computes what the small one does; what was removed is as it was.

        Args:
            state: State dict of the small network, as of a checkpoint; None: of `model`.

        Raises:
            ValueError: The network is for inference: constants are in its biases, and the dense one would add them
                again. Or names or shapes are those of another network.
        """
        if self.mode == "inference":
            raise ValueError("constants were folded into the biases: only mode='training' goes back to the dense keys")
        state = self.model.state_dict() if state is None else state
        if state.keys() != self.dense.keys():
            raise ValueError(f"not a state dict of the small network: {sorted(state.keys() ^ self.dense.keys())[:4]}")
        return {name: self._expanded(name, tensor) for name, tensor in state.items()}

    def _expanded(self, name: str, small: Tensor) -> Tensor:
        dense, axes = self.dense[name].to(small.device, small.dtype).clone(), self.kept.get(name, [])
        if take(self.dense[name], axes).shape != small.shape:
            raise ValueError(f"{name!r} has shape {tuple(small.shape)}, which is not that of the small network")
        index = [torch.arange(size) for size in dense.shape]
        for axis, stays in axes:
            index[axis] = stays
        if not dense.ndim:
            return small.clone()
        dense[torch.meshgrid(*index, indexing="ij")] = small
        return dense


@checked
def compact(
    model: nn.Module, masks: GivenMasks | None, example_inputs: Any, *, mode: Mode = "inference"
) -> CompactNetwork:
    """A physically smaller network that computes the same function as the masked one.

    Units and channels that no output depends on are removed, and those that are constants: what these add goes into the
    biases of the layers that read them, except where zero padding makes the border differ. Channels of a residual
    stream go where all blocks agree, heads of attention as a whole, groups of a convolution likewise; what is
    normalised over channels stays. The outputs are compared in the end, and the original is never changed.

    Args:
        model: Any module whose `forward` takes `example_inputs`. Of a LightningModule, what its steps use must be used
            by its `forward`, too.
        masks: `Masks`, a dict from parameter names to bool tensors, or the path of a file that `Masks.save` wrote;
            pruned weights need not be zero yet. None: the zeros of the weights.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments.
        mode: "inference" after training. "training" before it removes only what changes nothing: units without a path
            to the output, and those that are zero and stay so whatever is learnt; a unit with a bias and no live input
            learns. The loss curve is then that of the masked network to rounding; dropout draws other random numbers.

    Returns:
        The network, its masks, and a report.

    Raises:
        ValueError: A weight is computed (a parametrization, torch.nn.utils.prune) or sharded, the masks were made for
            another model, or the small network does not compute the same.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> masks = {"2.weight": torch.arange(8).expand(2, 8) < 3}
    >>> compact(net, masks, torch.rand(5, 4)).model[0]
    Linear(in_features=4, out_features=3, bias=True)
    """
    check_choice("mode", mode, get_args(Mode))
    check_compactable(as_kind("model", model, nn.Module))
    given = Masks({}) if masks is None else as_masks(masks)
    given.pairs(model)  # they fit
    masked = copy.deepcopy(model)
    given.apply_(masked)
    expected = _outputs(masked, example_inputs, mode)
    original = _on_cpu(masked)
    reading = _read(original, given, example_inputs, mode)
    for cautious in (False, True):
        small, removal = copy.deepcopy(masked), plan_removal(reading, cautious)
        try:
            cut(small, original, reading, removal)
            error = _error(masked, small, expected, example_inputs, mode)
            how = f"outputs differ by {error:.1e}"
        except Exception as raised:  # whatever code raises whose numbers do not fit
            error, how = torch.inf, f"it raises {type(raised).__name__}: {raised}"
        if error <= _tolerance(masked):
            return _result(masked, original, small, given, reading, removal, example_inputs, mode, error)
    raise ValueError(f"{type(model).__name__} cannot be made smaller: without its dead units {how}")


def _outputs(model: nn.Module, inputs: Any, mode: Mode) -> list[Tensor]:
    """Outputs in eval mode; for training also with the statistics of the batch, which keep deep signals alive."""
    with preserve_module_state(model), eval_semantics(model, device_of(model)), torch.no_grad():
        outputs = tree_leaves(call_model(model, inputs))
        if mode == "training":
            for module in model.modules():
                module.training = isinstance(module, _NormBase)
            outputs += tree_leaves(call_model(model, _few(inputs)))
        return [leaf for leaf in outputs if isinstance(leaf, Tensor)]


def _error(masked: nn.Module, small: nn.Module, expected: list[Tensor], inputs: Any, mode: Mode) -> float:
    error = largest_error(_outputs(small, inputs, mode), expected)
    if not _tolerance(masked) < error < _ROUNDING:
        return error
    # Deep networks round more than the tolerance; in double precision only what is wrong differs.
    wide = tree_map(lambda x: x.double() if is_float(x) else x, inputs)
    return largest_error(*(_outputs(copy.deepcopy(model).double(), wide, mode) for model in (small, masked)))


def _tolerance(model: nn.Module) -> float:
    return max((TOLERANCE.get(p.dtype, 1e-2) for p in model.parameters() if p.is_floating_point()), default=1e-5)


def _on_cpu(model: nn.Module) -> nn.Module:
    """The module to read, whose units are numbered on the CPU."""
    everywhere = {t.device.type for t in (*model.parameters(), *model.buffers())}
    return model if everywhere <= {"cpu"} else copy.deepcopy(model).cpu()


def _read(masked: nn.Module, masks: Masks, inputs: Any, mode: Mode) -> Reading:
    install()
    kept = {id(parameter): mask.cpu() for parameter, mask in masks.pairs(masked)}
    watcher = Watcher(masked, kept, mode == "training")
    inputs = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, _few(inputs))
    # What training reads and what evaluation reads may differ: auxiliary outputs, statistics of the batch.
    for training in (True, False) if mode == "training" else (False,):
        with preserve_module_state(masked), eval_semantics(masked, torch.device("cpu")), torch.no_grad():
            masked.train(training)
            watcher.run(_forward(masked, inputs), inputs)
    return watcher.reading


def _forward(model: nn.Module, inputs: Any) -> Callable[[], Any]:
    return lambda: call_model(model, inputs)


def _few(inputs: Any) -> Any:
    """Two samples of a tensor: enough to read, and enough for statistics of a batch."""
    if not isinstance(inputs, Tensor) or not inputs.ndim:
        return inputs
    return inputs[:2] if len(inputs) > 1 else inputs.repeat(2, *[1] * (inputs.ndim - 1))


def _result(
    masked: nn.Module, original: nn.Module, small: nn.Module, masks: Masks, reading: Reading, removal: Removal,
    inputs: Any, mode: Mode, error: float,
) -> CompactNetwork:  # fmt: skip
    kept = kept_indices(reading, removal)
    names = {name: kept[id(t)] for name, _, _, t in registered(original) if id(t) in kept}
    smaller = Masks({name: take(mask, names.get(name, [])) for name, mask in masks.items()})
    dense = {name: tensor.detach().clone() for name, tensor in masked.state_dict().items()}
    report = _report(original, masked, small, reading, removal, inputs, error)
    return CompactNetwork(small, smaller, report, names, dense, mode)


def _report(
    original: nn.Module, masked: nn.Module, small: nn.Module, reading: Reading, removal: Removal, inputs: Any,
    error: float,
) -> CompactReport:  # fmt: skip
    macs = Change(*(theoretical_macs(m, inputs)["total"].dense for m in (masked, small)))
    parameters = Change(*(sum(p.numel() for p in m.parameters()) for m in (masked, small)))
    names = {id(t): name for name, _, _, t in reversed(list(registered(original)))}
    layers = []
    for key, calls in reading.calls.items():
        call = calls[0]
        reads, gives = (Change(len(s), int((~removal.gone[s]).count_nonzero())) for s in (call.inputs, call.outputs))
        idle = call.outputs[~removal.need[call.outputs] & ~removal.gone[call.outputs]].tolist()
        reasons = most_frequent([removal.reasons.get(label, "") for label in idle])
        layers.append(LayerReport(names[key], reads, gives, len(idle), reasons))
    read = {*reading.calls, *(key for key, _ in reading.slots)}
    unread = [name for name, p in original.named_parameters() if id(p) not in read and p.ndim > 1]
    return CompactReport(macs, parameters, layers, unread, error)
