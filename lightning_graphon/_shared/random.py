"""Seeded generators that are independent of everybody else's."""

import hashlib

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose.

    Weights are often initialised right after `torch.manual_seed(seed)`. A generator with that very seed would repeat
    the numbers they were made from: random masks would keep the large weights. Here the purpose is mixed in.

    >>> draw = torch.rand(1, generator=generator(0, "masks"))
    >>> _ = torch.manual_seed(0)
    >>> bool(draw == torch.rand(1))
    False
    """
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
