"""Every random number of tailorpo, drawn from streams addressed by a key.

    noise = Noise(seed).normal(shape, "train", trajectory, "step", k, candidate)

A draw depends on the run's seed and its key alone: not on what was drawn before, not on the batch it is part of, not
on the device (numbers are drawn on the CPU and moved afterwards). Therefore the picture of trajectory 17 is the same
in a batch of 1 and of 8, a resumed run continues with the numbers the interrupted one would have drawn, and no state
of a random number generator has to be saved. torch's global generator is neither read nor seeded.

Left out: drawing on the accelerator. Latents are small (64 kB for SD 1.5); one copy, which nothing waits for
(`device.sent`), costs less than a result that depends on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Key = int | str


@dataclass(frozen=True)
class Noise:
    """The random numbers of one run.

    Args:
        seed: the run's seed, any integer.
    """

    seed: int

    def normal(self, shape: Sequence[int], *key: Key) -> Tensor:
        """Standard normal numbers of the given shape, float32, on the CPU."""
        return torch.randn(tuple(shape), generator=self._generator(key), dtype=torch.float32)

    def normals(self, shape: Sequence[int], keys: Sequence[Sequence[Key]], *suffix: Key) -> Tensor:
        """One independent draw per key, stacked: (len(keys), *shape). Row i depends on keys[i] and suffix alone."""
        return torch.stack([self.normal(shape, *key, *suffix) for key in keys])

    def permutation(self, n: int, *key: Key) -> list[int]:
        """The numbers 0..n-1 in random order."""
        return [int(i) for i in torch.randperm(n, generator=self._generator(key))]

    def integer(self, n: int, *key: Key) -> int:
        """A whole number drawn uniformly from 0..n-1."""
        return int(torch.randint(n, (1,), generator=self._generator(key)).item())

    def _generator(self, key: Sequence[Key]) -> torch.Generator:
        # repr keeps 1 and "1", and ("a", "b") and ("a, b",), apart; blake2b decorrelates neighbouring seeds and keys.
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
