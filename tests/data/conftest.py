"""Small tables with their clips, and what was logged."""

import csv
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY
from vdot.data.encoding import Encoder, load_encoder
from vdot.data.manifest import COLUMNS
from vdot.runtime import log
from vdot.video import write_image, write_video


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Messages of the package's logger, however other tests have set it up."""
    handler, level = _Lines(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler.lines
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return load_encoder(TINY, torch.device("cpu"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wide.mp4, real.mp4 (9 frames, 64x32), tall.mp4 (13 frames, 32x48), mask.mp4 (soft edges), toy.png, odd.png."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)

    def clip(name: str, frames: int, height: int, width: int) -> None:
        coarse = rng.integers(0, 256, (frames, height // 8, width // 8, 3), np.uint8)
        write_video(folder / name, coarse.repeat(8, axis=1).repeat(8, axis=2), 8)

    clip("wide.mp4", 9, 32, 64)
    clip("real.mp4", 9, 32, 64)
    clip("tall.mp4", 13, 48, 32)
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    write_video(folder / "mask.mp4", np.broadcast_to(ramp[None, None, :, None], (9, 32, 64, 3)).copy(), 8)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "toy.png")
    Image.fromarray(rng.integers(0, 256, (50, 10, 3), np.uint8)).save(folder / "odd.png")
    write_image(folder / "still.png", np.full((32, 64), 255, np.uint8))
    return folder


@pytest.fixture
def table(tmp_path: Path, clips: Path) -> Callable[..., str]:
    """``table([row, ...])`` writes a CSV whose paths start from the clips; a row is ``dict(task=..., src=...)``."""

    def write(rows: list[dict[str, str]], name: str = "table.csv") -> str:
        short = dict(zip(("task", "src", "mask", "refs", "prompt", "video"), COLUMNS, strict=True))
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for number, row in enumerate(rows):
                full = {"task_name": "any", "internvl_short": f"prompt {number}"}
                for key, value in row.items():
                    path = key in ("src", "mask", "video")
                    full[short[key]] = str(clips / value) if path else value
                    if key == "refs":
                        full[short[key]] = ",".join(str(clips / part) for part in value.split(","))
                writer.writerow(full)
        return str(tmp_path / name)

    return write


MIXED = [
    {"task": "depth", "src": "wide.mp4", "video": "real.mp4"},
    {"task": "depth", "src": "real.mp4", "video": "wide.mp4"},
    {"task": "inpaint", "src": "wide.mp4", "mask": "mask.mp4", "video": "real.mp4"},
    {"task": "inpaint", "src": "wide.mp4", "mask": "still.png", "refs": "toy.png,odd.png", "video": "real.mp4"},
    {"task": "r2v", "refs": "toy.png"},
    {"task": "tall", "src": "tall.mp4"},
]
