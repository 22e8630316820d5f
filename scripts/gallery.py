"""One clip per task, the condition beside what a model makes of it: an animation, a contact sheet, and every video.

    python scripts/gallery.py                                                 models/vdot-tiny -> results/demo
    python scripts/gallery.py --ckpt_dir models/vace-tiny --out results/teacher
    python scripts/gallery.py --tasks r2v,depth,inpainting --seed 7

The inputs are scenes of the procedural world that training never shows, one after another from --seed on: nobody has
chosen among them. Per task gallery.gif shows the source (where a mask lets it change is framed in red), the references
and the result; gallery.png has a row of frames, source above result; <task>.mp4 is the result.
"""

import argparse
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from vdot.data.sprites import FPS, TASKS, TaskClip, draw_task
from vdot.data.sprites.look import framed_source, reference_cell
from vdot.data.sprites.scene import SHIPPED
from vdot.errors import InputError, VdotError
from vdot.pipeline import VdotPipeline
from vdot.video import contact_sheet, write_gif

MODEL = Path(__file__).parents[1] / "models" / "vdot-tiny"
GAP, HEAD = 4, 18  # pixels


def panel(made: TaskClip, frames: np.ndarray, side: int) -> np.ndarray:
    """Source, references and result side by side under the task's name, uint8 ``[T, H, W, 3]``."""
    references = np.broadcast_to(reference_cell(made), frames.shape) if made.references else None
    parts = [framed_source(made), references, frames]
    wide = 3 * (side + GAP)
    title = Image.new("RGB", (wide, HEAD), "white")
    ImageDraw.Draw(title).text((1, 2), made.task.replace("_", " "), "black", ImageFont.load_default(12))
    out = np.full((len(frames), HEAD + side + GAP, wide, 3), 255, np.uint8)
    out[:, :HEAD] = np.asarray(title)
    for column, part in enumerate(parts):
        if part is not None:
            left = column * (side + GAP)
            out[:, HEAD : HEAD + side, left : left + side] = [
                cv2.resize(frame, (side, side), interpolation=cv2.INTER_CUBIC) for frame in part
            ]
    return out


def tile(panels: list[np.ndarray], columns: int) -> np.ndarray:
    """Clips of one size ``[T, h, w, 3]`` as a grid, white where the last row ends."""
    blank = np.full_like(panels[0], 255)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return np.concatenate([np.concatenate([*row, *[blank] * (columns - len(row))], axis=2) for row in rows], axis=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", default=MODEL, help="the model (default: the embedded student)")
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="scene of the first task; each further task has the next")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--side", type=int, default=80, help="pixels of a clip in the animation")
    parser.add_argument("--device")
    args = parser.parse_args()
    try:
        make(args)
    except VdotError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def make(args: argparse.Namespace) -> None:
    """Everything in order; ``InputError`` for what is not a task."""
    names = args.tasks.split(",")
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise InputError(f"unknown task {unknown[0]!r}: use one of {', '.join(TASKS)}")
    started = time.perf_counter()
    pipeline = VdotPipeline.from_pretrained(args.ckpt_dir, device=args.device)
    panels, rows = [], []
    for i, task in enumerate(tqdm(names, unit="video")):
        made = draw_task(args.seed + i, task, "test", view=SHIPPED)
        result = pipeline(**made.request())
        result.save(args.out / f"{task}.mp4")
        panels.append(panel(made, result.frames, args.side))
        # The sheet's font has no Chinese.
        words = made.prompt if made.prompt.isascii() else "(a prompt in Chinese)"
        rows += [(f"{task}: {words}", framed_source(made)), ("result", result.frames)]
    write_gif(args.out / "gallery.gif", tile(panels, args.columns), FPS)
    contact_sheet(rows, args.out / "gallery.png", columns=9, cell_width=96)
    sys.stdout.write(f"{args.out / 'gallery.gif'}\n{args.out / 'gallery.png'}\n")
    sys.stdout.write(f"{len(names)} videos in {time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    sys.exit(main())
