"""Source video + mask + references -> the 96-channel VACE context (Jiang et al. 2025, section 3.2).

White in a mask generates, black keeps. The clip is split into what is kept ("inactive") and what changes
("reactive"), both encoded, and the mask itself is folded into 64 channels of one value per pixel of an 8x8 cell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

UNKNOWN_GREY = 127.5  # the value of "nothing is known here" in a source clip, out of 255: 0 in model range
MASK_CELL = 8  # the VAE's spatial stride: one context position sees an 8x8 cell of the mask
MASK_THRESHOLD = 0.5


class Encoder(Protocol):
    """What is needed of the VAE."""

    def encode(self, video: Tensor) -> Tensor: ...

    def encode_constant(self, value: float, frames: int, height: int, width: int) -> Tensor: ...


@dataclass(frozen=True)
class Condition:
    """Pixels that steer a generation, all of one size. H and W are multiples of 16 and T is 4n + 1.

    ``source [3, T, H, W]`` in [-1, 1] or None (nothing is known), ``mask [T, H, W]`` in [0, 1] or None (all of the
    source may change), ``references``: each ``[3, 1, H, W]`` in [-1, 1], letterboxed on white.
    """

    frames: int
    height: int
    width: int
    source: Tensor | None = None
    mask: Tensor | None = None
    references: Sequence[Tensor] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.height % 16 or self.width % 16 or self.frames % 4 != 1:
            raise ValueError(f"need H, W in multiples of 16 and T = 4n + 1: {self.frames}x{self.height}x{self.width}")
        clip = (self.frames, self.height, self.width)
        if self.mask is not None and (self.source is None or tuple(self.mask.shape) != clip):
            raise ValueError(f"a mask needs a source video of the same T, H, W = {clip}")
        if self.source is not None and tuple(self.source.shape) != (3, *clip):
            raise ValueError(f"source is {tuple(self.source.shape)}, expected {(3, *clip)}")
        for reference in self.references:
            if tuple(reference.shape) != (3, 1, self.height, self.width):
                raise ValueError(f"reference is {tuple(reference.shape)}, expected {(3, 1, *clip[1:])}")

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape of the noise: references are leading latent frames."""
        return (16, len(self.references) + self.latent_frames, self.height // 8, self.width // 8)


def mask_latents(mask: Tensor) -> Tensor:
    """``mask [T, H, W]`` in [0, 1], not thresholded -> ``[64, n, H/8, W/8]`` with ``n = (T + 3) // 4``.

    Channel 8i + j holds pixel (i, j) of each cell; time takes frame ``floor((k + 1/2) T / n)``, as the original does.
    """
    frames = mask.shape[0]
    n = (frames + 3) // 4
    picked = torch.stack([mask[int((k + 0.5) * frames / n)] for k in range(n)])  # a list of indices would be copied
    return rearrange(picked, "t (y i) (x j) -> (i j) t y x", i=MASK_CELL, j=MASK_CELL)


def _encode(vae: Encoder, video: Tensor) -> Tensor:
    """``[3, T, H, W]`` -> ``[16, F, h, w]``; a clip of one grey everywhere comes from the cache of constants."""
    value = video.flatten()[0]
    if bool((video == value).all()):
        return vae.encode_constant(value.item(), *video.shape[1:])[0].float()
    return vae.encode(video[None])[0].float()


def split_clips(condition: Condition, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Clips ``[3, T, H, W]`` that the VAE is given: inactive, reactive and the references; the mask ``[T, H, W]``.

    ``device``: where the clips of a condition without a source are made; those of others stay where the source is.
    """
    clip = (condition.frames, condition.height, condition.width)
    if condition.source is not None:
        device = condition.source.device
    nothing = torch.zeros(3, *clip, device=device)
    if condition.source is None:
        inactive, reactive, mask = nothing, nothing, torch.ones(clip, device=device)
    elif condition.mask is None:
        inactive, reactive, mask = nothing, condition.source, torch.ones(clip, device=device)
    else:
        mask = condition.mask
        changes = (mask > MASK_THRESHOLD).float()
        inactive, reactive = condition.source * (1 - changes), condition.source * changes
    return [inactive, reactive, *condition.references], mask


def encode_context(
    vae: Encoder,
    condition: Condition,
    device: torch.device | str = "cpu",
    encode_clips: Callable[[Sequence[Tensor]], list[Tensor]] | None = None,
) -> Tensor:
    """The VACE context ``[1, 96, R + F, H/8, W/8]``, float32: 16 inactive, 16 reactive and 64 mask channels.

    ``encode_clips`` encodes several clips ``[3, T, H, W]`` to ``[16, F, h, w]`` in place of ``vae``, one by one: that
    is how ranks share the work.
    """
    parts, mask = split_clips(condition)
    clips = (clip.to(device) for clip in parts)
    encoded = [_encode(vae, clip) for clip in clips] if encode_clips is None else encode_clips(list(clips))
    return join_latents(encoded, mask.to(device))[None]


def join_latents(encoded: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Latents of the clips of :func:`split_clips`, and its mask -> the context ``[96, R + F, H/8, W/8]``."""
    latents, lead = torch.cat(list(encoded[:2])), encoded[2:]
    context = torch.cat([latents, mask_latents(mask)])
    if not lead:
        return context
    # A reference has no reactive part, and its mask is 0: keep.
    leading = torch.cat([torch.cat([r, r.new_zeros(80, *r.shape[1:])]) for r in lead], dim=1)
    return torch.cat([leading, context], dim=1)


def feather(mask: np.ndarray, radius: float) -> np.ndarray:
    """Opacity of the generated pixels: 0 wherever the mask keeps, rising to 1 within ``radius`` pixels inside it.

    ``mask [T, H, W]`` in [0, 1] -> float32 of that shape. In a region thinner than the radius the ramp is shortened to
    half the region's depth, so that thin strokes do not vanish.
    """
    alpha = np.zeros(mask.shape, np.float32)
    for frame, out in zip(mask > MASK_THRESHOLD, alpha, strict=True):
        if frame.all():
            out[:] = 1
        elif frame.any():
            changes = frame.astype(np.uint8)
            depth = cv2.distanceTransform(changes, cv2.DIST_L2, 3)
            count, labels = cv2.connectedComponents(changes)
            deepest = np.zeros(count, np.float32)
            np.maximum.at(deepest, labels.ravel(), depth.ravel())
            ramp = np.minimum(max(radius, 1e-3), np.maximum(deepest / 2, 1.0))
            out[:] = np.clip(depth / ramp[labels], 0, 1)
    return alpha


def keep_source(generated: np.ndarray, source: np.ndarray, mask: np.ndarray, radius: float) -> np.ndarray:
    """Put the source's own pixels back where the mask keeps: uint8 ``[T, H, W, 3]`` twice, mask ``[T, H, W]``.

    The seam is closed from the inside. The source there is unknown (often grey), so it is never mixed in; instead the
    difference between source and generated picture just outside the edge is carried in and fades over ``radius``.
    """
    out = source.copy()
    for i, alpha in enumerate(feather(mask, radius)):
        kept = mask[i] <= MASK_THRESHOLD
        if kept.all():
            continue
        picture = generated[i].astype(np.float32)
        if kept.any():
            picture += (1 - alpha)[..., None] * _edge_difference(source[i] - picture, kept, radius)
        out[i] = np.where(kept[..., None], source[i], np.rint(picture).clip(0, 255).astype(np.uint8))
    return out


def _edge_difference(difference: np.ndarray, kept: np.ndarray, radius: float) -> np.ndarray:
    """Average of ``difference [H, W, 3]`` over the kept pixels nearby: smooth, and defined across the edge."""
    sigma = max(radius / 2, 0.5)
    weight = cv2.GaussianBlur(kept.astype(np.float32), (0, 0), sigma)
    total = cv2.GaussianBlur(difference * kept[..., None].astype(np.float32), (0, 0), sigma)
    return total / np.maximum(weight, 1e-4)[..., None]


def hide(frames: np.ndarray, white: np.ndarray, filler: np.ndarray | None = None) -> np.ndarray:
    """uint8 ``frames [T, H, W, 3]`` with unknown grey, or ``filler`` of their shape, where bool ``white`` is true."""
    return np.where(white[..., None], np.uint8(UNKNOWN_GREY) if filler is None else filler, frames)


def as_mask(white: np.ndarray) -> np.ndarray:
    """Bool -> uint8: 255 generates, 0 keeps."""
    return np.where(white, 255, 0).astype(np.uint8)


def explain_mask(source: np.ndarray, mask: np.ndarray) -> list[str]:
    """What was understood of a mask, in sentences; ``source`` uint8 ``[T, H, W, 3]``, ``mask [T, H, W]`` in [0, 1] or
    uint8."""
    full = 255 if mask.dtype == np.uint8 else 1
    white = soft = grey = 0
    for picture, frame in zip(source, mask, strict=True):  # one by one: a clip may be long
        values = frame.astype(np.float32) / full
        changes = values > MASK_THRESHOLD
        white += int(changes.sum())
        soft += int(((values > 0.1) & (values < 0.9)).sum())
        grey += int((np.abs(picture[changes].astype(np.int16) - int(UNKNOWN_GREY)) <= 4).all(-1).sum())
    share = white / mask.size
    notes = [f"mask: white (generate) covers {share:.1%} of the clip, black (keep) {1 - share:.1%}"]
    if white == 0:
        notes.append("mask: it is black everywhere, so nothing would be generated; is it inverted?")
    if soft > 0.02 * mask.size:
        notes.append(f"mask: {soft / mask.size:.1%} of it is grey; above half counts as white")
    if white:
        free = grey > 0.9 * white
        inside = "is grey (unknown): it is made up freely" if free else "shows content: it steers what is generated"
        notes.append(f"mask: the source inside the white area {inside}")
    return notes
