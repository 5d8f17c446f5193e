"""The second of two processes cannot gather the weights; each of them writes how its training ended.

Not a test by itself: `test_fsdp_loss.py` starts it.
"""

import sys
from pathlib import Path

import torch

from lightning_graphon.pruning import sharding
from tests.distributed.fsdp_loss_script import Cut, adam, fit_cut, monitor
from tests.helpers.leaving import leave


def main(folder):
    gather, calls = sharding.full_tensor, []

    def failing(tensor):
        calls.append(tensor)
        if len(calls) > 8 and torch.distributed.get_rank() == 1:  # not at the first look
            raise torch.OutOfMemoryError("full")
        return gather(tensor)

    sharding.full_tensor = failing
    try:
        fit_cut(Cut(optimizer=adam), monitor(raise_errors=False))
        said = ""
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        said = str(error)
    (folder / f"rank{torch.distributed.get_rank()}.txt").write_text(said)
    leave(said != "")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
