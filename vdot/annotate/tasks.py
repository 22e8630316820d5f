"""VACE's tasks by name: which material each takes and what it makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from vdot.annotate import repaint, subject
from vdot.annotate.backends import Tools
from vdot.annotate.controls import CONTROLS, kind_of, make_control
from vdot.annotate.extend import EXPAND_NUM, check_ratio, extend, inner_margin, outpaint, parse_directions
from vdot.annotate.layout import FRAME, FRAMES, boxes_between, draw_boxes, draw_outlines
from vdot.annotate.material import FPS, Annotated, Material, check_frames, check_image
from vdot.conditioning import as_mask, hide
from vdot.errors import InputError
from vdot.video import fit_frames

Build = Callable[[Material, Tools, list[str]], Annotated]
FRAME_MODES = ("firstframe", "lastframe", "firstlastframe")
CLIP_MODES = ("firstclip", "lastclip", "firstlastclip")
REGION = ("mask", "bbox", "label", "caption", "maskaug_mode", "maskaug_ratio")
# Shape of the mask where nothing is said: an outline would tell the new person the old one's shape.
ROOM = {"character_replacement": ("bbox_expand", 0.2), "try_on": ("original_expand", 0.15)}
NO_CONTROL = "none"


@dataclass(frozen=True)
class Task:
    """``takes``: what of the material it uses, ``needs``: without which it cannot be done; ``kinds`` of work."""

    about: str
    build: Build
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()


# --- parts -----------------------------------------------------------------------------------------------------------


def _clip(material: Material) -> np.ndarray:
    """The clip, or one picture as a clip of one frame."""
    if material.video is not None:
        return check_frames(material.video)
    if len(material.images) == 1:
        return check_image(material.images[0])[None]
    raise InputError("give one --video (or one --image, which is a clip of one frame)")


def _images(material: Material, least: int, most: int | None = None) -> list[np.ndarray]:
    images = [check_image(image) for image in material.images]
    if len(images) < least or (most is not None and len(images) > most):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        raise InputError(f"{wanted} --image wanted, got {len(images)}")
    return images


def _fps(material: Material) -> float:
    return material.fps or FPS


def _unknown(material: Material, default: int = EXPAND_NUM) -> int:
    return default if material.expand_num is None else material.expand_num


def _mode(material: Material, modes: Sequence[str], default: str) -> str:
    mode = material.mode or default
    if mode not in modes:
        raise InputError(f"unknown mode {mode!r}: use {', '.join(modes)}")
    return mode


def _two_modes(material: Material, first: str) -> tuple[str, str]:
    """ "a,b" for the clip and for the references, which are about whatever stands out where nothing is said.

    Masks, boxes and words are about the clip.
    """
    a, comma, b = (material.mode or first).partition(",")
    if not comma:
        return a.strip(), "salient"
    if b.strip() not in ("plain", "salient", "face"):
        raise InputError(f"unknown mode {b.strip()!r} of the references beside a clip: use plain, salient or face")
    return a.strip(), b.strip()


def _repainted(
    frames: np.ndarray, masks: np.ndarray, notes: list[str], filler: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Source and mask of a region that is unknown, or shows ``filler``."""
    lost = int((~masks.any((1, 2))).sum())
    if lost:
        notes.append(
            f"the region is empty in {lost} of {len(masks)} frames: the thing was lost or has left the picture"
        )
    if masks.mean() > 0.9:
        notes.append("the mask covers nearly all of the picture: --maskaug_mode original_expand keeps more of it")
    return hide(frames, masks, filler), as_mask(masks)


# --- controls and extension ------------------------------------------------------------------------------------------


def _control(name: str) -> Build:
    def build(material: Material, tools: Tools, notes: list[str]) -> Annotated:
        frames = _clip(material)
        return Annotated(name, make_control(name, frames, tools, material.mode), fps=_fps(material))

    return build


