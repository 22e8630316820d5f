"""MediaPipe 0.10.21: pose, hands, face mesh, faces and people's outlines, all from models inside its wheel.

One person a picture. Pixels are RGB, as MediaPipe takes them.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vdot.annotate.salient import stands_out
from vdot.annotate.skeleton import Person, with_neck
from vdot.annotate.with_opencv import kind_of_word, surest

# MediaPipe's landmarks as the body's points without a neck: nose, right arm, left arm, right leg, left leg, eyes, ears.
BODY = (0, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)
# Vertices of the face mesh that lie where iBUG's 68 points do: jaw, brows, nose, eyes, mouth.
FACE = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389,
    71, 63, 105, 66, 107, 336, 296, 334, 293, 301,
    168, 197, 5, 4, 75, 97, 2, 326, 305,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip


def pose() -> Callable[[np.ndarray], list[list[Person]]]:
    """uint8 ``[T, H, W, 3]`` -> the person of each frame, followed from frame to frame."""
    return _people


def _people(frames: np.ndarray) -> list[list[Person]]:
    height, width = frames.shape[1:3]
    with _quiet(), _solutions().holistic.Holistic(model_complexity=1) as model:
        results = [model.process(np.ascontiguousarray(frame)) for frame in frames]
    return [_person(result, width, height) for result in results]


def _person(result: Any, width: int, height: int) -> list[Person]:
    if result.pose_landmarks is None:
        return []
    marks = result.pose_landmarks.landmark
    body = with_neck(_points([marks[i] for i in BODY], width, height))
    face = np.zeros((0, 3), np.float32)
    if result.face_landmarks is not None:
        face = _points([result.face_landmarks.landmark[i] for i in FACE], width, height, sure=True)
    found = (result.left_hand_landmarks, result.right_hand_landmarks)
    hands = tuple(_points(hand.landmark, width, height, sure=True) for hand in found if hand is not None)
    return [Person(body, face, hands)]


def _points(marks: Sequence[Any], width: int, height: int, sure: bool = False) -> np.ndarray:
    """``[n, 3]``; hands and faces have no confidence of their own."""
    return np.array([(m.x * width, m.y * height, 1.0 if sure else m.visibility) for m in marks], np.float32)


def faces() -> Callable[[np.ndarray], np.ndarray]:
    """uint8 ``[H, W, 3]`` -> boxes of faces, int ``[N, 4]``."""
    return _faces


def _faces(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    with _quiet(), _solutions().face_detection.FaceDetection(model_selection=1) as model:
        found = model.process(np.ascontiguousarray(image)).detections or []
    boxes = []
    for detection in found:
        box = detection.location_data.relative_bounding_box
        boxes.append((box.xmin, box.ymin, box.xmin + box.width, box.ymin + box.height))
    return np.clip(np.rint(np.array(boxes).reshape(-1, 4) * ([width, height] * 2)), 0, [width, height] * 2).astype(int)


def people() -> Callable[[np.ndarray, str, Any], np.ndarray]:
    """uint8 ``[H, W, 3]`` and the word person -> bool ``[H, W]``: where people are."""
    return _outline


def _outline(image: np.ndarray, text: str, tools: Any) -> np.ndarray:
    if kind_of_word(text, "mediapipe") == "face":
        return surest(image, tools("face")(image), tools)
    return _people_mask(image)


def _people_mask(image: np.ndarray) -> np.ndarray:
    with _quiet(), _solutions().selfie_segmentation.SelfieSegmentation(model_selection=0) as model:
        return model.process(np.ascontiguousarray(image)).segmentation_mask > 0.5


def salient() -> Callable[[np.ndarray], np.ndarray]:
    """uint8 ``[H, W, 3]`` -> bool ``[H, W]``: the person, where one has a face to be seen; else what stands out."""

    def find(image: np.ndarray) -> np.ndarray:
        mask = _people_mask(image) if len(_faces(image)) else np.zeros(image.shape[:2], bool)
        return mask if mask.any() else stands_out(image)

    return find


def _solutions() -> Any:
    os.environ.setdefault("GLOG_minloglevel", "2")
    import mediapipe

    return mediapipe.solutions


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MediaPipe's C++ side writes to stderr past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
