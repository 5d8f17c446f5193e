"""One thread and a fixed seed for every test of this folder, where tensors are tiny; memory of a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

# Not ru_maxrss: that of a new process begins with the peak of the one that started it, and pytest's is larger.
PEAK = """
import re
def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
"""


@pytest.fixture
def measured() -> Callable[..., list[float]]:
    """`measured(script, *arguments)` -> the numbers that it prints; `peak()` there is its memory's peak in bytes."""
    if sys.platform != "linux":
        pytest.skip("/proc is Linux's")

    def run(script: str, *arguments: str) -> list[float]:
        # Large blocks go back to the system when freed: what is measured is what is held, not holes in glibc's heap.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        command = [sys.executable, "-W", "ignore", "-c", PEAK + script, *arguments]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
        return [float(number) for number in printed.split()]

    return run


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
