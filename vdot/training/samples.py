"""What the student makes of the same few examples, with the same noise, as training goes on: a video and a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vdot.data.batch import Batch, collate
from vdot.data.dataset import Source
from vdot.distillation.draws import Draws
from vdot.distillation.networks import Network
from vdot.models.vae import WanVAE
from vdot.parallel.state import Ranks
from vdot.sampling import FewStepSchedule, sample
from vdot.video import contact_sheet, write_video


class Gallery:
    """One example per task, shared out among the data-parallel groups.

    Args:
        vae: turns latents into pixels, on any device.
        count: tasks at most, in the order in which the source has them.
    """

    def __init__(
        self, source: Source, vae: WanVAE, folder: Path, seed: int, fps: float, count: int, ranks: Ranks
    ) -> None:
        self.vae, self.folder, self.seed, self.fps, self.ranks = vae, folder, seed, fps, ranks
        tasks = list(source.tasks)
        self.rows = {task: tasks.index(task) for task in list(dict.fromkeys(tasks))[:count]}
        groups, names = ranks.mesh.videos, list(self.rows)
        rounds = -(-len(names) // groups.size)
        # Sharded networks must run equally often everywhere: a group without a task left repeats its first.
        mine = [
            names[i * groups.size + groups.rank] if i * groups.size + groups.rank < len(names) else names[0]
            for i in range(rounds)
        ]
        self.batches = {task: collate([source.load(self.rows[task])], [0]) for task in dict.fromkeys(mine)}
        self.mine = mine
        self._given: dict[str, list[np.ndarray]] = {}

    @torch.no_grad()
    def make(
        self, step: int, student: Network, schedule: FewStepSchedule, negative: Tensor, device: torch.device
    ) -> dict[str, Path]:
        """Write ``step_N/<task>.mp4`` and ``step_N.png``; returns the files by name, on all ranks. Collective.

        Side by side: what of the source is kept, what may change, the real clip where there is one, what was made.
        """
        folder = self.folder / f"step_{step:08d}"
        made: dict[str, np.ndarray] = {}
        for task in self.mine:
            latents = self._sample(self.batches[task].to(device), student, schedule, negative, device)
            if task not in made and self.ranks.leads:
                own = self._pixels(latents[:, :, self.batches[task].references :])
                made[task] = np.concatenate([*self._conditions(task), own], axis=2)
        with self.ranks.agree():
            for task, frames in made.items():
                write_video(folder / f"{task}.mp4", frames, self.fps)
        everyone = _gather(made, self.ranks)
        sheet = folder.with_suffix(".png")
        with self.ranks.agree():
            if self.ranks.rank == 0:
                rows = [(f"{task}, step {step}: kept | changed | real | made", everyone[task]) for task in self.rows]
                contact_sheet(rows, sheet, columns=4, cell_width=400)
        return {f"samples/{task}": folder / f"{task}.mp4" for task in self.rows} | {"samples/sheet": sheet}

    def _sample(
        self, batch: Batch, student: Network, schedule: FewStepSchedule, negative: Tensor, device: torch.device
    ) -> Tensor:
        draws = Draws(self.seed, 0, "gallery", batch.numbers, batch.shape.latent, device)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return student.guided(x, t, batch, negative, schedule.guide_scale)

        generator = torch.Generator("cpu").manual_seed(self.seed)
        return sample(velocity, draws.noise("start"), schedule, generator)

    def _pixels(self, latents: Tensor) -> np.ndarray:
        """``[1, 16, F, H, W]`` -> uint8 ``[T, 8H, 8W, 3]``."""
        video = self.vae.decode(latents.to(self.vae.device))[0]
        return ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()

    def _conditions(self, task: str) -> Sequence[np.ndarray]:
        """What the networks are given, as pixels: decoded once and kept."""
        if task not in self._given:
            batch = self.batches[task]
            own = batch.context[:, :, batch.references :]
            parts = [own[:, :16], own[:, 16:32]] + (
                [] if batch.real is None else [batch.real[:, :, batch.references :]]
            )
            self._given[task] = [self._pixels(part) for part in parts]
        return self._given[task]


def _gather(made: dict[str, np.ndarray], ranks: Ranks) -> dict[str, np.ndarray]:
    """Frames of all tasks, on all ranks."""
    if ranks.world == 1:
        return made
    everyone: list[dict[str, np.ndarray]] = [{} for _ in range(ranks.world)]
    dist.all_gather_object(everyone, made)
    return {task: frames for part in everyone for task, frames in part.items()}
