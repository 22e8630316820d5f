"""Long clips: chunks that overlap, each extended from the final frames of the one before, colours held to the first.

Lengths are counted in groups: 4n + 1 frames are one frame and n groups of four, as the autoencoder sees them. A chunk
shares 4k + 1 frames with the one before, so that what is new in it are whole groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vdot.anchor import ColourAnchor
from vdot.conditioning import MASK_THRESHOLD, UNKNOWN_GREY, Condition, keep_source
from vdot.errors import InputError
from vdot.video import to_model

GROUP = 4
LEAST = GROUP + 1  # frames of the shortest chunk that can go on from another
SHARE = 0.2  # of a chunk that is known from the one before, where nothing else is asked
LISTED = 6  # chunks that are named one by one in the plan


@dataclass(frozen=True)
class Chunk:
    """One pass of a clip: ``frames`` from ``start`` on, the first ``known`` of which the chunk before has made."""

    start: int
    frames: int  # 4n + 1
    known: int = 0

    @property
    def first_new(self) -> int:
        return self.start + self.known

    @property
    def stop(self) -> int:
        return self.start + self.frames


def groups_of(frames: int) -> int:
    """Groups of four after the first frame that it takes to make ``frames``."""
    return -(-(frames - 1) // GROUP)


def chunk_length(frames: int) -> int:
    """The frames of a pass for a model that makes ``frames`` at a time: 4n + 1, and enough to go on from others."""
    return max(GROUP * groups_of(frames) + 1, LEAST)


def default_overlap(length: int) -> int:
    """About a fifth of a chunk, 4k + 1: 17 of 81 frames."""
    return GROUP * min(round(SHARE * length / GROUP), (length - 1) // GROUP - 1) + 1


def plan_chunks(frames: int, length: int, overlap: int | None = None) -> tuple[Chunk, ...]:
    """The passes that make ``frames`` frames, of at most ``length`` each; one where it fits.

    All chunks of a longer clip have ``length`` frames, and what is left over makes the overlaps longer, all about
    alike: the fewest chunks with ``overlap`` common frames or more. The last may end up to three frames late.

    Raises:
        InputError: ``length`` or ``overlap`` is not 4n + 1, or ``overlap`` leaves less than four new frames.
    """
    check_chunks(length, overlap)
    needed, most = groups_of(frames), groups_of(length)
    if needed <= most:
        return (Chunk(0, GROUP * needed + 1),)
    shared = groups_of(default_overlap(length) if overlap is None else overlap)
    left = needed - most
    count = -(-left // (most - shared))
    ends = [most + left * i // count for i in range(count + 1)]  # groups made after each chunk
    following = (
        Chunk(GROUP * (end - most), length, GROUP * (before - end + most) + 1) for before, end in pairwise(ends)
    )
    return (Chunk(0, length), *following)


def check_chunks(length: int, overlap: int | None) -> None:
    """``InputError`` for numbers that make no chunks."""
    if length < LEAST or length % GROUP != 1:
        raise InputError(f"chunk_frames must be 4n + 1 and at least {LEAST}, got {length}: use {chunk_length(length)}")
    if overlap is not None and (overlap < 1 or overlap > length - GROUP or overlap % GROUP != 1):
        near = min(max(GROUP * round((overlap - 1) / GROUP), 0), length - LEAST) + 1
        raise InputError(
            f"chunk_overlap must be 4n + 1, from 1 to {length - GROUP} of {length} frames, got {overlap}: use {near}"
        )


def describe_chunks(chunks: tuple[Chunk, ...], frames: int, anchored: bool = True) -> list[str]:
    """How many passes make the ``frames``, and where they overlap; nothing for one pass."""
    if len(chunks) == 1:
        return []
    spans = [f"{c.start} to {min(c.stop, frames) - 1}" for c in chunks]
    if len(spans) > LISTED:
        spans[LISTED - 2 : -1] = ["..."]
    shared = sorted({c.known for c in chunks[1:]})
    common = f"{shared[0]}" if len(shared) == 1 else f"{shared[0]} to {shared[-1]}"
    colours = "its colours held to the first chunk's" if anchored else "its colours left as they come"
    frames_word = "frame" if shared == [1] else "frames"
    return [
        f"chunks {len(chunks)} passes of {chunks[0].frames} frames: {', '.join(spans)}; each goes on from the last "
        f"{common} {frames_word} of the one before, {colours}"
    ]


def heaviest(condition: Condition, chunks: tuple[Chunk, ...]) -> Condition:
    """A condition that takes the memory of the largest pass: all but the first have a source and a mask."""
    if len(chunks) == 1:
        return condition
    c = condition
    nothing = torch.zeros(1).expand(c.frames, c.height, c.width)
    return Condition(c.frames, c.height, c.width, nothing.expand(3, *nothing.shape), nothing, c.references)


class Assembly:
    """A clip that comes to be chunk by chunk: gives each pass its condition and takes its frames.

    Pixels are kept as bytes; only the chunk at work is ever in floating point.

    Args:
        first: the condition of the first chunk, or of the only one.
        chunks: the passes, of which the last may make more than ``count`` frames.
        source, mask: of the whole clip, uint8 ``[T, H, W, 3]`` and ``[T, H, W]`` (255 generates), or None; the mask of
            a single pass is that of its condition.
        feather: pixels over which the seam to the source's kept part is closed, None leaves kept parts as generated.
        anchored: whether colours of later chunks are held to the first one's.
    """

    def __init__(
        self,
        first: Condition,
        chunks: tuple[Chunk, ...],
        count: int,
        source: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        feather: float | None = None,
        anchored: bool = True,
    ) -> None:
        self.first, self.chunks, self.count = first, chunks, count
        self.source, self.mask, self.feather = source, mask, feather
        self.frames = np.empty((0, first.height, first.width, 3), np.uint8)
        self.anchor = ColourAnchor() if anchored and len(chunks) > 1 else None

    def condition(self, chunk: Chunk, share: Callable[[np.ndarray], np.ndarray] = lambda known: known) -> Condition:
        """What the pass of ``chunk`` is given: known frames are source that the mask keeps.

        ``share`` gives every rank the array of the first, which alone holds the frames.
        """
        if not chunk.known:
            return self.first
        known = share(self.frames[chunk.start : chunk.first_new])
        first = self.first
        shape = (chunk.frames, first.height, first.width)
        source = torch.zeros(3, *shape) if self.source is None else to_model(self.source[chunk.start : chunk.stop])
        source[:, : chunk.known] = to_model(known)
        mask = self._mask(chunk)
        mask = torch.ones(shape) if mask is None else mask
        mask[: chunk.known] = 0
        return Condition(*shape, source, mask, first.references)

    def _mask(self, chunk: Chunk) -> Tensor | None:
        """The user's mask of a chunk, ``[T, H, W]`` in [0, 1]."""
        if self.mask is None:
            return None if len(self.chunks) > 1 or self.first.mask is None else self.first.mask
        return torch.from_numpy(self.mask[chunk.start : chunk.stop]).float().div_(255)

    def add(self, chunk: Chunk, decoded: np.ndarray) -> None:
        """Take the frames of a pass, uint8 ``[T, H, W, 3]``: colours held, kept pixels put back, overlap dropped."""
        if len(self.chunks) > 1 and not chunk.known:  # room for all of them, taken when the first ones are there
            self.frames = np.empty((self.count, *decoded.shape[1:]), np.uint8)
        mask, source = self._mask(chunk), None if self.source is None else self.source[chunk.start : chunk.stop]
        new = decoded[chunk.known : self.count - chunk.start]
        if self.anchor is not None and chunk.known:
            new = self.anchor.hold(decoded, *self._known(chunk, source, mask), chunk.known)[: len(new)]
        if self.feather is not None and mask is not None and source is not None:
            kept = slice(chunk.known, chunk.known + len(new))
            new = keep_source(new, source[kept], mask[kept].numpy(), self.feather)
        if self.anchor is not None and not chunk.known:
            self.anchor.learn(new)
        if len(self.chunks) == 1:
            self.frames = new
        else:
            self.frames[chunk.first_new : chunk.first_new + len(new)] = new

    def _known(self, chunk: Chunk, source: np.ndarray | None, mask: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        """What is known of a chunk's pixels, uint8 ``[T, H, W, 3]``, and where, bool ``[T, H, W]``."""
        shape = (chunk.frames, *self.frames.shape[1:])
        pixels = np.full(shape, int(UNKNOWN_GREY), np.uint8) if source is None else source.copy()
        pixels[: chunk.known] = self.frames[chunk.start : chunk.first_new]
        where = np.zeros(shape[:3], bool) if mask is None else mask.numpy() <= MASK_THRESHOLD
        where[: chunk.known] = True
        return pixels, where
