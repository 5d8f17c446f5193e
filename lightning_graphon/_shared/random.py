"""Seeded generators that are independent of all others."""

import hashlib

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose, which is mixed into the seed.

    Weights are often initialised right after `torch.manual_seed(seed)`. A generator with the same seed would repeat
    the numbers that they were made from, and random masks would keep the large weights.

    >>> draw = torch.rand(1, generator=generator(0, "masks"))
    >>> _ = torch.manual_seed(0)
    >>> bool(draw == torch.rand(1))
    False
    """
    # Of the hash, as Python's own `hash` of a string differs from process to process.
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
