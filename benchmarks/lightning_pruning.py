"""Lightning's own ModelPruning beside PruneAtInit: a training step of a pruned 784-1024x4-10 MLP, and one pruning."""

import argparse
import logging
import time
from itertools import pairwise
from statistics import median

import lightning.pytorch as pl
import torch
from _timing import machine
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks import PruneAtInit

SIDES = (784, 1024, 1024, 1024, 1024, 10)
BATCH, STEPS = 256, 15  # an epoch


class Module(pl.LightningModule):
    """The network, trained so slowly that it stands still."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for a, b in pairwise(SIDES) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-12)

    def weights(self) -> list[tuple[nn.Module, str]]:
        return [(layer, "weight") for layer in self.net if isinstance(layer, nn.Linear)]


class Clock(Callback):
    """Seconds of each step of the second epoch, when both kinds of callbacks have pruned, and of the pruning itself."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.pruning = float("nan")
        self._start = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, index: int) -> None:
        now = time.perf_counter()
        if trainer.current_epoch == 1 and index > 1:
            self.seconds.append(now - self._start)
        self._start = now


class TimedModelPruning(ModelPruning):
    """Lightning's callback with a clock around the pruning: 90 % of all weights at the end of the first epoch."""

    def __init__(self, clock: Clock, module: Module) -> None:
        super().__init__(
            "l1_unstructured", parameters_to_prune=module.weights(), amount=0.9, use_global_unstructured=True,
            apply_pruning=lambda epoch: epoch == 0, use_lottery_ticket_hypothesis=False,
        )  # fmt: skip
        self.clock = clock

    def apply_pruning(self, amount: float) -> None:
        start = time.perf_counter()
        super().apply_pruning(amount)
        self.clock.pruning = time.perf_counter() - start


class TimedPruneAtInit(PruneAtInit):
    """This library's callback with a clock around fit start."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("magnitude", 0.9, min_density=0.01, verbose=False)
        self.clock = clock

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.perf_counter()
        super().on_fit_start(trainer, pl_module)
        self.clock.pruning = time.perf_counter() - start


def run(kind: str) -> Clock:
    """Two epochs with one kind of callback."""
    module, clock = Module(), Clock()
    made = {"dense": lambda: None, "ModelPruning": lambda: TimedModelPruning(clock, module)}
    pruner = made.get(kind, lambda: TimedPruneAtInit(clock))()
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[c for c in (pruner, clock) if c], accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.randn(BATCH * STEPS, 784), torch.randint(10, (BATCH * STEPS,)))
    trainer.fit(module, DataLoader(data, BATCH))
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(
        f"## A step of a Lightning Trainer, SGD, batch {BATCH}, 90 % pruned\n\n{machine()}, lightning {pl.__version__}"
    )
    kinds = ("dense", "ModelPruning", "PruneAtInit")
    clocks = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind in kinds:
            clocks[kind].append(run(kind))
    print("\n| | step, minimum (ms) | step, median (ms) | ratio to dense | one pruning (ms) |\n|---|---|---|---|---|")
    for kind in kinds:
        steps = [1e3 * median(clock.seconds) for clock in clocks[kind]]
        ratio = median(a / (1e3 * median(b.seconds)) for a, b in zip(steps, clocks["dense"], strict=True))
        least = 1e3 * min(min(clock.seconds) for clock in clocks[kind])
        pruning = 1e3 * min(clock.pruning for clock in clocks[kind])
        shown = f"{pruning:.0f}" if pruning == pruning else "–"
        print(f"| {kind} | {least:.1f} | {median(steps):.1f} | {ratio:.2f} | {shown} |")


if __name__ == "__main__":
    main()
