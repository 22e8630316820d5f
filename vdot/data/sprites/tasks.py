"""Scenes as tasks in the form VACE takes them: source video, mask, references, prompt, and the clip that is right.

White in a mask generates, black keeps; what is unknown in a source is grey; references are cut out on white. Without a
mask the whole source may change: it is a control.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from vdot.conditioning import UNKNOWN_GREY, as_mask, hide
from vdot.data.sprites.captions import caption
from vdot.data.sprites.draw import draw_scene, draw_thing, hidden_colours, pick
from vdot.data.sprites.layers import garment_picture, portrait
from vdot.data.sprites.render import Clip
from vdot.data.sprites.scene import FPS, PATTERN_COLOURS, SHAPES, Scene, Split, Thing
from vdot.errors import InputError

Rng = np.random.Generator
CONTROLS = ("depth", "pose", "flow", "scribble", "gray", "layout")
MIXED = CONTROLS[:-1]  # the controls that come with a first frame or a reference as well
KEPT_AT_ENDS = {
    "firstframe": (1, 0),
    "lastframe": (0, 1),
    "firstlastframe": (1, 1),
    "firstclip": (5, 0),
    "lastclip": (0, 5),
}
TASKS: tuple[str, ...] = (
    "t2v", "r2v", "r2v_several", *CONTROLS, "inpainting", "outpainting", *KEPT_AT_ENDS,
    *(f"firstframe_{control}" for control in MIXED), *(f"reference_{control}" for control in MIXED),
    "swap_anything", "animate_anything", "move_anything", "expand_anything", "character_replacement", "try_on",
)  # fmt: skip
NEEDS_PERSON = frozenset(("pose", "firstframe_pose", "reference_pose", "animate_anything", "character_replacement"))
NEEDS_SEVERAL = frozenset(("r2v_several",))
WITH_REFERENCE = frozenset(task for task in TASKS if task.startswith(("r2v", "reference_"))) | {
    "swap_anything", "animate_anything", "expand_anything", "character_replacement", "try_on",
}  # fmt: skip


@dataclass(frozen=True)
class TaskClip:
    """One example. ``video`` is the truth, uint8 ``[T, H, W, 3]``, and ``scene`` describes it.

    ``src_video`` like it, ``src_mask`` uint8 ``[T, H, W]`` of 0 and 255, ``references`` uint8 ``[H, W, 3]`` each.
    ``control`` names what the source shows where it may change ("" for nothing), ``things`` are the numbers of the
    things that the references or the mask are about.
    """

    task: str
    prompt: str
    video: np.ndarray
    src_video: np.ndarray | None
    src_mask: np.ndarray | None
    references: tuple[np.ndarray, ...]
    scene: Scene
    control: str = ""
    things: tuple[int, ...] = ()

    def request(self) -> dict[str, Any]:
        """Arguments of :class:`vdot.request.Request`."""
        return {
            "prompt": self.prompt,
            "src_video": self.src_video,
            "src_mask": self.src_mask,
            "src_ref_images": list(self.references) or None,
            "size": f"{self.scene.width}*{self.scene.height}",
            "frame_num": self.scene.frames,
            "fps": FPS,
        }


def draw_task(seed: int, task: str | None = None, split: Split = "train", **options: Any) -> TaskClip:
    """The example of a seed: a scene that suits the task (or a drawn one); options as in :func:`draw_scene`."""
    scene, task, rng = _task_scene(seed, task, split, options)
    return build_task(scene, task, rng)


def count_references(seed: int, task: str | None = None, split: Split = "train", **options: Any) -> int:
    """How many :func:`draw_task` would give, known without a picture: batches are planned by it."""
    if task in TASKS and task not in NEEDS_SEVERAL:  # the task says it, whatever the scene
        return int(task in WITH_REFERENCE)
    scene, task, _ = _task_scene(seed, task, split, options)
    if task == "r2v_several":
        return len(scene.things)
    return int(task in WITH_REFERENCE)


def _task_scene(seed: int, task: str | None, split: Split, options: dict[str, Any]) -> tuple[Scene, str, Rng]:
    if task is not None and task not in TASKS:
        raise InputError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    rng = np.random.default_rng([seed, split == "test", 1])
    task = task or pick(rng, TASKS)
    options = {"person": task in NEEDS_PERSON or (task == "try_on" and rng.random() < 0.6), **options}
    if task in NEEDS_SEVERAL:
        options.setdefault("things", int(rng.integers(2, 4)))
    return draw_scene(seed, split, **options), task, rng


def build_task(source: Scene | Clip, task: str, rng: Rng) -> TaskClip:
    """A scene, or its clip, as a task.

    Raises:
        InputError: an unknown task, or one that the scene has nothing for (a pose without a person).
    """
    if task not in _BUILDERS:
        raise InputError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    clip = source if isinstance(source, Clip) else Clip(source)
    people = [i for i, thing in enumerate(clip.scene.things) if thing.shape == "person"]
    if task in NEEDS_PERSON and not people:
        raise InputError(f"the task {task} needs a person in the scene: draw it with person=True")
    if task in NEEDS_SEVERAL and len(clip.scene.things) < 2:
        raise InputError(f"the task {task} needs more than one thing in the scene")
    # What the references, the masks and the changes are about.
    chosen = pick(rng, people) if people and (task in NEEDS_PERSON or task == "try_on") else _any_thing(clip, rng)
    return _BUILDERS[task](clip, task, rng, chosen)


def _any_thing(clip: Clip, rng: Rng) -> int:
    return int(rng.integers(len(clip.scene.things)))


def _example(
    clip: Clip, task: str, rng: Rng, source: "Source", things: tuple[int, ...] = (), **changes: Any
) -> TaskClip:
    scene = clip.scene
    values = {"references": (), "control": "", **changes}
    return TaskClip(task, caption(scene, rng), clip.frames, source[0], source[1], scene=scene, things=things, **values)


Source = tuple[np.ndarray | None, np.ndarray | None]
NOTHING: Source = (None, None)


def keep(frames: np.ndarray, kept: np.ndarray, filler: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Source and mask that show ``frames`` where ``kept`` (to ``[T, H, W]``) and ``filler`` (grey) elsewhere."""
    kept = np.broadcast_to(kept, frames.shape[:3])
    return hide(frames, ~kept, filler), as_mask(~kept)


