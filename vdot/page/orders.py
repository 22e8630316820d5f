"""A filled-in form as the model gets it: files read at the model's size, annotated, checked, and shown first."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from vdot.annotate import TASKS, Annotated, Material, annotate
from vdot.annotate.backends import BACKENDS
from vdot.chunks import heaviest
from vdot.cli import Session as Model
from vdot.errors import InputError
from vdot.memory import GIB
from vdot.offload import offload_mode
from vdot.page.presets import PRESETS, Preset
from vdot.page.uploads import display_name, renamed
from vdot.page.worker import Order
from vdot.pipeline import checkpoint_defaults, checkpoint_schedule
from vdot.request import Defaults, Prepared, Request, parse_size, prepare
from vdot.runtime import total_memory
from vdot.video import (
    FramePlan,
    fit_frames,
    output_size,
    plan_frames,
    probe,
    read_frames,
    read_image,
    read_mask,
    write_image,
    write_video,
)
from vdot.video.plan import CELL

REGIONS = ("paint", "box", "file")
SHAPES = ("auto", "original", "original_expand", "bbox_expand")
SIDES = ("left", "right", "up", "down")
MOST_EXPANSION = 1.0
CANVAS = 768  # pixels, the longer side of the picture that is painted on


@dataclass(frozen=True)
class Form:
    """What the page's inputs say. Paths are of files in the session's own folder; boxes are in percent of the frame."""

    preset: str = "t2v"
    prompt: str = ""
    negative_prompt: str = ""  # empty: the checkpoint's own
    clip: str | None = None
    ready: bool = False  # the clip is a control already
    pictures: tuple[str, ...] = ()
    cut_out: bool = False  # the subject of each picture alone on white
    region: str = "paint"
    painted: str | None = None  # a mask picture, white where it was painted
    mask: str | None = None
    shape: str = "auto"  # of the region: the task's own, or one of SHAPES
    track: bool = True  # a painted or boxed region follows the thing
    boxes: str = ""
    sides: tuple[str, ...] = SIDES
    ratio: float = 0.25
    end: str = "after"
    keep: int = 5  # frames of the clip that an extension goes on from
    size: str = ""
    frame_num: int | None = None
    frame_mode: str = "spread"
    fps: float | None = None
    steps: int | None = None
    shift: float | None = None
    solver: str | None = None
    guide_scale: float | None = None
    context_scale: float = 1.0
    keep_source: bool = True
    feather: float = 8.0
    seed: int = 2025

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Form":
        names = {f.name for f in fields(cls)}
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in names
        }
        return cls(**values)


@dataclass(frozen=True)
class Understood:
    """A form as the model gets it, with what it will take."""

    order: Order
    prepared: Prepared
    lines: tuple[str, ...]  # the plan in words
    flops: float
    peak: int  # bytes
    available: int
    backends: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> dict[str, Any]:
        """Source, mask and references as files that a browser shows: exactly the pixels that the model gets."""
        count, fps = self.prepared.frame_num, self.prepared.fps
        shown: dict[str, Any] = {"source": None, "mask": None, "overlay": None, "references": []}
        source, mask = self.prepared.source, self.prepared.condition.mask
        if source is not None:
            shown["source"] = folder / "src_video.mp4"
            write_video(shown["source"], source[:count], fps)
        if mask is not None and source is not None:
            grey = (mask[:count].numpy() * 255).round().astype(np.uint8)
            shown["mask"], shown["overlay"] = folder / "src_mask.mp4", folder / "overlay.mp4"
            write_video(shown["mask"], np.repeat(grey[..., None], 3, axis=-1), fps)
            write_video(shown["overlay"], Annotated("", source[:count], grey).overlay(), fps)
        for i, reference in enumerate(self.prepared.references):
            shown["references"].append(folder / f"src_ref_image_{i}.png")
            write_image(shown["references"][-1], reference)
        return shown


@dataclass(frozen=True)
class Clip:
    """The clip of a form at the model's size, and what is known of its file."""

    frames: np.ndarray | None
    plan: FramePlan | None
    height: int
    width: int
    count: int
    fps: float
    sound: str | None = None
    backend: str = "auto"  # of the annotators

    def annotate(self, task: str, material: Material) -> Annotated:
        """The named backends do what they can of this task; one that has no part in it is not asked."""
        kinds = TASKS[task].kinds
        able = {backend.name for backend in BACKENDS if backend.kind in kinds}
        named = [part for part in self.backend.split(",") if part.partition(":")[0].strip() in able]
        return annotate(task, material, ",".join(named) or "auto")


