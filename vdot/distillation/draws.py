"""Randomness that depends on nothing but a key: (seed, step, purpose, sample).

No generator is carried from step to step. A resumed run, another number of ranks or another split of a batch into
micro batches therefore sees the same noise for the same sample, and there is no random state to save.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vdot.flow import shift_sigma
from vdot.sampling import Draw


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a digest of ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """The random numbers of one micro batch in one update (``role``: of the generator or of the critic).

    Args:
        step: of training.
        numbers: of the samples in the whole run; each has its own noise.
        shape: of one sample's latent, ``(16, R + F, H, W)``.
    """

    def __init__(
        self, seed: int, step: int, role: str, numbers: Sequence[int], shape: Sequence[int], device: torch.device
    ) -> None:
        self.key = (seed, step, role)
        self.numbers, self.shape, self.device = tuple(numbers), tuple(shape), device

    def noise(self, purpose: str) -> Tensor:
        """Standard normal ``[B, 16, R + F, H, W]``, float32."""
        each = [torch.randn(self.shape, generator=self._generator(purpose, n)) for n in self.numbers]
        return torch.stack(each).to(self.device)

    def sequence(self, purpose: str) -> Draw:
        """For :func:`vdot.sampling.trajectory`: fresh noise at each call, always of this batch's shape."""
        generators = [self._generator(purpose, n) for n in self.numbers]

        def draw(shape: torch.Size) -> Tensor:
            assert shape == (len(generators), *self.shape)
            return torch.stack([torch.randn(self.shape, generator=g) for g in generators])

        return draw

    def sigma(self, purpose: str, shift: float, raw: Sequence[float], clamp: Sequence[float]) -> Tensor:
        """Noise levels ``[B]``: uniform in ``raw``, warped by ``shift``, clamped to ``clamp``."""
        uniform = torch.cat([torch.rand(1, generator=self._generator(purpose, n)) for n in self.numbers])
        low, high = raw
        return shift_sigma(low + (high - low) * uniform, shift).clamp(*clamp).to(self.device)

    def choice(self, purpose: str, count: int, among: int | str = "all") -> int:
        """One of ``range(count)``, equal on all ranks: sharded networks must run equally often everywhere."""
        return int(torch.randint(count, (), generator=keyed_generator(*self.key, purpose, among)))

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        return keyed_generator(*self.key, purpose, number)
