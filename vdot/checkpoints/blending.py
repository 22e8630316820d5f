"""The weights between two states of one training.

A network trained on for something new forgets some of the old. On the line between the weights of before and after,
much of both is often found, with nothing trained: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022.
"""

import torch

from vdot.errors import CheckpointError, ConfigError
from vdot.models.vace import VaceDiT


@torch.no_grad()
def blend(dit: VaceDiT, other: VaceDiT, share: float = 0.5) -> VaceDiT:
    """``dit`` with ``(1 - share)`` of its weights and ``share`` of those of ``other``, summed in float32, in place.

    Raises:
        ConfigError: ``share`` is not from 0 to 1.
        CheckpointError: they are not of one architecture.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of the other checkpoint is from 0 to 1, got {share}")
    mine, theirs = dict(dit.named_parameters()), dict(other.named_parameters())
    if dit.config != other.config or any(mine[name].shape != theirs[name].shape for name in mine):
        raise CheckpointError("only states of one training can be blended, and these two transformers differ in size")
    for name, weight in mine.items():
        weight.copy_((1 - share) * weight.float() + share * theirs[name].float())
    return dit