def _plain(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    return Annotated("plain", _clip(material), fps=_fps(material))


def _layout_bbox(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    frames = None if material.video is None and not material.images else _clip(material)
    height, width = FRAME if frames is None else frames.shape[1:3]
    still = FRAMES if frames is None or material.video is None else len(frames)
    count = still if material.expand_num is None else material.expand_num
    boxes = boxes_between(material.bbox or (), _at_least_one(count), height, width)
    _say_black(material, notes)
    return Annotated("layout_bbox", draw_boxes(boxes, height, width), fps=_fps(material))


def _say_black(material: Material, notes: list[str]) -> None:
    if material.label:
        notes.append(f"the label {material.label!r} has no colour of its own here: the box is black")


def _at_least_one(count: int) -> int:
    if not 1 <= count <= 2**16:
        raise InputError(f"expand_num must be from 1 to {2**16}, got {count}")
    return count


def _layout_track(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    frames = _clip(material)
    masks = repaint.region(frames, material, material.mode or repaint.default_mode(material), tools)
    masks = repaint.augmented(masks, material)
    return Annotated("layout_track", draw_outlines(masks), fps=_fps(material))


def _frameref(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    """Pictures at the ends; of a clip, its own first or last frame, the rest of it unknown."""
    mode = _mode(material, FRAME_MODES, "firstframe")
    both = mode == "firstlastframe"
    if material.video is not None:
        clip = check_frames(material.video)
        if len(clip) <= (2 if both else 1):
            raise InputError(f"the video has {len(clip)} frame(s): nothing would be left to generate; use --image")
        ends, default = [clip[:1], clip[-1:]], len(clip) - (2 if both else 1)
    else:
        images = _images(material, 2 if both else 1, 2 if both else 1)
        ends, default = [images[0][None], images[-1][None]], EXPAND_NUM - both
    first, last = ends[0] if mode != "lastframe" else None, ends[1] if mode != "firstframe" else None
    source, white = extend(first, last, _unknown(material, default))
    return Annotated("frameref", source, as_mask(white), fps=_fps(material))


def _clipref(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    mode = _mode(material, CLIP_MODES, "firstclip")
    clip = check_frames(material.video)
    if (mode == "firstlastclip") != (material.end_video is not None):
        raise InputError("firstlastclip takes two clips, --video a.mp4,b.mp4; the other modes take one")
    last = clip if mode == "lastclip" else None
    if mode == "firstlastclip":
        last = check_frames(material.end_video, "the second video")
    first = None if mode == "lastclip" else clip
    source, white = extend(first, last, _unknown(material))
    return Annotated("clipref", source, as_mask(white), fps=_fps(material))


# --- repainting ------------------------------------------------------------------------------------------------------


def _inpainting(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    frames = _clip(material)
    masks = repaint.region(frames, material, material.mode or repaint.default_mode(material), tools)
    masks = repaint.augmented(masks, material)
    if material.maskaug_mode is None and material.maskaug_ratio is None:
        notes.append("the mask is as tight as it was found: --maskaug_mode bbox_expand leaves more room for new shapes")
    source, mask = _repainted(frames, masks, notes)
    return Annotated("inpainting", source, mask, fps=_fps(material))


def _outpainting(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    ratio = check_ratio(material.expand_ratio, 4)
    source, white = outpaint(_clip(material), parse_directions(material.direction), ratio)
    return Annotated("outpainting", source, as_mask(white), fps=_fps(material))


def _outpainting_inner(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    frames = _clip(material)
    ratio = check_ratio(material.expand_ratio, 0.95)
    white = np.repeat(inner_margin(frames, parse_directions(material.direction), ratio), len(frames), axis=0)
    return Annotated("outpainting_inner", hide(frames, white), as_mask(white), fps=_fps(material))


# --- references ------------------------------------------------------------------------------------------------------


def _subject_mode(material: Material) -> str:
    mode = repaint.default_mode(material)
    return "salient" if mode == "salientmasktrack" else mode


def _references(images: Sequence[np.ndarray], material: Material, mode: str, tools: Tools) -> tuple[np.ndarray, ...]:
    return tuple(subject.reference(image, material, mode, tools) for image in images)


def _of_pictures(name: str, fixed: str | None = None) -> Build:
    def build(material: Material, tools: Tools, notes: list[str]) -> Annotated:
        mode = fixed or material.mode or _subject_mode(material)
        images = _images(material, 1, None if name == "reference_anything" else 1)
        return Annotated(name, references=_references(images, material, mode, tools), fps=_fps(material))

    return build


# --- compositions ----------------------------------------------------------------------------------------------------


def _animate(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    pose = make_control("pose", check_frames(material.video), tools)
    references = _references(_images(material, 1), material, material.mode or _subject_mode(material), tools)
    return Annotated("animate_anything", pose, references=references, fps=_fps(material))


def _swap(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    frames = check_frames(material.video)
    of_clip, of_images = _two_modes(material, repaint.default_mode(material))
    masks = repaint.augmented(repaint.region(frames, material, of_clip, tools), material)
    references = _references(_images(material, 1), Material(), of_images, tools)
    source, mask = _repainted(frames, masks, notes)
    return Annotated("swap_anything", source, mask, references, _fps(material))


def _expand(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    """The first picture, outpainted, is the first frame; the others are references."""
    images = _images(material, 1)
    of_frame, comma, of_images = (material.mode or "").partition(",")
    if not comma:  # one word is about the references
        of_frame, of_images = "firstframe", of_frame or "salient"
    if of_frame not in FRAME_MODES[:2]:
        raise InputError(f"unknown mode {of_frame!r} of the frame: use {' or '.join(FRAME_MODES[:2])}")
    grown, edge = outpaint(images[0][None], parse_directions(material.direction), check_ratio(material.expand_ratio, 4))
    first, last = (grown, None) if of_frame == "firstframe" else (None, grown)
    source, white = extend(first, last, _unknown(material))
    white[0 if of_frame == "firstframe" else -1] = edge[0]
    references = _references(images[1:], material, of_images.strip(), tools)
    return Annotated("expand_anything", source, as_mask(white), references, _fps(material))


def _move(material: Material, tools: Tools, notes: list[str]) -> Annotated:
    """The picture, then a box that moves from where the thing is to where it shall be."""
    image = _images(material, 1, 1)[0]
    height, width = image.shape[:2]
    if len(material.bbox or ()) < 2:
        raise InputError('move_anything needs two boxes, from where to where: --bbox "l,t,r,b l,t,r,b"')
    _say_black(material, notes)
    count = _at_least_one(_unknown(material))
    layout = draw_boxes(boxes_between(material.bbox or (), count, height, width), height, width)
    source = np.concatenate([image[None], layout])
    mask = np.full(source.shape[:3], 255, np.uint8)
    mask[0] = 0
    return Annotated("move_anything", source, mask, fps=_fps(material))


def _firstframe_control(fixed: str | None) -> Build:
    """The first frame, the clip's own or a picture in its place, then a control of the rest."""

    def build(material: Material, tools: Tools, notes: list[str]) -> Annotated:
        control = _named_control(fixed, material)
        frames = check_frames(material.video)
        if len(frames) < 2:
            raise InputError("the video has one frame: nothing would be left to generate")
        source = make_control(control, frames, tools, material.mode)
        images = _images(material, 0, 1)
        first = fit_frames(images[0][None], *frames.shape[1:3]) if images else frames[:1]
        source = np.concatenate([first, source[1:]])
        mask = np.full(source.shape[:3], 255, np.uint8)
        mask[0] = 0
        return Annotated(f"firstframe_{control}", source, mask, fps=_fps(material))

    return build


def _reference_control(fixed: str | None) -> Build:
    def build(material: Material, tools: Tools, notes: list[str]) -> Annotated:
        control = _named_control(fixed, material)
        source = make_control(control, check_frames(material.video), tools)
        references = _references(_images(material, 1), material, material.mode or _subject_mode(material), tools)
        return Annotated(f"reference_{control}", source, references=references, fps=_fps(material))

    return build


def _named_control(fixed: str | None, material: Material) -> str:
    name = fixed or material.control
    if name is None:
        raise InputError(f"name the control: --control, one of {', '.join(CONTROLS)}")
    kind_of(name)
    return name


def _replacement(name: str, word: str) -> Build:
    """Someone, or what they wear: the region shows only how they move, the references who or what it shall be."""

    def build(material: Material, tools: Tools, notes: list[str]) -> Annotated:
        frames = check_frames(material.video)
        given = any(getattr(material, key) is not None for key in ("mask", "bbox", "label", "caption"))
        asked = material if given or material.mode else replace(material, label=word)
        of_clip, of_images = _two_modes(material, repaint.default_mode(asked))
        masks = repaint.region(frames, asked, of_clip, tools)
        masks = repaint.augmented(masks, material, *ROOM[name])
        control = material.control or "pose"
        filler = None if control == NO_CONTROL else make_control(control, frames, tools)
        source, mask = _repainted(frames, masks, notes, filler)
        references = _references(_images(material, 1), Material(), of_images, tools)
        return Annotated(name, source, mask, references, _fps(material))

    return build


# --- the table -------------------------------------------------------------------------------------------------------

_CLIP = ("video", "images")
_CONTROL_TASKS = {
    name: Task(
        f"{name} control of a clip",
        _control(name),
        (*_CLIP, *(("mode",) if name == "pose" else ())),
        kinds=(kind_of(name),),
    )
    for name in CONTROLS
}
_SUBJECT = ("images", "mode", *REGION)
_POSSIBLE = tuple(dict.fromkeys(kind_of(name) for name in CONTROLS))
_MIXED = ("depth", "pose", "flow", "scribble", "gray")

TASKS: dict[str, Task] = {
    "plain": Task("the clip as it is", _plain, _CLIP),
    **_CONTROL_TASKS,
    "layout_bbox": Task(
        "a box that moves between boxes", _layout_bbox, (*_CLIP, "bbox", "label", "expand_num"), ("bbox",)
    ),
    "layout_track": Task(
        "the outline of a tracked thing", _layout_track, (*_CLIP, "mode", *REGION), (), repaint.KINDS, repaint.MODES
    ),
    "frameref": Task("pictures at the ends of a clip", _frameref, (*_CLIP, "mode", "expand_num"), modes=FRAME_MODES),
    "clipref": Task(
        "clips at the ends of a longer one",
        _clipref,
        ("video", "end_video", "mode", "expand_num"),
        ("video",),
        modes=CLIP_MODES,
    ),
    "inpainting": Task(
        "a region of a clip is made anew", _inpainting, (*_CLIP, "mode", *REGION), (), repaint.KINDS, repaint.MODES
    ),
    "outpainting": Task("more picture around a clip", _outpainting, (*_CLIP, "direction", "expand_ratio")),
    "outpainting_inner": Task(
        "the margin of a clip is made anew", _outpainting_inner, (*_CLIP, "direction", "expand_ratio")
    ),
    "face": Task("a face as reference", _of_pictures("face", "face"), ("images",), ("images",), ("face",)),
    "subject": Task(
        "a subject on white as reference", _of_pictures("subject"), _SUBJECT, ("images",), subject.KINDS, subject.MODES
    ),
    "object": Task(
        "an object on white as reference", _of_pictures("object"), _SUBJECT, ("images",), subject.KINDS, subject.MODES
    ),
    "reference_anything": Task(
        "subjects on white as references",
        _of_pictures("reference_anything"),
        _SUBJECT,
        ("images",),
        subject.KINDS,
        subject.MODES,
    ),
    "animate_anything": Task(
        "references move as the person of a clip", _animate, ("video", *_SUBJECT), ("video", "images"),
        ("pose", *subject.KINDS), subject.MODES,
    ),
    "swap_anything": Task(
        "references take the place of a thing", _swap, ("video", *_SUBJECT), ("video", "images"),
        repaint.KINDS, repaint.MODES,
    ),
    "expand_anything": Task(
        "a picture grows, becomes a clip and gets company",
        _expand,
        (*_SUBJECT, "direction", "expand_ratio", "expand_num"),
        ("images",),
        subject.KINDS,
    ),
    "move_anything": Task(
        "the thing in a picture moves along boxes", _move, ("images", "bbox", "label", "expand_num"), ("images", "bbox")
    ),
    "firstframe_control": Task(
        "a first frame and a control (--control)", _firstframe_control(None), (*_CLIP, "control", "mode"),
        ("video", "control"), _POSSIBLE,
    ),
    "reference_control": Task(
        "references and a control (--control)", _reference_control(None), ("video", "control", *_SUBJECT),
        ("video", "images", "control"), (*_POSSIBLE, *subject.KINDS), subject.MODES,
    ),
    **{
        f"firstframe_{name}": Task(
            f"a first frame and {name}", _firstframe_control(name), (*_CLIP, *(("mode",) if name == "pose" else ())),
            ("video",), (kind_of(name),),
        )
        for name in _MIXED
    },
    **{
        f"reference_{name}": Task(
            f"references and {name}", _reference_control(name), ("video", *_SUBJECT), ("video", "images"),
            (kind_of(name), *subject.KINDS), subject.MODES,
        )
        for name in _MIXED
    },
    "character_replacement": Task(
        "the person of a clip becomes the person of a picture", _replacement("character_replacement", "person"),
        ("video", "control", *_SUBJECT), ("video", "images"), (*_POSSIBLE, *repaint.KINDS), repaint.MODES,
    ),
    "try_on": Task(
        "the person of a clip wears the garment of a picture", _replacement("try_on", "shirt"),
        ("video", "control", *_SUBJECT), ("video", "images"), (*_POSSIBLE, *repaint.KINDS), repaint.MODES,
    ),
}  # fmt: skip
# Other names that VACE's tools use: the task and the mode that they fix.
ALIASES: dict[str, tuple[str, str | None]] = {
    **{name: ("frameref", name) for name in FRAME_MODES},
    **{name: ("clipref", name) for name in CLIP_MODES},
    "framerefext": ("frameref", None),
    **{
        f"inpainting_{mode}": ("inpainting", mode)
        for mode in ("mask", "bbox", "masktrack", "bboxtrack", "label", "caption")
    },
    **{
        f"image_{name}": (name, None)
        for name in ("plain", "face", "inpainting", "outpainting", "depth", "gray", "pose", "scribble")
    },
    "image_salient": ("subject", "salient"),
    "image_reference": ("subject", None),
}


def resolve(task: str, mode: str | None = None) -> tuple[str, Task, str | None]:
    """Name, task and mode that a name stands for. ``InputError`` for an unknown one or one at odds with ``mode``."""
    name, fixed = ALIASES.get(task, (task, None))
    if name not in TASKS:
        raise InputError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    if fixed is not None and mode not in (None, fixed):
        raise InputError(f"the task {task} is {name} with --mode {fixed}: leave --mode {mode} out")
    return name, TASKS[name], fixed or mode


def annotate(task: str, material: Material, backend: str = "auto") -> Annotated:
    """Source, mask and references of ``task``, out of raw material.

    Raises:
        InputError: an unknown task or option, or material that is missing, unusable or of no use to the task.
        MissingDependencyError: no backend can do a part of the work; names command and model.
    """
    name, definition, mode = resolve(task, material.mode)
    material = replace(material, mode=mode)
    check_material(name, definition, material)
    tools, notes = Tools(backend), list[str]()
    tools.check(definition.kinds, f"the task {name}")
    done = definition.build(material, tools, notes)
    return replace(done, notes=(*done.notes, *notes), backends=dict(tools.used))


def check_material(name: str, task: Task, material: Material) -> None:
    """``InputError`` for what is missing and for what the task would ignore."""
    given = {f.name for f in fields(material) if f.name != "fps" and not _absent(getattr(material, f.name))}
    flags = {"images": "image", "end_video": "video (a second clip)"}
    for key in task.needs:
        if key not in given:
            raise InputError(f"the task {name} needs --{flags.get(key, key)}")
    useless = sorted(given - set(task.takes))
    if useless:
        wanted = ", ".join(f"--{flags.get(key, key)}" for key in task.takes)
        raise InputError(f"the task {name} has no use for --{flags.get(useless[0], useless[0])}: it takes {wanted}")


def _absent(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple | str) and not len(value))


def control(kind: str, frames: np.ndarray, backend: str = "auto") -> np.ndarray:
    """A clip uint8 ``[T, H, W, 3]`` as one of :data:`CONTROLS`, of the same shape.

    Raises:
        InputError: an unknown kind or backend. MissingDependencyError: nothing here can make it.
    """
    tools = Tools(backend)
    tools.check((kind_of(kind),), f"the control {kind}")
    return make_control(kind, frames, tools)


def track(frames: np.ndarray, mask: np.ndarray, backend: str = "auto") -> np.ndarray:
    """Where the thing under bool ``mask [H, W]`` in the first frame is in all: bool ``[T, H, W]``."""
    from vdot.annotate.material import check_mask

    tools = Tools(backend)
    tools.check(("track",), "tracking")
    check_frames(frames)
    return tools("track")(frames, check_mask(mask, *frames.shape[1:3]))
