"""What a run will take, counted before anything is allocated: work, memory and data."""

from functools import lru_cache

import torch

from vdot.distillation.steps import terms_of
from vdot.memory import count_stage
from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT
from vdot.training.config import TrainConfig

TEXT_ROWS = 96  # of a typical prompt after padding is dropped: what the count assumes


@lru_cache(maxsize=64)
def forward_flops(dit: DitConfig, latent: tuple[int, ...]) -> float:
    """Of one forward of one sample ``(16, R + F, H, W)``, by running the network on the meta device."""
    with torch.device("meta"):
        network = VaceDiT(dit)
        x = torch.empty(1, *latent)
        context = torch.empty(1, dit.vace_in_dim, *latent[1:])
        text = torch.empty(1, dit.text_len, dit.text_dim)
        t = torch.zeros(1)
    rows = min(TEXT_ROWS, dit.text_len)
    return count_stage("transformer", network, lambda: network(x, t, text, context, lengths=[rows])).flops


class StepCost:
    """Floating-point operations of a training step, in forwards of the transformer.

    A backward pass costs two forwards (one, where only the input's gradient is wanted), recomputation one more.
    """

    def __init__(self, config: TrainConfig, dit: DitConfig) -> None:
        self.config, self.dit = config, dit

    @staticmethod
    def tokens(latent: tuple[int, ...]) -> int:
        return latent[1] * (latent[2] // 2) * (latent[3] // 2)

    def flops(self, step: int, latent: tuple[int, ...]) -> float:
        """Of one sample in training step ``step``."""
        return self.forwards(step) * forward_flops(self.dit, tuple(latent))

    def forwards(self, step: int) -> float:
        """Forwards of one sample, the mean over exit steps."""
        again = 0.0 if self.config.parallel.recompute == "none" else 1.0
        if self.config.objective == "flow":
            return 3 + again
        d = self.config.distill
        terms = terms_of(step, d)
        rollout = (d.schedule.steps + 1) / 2
        critic = rollout + 3 + again + (2 * (3 + again) if "gan" in terms else 0)
        if step % d.generator_every:
            return critic
        scores = (2 + (d.dmd.guidance != 1)) * (2 if d.draws == "separate" and {"dmd", "ot"} <= terms else 1)
        scores = scores if {"dmd", "ot"} & terms else 0
        adversarial = 3 + again if "gan" in terms else 0  # both halves, and the input's gradient
        return critic + rollout + 2 + again + scores + adversarial