def understand(form: Form, model: Model, folder: Path, world: int = 1, backend: str = "auto") -> Understood:
    """``InputError`` or ``MissingDependencyError``: one sentence on what is missing or does not fit."""
    preset = _preset(form)
    defaults = checkpoint_defaults(model.info)
    clip = replace(_read_clip(form, preset, defaults), backend=backend)
    made, before, after = _make(form, preset, clip)
    schedule = checkpoint_schedule(model.info).override(
        steps=form.steps, shift=form.shift, solver=form.solver, guide_scale=form.guide_scale
    )
    source = None if made.src_video is None else _on_grid(made.src_video)
    mask = None if made.src_mask is None else _mask_on_grid(made.src_mask)
    request = Request(
        prompt=form.prompt,
        negative_prompt=form.negative_prompt or None,
        src_video=source,
        src_mask=mask,
        src_ref_images=list(made.references) or None,
        size=None if source is not None else f"{clip.width}*{clip.height}",
        frame_num=clip.count if source is None else len(source),
        fps=form.fps or clip.fps,
        keep_source=form.keep_source,
        feather=form.feather,
        context_scale=form.context_scale,
        seed=form.seed,
    )
    prepared = prepare(request, defaults)
    plan = clip.plan if preset.key != "extend" and source is not None else None
    prepared = replace(prepared, plan=_same_size(plan, prepared), notes=(*prepared.notes, *made.notes))
    memory = model.plan(heaviest(prepared.condition, prepared.chunks), schedule, world)
    mode, on_cpu = offload_mode(model.config.offload_model), model.device.type == "cpu"
    available = total_memory(model.device)
    memory.check_fit(mode, available, on_cpu)
    compared = clip.frames if preset.key not in ("outpaint", "extend") else None
    order = Order(request, schedule, str(folder), form.settings(), compared, plan, clip.sound, before, after)
    lines = (*prepared.lines(), *_schedule_lines(schedule), *_backend_lines(made.backends))
    peak = memory.peak("false" if on_cpu else mode)
    return Understood(order, prepared, lines, memory.flops * len(prepared.chunks), peak, available, dict(made.backends))


def _preset(form: Form) -> Preset:
    if form.preset not in PRESETS:
        raise InputError(f"unknown preset {form.preset!r}: use one of {', '.join(PRESETS)}")
    preset = PRESETS[form.preset]
    if not form.prompt.strip():
        raise InputError("the prompt is empty: describe the video in a sentence")
    given = {"clip": form.clip, "pictures": form.pictures, "boxes": form.boxes.strip(), "region": _region_given(form)}
    words = {
        "clip": "a clip: drop one, or load the example",
        "pictures": "a picture: add at least one",
        "boxes": "boxes: left,top,right,bottom in percent, one a line",
        "region": "to know what to change: paint it, give a box, or a mask file",
    }
    for need in preset.needs:
        if not given[need]:
            raise InputError(f"this needs {words[need]}")
    if form.region not in REGIONS:
        raise InputError(f"unknown region {form.region!r}: use {', '.join(REGIONS)}")
    return preset


