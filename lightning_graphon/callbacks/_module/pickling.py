"""What a callback takes along when it is pickled or copied."""

from typing import Any

from lightning.pytorch.callbacks import Callback


def state_without_module(callback: Callback, *transient: str) -> dict[str, Any]:
    """The callback's attributes, the `transient` ones None, and nothing of the module.

    Lightning leaves bound methods of the module behind on every callback: `log` and `log_dict`.
    """
    state = {name: value for name, value in callback.__dict__.items() if name not in ("log", "log_dict")}
    return {**state, **dict.fromkeys(transient)}
