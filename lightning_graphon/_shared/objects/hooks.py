"""Hooks on gradients, on optimizers, and on methods of objects that have none."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from torch.optim import Optimizer


class AfterCall:
    """Calls a function after each call of a method of one object, until it is removed.

    Args:
        owner: The object; its class and its other objects are not changed.
        name: Name of the method.
        function: Called without arguments.

    >>> class Counter:
    ...     def step(self):
    ...         print("step")
    >>> counter = Counter()
    >>> handle = AfterCall(counter, "step", lambda: print("after"))
    >>> counter.step()
    step
    after
    >>> handle.remove()
    >>> counter.step()
    step
    """

    def __init__(self, owner: Any, name: str, function: Callable[[], None]) -> None:
        method = getattr(owner, name)

        @wraps(method)
        def shadow(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if self._active:
                function()
            return result

        self._active, self._owner, self._name, self._shadow = True, owner, name, shadow
        self._before = vars(owner).get(name)
        setattr(owner, name, shadow)

    def remove(self) -> None:
        """Put back what was there, unless others have shadowed the method since."""
        self._active = False
        if vars(self._owner).get(self._name) is self._shadow:
            if self._before is None:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, self._before)


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks of torch are called; not by Lookahead and other wrappers that never call `Optimizer.__init__`."""
    # By private names, since torch has no others for what that call leaves on the class and on the optimizer.
    marked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return marked and hasattr(optimizer, "_optimizer_load_state_dict_post_hooks")


def hook_gradient(parameter: nn.Parameter, hook: Callable[[nn.Parameter], None]) -> Any:
    """Register a hook that waits for a frozen weight to thaw."""
    frozen = not parameter.requires_grad
    try:
        return parameter.requires_grad_(True).register_post_accumulate_grad_hook(hook)
    finally:
        parameter.requires_grad_(not frozen)
