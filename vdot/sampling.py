"""From noise to latents in a few steps: the schedule that travels with a checkpoint, and the solvers that follow it."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from vdot.errors import CheckpointError, ConfigError
from vdot.flow import NUM_TIMESTEPS, add_noise, shift_sigma, sigma_to_t, velocity_to_x0

SOLVERS = ("unipc", "dpm++", "euler", "renoise")
SCHEDULE_FILE = "schedule.json"

Velocity = Callable[[Tensor, Tensor], Tensor]  # (latents [B, 16, F, H, W], t [B]) -> velocity of that shape
Draw = Callable[[torch.Size], Tensor]  # shape -> fresh normal noise, float32 on the CPU


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class FewStepSchedule:
    """How a checkpoint wants to be sampled. The same object labels, noises and samples in training.

    ``unipc`` and ``dpm++`` are the multistep solvers of the original, with its noise levels and its truncated integer
    timesteps; ``euler`` is first order; ``renoise`` predicts x0 and adds fresh noise (what distillation trains).
    ``guide_scale`` is a real number: 1 costs one forward a step, anything else two. ``noise_levels``, one per step,
    are for ``renoise`` alone: the levels that its latents really have where the network is told others. The release
    trains with such a mismatch (:data:`RELEASE_NOISE_LEVELS`); it is here to be measured, not to be used.
    """

    steps: int = 4
    shift: float = 16.0
    solver: str = "unipc"
    guide_scale: float = 1.0
    noise_levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps <= NUM_TIMESTEPS:
            raise ConfigError(f"steps must be a whole number from 1 to {NUM_TIMESTEPS}, got {self.steps!r}")
        if not (_finite(self.shift) and self.shift > 0):
            raise ConfigError(f"shift must be a positive number, got {self.shift!r}")
        if not _finite(self.guide_scale):
            raise ConfigError(f"guide_scale must be a finite number, got {self.guide_scale!r}")
        if self.solver not in SOLVERS:
            raise ConfigError(f"unknown solver {self.solver!r}: choose one of {', '.join(SOLVERS)}")
        if self.noise_levels is not None:
            object.__setattr__(self, "noise_levels", tuple(self.noise_levels))
            if self.solver != "renoise" or len(self.noise_levels) != self.steps:
                raise ConfigError("noise_levels belong to the solver renoise and are as many as its steps")

    @property
    def guided(self) -> bool:
        return self.guide_scale != 1.0

    @property
    def evaluations(self) -> int:
        """Network forwards for one video."""
        return self.steps * (2 if self.guided else 1)

    def override(self, **values: Any) -> "FewStepSchedule":
        """A copy with every value that is not ``None`` replaced."""
        given = {k: v for k, v in values.items() if v is not None}
        if any(given.get(name, getattr(self, name)) != getattr(self, name) for name in ("steps", "shift", "solver")):
            given.setdefault("noise_levels", None)  # they belonged to the old ones
        return replace(self, **given)

    def _levels(self) -> Tensor:
        # The original's unipc starts at the float32 nearest to 0.999, its dpm++ and the distillation rollout at 1.
        first = torch.tensor(0.999 if self.solver == "unipc" else 1.0, dtype=torch.float32)
        return shift_sigma(torch.linspace(first.item(), 0, self.steps + 1, dtype=torch.float64), self.shift)

    def sigmas(self) -> Tensor:
        """Noise levels ``[steps + 1]`` float32, falling, the last one 0."""
        return self._levels().float()

    def added(self) -> list[float]:
        """Levels ``[steps + 1]`` at which ``renoise`` adds noise: ``sigmas`` unless ``noise_levels`` says otherwise."""
        return self.sigmas().tolist() if self.noise_levels is None else [*self.noise_levels, 0.0]

    def timesteps(self) -> Tensor:
        """What the network is told at each step, ``[steps]``: int64 for the original's solvers, else float32."""
        t = sigma_to_t(self._levels()[:-1])
        return t.long() if self.solver in ("unipc", "dpm++") else t.float()

    def save(self, folder: Path | str) -> None:
        Path(folder, SCHEDULE_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is ``None`` is left out."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "schedule") -> "FewStepSchedule":
        """Build from JSON. ``CheckpointError`` names an unknown key."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise CheckpointError(f"{where} has unknown keys {', '.join(unknown)}: is it from a newer version?")
        return cls(**values)


VDOT_SCHEDULE = FewStepSchedule()  # the published VDOT-14B
# Entries of the release's 1000-step shift-16 table at 999, 979, 941, 841, beside labels of shift 8.
RELEASE_NOISE_LEVELS = (0.9998748302459717, 0.9798307418823242, 0.9417270421981812, 0.8412160277366638)
VACE_SCHEDULE = FewStepSchedule(steps=50, shift=16.0, solver="unipc", guide_scale=5.0)  # the VACE teachers


def _multistep(schedule: FewStepSchedule) -> Any:
    """diffusers' solver at the original's noise levels; its own default levels differ by up to 2e-3."""
    kind = UniPCMultistepScheduler if schedule.solver == "unipc" else DPMSolverMultistepScheduler
    solver: Any = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=schedule.shift)
    solver.set_timesteps(schedule.steps)
    solver.sigmas, solver.timesteps = schedule.sigmas(), schedule.timesteps()
    solver.set_begin_index(0)  # count steps: equal truncated timesteps could not be told apart
    return solver


def sample(
    velocity: Velocity,
    noise: Tensor,
    schedule: FewStepSchedule,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Follow ``schedule`` from ``noise [1, 16, F, H, W]`` to clean latents of the same shape, float32.

    Args:
        velocity: the (guided) network.
        generator: CPU generator of ``renoise``'s fresh noise, the one that drew ``noise``.
        on_step: called after each step with its number (from 1) and the current latents.
    """
    x = noise.float()
    for step, latents in enumerate(trajectory(velocity, x, schedule, partial(_fresh, generator)), start=1):
        x = latents
        if on_step is not None:
            on_step(step, x)
    return x


def trajectory(velocity: Velocity, x: Tensor, schedule: FewStepSchedule, draw: Draw) -> Iterator[Tensor]:
    """The latents after each step, each computed when it is asked for: training stops before the last."""
    timesteps, sigmas, added = schedule.timesteps().to(x.device), schedule.sigmas(), schedule.added()
    solver = _multistep(schedule) if schedule.solver in ("unipc", "dpm++") else None
    for i in range(schedule.steps):
        v = velocity(x, timesteps[i : i + 1].expand(x.shape[0])).float()
        if solver is not None:
            x = solver.step(v, timesteps[i], x, return_dict=False)[0]
        elif schedule.solver == "euler":
            x = x + (sigmas[i + 1] - sigmas[i]).item() * v
        else:
            x = renoise(velocity_to_x0(x, v, sigmas[i].item()), added[i + 1], draw)
        yield x


def renoise(x0: Tensor, sigma: float, draw: Draw) -> Tensor:
    """Fresh noise at level ``sigma`` on a clean estimate; drawn on the CPU, so that every device sees the same."""
    return x0 if sigma == 0 else add_noise(x0, draw(x0.shape).to(x0.device), sigma)


def _fresh(generator: torch.Generator | None, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def draw_noise(shape: tuple[int, ...], seed: int) -> tuple[Tensor, torch.Generator]:
    """``randn(shape)`` of a seed, on the CPU, and the generator to go on with: equal on every device and rank."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32), generator
