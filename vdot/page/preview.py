"""A look at a video that is still being made: the clean estimate of each step, in colours, without the autoencoder.

Latents of these autoencoders are nearly linear in colour: ``[16]`` to RGB is fitted once by least squares, on pictures
of smooth random colours that the autoencoder encodes. A preview is then one small product, on any device, whatever is
offloaded.
"""

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vdot.flow import t_to_sigma, velocity_to_x0
from vdot.models.vace import VaceDiT
from vdot.pipeline import VdotPipeline

SIDE = 128  # pixels of the pictures that are fitted
PICTURES = 4
SHOWN = 320  # pixels, the longer side of a preview


def fit_colours(pipeline: VdotPipeline) -> Tensor:
    """``[17, 3]``: a latent and 1 -> RGB in [-1, 1], the best linear map for this autoencoder."""
    generator = torch.Generator("cpu").manual_seed(0)
    latents, colours = [], []
    with torch.no_grad(), pipeline.placement.use(pipeline.vae):
        for _ in range(PICTURES):
            coarse = torch.rand(1, 3, 5, 5, generator=generator) * 2 - 1
            picture = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=True).clamp(-1, 1)
            encoded = pipeline.vae.encode(picture[:, :, None].to(pipeline.device))  # [1, 16, 1, h, w]
            latents.append(encoded[0, :, 0].flatten(1).T.float().cpu())
            colours.append(F.avg_pool2d(picture, 8)[0].flatten(1).T)
    known = torch.cat(latents)
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    return torch.linalg.lstsq(known, torch.cat(colours)).solution


def paint(latents: Tensor, colours: Tensor) -> np.ndarray:
    """``[16, F, h, w]`` -> uint8 ``[F, h, w, 3]``."""
    x = latents.permute(1, 2, 3, 0).float().cpu()
    rgb = x @ colours[:-1] + colours[-1]
    return ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def animation(frames: np.ndarray, fps: float) -> bytes:
    """uint8 ``[F, h, w, 3]`` -> an animated WebP that plays in a loop, enlarged to a size one can look at."""
    from PIL import Image

    height, width = frames.shape[1:3]
    scale = SHOWN / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    out = io.BytesIO()
    pause = max(20, round(1000 / fps))
    pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], duration=pause, loop=0, quality=70)
    return out.getvalue()


class Estimate:
    """Listens to the network and keeps its latest clean estimate ``[1, 16, F, h, w]``, whatever the solver does."""

    def __init__(self, dit: VaceDiT) -> None:
        self.latents: Tensor | None = None
        dit.register_forward_hook(self._hear)

    def _hear(self, dit: Any, inputs: tuple[Any, ...], velocity: Tensor) -> None:
        x, t = inputs[:2]
        if self.latents is None:  # with guidance a step asks twice; the first time is about what is wanted
            self.latents = velocity_to_x0(x.float(), velocity.float(), t_to_sigma(t.float()))

    def take(self, references: int) -> Tensor | None:
        """The estimate of this step, without reference frames ``[16, F, h, w]``; the next one is listened for."""
        latents, self.latents = self.latents, None
        return None if latents is None else latents[0, :, references:]
