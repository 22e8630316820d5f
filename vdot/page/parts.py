"""Small steps between the page's components and what the rest of the room works with."""

import asyncio
import secrets
import threading
from typing import Any

import numpy as np

from vdot.errors import InputError, VdotError, one_line
from vdot.page.options import PageConfig
from vdot.page.orders import Form, parse_boxes
from vdot.page.results import Result, Session
from vdot.prompts import Extended, extend_prompt, find_writer
from vdot.runtime import log
from vdot.video import write_image

LOOK = 0.25  # seconds between two looks at what is being made


class Writers:
    """Language models that write prompts out, as the command line found them; one prompt at a time."""

    def __init__(self, config: PageConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._writers: dict[str, Any] = {}

    def extend(self, prompt: str, language: str) -> Extended:
        """``ConfigError`` where the page was started without a model, ``ServiceError`` where it gives no answer."""
        c = self.config
        hosted = "_ds" if c.use_prompt_extend.endswith("_ds") else ""
        mode = ("wan_zh" if language == "zh" else "wan_en") + hosted  # in the language of the page
        with self._lock:
            if mode not in self._writers:  # on the host: the device is the worker's
                self._writers[mode] = find_writer(mode, c.prompt_model, c.prompt_url, c.prompt_timeout, keep=True)
            return extend_prompt(prompt, mode, self._writers[mode])


async def until_set(event: threading.Event) -> None:
    """Wait without a thread: any number of visitors may."""
    while not event.is_set():
        await asyncio.sleep(LOOK)


def update(**values: Any) -> Any:
    import gradio as gr

    return gr.update(**values)


def number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{name} must be a number")
    return float(value)


def whole(value: Any, name: str) -> int | None:
    if value is None or value == "":
        return None
    value = number(value, name)
    if value != int(value):
        raise InputError(f"{name} must be a whole number, got {value:g}")
    return int(value)


def say(error: Exception, session: Session) -> str:
    """The sentence for the user. What is a bug of ours is logged in full."""
    if isinstance(error, VdotError):
        return clean(error, session)
    log.error("unexpected error", exc_info=error)
    return f"unexpected {type(error).__name__}; the page's log has the details"


def clean(error: Exception, session: Session) -> str:
    """The message with files under the names that the user knows, and no folder of ours."""
    message = one_line(error)
    for stored, name in session.names.items():
        message = message.replace(stored, name)
    return message.replace(f"{session.folder}/", "")


def picture_paths(value: Any) -> list[str]:
    """A gallery's pictures."""
    return [item[0] if isinstance(item, tuple | list) else item for item in value or ()]


def painted(canvas: Any, session: Session) -> str | None:
    """The strokes of the editor as a mask picture in the session's folder; None where nothing is painted."""
    layers = [np.asarray(layer) for layer in (canvas or {}).get("layers") or () if layer is not None]
    strokes = [layer[..., 3] > 0 for layer in layers if layer.ndim == 3 and layer.shape[-1] == 4]
    if not strokes or not any(stroke.any() for stroke in strokes):
        return None
    mask = np.logical_or.reduce(strokes)
    path = session.uploads / f"painted_{secrets.token_hex(4)}.png"
    write_image(path, np.where(mask, 255, 0).astype(np.uint8))
    return str(path)


def with_boxes(frame: np.ndarray, boxes: str) -> np.ndarray:
    import cv2

    out = frame.copy()
    height, width = out.shape[:2]
    try:
        for left, top, right, bottom in parse_boxes(boxes or "", height, width):
            cv2.rectangle(out, (round(left), round(top)), (round(right) - 1, round(bottom) - 1), (255, 45, 45), 2)
    except InputError:
        return out  # half-typed: said when it is used
    return out


def gallery_items(session: Session) -> list[tuple[str, str]]:
    """Newest first, each with the start of its prompt."""
    items = []
    for result in reversed(session.results):
        prompt = str(result.settings.get("prompt", ""))
        items.append((str(result.thumbnail), f"{prompt[:60]} · {result.facts['size']} · {result.facts['seed']}"))
    return items


def result_updates(result: Result) -> tuple[Any, ...]:
    """Of result, side, download, reuse, extend_this, settings, tabs."""
    side, video = result.side_by_side, str(result.video)
    usual = Form().settings()
    told = {key: value for key, value in result.settings.items() if key == "seed" or value != usual[key]}
    settings = {key: value for key, value in told.items() if key not in ("clip", "mask", "painted", "pictures")}
    return (
        video,
        update(value=None if side is None else str(side), visible=side is not None),
        update(value=video, interactive=True),
        update(interactive=True),
        update(interactive=True),
        update(value=settings | result.facts, visible=True),
        update(selected="result"),
    )
