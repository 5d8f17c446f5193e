"""Interleaved timing: A B A B ..., so that a machine whose speed drifts is fair to both."""

import os
import platform
import time
from collections.abc import Callable
from statistics import median

import torch


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every run of every candidate, run in turn."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], baseline: str) -> None:
    """A markdown table: minimum, median, and the median of the ratios to the baseline, pair by pair."""
    print(f"\n### {title}\n\n| | minimum (ms) | median (ms) | ratio to {baseline} |\n|---|---|---|---|")
    for name, runs in seconds.items():
        ratio = median(run / base for run, base in zip(runs, seconds[baseline], strict=True))
        print(f"| {name} | {1e3 * min(runs):.2f} | {1e3 * median(runs):.2f} | {ratio:.3f} |")


def machine() -> str:
    """One line about the machine and the versions."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{cpu}, {torch.get_num_threads()} threads, {gpu}, {versions}"
