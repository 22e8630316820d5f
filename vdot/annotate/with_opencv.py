"""Faces and people by the detectors that OpenCV ships: Haar cascades and a histogram of gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vdot.errors import InputError, MissingDependencyError

SIDE = 640  # pixels of the long side at which people are looked for
WORDS = {
    **dict.fromkeys(("person", "people", "man", "woman", "human", "boy", "girl", "child"), "people"),
    "face": "face",
}


def faces() -> Callable[[np.ndarray], np.ndarray]:
    """uint8 ``[H, W, 3]`` -> boxes of faces seen from the front, int ``[N, 4]``."""
    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    name = Path(folder) / "haarcascade_frontalface_alt2.xml"
    if not hasattr(cv2, "CascadeClassifier") or not name.is_file():
        raise MissingDependencyError(
            "this OpenCV has no face detector: run `pip install 'opencv-python-headless>=4.10,<5'`"
        )
    cascade = cv2.CascadeClassifier(str(name))

    def find(image: np.ndarray) -> np.ndarray:
        grey = cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        least = max(20, min(image.shape[:2]) // 16)
        found = cascade.detectMultiScale(grey, 1.1, 4, minSize=(least, least))
        return _corners(found)

    return find


def people(image: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, 3]`` -> boxes of people who stand, int ``[N, 4]``, the surest first."""
    scale = SIDE / max(image.shape[:2])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    if small.shape[0] < 128 or small.shape[1] < 64:
        return np.zeros((0, 4), int)
    detector = cv2.HOGDescriptor()
    detector.setSVMDetector(np.asarray(cv2.HOGDescriptor.getDefaultPeopleDetector()))
    found, sure = detector.detectMultiScale(cv2.cvtColor(small, cv2.COLOR_RGB2BGR), winStride=(8, 8), scale=1.05)
    surest = np.argsort(-np.asarray(sure, float).ravel())
    boxes = _corners(np.asarray(found, float).reshape(-1, 4)[surest] / scale)
    return np.clip(boxes, 0, [image.shape[1], image.shape[0]] * 2)


def find() -> Callable[[np.ndarray, str, Any], np.ndarray]:
    """uint8 ``[H, W, 3]``, a word it knows and the tools -> bool ``[H, W]``: the surest one's outline."""
    return _find


def _find(image: np.ndarray, text: str, tools: Any) -> np.ndarray:
    kind = kind_of_word(text, "opencv")
    return surest(image, people(image) if kind == "people" else tools("face")(image), tools)


def kind_of_word(text: str, backend: str) -> str:
    """ "people" or "face". ``InputError`` for any other word."""
    kind = WORDS.get(text.strip().lower())
    if kind is None:
        raise InputError(
            f"{backend} finds only {', '.join(WORDS)} by name, not {text!r}: use --backend grounding_dino or clipseg, "
            "--mask or --bbox"
        )
    return kind


def surest(image: np.ndarray, boxes: np.ndarray, tools: Any) -> np.ndarray:
    """What fills the first box, bool ``[H, W]``; empty when there is none."""
    if not len(boxes):
        return np.zeros(image.shape[:2], bool)
    return tools("segment")(image, tuple(boxes[0].tolist()))


def _corners(found: Any) -> np.ndarray:
    """left, top, width, height -> left, top, right, bottom."""
    boxes = np.rint(np.asarray(found, float).reshape(-1, 4)).astype(int)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
