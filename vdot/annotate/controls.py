"""Controls: a clip as depth, flow, grey, lines or pose."""

from collections.abc import Callable

import numpy as np

from vdot.annotate.backends import Tools
from vdot.annotate.flow import flow_picture
from vdot.annotate.material import check_frames
from vdot.errors import InputError

POSE_PARTS = ("body", "face", "hands", "dwpose")


def _depth(frames: np.ndarray, tools: Tools, mode: str | None) -> np.ndarray:
    estimate = tools("depth")
    from vdot.annotate.depth import depth_picture

    return depth_picture(frames, estimate)


def _flow(frames: np.ndarray, tools: Tools, mode: str | None) -> np.ndarray:
    return flow_picture(frames, tools("flow"))


def _gray(frames: np.ndarray, tools: Tools, mode: str | None) -> np.ndarray:
    return tools("gray")(frames)


def _scribble(frames: np.ndarray, tools: Tools, mode: str | None) -> np.ndarray:
    return tools("scribble")(frames)


def _pose(frames: np.ndarray, tools: Tools, mode: str | None) -> np.ndarray:
    parts = tuple(part.strip() for part in (mode or "body,face").split(","))
    wrong = [part for part in parts if part not in POSE_PARTS]
    if wrong:
        raise InputError(f"unknown mode {wrong[0]!r} of pose: use any of {','.join(POSE_PARTS)}")
    found = tools("pose")(frames)
    from vdot.annotate.skeleton import draw_people

    return draw_people(found, frames.shape[1], frames.shape[2], parts)


def _pose_body(frames: np.ndarray, tools: Tools, mode: str | None) -> np.ndarray:
    return _pose(frames, tools, "body")


_MAKERS: dict[str, tuple[str, Callable[[np.ndarray, Tools, str | None], np.ndarray]]] = {
    "depth": ("depth", _depth),
    "depthv2": ("depth", _depth),
    "flow": ("flow", _flow),
    "gray": ("gray", _gray),
    "scribble": ("scribble", _scribble),
    "pose": ("pose", _pose),
    "pose_body": ("pose", _pose_body),
}
CONTROLS = tuple(_MAKERS)


def kind_of(control: str) -> str:
    """The work that a control takes. ``InputError`` for an unknown one."""
    if control not in _MAKERS:
        raise InputError(f"unknown control {control!r}: use one of {', '.join(CONTROLS)}")
    return _MAKERS[control][0]


def make_control(kind: str, frames: np.ndarray, tools: Tools, mode: str | None = None) -> np.ndarray:
    """The control's picture of each frame, uint8 ``[T, H, W, 3]``."""
    kind_of(kind)
    return _MAKERS[kind][1](check_frames(frames), tools, mode)
