"""The cast: one transformer in three roles, by weights of its own or by adapters over one base."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vdot.data.batch import Batch
from vdot.models.discriminator import Discriminator
from vdot.models.dit import Features
from vdot.models.vace import VaceDiT


@dataclass(frozen=True)
class Network:
    """A transformer in one role.

    ``role`` is a context in which ``dit`` has this role's weights: nothing for a network of its own, a switch of
    adapters where several share a base. Forwards enter it by themselves; a backward pass has to be wrapped, since
    recomputed activations must come from the same weights.
    """

    dit: VaceDiT
    role: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Velocity of ``x [B, 16, F, H, W]`` under the batch's prompts and contexts."""
        with self.role():
            return self.dit(x, t, batch.text, batch.context, lengths=batch.lengths)

    def guided(self, x: Tensor, t: Tensor, batch: Batch, negative: Tensor, scale: float) -> Tensor:
        """``v_neg + scale (v - v_neg)``; ``negative [L, C]`` is the negative prompt's embedding."""
        velocity = self(x, t, batch)
        if scale == 1.0:
            return velocity
        with self.role():
            text, lengths = negative.expand(len(batch), -1, -1), (len(negative),) * len(batch)
            against = self.dit(x, t, text, batch.context, lengths=lengths)
        return torch.lerp(against, velocity, scale)

    def features(self, x: Tensor, t: Tensor, batch: Batch, taps: Sequence[int]) -> Features:
        """What the discriminator judges: the tapped blocks' outputs, whole on every rank."""
        with self.role():
            _, features = self.dit(x, t, batch.text, batch.context, lengths=batch.lengths, taps=taps)
        return Features([self.dit.gather(tokens) for tokens in features.tokens], features.time)

    def backward(self, tensor: Tensor, gradient: Tensor | None = None) -> None:
        with self.role():
            tensor.backward(gradient)


@dataclass(frozen=True)
class Cast:
    """Everyone in a step. ``negative`` is the embedding that the teacher is guided away from, ``[L, C]``.

    ``average`` makes the gradient of an input equal on the ranks that share one video (identity without them).
    """

    generator: Network
    real: Network
    fake: Network
    negative: Tensor
    heads: Discriminator | None = None
    taps: tuple[int, ...] = ()
    average: Callable[[Tensor], Tensor] = field(default=lambda gradient: gradient)

    def logits(self, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """``[B]``: how real ``x`` looks to the discriminator on F's features."""
        assert isinstance(self.heads, nn.Module)
        return self.heads(*self.fake.features(x, t, batch, self.taps))
