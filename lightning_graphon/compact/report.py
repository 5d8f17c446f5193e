"""What became smaller, and what stays and why."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple


class Change(NamedTuple):
    """A number before and after."""

    before: int
    after: int

    @property
    def share(self) -> float:
        """What is left, in [0, 1]."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class LayerReport:
    """One weight.

    Attributes:
        name: Its parameter.
        inputs: Units that it reads.
        outputs: Units that it gives.
        idle: Number of outputs that nobody needs and that stay all the same.
        reasons: Why they stay, with their number, the most frequent first.
    """

    name: str
    inputs: Change
    outputs: Change
    idle: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class CompactReport:
    """What `compact` did.

    Attributes:
        macs: Multiply-accumulates of the example inputs.
        parameters: Numbers of parameters.
        layers: In the order of the forward pass.
        unread: Layers that the forward pass does not call, or that have no rule; they stay as they are.
        error: Largest difference of outputs, relative to the largest output.

    >>> layer = LayerReport("0.weight", Change(4, 4), Change(8, 3), 1, {"it is an output": 1})
    >>> print(CompactReport(Change(100, 25), Change(40, 12), [layer], [], 0.0))
    multiply-accumulates 100 -> 25 (25.0 %), parameters 40 -> 12 (30.0 %)
    0.weight: inputs 4 -> 4, outputs 8 -> 3; 1 not needed stays: it is an output
    """

    macs: Change
    parameters: Change
    layers: list[LayerReport]
    unread: list[str]
    error: float

    def __str__(self) -> str:
        head = (
            f"multiply-accumulates {self.macs.before} -> {self.macs.after} ({self.macs.share:.1%}), "
            f"parameters {self.parameters.before} -> {self.parameters.after} ({self.parameters.share:.1%})"
        ).replace("%)", " %)")
        lines = [head, *map(_line, self.layers)]
        return "\n".join(lines + [f"as they were: {', '.join(self.unread)}"] * bool(self.unread))


def _line(layer: LayerReport) -> str:
    text = (
        f"{layer.name}: inputs {layer.inputs.before} -> {layer.inputs.after}, "
        f"outputs {layer.outputs.before} -> {layer.outputs.after}"
    )
    if layer.idle:
        text += f"; {layer.idle} not needed stay{'s' * (layer.idle == 1)}: {'; '.join(layer.reasons)}"
    return text


def most_frequent(reasons: list[str]) -> dict[str, int]:
    """Reasons with their number."""
    return dict(Counter(reasons).most_common())