def control_picture(clip: Clip, control: str) -> np.ndarray:
    return clip.flow_picture if control == "flow" else getattr(clip, control)


def reference_of(thing: Thing, clip: Clip, rng: Rng) -> np.ndarray:
    """A thing large on white, tilted a little as photographs of things are."""
    angle = 0.0 if thing.shape == "person" else float(rng.uniform(-0.3, 0.3))
    return portrait(thing, clip.scene.unit, angle)


# --- builders: one per family ----------------------------------------------------------------------------------------


def _text(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    return _example(clip, task, rng, NOTHING)


def _subjects(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """R2V: the chosen thing, or all of them."""
    things = (chosen,) if task == "r2v" else tuple(range(len(clip.scene.things)))
    references = tuple(reference_of(clip.scene.things[i], clip, rng) for i in things)
    return _example(clip, task, rng, NOTHING, things, references=references)


def _control(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    return _example(clip, task, rng, (control_picture(clip, task), None), control=task)


def _reference_control(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """A reference says what it looks like, the control how it moves. Animate is this with a pose."""
    control = "pose" if task == "animate_anything" else task.removeprefix("reference_")
    reference = reference_of(clip.scene.things[chosen], clip, rng)
    source = (control_picture(clip, control), None)
    return _example(clip, task, rng, source, (chosen,), references=(reference,), control=control)


def _firstframe_control(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """The first frame is given, the rest is a control. Move is this with boxes."""
    control = "layout" if task == "move_anything" else task.removeprefix("firstframe_")
    first = np.arange(clip.scene.frames)[:, None, None] == 0
    return _example(clip, task, rng, keep(clip.frames, first, control_picture(clip, control)), control=control)


def _extension(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """Frames or clips are given at the ends. A clip is up to two latent frames long: at most half of the video."""
    frames = clip.scene.frames
    first, last = (min(count, (frames + 1) // 2) for count in KEPT_AT_ENDS[task])
    index = np.arange(frames)[:, None, None]
    return _example(clip, task, rng, keep(clip.frames, (index < first) | (index >= frames - last)))


def _inpainting(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """The region of one thing, as its grown outline or its box, is unknown."""
    return _example(clip, task, rng, keep(clip.frames, ~region(clip, chosen, rng.random() < 0.5)), (chosen,))


def _outpainting(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    return _example(clip, task, rng, keep(clip.frames, _window(clip, rng)))


def _expand(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """Outpainting with a reference, from the whole clip or, as VACE's own tool makes it, from the first frame alone."""
    kept = _window(clip, rng)
    if rng.random() < 0.5:
        kept = kept & (np.arange(clip.scene.frames)[:, None, None] == 0)
    reference = reference_of(clip.scene.things[chosen], clip, rng)
    return _example(clip, task, rng, keep(clip.frames, kept), (chosen,), references=(reference,))


def _swap(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """The scene had another thing here: its place is unknown, boxed so that no outline is given away."""
    scene = clip.scene
    old = scene.things[chosen]
    others = [thing for i, thing in enumerate(scene.things) if i != chosen]
    half = (scene.width / (2 * scene.unit), scene.height / (2 * scene.unit))
    # A person stays one, since no other thing walks; the rest change their shape as well.
    shapes = [shape for shape in SHAPES if (shape == old.shape) == (old.shape == "person")]
    new = draw_thing(
        rng, scene.split, scene.background, others, half, shapes=shapes, kinds=[old.motion.kind], avoid=old.colour
    )
    new = replace(new, x=old.x, y=old.y, depth=old.depth, size=old.size, radius=old.radius, motion=old.motion)
    truth = Clip(_with(scene, chosen, new))
    unknown = region(clip, chosen, boxed=True) | region(truth, chosen, boxed=True)
    reference = reference_of(new, truth, rng)
    return _example(truth, task, rng, keep(truth.frames, ~unknown), (chosen,), references=(reference,))


def _character(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """Someone else takes a person's place: their region shows the pose alone, the reference who it shall be."""
    unknown = region(clip, chosen, boxed=True)
    pose = np.where(clip.pose.any(-1, keepdims=True), clip.pose, np.uint8(UNKNOWN_GREY))
    reference = reference_of(clip.scene.things[chosen], clip, rng)
    source = keep(clip.frames, ~unknown, pose)
    return _example(clip, task, rng, source, (chosen,), references=(reference,), control="pose")


def _try_on(clip: Clip, task: str, rng: Rng, chosen: int) -> TaskClip:
    """New cloth for a person's shirt, or a new pattern for a thing: only that is unknown; the reference shows it."""
    scene = clip.scene
    thing = scene.things[chosen]
    pattern = pick(rng, [p for p in ("striped", "spotted", "checked") if p != thing.pattern])
    hidden = hidden_colours(scene.background)
    seconds = [c for c in PATTERN_COLOURS if c not in (thing.colour, thing.second, *hidden)] or ["white"]
    truth = Clip(_with(scene, chosen, replace(thing, pattern=pattern, second=pick(rng, seconds))))
    unknown = _grow(truth.garment(chosen) & (truth.masks == chosen + 1), max(1, scene.unit // 48))
    reference = garment_picture(truth.scene.things[chosen], scene.unit)
    return _example(truth, task, rng, keep(truth.frames, ~unknown), (chosen,), references=(reference,))


_BUILDERS: dict[str, Callable[[Clip, str, Rng, int], TaskClip]] = {
    "t2v": _text,
    "r2v": _subjects,
    "r2v_several": _subjects,
    **dict.fromkeys(CONTROLS, _control),
    "inpainting": _inpainting,
    "outpainting": _outpainting,
    **dict.fromkeys(KEPT_AT_ENDS, _extension),
    **{f"firstframe_{control}": _firstframe_control for control in MIXED},
    **{f"reference_{control}": _reference_control for control in MIXED},
    "swap_anything": _swap,
    "animate_anything": _reference_control,
    "move_anything": _firstframe_control,
    "expand_anything": _expand,
    "character_replacement": _character,
    "try_on": _try_on,
}


# --- regions ---------------------------------------------------------------------------------------------------------


def region(clip: Clip, thing: int, boxed: bool) -> np.ndarray:
    """Where a thing is, with room around it, bool ``[T, H, W]``: its box or its grown outline."""
    room = max(2, clip.scene.unit // 20)
    if not boxed:
        return _grow(clip.coverage[thing] > 0, room)
    out = np.zeros(clip.frames.shape[:3], bool)
    for frame, (left, top, right, bottom) in zip(out, clip.boxes[:, thing].tolist(), strict=True):
        if right > left:
            frame[max(top - room, 0) : bottom + room, max(left - room, 0) : right + room] = True
    return out


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return np.stack([cv2.dilate(frame.astype(np.uint8), kernel) for frame in mask]) > 0


def _window(clip: Clip, rng: Rng) -> np.ndarray:
    """What outpainting keeps, bool ``[1, H, W]``: all but a quarter at one side, or an eighth at several."""
    height, width = clip.scene.height, clip.scene.width
    left, right, top, bottom = pick(rng, (
        (4, 0, 0, 0), (0, 4, 0, 0), (0, 0, 4, 0), (0, 0, 0, 4), (3, 3, 0, 0), (0, 0, 3, 3), (2, 2, 2, 2),
    ))  # fmt: skip
    kept = np.zeros((1, height, width), bool)
    kept[:, top * height // 12 : height - bottom * height // 12, left * width // 12 : width - right * width // 12] = (
        True
    )
    return kept


def _with(scene: Scene, number: int, thing: Thing) -> Scene:
    things = list(scene.things)
    things[number] = thing
    return replace(scene, things=tuple(things))
