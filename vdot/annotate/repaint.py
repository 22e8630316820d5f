"""Which region of a clip, as VACE's modes name it: painted, boxed, salient or found by words; held still or tracked."""

from collections.abc import Callable

import numpy as np

from vdot.annotate.backends import Tools
from vdot.annotate.masks import augment, box_of, filled_box
from vdot.annotate.material import Material, check_box, check_mask
from vdot.errors import InputError

# What each mode needs of the material.
NEEDS: dict[str, str] = {
    "salient": "", "mask": "mask", "bbox": "bbox", "salientmasktrack": "", "salientbboxtrack": "",
    "masktrack": "mask", "bboxtrack": "bbox", "label": "label", "caption": "caption",
}  # fmt: skip
MODES = tuple(NEEDS)
KINDS = ("salient", "segment", "find", "track", "face")


def default_mode(material: Material) -> str:
    """The mode that fits what was given, where none was named."""
    if material.mask is not None:
        return "masktrack" if np.ndim(material.mask) == 2 else "mask"
    if material.bbox is not None:
        return "bboxtrack"
    if material.label is not None:
        return "label"
    return "caption" if material.caption is not None else "salientmasktrack"


def region(frames: np.ndarray, material: Material, mode: str, tools: Tools) -> np.ndarray:
    """Where ``frames`` show the thing, bool ``[T, H, W]``, before its mask is augmented.

    Raises:
        InputError: an unknown mode, or material that it lacks.
    """
    if mode not in NEEDS:
        raise InputError(f"unknown mode {mode!r}: use {', '.join(MODES)}")
    given = getattr(material, NEEDS[mode]) if NEEDS[mode] else ()
    if given is None or (NEEDS[mode] == "bbox" and not len(given)):
        raise InputError(f"mode {mode} needs --{NEEDS[mode]}")
    count, height, width = frames.shape[:3]
    if mode == "mask":
        mask = check_mask(material.mask, height, width, count)
        return np.broadcast_to(mask, frames.shape[:3]).copy()
    things = _FIRST[mode](frames[0], material, tools)
    if mode in ("salient", "bbox") or count == 1:
        return np.repeat(np.any(things, axis=0)[None], count, axis=0)
    return np.any([tools("track")(frames, thing) for thing in things], axis=0)


def augmented(masks: np.ndarray, material: Material, mode: str | None = None, ratio: float | None = None) -> np.ndarray:
    """``masks`` as the material's maskaug options want them, or as ``mode`` and ``ratio`` where it has none."""
    if material.maskaug_mode is None and material.maskaug_ratio is None:
        return augment(masks, mode, ratio)
    return augment(masks, material.maskaug_mode or "original_expand", material.maskaug_ratio)


def _salient(image: np.ndarray, material: Material, tools: Tools) -> list[np.ndarray]:
    return [tools("salient")(image)]


def _painted(image: np.ndarray, material: Material, tools: Tools) -> list[np.ndarray]:
    mask = np.asarray(material.mask)
    return [check_mask(mask if mask.ndim == 2 else mask[0], image.shape[0], image.shape[1])]


def _boxes(image: np.ndarray, material: Material, tools: Tools) -> list[np.ndarray]:
    return [filled_box(check_box(box, *image.shape[:2]), *image.shape[:2]) for box in material.bbox or ()]


def _in_boxes(image: np.ndarray, material: Material, tools: Tools) -> list[np.ndarray]:
    """What fills each box, and the box itself where nothing was found to."""
    boxes = [check_box(box, *image.shape[:2]) for box in material.bbox or ()]
    found = [tools("segment")(image, box) for box in boxes]
    return [f if f.any() else filled_box(box, *image.shape[:2]) for f, box in zip(found, boxes, strict=True)]


def _in_salient_box(image: np.ndarray, material: Material, tools: Tools) -> list[np.ndarray]:
    return [tools("segment")(image, box_of(tools("salient")(image)))]


def _named(image: np.ndarray, material: Material, tools: Tools) -> list[np.ndarray]:
    text = material.label or material.caption or ""
    found = tools("find")(image, text, tools)
    if not found.any():
        raise InputError(f"nothing like {text!r} was found in the first frame: use other words, --mask or --bbox")
    return [found]


# Of each mode the things in the first frame, a mask each.
_FIRST: dict[str, Callable[[np.ndarray, Material, Tools], list[np.ndarray]]] = {
    "salient": _salient,
    "bbox": _boxes,
    "salientmasktrack": _salient,
    "salientbboxtrack": _in_salient_box,
    "masktrack": _painted,
    "bboxtrack": _in_boxes,
    "label": _named,
    "caption": _named,
}
