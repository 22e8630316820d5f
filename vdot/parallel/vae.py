"""The autoencoder shared by several ranks: each has a tile of the frame and a clip, and borders are exchanged.

Exact. Before every convolution a rank is sent the few rows and columns around its tile that the layer reaches, so
nothing is computed twice but a border of two pixels, whatever the number of ranks; the middle block's attention,
which sees whole frames, is preceded by an exchange of whole frames at 1/8 resolution. Time runs as on one rank, step
by step with the causal memories, so the result differs in rounding alone. (Cutting tiles with the reach of the whole
network as margin, as one rank does for large frames, would cost 45% more work for four tiles of 480p.)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vdot.models.vae import Span, WanVAE, _clip, _crop, _Memory, _steps
from vdot.parallel.mesh import Group

Rect = tuple[Span, Span]  # rows and columns
EVERYTHING = 1 << 30  # a reach that no frame exceeds


@dataclass(frozen=True)
class Layer:
    """One step of the network as a rank runs it on its tile."""

    run: Callable[[_Memory, Tensor], Tensor]
    reach: Span  # pixels before and after its place that an output reads, in input pixels
    zoom: tuple[int, int] = (1, 1)  # output pixels = input pixels * zoom[0] / zoom[1]


@dataclass(frozen=True)
class Share:
    """Who does what: per rank the clip and the tile, in latent rows and columns. A rank without work has no tile."""

    clips: tuple[int, ...]
    tiles: tuple[Rect | None, ...]

    def partners(self, rank: int) -> list[int]:
        return [i for i, clip in enumerate(self.clips) if clip == self.clips[rank] and self.tiles[i] is not None]


def share_out(clips: int, ranks: int, height: int, width: int) -> Share:
    """``clips`` of ``height x width`` latents among ``ranks``: whole clips first (no borders between them), then tiles.

    Without an even share all clips stay together as one batch, which is called clip 0.
    """
    together = clips == 1 or ranks % clips != 0
    per_clip = ranks if together else ranks // clips
    tiles = _grid(per_clip, height, width)
    return Share(
        tuple(rank // per_clip for rank in range(ranks)), tuple(tiles[rank % per_clip] for rank in range(ranks))
    )


def _grid(count: int, height: int, width: int) -> list[Rect | None]:
    """``count`` near-equal tiles with the shortest borders; fewer, and the rest ``None``, in a frame of few latents."""
    for n in range(count, 0, -1):
        fits = [(r, n // r) for r in range(1, n + 1) if n % r == 0 and r <= height and n // r <= width]
        if fits:
            rows, columns = min(
                fits, key=lambda g: (-(-height // g[0]) * -(-width // g[1]), g[0] * width + g[1] * height)
            )
            tiles: list[Rect | None] = [(a, b) for a in _spans(height, rows) for b in _spans(width, columns)]
            return tiles + [None] * (count - n)
    raise ValueError(f"cannot share out {height} x {width} latents")


def _spans(size: int, count: int) -> list[Span]:
    stops = list(accumulate(Group(count).split(size)))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _scaled(tile: Rect, scale: int) -> Rect:
    (top, bottom), (left, right) = tile
    return (scale * top, scale * bottom), (scale * left, scale * right)


def _common(a: Rect, b: Rect) -> Rect | None:
    rows, columns = ((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return (rows, columns) if rows[0] < rows[1] and columns[0] < columns[1] else None


def _area(rect: Rect | None) -> int:
    return 0 if rect is None else (rect[0][1] - rect[0][0]) * (rect[1][1] - rect[1][0])


class SharedVAE:
    """``encode_clips`` and ``decode`` of one :class:`WanVAE` that every rank of ``group`` holds; all call alike."""

    def __init__(self, vae: WanVAE, group: Group) -> None:
        self.vae, self.group = vae, group

    # -- encode --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_clips(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Clips ``[3, T, H, W]`` in [-1, 1], equal on all ranks -> latents ``[z, F, H/8, W/8]`` float32 on all ranks.

        A clip of one value everywhere is encoded by one rank, from the cache of constants.
        """
        values = [_constant(clip) for clip in clips]
        found: dict[int, Tensor] = {}
        lengths = {clip.shape[1] for clip, value in zip(clips, values, strict=True) if value is None}
        for length in sorted(lengths, reverse=True):
            alike = [i for i, clip in enumerate(clips) if values[i] is None and clip.shape[1] == length]
            found |= dict(zip(alike, self._encode([clips[i] for i in alike]), strict=True))
        constants: dict[tuple[float, torch.Size], Tensor] = {}
        for i, value in enumerate(values):
            if value is not None:
                key = value, clips[i].shape
                if key not in constants:
                    constants[key] = self._encode_constant(*key, owner=-1 - len(constants) % self.group.size)
                found[i] = constants[key]
        return [found[i] for i in range(len(clips))]

    def _encode_constant(self, value: float, size: torch.Size, owner: int) -> Tensor:
        """By rank ``owner`` alone, counted from the last (the first embeds the prompt meanwhile), then to all."""
        owner %= self.group.size
        shape = (self.vae.latent_channels, (size[1] + 3) // 4, size[2] // 8, size[3] // 8)
        mine = torch.empty(0, device=self.vae.device)
        if self.group.rank == owner:
            mine = self.vae.encode_constant(value, *size[1:])[0].flatten()
        sizes = [math.prod(shape) if i == owner else 0 for i in range(self.group.size)]
        return self.group.exchange([mine] * self.group.size, sizes)[owner].view(shape)

    def _encode(self, clips: list[Tensor]) -> list[Tensor]:
        """Clips of one shape, shared out; the latents of all on every rank."""
        frames, height, width = clips[0].shape[1:]
        share = share_out(len(clips), self.group.size, height // 8, width // 8)
        groups = max(share.clips) + 1
        mine = [clips[share.clips[self.group.rank]]] if groups > 1 else clips
        video = torch.stack([clip.to(self.vae.device, self.vae.dtype) for clip in mine])
        per_step = self._per_step(share, len(mine))
        out = list(self._run(_encoder(self.vae), _steps(video, 1, 4, per_step), share, 8, len(mine)))
        tile = torch.cat(out, dim=2).float() if out else video.new_empty(0, dtype=torch.float32)
        mean, std = self.vae._statistics()
        shape = (len(mine), self.vae.latent_channels, (frames + 3) // 4, height // 8, width // 8)
        whole = self._assemble(tile, share, 1, shape)
        return [(latents - mean[0]) / std[0] for clip in whole for latents in clip]

    # -- decode --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latents: Tensor, convert: Callable[[Tensor], Tensor], owner: int = 0) -> Tensor | None:
        """Latents ``[1, z, k+1, h, w]``, equal on all ranks -> the video on rank ``owner``, None on the others.

        ``convert`` turns a piece ``[1, 3, n, h, w]``, clamped to [-1, 1], into what is kept and sent (uint8, say).
        Result: ``[1, 3, 4k+1, 8h, 8w]`` of its type.
        """
        height, width = latents.shape[-2:]
        share = share_out(1, self.group.size, height, width)
        mean, std = self.vae._statistics()
        z = (latents.to(self.vae.device).float() * std + mean).to(self.vae.dtype)
        steps = _steps(z, 1, 1, self._per_step(share, 1))
        pieces = [convert(piece.float().clamp_(-1, 1)) for piece in self._run(_decoder(self.vae), steps, share, 1, 1)]
        tile = torch.cat(pieces, dim=2) if pieces else convert(z.new_empty(1, 3, 0, 0, 0).float()).flatten()
        shape = (1, 3, 4 * latents.shape[2] - 3, 8 * height, 8 * width)
        whole = self._assemble(tile, share, 8, shape, owner)
        return whole[0] if whole else None

    # -- the common walk -----------------------------------------------------------------------------------------

    def _per_step(self, share: Share, batch: int) -> int:
        """Latent frames per step: as one rank would take for a frame of the largest tile's size, alike on all ranks."""
        tiles = [tile for tile in share.tiles if tile is not None]
        height = max(rows[1] - rows[0] for rows, _ in tiles)
        width = max(columns[1] - columns[0] for _, columns in tiles)
        return self.vae._step_frames(batch, 8 * height, 8 * width)

    def _run(
        self, layers: list[Layer], steps: Iterator[Tensor], share: Share, scale: int, batch: int
    ) -> Iterator[Tensor]:
        """Lead whole frames (pixels: ``scale`` 8, latents: 1) through ``layers``; -> this rank's tile of the output."""
        memory, tile = _Memory(self.vae.model), share.tiles[self.group.rank]
        for x in steps:
            memory.rewind()
            size = x.shape[-2], x.shape[-1]
            have: tuple[Rect | None, ...] = (((0, size[0]), (0, size[1])),) * self.group.size
            whole, at = True, scale
            for layer in layers:
                want = tuple(None if t is None else _reached(_scaled(t, at), layer, size) for t in share.tiles)
                x = self._widen(x, have, want, share, whole)
                if tile is not None:
                    x = layer.run(memory, x)
                grow, shrink = layer.zoom
                at, size = at * grow // shrink, (size[0] * grow // shrink, size[1] * grow // shrink)
                have, whole = tuple(None if t is None else _scaled(t, at) for t in share.tiles), False
                region = want[self.group.rank]
                if tile is not None and region is not None:
                    corner = tuple((a * grow // shrink, b * grow // shrink) for a, b in region)
                    x = _crop(x, (corner[0], corner[1]), _scaled(tile, at))
            if tile is not None:
                yield x

    def _widen(
        self, x: Tensor, have: tuple[Rect | None, ...], want: tuple[Rect | None, ...], share: Share, whole: bool
    ) -> Tensor:
        """``x`` covers ``have[me]``; -> the region ``want[me]``, its borders sent by the ranks that have them."""
        me = self.group.rank
        mine, region = have[me], want[me]
        if whole:  # every rank holds everything
            return x if region is None or mine is None else _crop(x, mine, region)
        if want == have:
            return x
        partners = share.partners(me)
        nothing = x.new_empty(0)
        parts, sizes, places = [nothing] * self.group.size, [0] * self.group.size, {}
        lead = tuple(x.shape[:-2])
        for other in partners:
            if other == me or mine is None or region is None:
                continue
            asked, given = _common(mine, _must(want[other])), _common(_must(have[other]), region)
            if asked is not None:
                parts[other] = _crop(x, mine, asked).reshape(-1)
            if given is not None:
                sizes[other], places[other] = math.prod(lead) * _area(given), given
        received = self.group.exchange(parts, sizes)
        if mine is None or region is None:
            return x
        out = x.new_empty(*lead, region[0][1] - region[0][0], region[1][1] - region[1][0])
        _crop(out, region, mine).copy_(x)
        for other, place in places.items():
            view = _crop(out, region, place)
            view.copy_(received[other].view(view.shape))
        return out

    def _assemble(
        self, tile: Tensor, share: Share, scale: int, shape: tuple[int, ...], owner: int | None = None
    ) -> list[Tensor]:
        """Put the ranks' tiles together: per clip a tensor of ``shape``, on all ranks or only on ``owner``."""
        group = self.group
        rects = [None if t is None else _scaled(t, scale) for t in share.tiles]
        wanted = owner is None or owner == group.rank
        lead = math.prod(shape[:3])
        nothing = tile.new_empty(0)
        flat = tile.reshape(-1)
        parts = [flat if owner is None or owner == other else nothing for other in range(group.size)]
        received = group.exchange(parts, [lead * _area(rect) if wanted else 0 for rect in rects])
        if not wanted:
            return []
        out = [tile.new_empty(shape) for _ in range(max(share.clips) + 1)]
        full = (0, shape[3]), (0, shape[4])
        for clip, rect, piece in zip(share.clips, rects, received, strict=True):
            if rect is not None:
                place = _crop(out[clip], full, rect)
                place.copy_(piece.view(place.shape))
        return out


def _must(rect: Rect | None) -> Rect:
    assert rect is not None
    return rect


def _reached(tile: Rect, layer: Layer, size: tuple[int, int]) -> Rect:
    """The input pixels that a layer reads for ``tile``, inside the frame; ``size`` is the frame's."""
    rows, columns = (_clip(span, layer.reach, n, layer.zoom[1]) for span, n in zip(tile, size, strict=True))
    return rows, columns


def _constant(clip: Tensor) -> float | None:
    value = clip.flatten()[0]
    return value.item() if bool((clip == value).all()) else None


def _block(block: Any) -> Iterator[Layer]:
    """Residual blocks reach two pixels, attention the whole frame, resampling one."""

    def through(layer: Any) -> Callable[[_Memory, Tensor], Tensor]:
        return lambda memory, x: memory.run(layer, x)

    if hasattr(block, "attentions"):
        yield Layer(through(block.resnets[0]), (2, 2))
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            yield Layer(lambda _, x, attention=attention: attention(x), (EVERYTHING, EVERYTHING))  # type: ignore[misc]
            yield Layer(through(resnet), (2, 2))
    elif hasattr(block, "upsamplers"):
        yield from (Layer(through(resnet), (2, 2)) for resnet in block.resnets)
        if block.upsamplers is not None:
            yield Layer(through(block.upsamplers[0]), (1, 1), (2, 1))
    elif hasattr(block, "resample"):
        yield Layer(through(block), (0, 1), (1, 2))  # pads behind only: output y reads 2y, 2y + 1 and 2y + 2
    else:
        yield Layer(through(block), (2, 2))


def _encoder(vae: WanVAE) -> list[Layer]:
    """Pixels ``[B, 3, 4n, H, W]`` -> un-normalised posterior mean ``[B, z, n, H/8, W/8]``."""
    encoder = vae.model.encoder

    def head(memory: _Memory, x: Tensor) -> Tensor:
        x = memory.conv(encoder.conv_out, encoder.nonlinearity(encoder.norm_out(x)))
        return vae.model.quant_conv(x).chunk(2, dim=1)[0]

    layers = [Layer(lambda memory, x: memory.conv(encoder.conv_in, x), (1, 1))]
    for block in (*encoder.down_blocks, encoder.mid_block):
        layers += _block(block)
    return [*layers, Layer(head, (1, 1))]


def _decoder(vae: WanVAE) -> list[Layer]:
    """Un-normalised latents ``[B, z, n, h, w]`` -> pixels ``[B, 3, 4n, 8h, 8w]``."""
    decoder = vae.model.decoder

    def stem(memory: _Memory, z: Tensor) -> Tensor:
        return memory.conv(decoder.conv_in, vae.model.post_quant_conv(z))

    def head(memory: _Memory, x: Tensor) -> Tensor:
        return memory.conv(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)))

    layers = [Layer(stem, (1, 1))]
    for block in (decoder.mid_block, *decoder.up_blocks):
        layers += _block(block)
    return [*layers, Layer(head, (1, 1))]
