"""Optical flow by RAFT, from torchvision (which needs a torch of its own build beside it)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vdot.errors import CheckpointError, MissingDependencyError, one_line
from vdot.runtime import pick_device

CELL = 8  # sides must be multiples of it
LEAST = 128  # and at least this
DEFAULT = "torchvision"  # the weights that come with it, fetched on first use


def flow(place: str) -> Callable[[np.ndarray], np.ndarray]:
    """``place``: a file of weights, a folder with one, or "torchvision" -> flow ``[T - 1, H, W, 2]`` of a clip."""
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f"flow by raft needs a torchvision that fits this torch ({one_line(error)[:120]}): "
            "run `pip install torchvision` on a machine with a GPU, or use --backend dis"
        ) from error
    try:
        model = raft_large(weights=Raft_Large_Weights.DEFAULT if place == DEFAULT else None, progress=False)
    except OSError as error:
        raise MissingDependencyError(
            f"RAFT's weights could not be fetched ({one_line(error)}): use raft:FILE"
        ) from error
    if place != DEFAULT:
        _load_weights(model, place)
    device = pick_device()
    model = model.eval().to(device)

    @torch.inference_mode()
    def estimate(frames: np.ndarray) -> np.ndarray:
        height, width = frames.shape[1:3]
        out = np.empty((len(frames) - 1, height, width, 2), np.float32)
        for t, field in enumerate(out):
            first, second = (_padded(frame).to(device) for frame in frames[t : t + 2])
            field[:] = model(first, second)[-1][0, :, :height, :width].permute(1, 2, 0).float().cpu().numpy()
        return out

    return estimate


def _padded(frame: np.ndarray) -> torch.Tensor:
    """uint8 ``[H, W, 3]`` -> float32 ``[1, 3, H', W']`` in [-1, 1], its last row and column repeated."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 127.5 - 1
    sides = [max(LEAST, -(-side // CELL) * CELL) - side for side in frame.shape[:2]]
    return F.pad(pixels, (0, sides[1], 0, sides[0]), mode="replicate")


def _load_weights(model: Any, place: str) -> None:
    files = (
        sorted(path for end in ("*.pth", "*.pt") for path in Path(place).glob(end))
        if Path(place).is_dir()
        else [Path(place)]
    )
    if len(files) != 1 or not files[0].is_file():
        raise CheckpointError(f"raft:{place} must be a file of weights, or a folder with one .pth")
    try:
        state = torch.load(files[0], map_location="cpu", weights_only=True)
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except Exception as error:
        raise CheckpointError(f"{files[0]} does not hold torchvision's RAFT: {one_line(error)[:200]}") from error