def _region_given(form: Form) -> Any:
    return {"paint": form.painted, "box": form.boxes.strip(), "file": form.mask}.get(form.region)


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_clip(form: Form, preset: Preset, defaults: Defaults) -> Clip:
    width, height = parse_size(form.size or defaults.size)
    area = width * height / _growth(form, preset)
    if form.clip is not None and "clip" in preset.shows:
        info = probe(form.clip)
        if preset.key == "extend":  # all of the clip, at its own rate
            return _whole_clip(form, info, area, defaults)
        by_file = "region" in preset.shows and form.region == "file"
        mask = probe(form.mask, allow_image=True) if by_file and form.mask is not None else None
        plan = plan_frames(
            info,
            max_area=int(area),
            frame_num=form.frame_num,
            mode=form.frame_mode,  # type: ignore[arg-type]
            mask=mask,
            budget_frames=defaults.frame_num,
            fps=form.fps,
        )
        frames = read_frames(form.clip, plan.frame_ids, (plan.height, plan.width))
        sound = form.clip if info.has_audio and plan.keeps_timing else None
        return Clip(frames, plan, plan.height, plan.width, plan.frame_num, plan.fps, sound)
    count, fps = form.frame_num or defaults.frame_num, form.fps or defaults.fps
    if preset.key in ("i2v", "move", "expand") and form.pictures:
        rows, cols = read_image(form.pictures[0]).shape[:2]
        height, width = _fitting(rows, cols, int(area))
    return Clip(None, None, height, width, count, fps)


def _growth(form: Form, preset: Preset) -> float:
    """How many times larger outpainting makes the frame."""
    if "sides" not in preset.shows:
        return 1.0
    wrong = [side for side in form.sides if side not in SIDES]
    if wrong or not form.sides:
        raise InputError("choose at least one side on which the picture grows: left, right, up, down")
    if not 0 < form.ratio <= MOST_EXPANSION:
        raise InputError(f"the picture grows by a share from 0 to {MOST_EXPANSION:g} on each side, got {form.ratio:g}")
    across = 1 + form.ratio * sum(side in ("left", "right") for side in form.sides)
    down = 1 + form.ratio * sum(side in ("up", "down") for side in form.sides)
    return across * down


def _fitting(rows: int, cols: int, area: int) -> tuple[int, int]:
    """A size for a picture: of the area, whatever its own, since pictures may be smaller than what is made of them."""
    scale = max(1.0, math.sqrt(area / (rows * cols)))
    return output_size(max(CELL, round(rows * scale)), max(CELL, round(cols * scale)), area)


def _whole_clip(form: Form, info: Any, area: float, defaults: Defaults) -> Clip:
    height, width = output_size(info.height, info.width, int(area))
    count = form.frame_num or defaults.frame_num
    if not 1 <= form.keep < count:
        raise InputError(f"an extension goes on from 1 to {count - 1} frames of the clip, got {form.keep}")
    frames = read_frames(form.clip or "", range(info.frames), (height, width))
    return Clip(frames, None, height, width, count, form.fps or info.fps or defaults.fps)


# --- annotating ------------------------------------------------------------------------------------------------------

Made = tuple[Annotated, np.ndarray | None, np.ndarray | None]


def _make(form: Form, preset: Preset, clip: Clip) -> Made:
    """Source, mask and references, and the frames that the result is joined to."""
    pictures = [read_image(path) for path in form.pictures] if "pictures" in preset.shows else []
    if preset.key == "extend":
        return _extend(form, clip)
    if preset.group == "control" or preset.key == "animate":
        return _control(form, preset, clip, pictures), None, None
    if preset.key in ("t2v", "r2v", "i2v", "move", "expand"):
        return _from_pictures(form, preset, clip, pictures), None, None
    return _from_clip(form, preset, clip, pictures), None, None


def _from_clip(form: Form, preset: Preset, clip: Clip, pictures: list[np.ndarray]) -> Annotated:
    """A clip of which a part is made anew, or which grows."""
    material = Material(video=clip.frames, fps=clip.fps)
    if form.ready and "region" in preset.shows:
        return _prepared(form, clip, material, pictures)
    if "sides" in preset.shows:
        material = replace(material, direction=form.sides, expand_ratio=form.ratio)
    if "region" in preset.shows:
        material = _with_region(form, clip, material, preset)
    if preset.key == "inpaint":
        return _with_references(clip.annotate(preset.task, material), form, clip, pictures)
    return clip.annotate(preset.task, replace(material, images=pictures) if pictures else material)


