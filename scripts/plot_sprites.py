"""Draw docs/sprites.png: the procedural world as every task sees it.

    python scripts/plot_sprites.py

Per task: the source at three times (what a mask lets change is framed in red), a reference, and the true clip.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vdot.data.sprites import TASKS, TaskClip, draw_task
from vdot.data.sprites.look import framed_source, reference_cell
from vdot.data.sprites.scene import SHIPPED
from vdot.video import atomic_path

CELL, GAP, LABEL, HEAD = 64, 3, 122, 22


def row(made: TaskClip) -> np.ndarray:
    times = [1, len(made.video) // 2, len(made.video) - 2]
    if made.task in ("firstframe", "lastframe", "firstlastframe", "firstclip", "lastclip"):
        times[0], times[2] = 0, len(made.video) - 1
    elif made.src_mask is not None and made.control:
        times[0] = 0
    cells = [*framed_source(made)[times], reference_cell(made), *made.video[times]]
    return np.concatenate([np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for cell in cells], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/sprites.png"))
    parser.add_argument("--seed", type=int, default=100, help="of the first task; each further one takes the next")
    args = parser.parse_args()
    rows = [row(draw_task(args.seed + i, task, view=SHIPPED)) for i, task in enumerate(TASKS)]
    tall, wide = rows[0].shape[:2]
    lines = (len(rows) + 1) // 2
    block = LABEL + wide + 4 * GAP
    sheet = Image.new("RGB", (2 * block, HEAD + lines * tall), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    for i, (task, pictures) in enumerate(zip(TASKS, rows, strict=True)):
        left, top = i // lines * block, HEAD + i % lines * tall
        sheet.paste(Image.fromarray(pictures), (left + LABEL, top))
        words = task.replace("_", " ").replace("first last", "first + last").split(" ")
        text = "\n".join(words) if len(task) > 13 else task
        draw.multiline_text((left + 4, top + CELL // 2), text, "black", font, anchor="lm", spacing=2)
        if i % lines == 0:
            for column, title in ((0, "source"), (3, "reference"), (4, "truth")):
                draw.text((left + LABEL + column * (CELL + GAP), 6), title, (90, 90, 90), small)
    with atomic_path(args.out) as path:
        sheet.save(path, format="PNG", optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()
