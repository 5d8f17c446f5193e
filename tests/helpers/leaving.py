"""How a rank ends once it has found what it was asked for."""

import atexit
import multiprocessing
import os
import sys
import time

import torch
from lightning.pytorch.callbacks import Callback


def write_and_leave(found, folder):
    """Saves what this rank found to `rank{n}.pt`, complete from the moment it exists, and ends the process.

    Without the interpreter's own end: gloo's threads may still hold tensors of the last collective, and freeing those
    while Python shuts down aborts a process that has done all its work (pytorch/pytorch#179291).
    """
    path = folder / f"rank{torch.distributed.get_rank()}.pt"
    torch.save(found, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    leave(0)


def leave(code):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Unhurried(Callback):
    """Gives gloo's threads half a second before the interpreter of a spawned process ends, whose exit code counts."""

    def setup(self, trainer, pl_module, stage):
        if multiprocessing.parent_process() is not None:
            atexit.register(time.sleep, 0.5)