def _prepared(form: Form, clip: Clip, material: Material, pictures: list[np.ndarray]) -> Annotated:
    """The clip as it is, with what is hidden or shown in the region that changes."""
    white = clip.annotate("inpainting", _with_region(form, clip, material, PRESETS["inpaint"]))
    plain = clip.annotate("plain", Material(video=clip.frames, fps=clip.fps))
    return _with_references(replace(plain, src_mask=white.src_mask, backends=white.backends), form, clip, pictures)


def _references(form: Form, clip: Clip, pictures: Sequence[np.ndarray]) -> Annotated:
    mode = "salient" if form.cut_out else "plain"
    return clip.annotate("reference_anything", Material(images=pictures, mode=mode))


def _with_references(made: Annotated, form: Form, clip: Clip, pictures: Sequence[np.ndarray]) -> Annotated:
    return replace(made, references=_references(form, clip, pictures).references) if pictures else made


def _control(form: Form, preset: Preset, clip: Clip, pictures: Sequence[np.ndarray]) -> Annotated:
    """The clip as a control, made of it or there already, with references where pictures were given."""
    task = "pose" if preset.key == "animate" else preset.task
    if preset.key == "layout" and not form.ready:
        if not form.boxes.strip():
            raise InputError("this needs boxes: left,top,right,bottom in percent, one a line")
        white = np.full((clip.count, clip.height, clip.width, 3), 255, np.uint8)
        boxes = parse_boxes(form.boxes, clip.height, clip.width)
        return clip.annotate("layout_bbox", Material(video=white, bbox=boxes, fps=clip.fps))
    if clip.frames is None:
        raise InputError("this needs a clip: drop one, or load the example")
    made = clip.annotate("plain" if form.ready else task, Material(video=clip.frames, fps=clip.fps))
    return _with_references(made, form, clip, pictures)


def _from_pictures(form: Form, preset: Preset, clip: Clip, pictures: list[np.ndarray]) -> Annotated:
    if preset.key == "t2v":
        return Annotated("t2v", fps=clip.fps)
    if preset.key == "r2v":
        return _references(form, clip, pictures)
    first = fit_frames(pictures[0][None], clip.height, clip.width)[0]
    unknown = clip.count - 1
    if unknown < 1:
        raise InputError("a clip needs at least 2 frames")
    if preset.key == "move":
        boxes = parse_boxes(form.boxes, clip.height, clip.width)
        if len(boxes) < 2:
            raise InputError("a thing moves from a first box to a second one: give two lines of boxes")
        return clip.annotate("move_anything", Material(images=[first], bbox=boxes, expand_num=unknown, fps=clip.fps))
    if preset.key == "expand":
        mode = "firstframe," + ("salient" if form.cut_out else "plain")
        material = Material(
            images=[first, *pictures[1:]],
            direction=form.sides,
            expand_ratio=form.ratio,
            expand_num=unknown,
            fps=clip.fps,
            mode=mode,
        )
        return clip.annotate("expand_anything", material)
    if len(pictures) > 2:
        raise InputError("at most two pictures: the first frame, and the last one if you like")
    last = [fit_frames(picture[None], clip.height, clip.width)[0] for picture in pictures[1:]]
    mode = "firstlastframe" if last else "firstframe"
    material = Material(images=[first, *last], mode=mode, expand_num=unknown - len(last), fps=clip.fps)
    return clip.annotate("frameref", material)


def _extend(form: Form, clip: Clip) -> Made:
    """The result is the clip and what comes after it, or before it."""
    assert clip.frames is not None
    keep = min(form.keep, len(clip.frames))
    unknown = clip.count - keep
    if form.end == "after":
        material = Material(video=clip.frames[-keep:], mode="firstclip", expand_num=unknown, fps=clip.fps)
        return clip.annotate("clipref", material), clip.frames[:-keep], None
    if form.end != "before":
        raise InputError(f"a clip grows after its end or before its beginning, not {form.end!r}")
    material = Material(video=clip.frames[:keep], mode="lastclip", expand_num=unknown, fps=clip.fps)
    return clip.annotate("clipref", material), None, clip.frames[keep:]


