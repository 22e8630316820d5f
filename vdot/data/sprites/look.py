"""An example as pictures to look at."""

import cv2
import numpy as np

from vdot.data.sprites.tasks import TaskClip

MARK = (255, 48, 48)
NOTHING = 245  # light grey: there is no source


def framed_source(made: TaskClip) -> np.ndarray:
    """The source, the mask's white areas framed in red; light grey where there is none. uint8 ``[T, H, W, 3]``."""
    if made.src_video is None:
        return np.full_like(made.video, NOTHING)
    frames = made.src_video.copy()
    if made.src_mask is not None:
        for frame, mask in zip(frames, made.src_mask, strict=True):
            outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(frame, outlines, -1, MARK, 1)
    return frames


def reference_cell(made: TaskClip) -> np.ndarray:
    """The references in one picture of the clip's size, up to four of them at half size, on white."""
    height, width = made.video.shape[1:3]
    cell = np.full((height, width, 3), 255, np.uint8)
    if len(made.references) == 1:
        return made.references[0]
    for i, picture in enumerate(made.references[:4]):
        half = (height // 2, width // 2)
        top, left = i // 2 * half[0], i % 2 * half[1]
        cell[top : top + half[0], left : left + half[1]] = cv2.resize(picture, half[::-1], interpolation=cv2.INTER_AREA)
    return cell
