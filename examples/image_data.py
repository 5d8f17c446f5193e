"""What every example trains on, and the arguments that choose it."""

import argparse
from functools import cache
from pathlib import Path

from quickstart import load_data
from torch import Tensor


def add_data_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Which images, where they are kept, and where the example called `name` writes."""
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where torchvision keeps MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="results, figures and tables")


@cache
def images(data: str, root: Path) -> tuple[Tensor, Tensor]:
    """All images, one row each, and their labels."""
    inputs, labels = load_data(data, root)[0].tensors
    return inputs.flatten(1), labels
