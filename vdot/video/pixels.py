"""Pixels: resize and crop, letterbox, image files, masks, and the step between uint8 and the model's [-1,1]."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vdot.errors import InputError
from vdot.video.source import is_image, open_image, probe, read_frames

_CHUNK = 8  # frames resized or converted at a time: bounds memory, not results


def fit_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 ``[T,H,W,3]`` to cover ``height x width`` and crop the centre -> uint8 ``[T,height,width,3]``.

    Bicubic with antialias *on uint8*, as the original: its integer arithmetic differs from float by one grey level.
    """
    rows, cols = frames.shape[1:3]
    if (rows, cols) == (height, width):
        return frames
    scale = max(width / cols, height / rows)
    tall, wide = round(scale * rows), round(scale * cols)
    top, left = (tall - height) // 2, (wide - width) // 2
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for at in range(0, len(frames), _CHUNK):
        chunk = torch.from_numpy(np.ascontiguousarray(frames[at : at + _CHUNK])).permute(0, 3, 1, 2)
        scaled = F.interpolate(chunk, size=(tall, wide), mode="bicubic", antialias=True)
        out[at : at + _CHUNK] = scaled[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).numpy()
    return out


def to_model(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 ``[T,H,W,3]`` -> float32 ``[3,T,H,W]`` in [-1,1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(3, 0, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def from_model(video: Tensor) -> np.ndarray:
    """Float ``[3,T,H,W]`` in [-1,1] (clamped to it; NaN becomes black) -> uint8 ``[T,H,W,3]``."""
    out = np.empty((*video.shape[1:], 3), np.uint8)
    for at in range(0, video.shape[1], _CHUNK):
        chunk = video[:, at : at + _CHUNK].detach().float().nan_to_num(nan=-1.0).clamp(-1, 1)
        out[at : at + _CHUNK] = ((chunk + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    return out


# --- images ----------------------------------------------------------------------------------------------------------


def read_image(path: str | os.PathLike, *, alpha: str = "white") -> np.ndarray:
    """Any common image file -> uint8 RGB ``[H,W,3]``, upright by its EXIF orientation.

    16-bit is scaled to 8; transparent areas become white. ``alpha="drop"`` ignores transparency instead and shows the
    colours stored beneath it, as the original does.

    Raises:
        InputError: missing, a folder, empty, damaged or not an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = os.fspath(path)
    if os.path.isdir(name):
        raise InputError(f"{name} is a folder, not an image.")
    if not os.path.isfile(name):
        raise InputError(f"{name} does not exist.")
    try:
        with open_image(name) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image), alpha)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image file that can be read.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large an image: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises on damaged files
        raise InputError(f"{name} is a damaged image: {error}.") from error


def _rgb(image: Any, alpha: str) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(np.asarray(image))
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if transparent and alpha == "white":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"), np.uint8)


def _deep_grey(values: np.ndarray) -> np.ndarray:
    """One channel of 16 or 32 bits, or of floats in [0,1] -> uint8 ``[H,W,3]``."""
    values = np.nan_to_num(values.astype(np.float64))
    if values.max(initial=0) > 255:
        values = values / 257  # 65535 -> 255
    elif 0 < values.max(initial=0) <= 1:
        values = values * 255
    grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def letterbox(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 ``[H,W,3]`` scaled to fit, centred on a white canvas -> float32 ``[3,1,height,width]`` in [-1,1].

    Bilinear without antialias and with truncated sizes, as the original prepares reference images.
    """
    rows, cols = image.shape[:2]
    scale = min(height / rows, width / cols)
    tall, wide = max(int(rows * scale), 1), max(int(cols * scale), 1)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float().div(127.5).sub(1)
    if (tall, wide) != (rows, cols):
        pixels = F.interpolate(pixels, size=(tall, wide), mode="bilinear", align_corners=False)
    canvas = torch.ones(3, 1, height, width)
    top, left = (height - tall) // 2, (width - wide) // 2
    canvas[:, 0, top : top + tall, left : left + wide] = pixels[0]
    return canvas


# --- masks -----------------------------------------------------------------------------------------------------------


def read_mask(path: str | os.PathLike, frame_ids: Sequence[int], height: int, width: int) -> Tensor:
    """Mask video (its frames ``frame_ids``) or still picture (repeated) -> float32 ``[T,height,width]`` in [0,1].

    1 (white) generates, 0 (black) keeps. The mask takes the source's own resize and crop, and its first channel
    counts, as the original. Transparent areas of a picture count as white.

    Raises:
        InputError: as :func:`probe`, :func:`read_image`, :func:`read_frames`.
    """
    still = is_image(path)
    if still or probe(path).is_still:
        frame = read_image(path)[None] if still else read_frames(path, [0])
        frames = np.repeat(fit_frames(frame, height, width), len(frame_ids), axis=0)
    else:
        frames = read_frames(path, frame_ids, (height, width))
    return torch.from_numpy(np.ascontiguousarray(frames[..., 0])).float().div_(255)
