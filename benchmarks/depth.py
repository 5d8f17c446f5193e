"""Not time: how deep calls of this library are nested in a fit with `LossDecayMonitor`, and how many files they enter.

A whole fit of twenty steps under `sys.setprofile`; frames of other packages between them do not count.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_graphon
from lightning_graphon.callbacks import LossDecayMonitor

PACKAGE = Path(lightning_graphon.__file__).parent
INSIDE = f"{PACKAGE}{os.sep}"


class Module(pl.LightningModule):
    """An MLP of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class DepthProfile:
    """Keeps the deepest chain of calls and the files entered, of this library only."""

    def __init__(self) -> None:
        self.deepest: list[CodeType] = []
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and is_own(frame.f_code):
            chain = [code for code in callers(frame) if is_own(code)]
            self.files.add(frame.f_code.co_filename)
            self.deepest = max(self.deepest, chain[::-1], key=len)


def is_own(code: CodeType) -> bool:
    return code.co_filename.startswith(INSIDE)


def callers(frame: FrameType | None) -> Iterator[CodeType]:
    """The code of a frame, of its caller, and so on."""
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def label(code: CodeType) -> str:
    name = getattr(code, "co_qualname", code.co_name)  # qualified from Python 3.11 on
    return f"{Path(code.co_filename).relative_to(PACKAGE).as_posix()}:{name}"


def profile_fit() -> DepthProfile:
    """Twenty steps with the callback at its defaults and TensorBoard."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(320, 8), torch.randint(3, (320,)))
    profile = DepthProfile()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[LossDecayMonitor(verbose=False)], accelerator="cpu", devices=1,
            logger=TensorBoardLogger(folder), log_every_n_steps=5, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        sys.setprofile(profile)
        try:
            trainer.fit(Module(), DataLoader(data, 16, shuffle=True))
        finally:
            sys.setprofile(None)
    return profile


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*")
    profile = profile_fit()
    print("## Depth of a fit with LossDecayMonitor\n")
    print(f"{len(profile.deepest)} nested calls, {len(profile.files)} files entered. The deepest chain:\n")
    print("\n".join(f"- `{label(code)}`" for code in profile.deepest))


if __name__ == "__main__":
    main()
