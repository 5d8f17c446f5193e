"""Seeded generators that are independent of all others, and random orders."""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose, which is mixed into the seed.

    Weights are often initialised right after `torch.manual_seed(seed)`. A generator with the same seed would repeat
    the numbers that they were made from, and random masks would keep the large weights.

    >>> draw = torch.rand(1, generator=generator(0, "masks"))
    >>> _ = torch.manual_seed(0)
    >>> bool(draw == torch.rand(1))
    False
    """
    return torch.Generator().manual_seed(seed_for(seed, purpose))


def seed_for(seed: int, purpose: str) -> int:
    """A seed into which a purpose is mixed, the same in every process."""
    # Of the hash, as Python's own `hash` of a string differs from process to process.
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class ShuffledPasses:
    """The numbers below a count without end, in a random order that is new in each pass.

    Args:
        count: How many numbers.
        rng: Draws the orders.

    >>> numbers = ShuffledPasses(3, torch.Generator().manual_seed(0))
    >>> sorted(torch.cat([numbers.take(2), numbers.take(1)]).tolist())
    [0, 1, 2]
    """

    def __init__(self, count: int, rng: torch.Generator) -> None:
        self._count, self._rng, self._order = count, rng, torch.empty(0, dtype=torch.long)

    def take(self, count: int) -> Tensor:
        """The next ones, [count] int64; they may end a pass and begin the next."""
        while len(self._order) < count:
            self._order = torch.cat([self._order, torch.randperm(self._count, generator=self._rng)])
        taken, self._order = self._order[:count], self._order[count:]
        return taken
