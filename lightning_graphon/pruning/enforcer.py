"""Keep pruned weights at zero during training with any optimizer."""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_graphon._shared.objects.hooks import AfterCall, hook_gradient, runs_hooks
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.sharding import is_sharded, local_shard, local_shard_like, reshard

# With weight, gradient and state at zero, a step of these leaves exactly zero, so nothing has to be zeroed again.
_ZERO_PRESERVING = {
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
}
# Where gradients are zero the second moment does not matter, and on a CPU torch takes fifteen times longer for the
# square root of an exact zero than for that of another number.
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
# Second moments decay, by half in 64 steps with beta2 = 0.99: they are checked every so many steps, against a floor.
_CHECK_EVERY, _FLOOR = 64, 1e-12
Version: TypeAlias = int | tuple[int, int]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Enforcer:
    """Keep the pruned weights of a network and their gradients exactly zero until it is detached.

    Gradients are zeroed as autograd writes them, before clipping or the optimizer sees them. The optimizer state of
    pruned weights is zeroed on attaching and whenever the optimizer loads a state; on a CPU their second moments are
    one while attached, which changes no weight and avoids the slow square roots of zeros. Weights are zeroed again
    after each step of an optimizer that can move a weight without a gradient, and after other code wrote to weights or
    gradients (noticed unless it used `.data`). Of sharded parameters (DTensors) each process zeroes its own part,
    without communication.

    Args:
        model: The network; its parameters keep their identity.
        masks: Masks of the weights.
        optimizers: The optimizers that train the network.

    Raises:
        ValueError: The masks were made for another model.

    >>> net = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> with Enforcer(net, Masks({"weight": torch.tensor([[True, False]])}), optimizer):
    ...     net(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> net.weight[0, 1].item()
    0.0
    """

    def __init__(self, model: nn.Module, masks: Masks, *optimizers: Optimizer) -> None:
        reshard(model)
        pairs = masks.pairs(model)
        self._erasers = {parameter: _Eraser(mask) for parameter, mask in pairs}
        self._named = {name: parameter for name, (parameter, _) in zip(masks, pairs, strict=True)}
        self._optimizers = optimizers
        self._handles: list[Any] = []
        self._grad_versions: dict[nn.Parameter, tuple[int, Version]] = {}
        self._weight_versions: dict[nn.Parameter, Version] = {}
        # Decided once, as versions are compared several times at every step.
        self._version = _version if any(map(is_sharded, self._erasers)) else attrgetter("_version")
        self._always_zeroed: set[nn.Parameter] = set()
        self._tiny = max((torch.finfo(parameter.dtype).tiny for parameter in self._erasers), default=0.0)
        self._steps = 0
        self._dense: dict[nn.Parameter, Tensor] | None = None  # gradients of all weights, while they are collected
        self.zero_weights()
        for parameter, eraser in self._erasers.items():
            self._weight_versions[parameter] = self._version(parameter)
            self._handles.append(hook_gradient(parameter, self._on_grad(eraser)))
        for optimizer in optimizers:
            self._attach(optimizer)

    def _attach(self, optimizer: Optimizer) -> None:
        if runs_hooks(optimizer):
            self._handles.append(optimizer.register_load_state_dict_post_hook(lambda opt: self.zero_state()))
            self._handles.append(optimizer.register_step_post_hook(lambda opt, args, kwargs: self._after_step(opt)))
        else:
            self._handles.append(AfterCall(optimizer, "load_state_dict", self.zero_state))
            self._handles.append(AfterCall(optimizer, "step", lambda: self._after_step(optimizer)))
        self.zero_state()

    def is_of(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> bool:
        """Whether these are still the parameters and the optimizers that it is attached to."""
        reshard(model)
        now = dict(model.named_parameters(remove_duplicate=False))
        same = all(now.get(name) is parameter for name, parameter in self._named.items())
        return same and [*map(id, self._optimizers)] == [*map(id, optimizers)]

    def _on_grad(self, erase: "_Eraser") -> Callable[[nn.Parameter], None]:
        version = self._version

        def hook(parameter: nn.Parameter) -> None:
            grad = parameter.grad
            if grad is not None:
                if self._dense is not None:
                    self._add_dense(self._dense, parameter, grad)
                erase(grad)
                self._grad_versions[parameter] = id(grad), version(grad)
            if version(parameter) != self._weight_versions[parameter]:  # written to since the last step
                erase(parameter.data)
                self._weight_versions[parameter] = version(parameter)

        return hook

    def collect_gradients(self) -> None:
        """Keep the gradients of all weights, pruned ones too, of the backward passes from here on."""
        self._dense = {} if self._dense is None else self._dense

    def take_gradients(self) -> dict[str, Tensor]:
        """What was collected, by the weight's name: of this process, summed over backward passes; and stop collecting.

        Weights without a gradient are left out; those of sharded weights are sharded.
        """
        dense, self._dense = self._dense or {}, None
        return {name: dense[parameter] for name, parameter in self._named.items() if parameter in dense}

    @torch.no_grad()
    def _add_dense(self, dense: dict[nn.Parameter, Tensor], parameter: nn.Parameter, grad: Tensor) -> None:
        if parameter in dense:
            # `grad` has the sum of all passes for kept weights, and of the pruned ones this pass alone.
            self._erasers[parameter].add_pruned(grad, dense[parameter])
        dense[parameter] = grad.detach().clone()

    @torch.no_grad()
    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks of some weights, in place: who holds the old ones sees the new ones.

        No hook is added or removed, so nothing compiled is compiled again. Weights that leave are zeroed. So are the
        optimizer states of those that leave and of those that come, which begin at zero.

        Args:
            masks: Name -> new bool mask.
        """
        for name, mask in masks.items():
            parameter = self._named[name]
            erase = self._erasers[parameter]
            stays = erase.replace(mask)
            for tensor in (parameter, parameter.grad, *self._states(parameter)):
                if tensor is not None:
                    stays(tensor)
            self._weight_versions[parameter] = self._version(parameter)
        self._steps = 0

    def _states(self, parameter: nn.Parameter) -> list[Tensor]:
        """Tensors of the optimizers' states that have an entry for every weight."""
        values = [v for optimizer in self._optimizers for v in optimizer.state.get(parameter, {}).values()]
        return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        rewritten = self._rewritten_gradients()
        # To inspect gradients on an accelerator the host would wait for it at every step that clips or unscales.
        # Their weights are zeroed after each step from now on instead, whatever momentum they may have.
        self._always_zeroed.update(p for p in rewritten if local_shard(p).device.type != "cpu")
        if not self._preserves_zero(optimizer):
            self.zero_weights()
        elif any(self._erasers[p].would_change(grad) for p, grad in rewritten.items() if p not in self._always_zeroed):
            self.zero_weights()
            self.zero_state()
        for parameter in self._always_zeroed:
            self._erasers[parameter](parameter)
        self._floor_second_moments(optimizer)
        for parameter in self._erasers:
            self._weight_versions[parameter] = self._version(parameter)

    def _preserves_zero(self, optimizer: Optimizer) -> bool:
        # Without eps, or with one that underflows in float16, the update of a pruned weight is 0 / 0.
        groups = optimizer.param_groups
        return type(optimizer) in _ZERO_PRESERVING and all(group.get("eps", 1) >= self._tiny for group in groups)

    def _rewritten_gradients(self) -> dict[nn.Parameter, Tensor]:
        """Gradients that were written to after autograd did, if only to scale them."""
        known = self._grad_versions
        grads = [(p, p.grad) for p in self._erasers if p.grad is not None]
        return {p: grad for p, grad in grads if known.get(p) != (id(grad), self._version(grad))}

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Zero the pruned weights and their gradients."""
        for parameter, erase in self._erasers.items():
            erase(parameter)
            if parameter.grad is not None:
                erase(parameter.grad)

    @torch.no_grad()
    def zero_state(self) -> None:
        """Zero the optimizer state of pruned weights: every state tensor of a weight's shape."""
        for parameter, erase in self._erasers.items():
            for value in self._states(parameter):
                erase(value)
        self._steps = 0

    def _floor_second_moments(self, optimizer: Optimizer) -> None:
        """Keep the second moments of pruned weights away from zero."""
        if self._steps % _CHECK_EVERY == 0 and self._preserves_zero(optimizer):
            for parameter, erase in self._erasers.items():
                for key in _SECOND_MOMENTS:
                    if (moment := optimizer.state.get(parameter, {}).get(key)) is not None:
                        erase.floor_second_moments(moment)
        self._steps += 1

    @torch.no_grad()
    def zero_saved(self, state_dict: Mapping[str, Any]) -> None:
        """Zero the pruned entries of a state dict of the model, whole or sharded."""
        for name, parameter in self._named.items():
            erase = self._erasers[parameter]
            # Strategies that gather a state dict drop the prefix of compiled modules.
            for key in {name, name.replace("_orig_mod.", "")} & state_dict.keys():
                if isinstance(state_dict[key], Tensor) and state_dict[key].shape == erase.shape:
                    erase(state_dict[key])

    def detach(self) -> None:
        """Remove every hook and zero the optimizer state of pruned weights."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.zero_state()

    def __enter__(self) -> "Enforcer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.zero_weights()
        self.detach()


class _Eraser:
    """Sets pruned entries of a tensor to zero, even if they are NaN or infinite."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self._mask = mask
        self._pruned: list[list[int]] | None = None  # index of one pruned entry, if there is any
        self._cache: dict[Any, Tensor] = {}

    def __call__(self, tensor: Tensor) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._erase(tensor)
        else:  # in a backward pass, where the context manager would cost time at every step
            self._erase(tensor)

    def _erase(self, tensor: Tensor) -> None:
        local = local_shard(tensor)
        integer = _INTEGERS.get(local.element_size()) if local.device.type == "cpu" else None
        if integer is None or local.is_complex():
            local.masked_fill_(self._mask_for(tensor, local.device, None), 0)
        else:
            # On a CPU an AND with all-ones or all-zeros is four times faster than masked_fill.
            local.view(integer).bitwise_and_(self._mask_for(tensor, local.device, integer))

    @torch.no_grad()
    def floor_second_moments(self, tensor: Tensor) -> None:
        """Set pruned entries of a plain tensor on a CPU to one, where they are nearly zero."""
        if tensor.device.type == "cpu" and not is_sharded(tensor) and tensor.shape == self.shape:
            if self._pruned is None:
                self._pruned = (~self._mask).nonzero()[:1].tolist()
            if self._pruned and float(tensor[tuple(self._pruned[0])]) < _FLOOR:
                tensor.masked_fill_(~self._mask.to(tensor.device), 1)

    def replace(self, mask: Tensor) -> "_Eraser":
        """Take another mask, in place; an eraser of all entries but those kept by both."""
        mask = mask.to(self._mask.device)
        stays = _Eraser(self._mask & mask)
        self._mask.copy_(mask)
        self._pruned, self._cache = None, {}
        return stays

    def add_pruned(self, tensor: Tensor, other: Tensor) -> None:
        """Add pruned entries of another tensor."""
        kept = local_shard_like(self._mask, tensor)
        local_shard(tensor).add_(local_shard(other).masked_fill(kept, 0))

    def would_change(self, tensor: Tensor) -> bool:
        """Whether a pruned entry that this process holds is not zero."""
        erased = tensor.clone()
        self(erased)
        return not torch.equal(local_shard(erased), local_shard(tensor))

    def _mask_for(self, tensor: Tensor, device: torch.device, integer: torch.dtype | None) -> Tensor:
        key = (device, integer, getattr(tensor, "placements", None))
        if key not in self._cache:
            mask = local_shard_like(self._mask, tensor)
            self._cache = {key: ~mask if integer is None else mask.to(integer).neg_()}
        return self._cache[key]


def _version(tensor: Tensor) -> Version:
    """A value that changes whenever a tensor, or the part that this process holds, is written to."""
    # By a private name, though the notes on autograd explain it: torch shows this counter in no other way.
    return (tensor._version, local_shard(tensor)._version) if is_sharded(tensor) else tensor._version
