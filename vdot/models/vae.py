"""Video <-> latents: diffusers' AutoencoderKLWan, driven layer by layer so that memory is bounded and tiles are exact.

The network is causal in time: frame 1 makes one latent frame, every further 4 frames one more, and each convolution
remembers the last two frames it saw. We feed it a few latent frames at a time (more when frames are small) and keep
those memories here. Against the library's own loop this drops a quadratic concatenation and nothing else.

Tiles. Only the middle block looks at the whole frame, at 1/8 resolution, where it is cheap. Everything between it and
the pixels is convolution of known reach, so a tile that is cut with that reach as margin, trimmed as the reach
shrinks from stage to stage, is equal to the untiled result up to rounding: no blending, no seams.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm, WanUpsample
from torch import Tensor, nn

Tiled = bool | Literal["auto"]
Span = tuple[int, int]  # [start, stop) along one axis

AUTO_TILE_PIXELS = 720 * 1280  # "auto" tiles above this frame area
TILE = 48  # latent rows and columns per tile, margins excluded: 384 pixels
STEP_PIXELS = 480 * 832  # pixels of a batch per latent frame of a step: what sets the peak memory, at width WIDTH
WIDTH = 96  # channels of the published autoencoder at full resolution


class _Memory:
    """The causal memories of one run of layers: what the library's layers call ``feat_cache`` and ``feat_idx``."""

    def __init__(self, *layers: nn.Module) -> None:
        self.slots: list[Any] = [None] * sum(isinstance(m, nn.Conv3d) for layer in layers for m in layer.modules())
        self.index = [0]

    def rewind(self) -> None:
        self.index[0] = 0

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, feat_cache=self.slots, feat_idx=self.index)

    def conv(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A bare causal convolution (kernel 3 in time) preceded by the two frames it saw last."""
        past = self.slots[self.index[0]]
        seen = x if past is None else torch.cat([past, x[:, :, -2:]], dim=2)
        self.slots[self.index[0]] = seen[:, :, -2:].clone()
        self.index[0] += 1
        return layer(x, past)


def _clip(span: Span, margin: Span, size: int, align: int = 1) -> Span:
    """``span`` widened by ``margin`` (before, after), aligned outwards, inside ``[0, size)``."""
    start = (span[0] - margin[0]) // align * align
    stop = -(-(span[1] + margin[1]) // align) * align
    return max(0, start), min(size, stop)


def _crop(x: Tensor, have: tuple[Span, Span], want: tuple[Span, Span]) -> Tensor:
    """Cut ``want`` (rows, columns) out of ``x [..., h, w]``, which covers ``have``."""
    (y, _), (x0, _) = have
    return x[..., want[0][0] - y : want[0][1] - y, want[1][0] - x0 : want[1][1] - x0]


class _CausalConv3d(WanCausalConv3d):
    """The library's causal convolution, with rows and columns padded by the kernel; only time needs a copy.

    On a CPU float32 goes through oneDNN. PyTorch's own choice there is an unfold and a matrix product when one clip
    has few channels: two to three times the time for the whole autoencoder.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        host = _plain_cpu(x)
        if not (host or _on_gpu(x)):
            return super().forward(x, cache_x)
        columns, _, rows, _, past, _ = cast(tuple[int, ...], self._padding)  # past: of which the memory holds some
        if cache_x is not None and past > 0:
            x, past = torch.cat([cache_x, x], dim=2), past - cache_x.shape[2]
        if past:
            x = F.pad(x, (0, 0, 0, 0, past, 0))
        if not host:
            return F.conv3d(x, self.weight, self.bias, self.stride, (0, rows, columns))
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return torch.mkldnn_convolution(x, self.weight, self.bias, [0, rows, columns], self.stride, [1, 1, 1], 1)


class _RMSNorm(WanRMS_norm):
    """The library's norm over channels, in one pass where they lie innermost in memory (channels last).

    Sums of half precision are float32 inside, as in the library's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (_plain_cpu(x) or _on_gpu(x)):
            return super().forward(x)
        return F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.flatten(), 1e-12).movedim(-1, 1)


class _Upsample(WanUpsample):
    """Nearest neighbours are copies: no way through float32."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Upsample.forward(self, x) if _on_gpu(x) else super().forward(x)


def _plain_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _on_gpu(x: Tensor) -> bool:
    """Also where only shapes are, which stand for one."""
    return x.device.type in ("cuda", "meta")


FASTER: dict[type, type] = {WanCausalConv3d: _CausalConv3d, WanRMS_norm: _RMSNorm, WanUpsample: _Upsample}


class WanVAE(nn.Module):
    """``encode`` and ``decode`` between pixels in [-1, 1] and normalised latents.

    Inputs of any float type; the network computes in its own parameters' type, normalisation and results are float32.
    Gradients flow if they are enabled; a caller that needs none should disable them.
    """

    def __init__(self, model: AutoencoderKLWan) -> None:
        super().__init__()
        self.model = cast(Any, model)  # the library's modules carry no type hints
        for module in self.model.modules():  # same parameters, same names, same results
            module.__class__ = FASTER.get(type(module), type(module))
        config = self.model.config
        if config.is_residual or config.patch_size is not None or config.attn_scales:
            raise ValueError("WanVAE wraps the Wan2.1 autoencoder; this is the one of Wan2.2 or of another model.")
        self._decoder_margins = _decoder_margins(self.model.decoder)
        self._encoder_margins = _encoder_margins(self.model.encoder)
        self._constants: OrderedDict[tuple, Tensor] = OrderedDict()
        self.eval()

    # -- facts ---------------------------------------------------------------------------------------------------

    counts_for: str | None = None  # device type that a run on the meta device stands for

    stride = (4, 8, 8)  # frames, rows, columns per latent; the first frame has a latent of its own

    @property
    def latent_channels(self) -> int:
        return self.model.config.z_dim

    @property
    def device(self) -> torch.device:
        return self.model.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.quant_conv.weight.dtype

    def channels_last(self) -> "WanVAE":
        """Lay the convolutions' weights out channels last, in place; values and names do not change.

        Measured on a CPU with bfloat16 instructions: half the time in bfloat16; in float32 it saves reordering. On an
        H200 in bfloat16 it is a tenth of the time by itself, and the norms take one pass because of it.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
            elif isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Latent mean and standard deviation, float32 ``[1, z, 1, 1, 1]`` (never cast with the module)."""
        rows = torch.tensor([self.model.config.latents_mean, self.model.config.latents_std], device=self.device)
        mean, std = rows.view(2, 1, -1, 1, 1, 1)
        return mean, std

    # -- encode --------------------------------------------------------------------------------------------------

    def encode(self, video: Tensor, tiled: Tiled = "auto") -> Tensor:
        """``video [B, 3, 4k+1, H, W]`` in [-1, 1], H and W multiples of 8 -> latents float32 ``[B, z, k+1, H/8, W/8]``.

        The posterior mean, normalised per channel. ValueError names a wrong shape.
        """
        _check_video(video)
        parts = [self._encode(part.to(self.device, self.dtype), tiled) for part in self._slices(video, 1)]
        mean, std = self._statistics()
        return (torch.cat(parts).float() - mean) / std

    def encode_constant(self, value: float, frames: int, height: int, width: int) -> Tensor:
        """``encode`` of one clip whose every pixel is ``value`` -> ``[1, z, k+1, H/8, W/8]``, without encoding it.

        Away from the borders all convolutions see the same neighbourhood, so a canvas just large enough to hold both
        borders is encoded and its centre repeated; only the middle block runs at full size. Equal to ``encode`` up to
        rounding and kept per shape (weights are taken as frozen).
        """
        key = (float(value), frames, height, width, self.device, self.dtype)
        if key not in self._constants:
            self._constants[key] = self._encode_constant(float(value), frames, height, width)
            if len(self._constants) > 8:
                self._constants.popitem(last=False)
        self._constants.move_to_end(key)
        return self._constants[key].clone()

    @torch.no_grad()
    def _encode_constant(self, value: float, frames: int, height: int, width: int) -> Tensor:
        _check_clip(frames, height, width)
        before, after = (-(-m // 8) for m in self._encoder_margins[0])
        rows, columns = (_repeat_centre(size // 8, before, after) for size in (height, width))
        small_rows, small_columns = 8 * (int(rows[-1]) + 1), 8 * (int(columns[-1]) + 1)
        clip = torch.full((1, 3, 1, small_rows, small_columns), value, device=self.device, dtype=self.dtype)
        clip = clip.expand(-1, -1, frames, -1, -1)
        stem = torch.cat(list(self._encoder_stem(clip)), dim=2)
        stem = stem[..., rows.to(self.device)[:, None], columns.to(self.device)]
        mean, std = self._statistics()
        return (self._encoder_tail(stem).float() - mean) / std

    def _encode(self, x: Tensor, tiled: Tiled) -> Tensor:
        """``x [b, 3, T, H, W]`` -> un-normalised posterior mean ``[b, z, k+1, H/8, W/8]``."""
        height, width = x.shape[-2] // 8, x.shape[-1] // 8
        if not _use_tiles(tiled, height, width):
            return self._encoder_tail(torch.cat(list(self._encoder_stem(x)), dim=2))
        stem: Tensor | None = None
        for tile in _tiles(height, width):
            piece = torch.cat(list(self._encoder_stem(x, tile)), dim=2)
            if stem is None:
                stem = piece.new_empty(*piece.shape[:3], height, width)
            _crop(stem, ((0, height), (0, width)), tile).copy_(piece)
        assert stem is not None
        return self._encoder_tail(stem)

    def _encoder_stem(self, x: Tensor, tile: tuple[Span, Span] | None = None) -> Iterator[Tensor]:
        """Pixels to the middle block's input ``[b, C, n, h, w]``, a few latent frames per step; of one tile if given.

        ``tile`` is in latent rows and columns. Without one the crops below are the identity.
        """
        height, width = x.shape[-2:]
        tile = tile or ((0, height // 8), (0, width // 8))
        spans = []  # region needed at the input of each stage, in that stage's pixels
        for stage, margin in enumerate(self._encoder_margins):
            scale = 8 >> stage
            rows, columns = ((scale * s[0], scale * s[1]) for s in tile)
            sizes = height >> stage, width >> stage
            spans.append((_clip(rows, margin, sizes[0], scale), _clip(columns, margin, sizes[1], scale)))
        encoder = self.model.encoder
        memory = _Memory(encoder.conv_in, encoder.down_blocks)
        x = _crop(x, ((0, height), (0, width)), spans[0])
        for frames in _steps(x, first=1, unit=4, per_step=self._step_frames(x.shape[0], *x.shape[-2:])):
            memory.rewind()
            h, stage = memory.conv(encoder.conv_in, frames), 0
            for layer in encoder.down_blocks:
                h = memory.run(layer, h)
                if hasattr(layer, "resample"):
                    stage += 1
                    have = tuple((a // 2, a // 2 + n) for (a, _), n in zip(spans[stage - 1], h.shape[-2:], strict=True))
                    h = _crop(h, (have[0], have[1]), spans[stage])
            yield _crop(h, spans[-1], tile)

    def _encoder_tail(self, stem: Tensor) -> Tensor:
        """Middle block and head at full frame: ``[b, C, k+1, h, w]`` -> posterior mean ``[b, z, k+1, h, w]``."""
        encoder = self.model.encoder
        memory, out = _Memory(encoder.mid_block, encoder.conv_out), []
        step = self._step_frames(stem.shape[0], 8 * stem.shape[-2], 8 * stem.shape[-1])
        for h in _steps(stem, first=1, unit=1, per_step=step):
            memory.rewind()
            h = encoder.nonlinearity(encoder.norm_out(memory.run(encoder.mid_block, h)))
            out.append(self.model.quant_conv(memory.conv(encoder.conv_out, h)).chunk(2, dim=1)[0])
        return torch.cat(out, dim=2)

    # -- decode --------------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor, clamp: bool = True, tiled: Tiled = "auto") -> Tensor:
        """Latents ``[B, z, k+1, h, w]`` -> video float32 ``[B, 3, 4k+1, 8h, 8w]``, clamped to [-1, 1] on request."""
        self._check_latents(latents)
        batch, _, n, height, width = latents.shape
        video = torch.empty(batch, 3, 4 * n - 3, 8 * height, 8 * width, device=self.device)
        start = 0
        for part in self._slices(latents, 8):
            rows = video[start : start + part.shape[0]]
            start += part.shape[0]
            use_tiles = _use_tiles(tiled, height, width)
            middle: Iterable[Tensor] = self._decoder_head(part)
            if use_tiles:
                middle = list(middle)  # every tile reads it
            for tile in _tiles(height, width) if use_tiles else [None]:
                done = 0
                for pixels in self._decoder_tail(middle, height, width, tile):
                    place = rows[:, :, done : done + pixels.shape[2]]
                    done += pixels.shape[2]
                    _pixels(place, tile).copy_(pixels)
        return video.clamp_(-1, 1) if clamp else video

    def decode_stream(self, latents: Tensor, clamp: bool = True, tiled: Tiled = "auto") -> Iterator[Tensor]:
        """``decode`` a few frames at a time, in order: yields float32 ``[B, 3, n, 8h, 8w]``; nothing else is kept."""
        self._check_latents(latents)
        height, width = latents.shape[-2:]
        tiles = list(_tiles(height, width)) if _use_tiles(tiled, height, width) else [None]
        middle = _Shared(self._decoder_head(latents), len(tiles))
        tails = [self._decoder_tail(middle.reader(), height, width, tile) for tile in tiles]
        for pieces in zip(*tails, strict=True):
            frames = torch.empty(*pieces[0].shape[:3], 8 * height, 8 * width, device=self.device)
            for tile, piece in zip(tiles, pieces, strict=True):
                _pixels(frames, tile).copy_(piece)
            yield frames.clamp_(-1, 1) if clamp else frames

    def _decoder_head(self, latents: Tensor) -> Iterator[Tensor]:
        """Normalised latents to the middle block's output ``[b, C, n, h, w]`` at full frame, step by step."""
        mean, std = self._statistics()
        decoder = self.model.decoder
        memory = _Memory(decoder.conv_in, decoder.mid_block)
        step = self._step_frames(latents.shape[0], 8 * latents.shape[-2], 8 * latents.shape[-1])
        for z in _steps(latents, first=1, unit=1, per_step=step):
            memory.rewind()
            z = self.model.post_quant_conv((z.to(self.device).float() * std + mean).to(self.dtype))
            yield memory.run(decoder.mid_block, memory.conv(decoder.conv_in, z))

    def _decoder_tail(
        self, middle: Iterable[Tensor], height: int, width: int, tile: tuple[Span, Span] | None
    ) -> Iterator[Tensor]:
        """Middle block's output to pixels ``[b, 3, m, 8h, 8w]``, of one tile (in latent rows, columns) if given."""
        decoder = self.model.decoder
        memory = _Memory(decoder.up_blocks, decoder.conv_out)
        tile = tile or ((0, height), (0, width))
        full = (0, height), (0, width)
        for h in middle:
            memory.rewind()
            have, scale = full, 1
            for block, margin in zip(decoder.up_blocks, self._decoder_margins, strict=True):
                rows, columns = ((scale * s[0], scale * s[1]) for s in tile)
                want = _clip(rows, (margin,) * 2, scale * height), _clip(columns, (margin,) * 2, scale * width)
                h = memory.run(block, _crop(h, have, want))
                grow = 2 if block.upsamplers is not None else 1
                have = tuple((grow * a, grow * b) for a, b in want)  # type: ignore[assignment]
                scale *= grow
            h = memory.conv(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(h)))
            rows, columns = ((scale * s[0], scale * s[1]) for s in tile)
            yield _crop(h, have, (rows, columns))

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or 0 in latents.shape:
            want = f"[B, {self.latent_channels}, frames, rows, columns]"
            raise ValueError(f"Latents must be {want}, got {list(latents.shape)}.")

    def _step_frames(self, batch: int, height: int, width: int) -> int:
        """Latent frames per step: 1 at 480p and above, more for small frames, where calls cost more than arithmetic.

        Few on a CPU, whose cache they should fit. Two at 480p take 2% less time on an H200 and 1.5 GB more.
        """
        most = 2 if (self.counts_for or self.device.type) == "cpu" else 8
        return max(1, min(most, self._step_pixels // (batch * height * width)))

    @property
    def _step_pixels(self) -> int:
        """A narrow network takes more of them in the same memory."""
        return STEP_PIXELS * max(1, WIDTH // self.model.config.base_dim)

    def _slices(self, x: Tensor, scale: int) -> Iterator[Tensor]:
        """Split the batch so that one step stays within its pixels; ``scale`` is pixels per row of ``x``."""
        yield from x.split(max(1, self._step_pixels // (scale * scale * x.shape[-2] * x.shape[-1])))


class _Shared:
    """One iterator read by several readers in lockstep, each item kept until the last of them has taken it."""

    def __init__(self, source: Iterator[Tensor], readers: int) -> None:
        self.source, self.readers = source, readers
        self.item: Tensor | None = None
        self.taken = readers

    def reader(self) -> Iterator[Tensor]:
        while True:
            if self.taken == self.readers:
                self.item = next(self.source, None)
                self.taken = 0
            self.taken += 1
            if self.item is None:
                return
            yield self.item


def _check_video(video: Tensor) -> None:
    if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"Video must be [B, 3, frames, height, width], got {list(video.shape)}.")
    _check_clip(*video.shape[2:])


def _check_clip(frames: int, height: int, width: int) -> None:
    if frames % 4 != 1 or frames < 1:
        raise ValueError(f"The autoencoder takes 4k + 1 frames, got {frames}; the nearest are {_near(frames)}.")
    if height % 8 or width % 8 or not height or not width:
        raise ValueError(f"Frame height and width must be multiples of 8, got {height} x {width}.")


def _near(frames: int) -> str:
    k = max(0, (frames - 1) // 4)
    return f"{4 * k + 1} and {4 * k + 5}"


def _steps(x: Tensor, first: int, unit: int, per_step: int) -> Iterator[Tensor]:
    """Cut time into ``first`` frames, then ``unit * per_step`` at a time (the remainder last)."""
    yield x[:, :, :first]
    if x.shape[2] > first:
        yield from x[:, :, first:].split(unit * per_step, dim=2)


def _use_tiles(tiled: Tiled, height: int, width: int) -> bool:
    return 64 * height * width > AUTO_TILE_PIXELS if tiled == "auto" else bool(tiled)


def _tiles(height: int, width: int) -> Iterator[tuple[Span, Span]]:
    """Near-equal tiles of at most ``TILE`` latent rows and columns that cover ``height x width`` once."""

    def spans(size: int) -> list[Span]:
        n = math.ceil(size / TILE)
        return [(i * size // n, (i + 1) * size // n) for i in range(n)]

    for rows in spans(height):
        for columns in spans(width):
            yield rows, columns


def _pixels(video: Tensor, tile: tuple[Span, Span] | None) -> Tensor:
    """View of ``video [..., 8h, 8w]`` under a tile given in latent rows and columns."""
    if tile is None:
        return video
    (top, bottom), (left, right) = tile
    return video[..., 8 * top : 8 * bottom, 8 * left : 8 * right]


def _repeat_centre(size: int, before: int, after: int) -> Tensor:
    """Index that widens a canvas of ``before + 1 + after`` positions to ``size`` by repeating position ``before``."""
    index = torch.arange(size)
    return torch.where(index <= before, index, torch.clamp(index - max(0, size - 1 - before - after), min=before))


def _decoder_margins(decoder: Any) -> list[int]:
    """Pixels around a tile that each up block must see, in that block's input resolution."""
    need, margins = 1, []  # the last convolution reaches one pixel
    for block in reversed(decoder.up_blocks):
        if block.upsamplers is not None:
            need = math.ceil((need + 1) / 2)  # a 3x3 convolution after doubling
        need += 2 * len(block.resnets)
        margins.append(need)
    return margins[::-1]


def _encoder_margins(encoder: Any) -> list[Span]:
    """(before, after) pixels that each resolution must see, at the input of its first layer, largest frame first.

    A downsampling convolution pads behind only: output y reads rows 2y, 2y+1 and 2y+2.
    """
    before = after = 0
    margins: list[Span] = []
    for layer in reversed(encoder.down_blocks):
        if hasattr(layer, "resample"):
            margins.append((before, after))
            before, after = 2 * before, 2 * after + 1
        else:
            before, after = before + 2, after + 2
    margins.append((before + 1, after + 1))  # the first convolution
    return margins[::-1]