def _with_region(form: Form, clip: Clip, material: Material, preset: Preset) -> Material:
    """What shall change: painted or boxed in the first frame (and tracked), or a mask file."""
    if form.shape not in SHAPES:
        raise InputError(f"unknown shape {form.shape!r} of the region: use {', '.join(SHAPES)}")
    exact = preset.key == "inpaint" and form.shape == "auto"
    shape = "original" if exact else None if form.shape == "auto" else form.shape
    material = replace(material, maskaug_mode=shape)
    two = () if preset.key == "inpaint" else ("salient" if form.cut_out else "plain",)
    if form.region == "file":
        assert clip.plan is not None and form.mask is not None
        mask = read_mask(form.mask, clip.plan.frame_ids, clip.height, clip.width).numpy() > 0.5
        if not mask.any():
            raise InputError("the mask is black everywhere: paint white what shall change")
        return replace(material, mask=mask, mode=",".join(("mask", *two)))
    if form.region == "box":
        boxes = parse_boxes(form.boxes, clip.height, clip.width)
        return replace(material, bbox=boxes, mode=",".join(("bboxtrack" if form.track else "bbox", *two)))
    painted = fit_frames(read_image(form.painted or "")[None], clip.height, clip.width)[0, ..., 0] > 127
    if not painted.any():
        raise InputError("nothing is painted: paint over what shall change")
    return replace(material, mask=painted, mode=",".join(("masktrack" if form.track else "mask", *two)))


def parse_boxes(text: str, height: int, width: int) -> list[tuple[float, float, float, float]]:
    """Lines of "left,top,right,bottom" in percent -> pixels of a ``height x width`` frame."""
    boxes = []
    for line in (line for line in re.split(r"[\n;]", text) if line.strip()):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", line)
        values = [float(number) for number in numbers]
        inside = len(values) == 4 and all(0 <= v <= 100 for v in values)
        if not inside or values[0] >= values[2] or values[1] >= values[3]:
            raise InputError(f"the box {line.strip()!r} must be left,top,right,bottom in percent, like 10,20,40,80")
        left, top, right, bottom = values
        boxes.append((left * width / 100, top * height / 100, right * width / 100, bottom * height / 100))
    return boxes


# --- the model's grid ------------------------------------------------------------------------------------------------


def _on_grid(frames: np.ndarray) -> np.ndarray:
    height, width = (max(CELL, side // CELL * CELL) for side in frames.shape[1:3])
    return fit_frames(frames, height, width)


def _mask_on_grid(mask: np.ndarray) -> np.ndarray:
    height, width = (max(CELL, side // CELL * CELL) for side in mask.shape[1:3])
    if (height, width) == mask.shape[1:3]:
        return mask
    return np.where(fit_frames(np.repeat(mask[..., None], 3, axis=-1), height, width)[..., 0] > 127, 255, 0).astype(
        np.uint8
    )


def _same_size(plan: FramePlan | None, prepared: Prepared) -> FramePlan | None:
    """The plan says the size that is made, which outpainting has grown."""
    if plan is None:
        return None
    return replace(plan, height=prepared.condition.height, width=prepared.condition.width)


# --- in words --------------------------------------------------------------------------------------------------------


def _schedule_lines(schedule: Any) -> tuple[str, ...]:
    return (
        f"steps {schedule.steps}, {schedule.solver}, shift {schedule.shift:g}, guidance {schedule.guide_scale:g}: "
        f"{schedule.evaluations} network evaluations",
    )


def _backend_lines(backends: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"made  {kind} by {name}" for kind, name in backends.items())


def in_gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def first_frame(path: str | Path) -> np.ndarray:
    """What is painted on: uint8 ``[H, W, 3]`` of a clip, scaled to :data:`CANVAS`."""
    with renamed(Path(path), display_name(path)):
        info = probe(path)
        scale = CANVAS / max(info.height, info.width)  # small clips are enlarged: a brush has room on them
        size = (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
        return read_frames(path, [0], size)[0]
