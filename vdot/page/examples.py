"""An example for every preset, drawn by the procedural world when it is first asked for: nothing to download."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from vdot.data.sprites import draw_task
from vdot.data.sprites.scene import FPS, SHIPPED
from vdot.page.orders import Form
from vdot.page.presets import PRESETS
from vdot.video import write_image, write_video

SEED = 11
SIDE, FRAMES = 128, 17
# The world's task for a preset, and what of it is given: the clip itself, its first frame, or the prepared source.
TASKS = {
    "t2v": "t2v", "r2v": "r2v", "i2v": "firstframe", "depth": "depth", "pose": "pose", "flow": "flow",
    "scribble": "scribble", "gray": "gray", "layout": "layout", "inpaint": "inpainting", "outpaint": "t2v",
    "extend": "t2v", "swap": "swap_anything", "animate": "animate_anything", "move": "move_anything",
    "expand": "expand_anything", "character": "character_replacement", "tryon": "try_on",
}  # fmt: skip
WHOLE = ("inpaint", "outpaint", "extend")
PICTURE = ("i2v", "move", "expand")
BOXES = {"move": "10,40,40,70\n60,40,90,70"}


class Examples:
    """Files of examples in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._made: dict[str, Form] = {}

    def form(self, preset: str) -> Form:
        with self._lock:
            if preset not in self._made:
                self._made[preset] = self._make(preset)
            return self._made[preset]

    def _make(self, preset: str) -> Form:
        drawn = draw_task(SEED, TASKS[preset], width=SIDE, height=SIDE, frames=FRAMES, view=SHIPPED)
        folder, shows = self.folder / preset, PRESETS[preset].shows
        values: dict[str, Any] = {"preset": preset, "prompt": drawn.prompt, "boxes": BOXES.get(preset, "")}
        if "clip" in shows:
            whole = preset in WHOLE or drawn.src_video is None
            values |= {"clip": str(folder / "clip.mp4"), "ready": not whole}
            write_video(folder / "clip.mp4", drawn.video if drawn.src_video is None or whole else drawn.src_video, FPS)
        if "region" in shows and drawn.src_mask is not None:
            values |= {"mask": str(folder / "mask.mp4"), "region": "file"}
            write_video(folder / "mask.mp4", np.repeat(drawn.src_mask[..., None], 3, axis=-1), FPS)
        if "pictures" in shows:
            pictures = ([drawn.video[0]] if preset in PICTURE else []) + list(drawn.references)
            values["pictures"] = tuple(str(folder / f"picture_{i}.png") for i in range(len(pictures)))
            for path, picture in zip(values["pictures"], pictures, strict=True):
                write_image(path, picture)
        return Form(**values)
