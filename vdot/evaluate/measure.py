"""One generated clip -> every number that its task allows. What cannot be measured is ``None``, never 0."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from vdot.data.sprites.render import Clip
from vdot.data.sprites.scene import Scene
from vdot.errors import InputError
from vdot.evaluate import control, identity, kept, motion, picture
from vdot.evaluate.fields import check_clip, check_pair, optical_flow
from vdot.evaluate.truth import Found, Judge, Verdict

Values = dict[str, float | None]
Better = Literal["higher", "lower", "zero"]
Floor = Literal["other", "pasted", "shuffled"] | float


@dataclass(frozen=True)
class Metric:
    """``floor`` is what a video gets that deserves nothing: another clip of the task (``other``), that clip in the hole
    that the mask leaves (``pasted``), the truth with its frames in random order (``shuffled``), or a fixed value. The
    ceiling is what the truth itself gets."""

    group: str
    better: Better
    unit: str
    floor: Floor
    about: str


METRICS: dict[str, Metric] = {
    "things_right": Metric("content", "higher", "0..1", "other", "things present in their colour, shape and motion"),
    "present": Metric("content", "higher", "0..1", "other", "things found in their colour"),
    "shape_right": Metric("content", "higher", "0..1", "other", "of the things found, those in their shape"),
    "motion_right": Metric("content", "higher", "0..1", "other", "of the things found, those that move as asked"),
    "count_right": Metric("content", "higher", "0..1", "other", "every thing present and none too many"),
    "colour_error": Metric("content", "lower", "CIE76, from 0", "other", "mean colour of things against the truth's"),
    "shape_overlap": Metric("content", "higher", "0..1", "other", "outline against the shape asked for, any rotation"),
    "motion_error": Metric("content", "lower", "short sides", "other", "from the best path of the motion asked for"),
    "place_overlap": Metric("place", "higher", "0..1", "other", "masks of things against the truth's, missing: 0"),
    "place_error": Metric("place", "lower", "short sides", "other", "between centroids of things and truth's"),
    "scribble_f1": Metric("control", "higher", "0..1", "other", "Canny edges against the scribble"),
    "depth_edges": Metric("control", "higher", "up to 1", "other", "jumps in depth that are edges, above chance"),
    "flow_control_error": Metric("control", "lower", "pixels a frame", "other", "flow against the control, from 0"),
    "gray_error": Metric("control", "lower", "levels of 255, from 0", "other", "luminance against the grey control"),
    "gray_ssim": Metric("control", "higher", "-1..1", "other", "structural similarity with the grey control"),
    "skeleton_overlap": Metric("control", "higher", "0..1", "other", "the person's mask against the limbs"),
    "box_overlap": Metric("control", "higher", "0..1", "other", "boxes around the things against those given"),
    "kept_psnr": Metric("kept", "higher", "dB, at most 60", "other", "kept pixels against the source"),
    "kept_ssim": Metric("kept", "higher", "-1..1", "other", "kept pixels against the source, structure"),
    "seam": Metric("kept", "lower", "levels of 255", "pasted", "step across the mask's border above the truth's"),
    "reference_colour": Metric("identity", "higher", "0..1", "other", "colours of reference and thing in common"),
    "reference_gradient": Metric("identity", "higher", "0..1", "other", "edge directions in common"),
    "motion_ratio": Metric("motion", "zero", "octaves", 2.0, "amount of motion against the truth's"),
    "motion_jerk": Metric("motion", "lower", "from 0", "shuffled", "change of the flow relative to its length"),
    "flicker": Metric("motion", "lower", "levels of 255, from 0", "shuffled", "what neighbours, moved, do not explain"),
    "sharpness": Metric("picture", "zero", "octaves", 3.0, "Laplacian variance against the truth's"),
    "brightness_drift": Metric("picture", "zero", "levels of 255", 32.0, "last quarter less first, less the truth's"),
    "saturation_drift": Metric("picture", "zero", "levels of 255", 32.0, "as brightness, of max(RGB) - min(RGB)"),
}  # fmt: skip
GROUPS = tuple(dict.fromkeys(metric.group for metric in METRICS.values()))


class Task(Protocol):
    """What is measured against: a :class:`~vdot.data.sprites.tasks.TaskClip`, or the like without video and scene."""

    @property
    def src_video(self) -> np.ndarray | None: ...
    @property
    def src_mask(self) -> np.ndarray | None: ...
    @property
    def references(self) -> tuple[np.ndarray, ...]: ...
    @property
    def control(self) -> str: ...
    @property
    def video(self) -> np.ndarray | None: ...
    @property
    def scene(self) -> Scene | None: ...
    @property
    def things(self) -> tuple[int, ...]: ...


class Measurer:
    """All measurements of videos for one task; what depends on the task alone is computed once.

    Where no scene is known, nothing is said of content and place, of poses and boxes, and references are looked for
    everywhere. Where no truth is known, what is relative to it is ``None``; seams and drifts are as they are.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.unknown = None if task.src_mask is None else kept.generated(task.src_mask)

    @cached_property
    def judge(self) -> Judge | None:
        return None if self.task.scene is None else Judge(Clip(self.task.scene))

    def __call__(self, frames: np.ndarray) -> Values:
        """``frames`` uint8 ``[T, H, W, 3]`` like the task's video (or its source); ``InputError`` otherwise."""
        like = self.task.src_video if self.task.video is None else self.task.video
        if like is None:
            check_clip(frames)
        else:
            check_pair(frames, like)
        masks, content = None, {}
        if self.judge is not None:
            masks, foreground = self.judge.masks(frames)
            content = self._content(self.judge.weigh(frames, masks, foreground))
        return {
            **dict.fromkeys(METRICS),
            **content,
            **self._control(frames, masks),
            **self._kept(frames),
            **self._identity(frames, masks),
            **self._motion(frames),
            **self._picture(frames),
        }

    @cached_property
    def _wanted_motion(self) -> float | None:
        return None if self.task.video is None else motion.motion_amount(self.task.video)

    @property
    def _truth(self) -> np.ndarray:
        if self.task.video is None:
            raise InputError("of this task no truth is known, and so no reference points either")
        return self.task.video

    def ceiling(self) -> Values:
        """What the truth gets."""
        return self(self._truth)

    def floor(self, other: np.ndarray | None) -> Values:
        """What deserves nothing gets; ``other`` is the truth of another clip of the task, if there is one."""
        truth = self._truth
        strange = {} if other is None else self(other)
        pasted = None if other is None or self.unknown is None else np.where(self.unknown[..., None], other, truth)
        values = {
            "other": strange,
            "pasted": {} if pasted is None else self._kept(pasted),
            "shuffled": self._motion(truth[np.random.default_rng(0).permutation(len(truth))]),
        }
        return {
            name: values[metric.floor].get(name) if isinstance(metric.floor, str) else metric.floor
            for name, metric in METRICS.items()
        }

    def _content(self, verdict: Verdict) -> Values:
        values: Values = {
            "things_right": verdict.right,
            "present": _mean(verdict.things, lambda thing: thing.present),
            "count_right": float(verdict.count_right),
            "shape_right": _mean(verdict.things, lambda thing: thing.shape),
            "motion_right": _mean(verdict.things, lambda thing: thing.motion),
            "colour_error": _mean(verdict.things, lambda thing: thing.colour_error),
            "shape_overlap": _mean(verdict.things, lambda thing: thing.shape_overlap),
            "motion_error": _mean(verdict.things, lambda thing: thing.motion_error),
        }
        if self.task.src_video is None:  # words and references leave the place open
            return values
        overlaps = [thing.place_overlap or 0.0 for thing in verdict.things]
        return {
            **values,
            "place_overlap": float(np.mean(overlaps)),
            "place_error": _mean(verdict.things, lambda thing: thing.place_error),
        }

    def _control(self, frames: np.ndarray, masks: np.ndarray | None) -> Values:
        given, where = self.task.src_video, self.unknown
        if given is None:
            return {}
        match self.task.control:
            case "scribble":
                return {"scribble_f1": control.scribble_f1(frames, given, where)}
            case "depth":
                return {"depth_edges": control.depth_edges(frames, given, where)}
            case "flow" if self.task.scene is not None:  # others paint flow in other colours
                return {"flow_control_error": control.flow_control_error(frames, given, where)}
            case "gray":
                error, likeness = control.gray_error, control.gray_ssim
                return {"gray_error": error(frames, given, where), "gray_ssim": likeness(frames, given, where)}
            case "pose" if self.judge is not None and masks is not None:
                return {"skeleton_overlap": self._skeleton(self.judge.clip, masks)}
            case "layout" if self.judge is not None and masks is not None:
                return {"box_overlap": control.box_overlap(masks, self.judge.clip.boxes)}
        return {}

    @staticmethod
    def _skeleton(clip: Clip, masks: np.ndarray) -> float | None:
        """Of all people together, against limbs drawn anew: in a source they may lie on grey."""
        people = [i for i, thing in enumerate(clip.scene.things) if thing.shape == "person"]
        size = max(clip.scene.things[i].radius for i in people) * clip.scene.unit
        return control.skeleton_overlap(masks[people].max(axis=0), clip.pose, 0.24 * size)

    def _kept(self, frames: np.ndarray) -> Values:
        source, mask = self.task.src_video, self.unknown
        if source is None or mask is None:
            return {}
        return {
            "kept_psnr": kept.kept_psnr(frames, source, mask),
            "kept_ssim": kept.kept_ssim(frames, source, mask),
            "seam": kept.seam(frames, mask, self.task.video),
        }

    def _identity(self, frames: np.ndarray, masks: np.ndarray | None) -> Values:
        if masks is None:
            scores = [identity.reference_similarity(reference, frames) for reference in self.task.references]
        else:
            scores = [
                identity.reference_similarity(reference, frames, masks[thing])
                for thing, reference in zip(self.task.things, self.task.references, strict=False)
            ]
        colour, gradient = (_mean(scores, lambda score, k=k: score[k]) for k in (0, 1))
        return {"reference_colour": colour, "reference_gradient": gradient}

    def _motion(self, frames: np.ndarray) -> Values:
        flow = optical_flow(frames) if len(frames) > 1 else None
        own, wanted = motion.motion_amount(frames, flow), self._wanted_motion
        # A tenth of a pixel over the clip of 64 is what the matcher finds in a still.
        ratio = None if own is None or wanted is None else float(np.log2((own + 1e-4) / (wanted + 1e-4)))
        jerk, flicker = motion.motion_jerk(frames, flow), motion.flicker(frames, flow)
        return {"motion_ratio": ratio, "motion_jerk": jerk, "flicker": flicker}

    def _picture(self, frames: np.ndarray) -> Values:
        truth = self.task.video
        drifts = {"brightness_drift": picture.brightness_drift, "saturation_drift": picture.saturation_drift}
        values: Values = {"sharpness": None if truth is None else picture.sharpness(frames, truth)}
        for name, drift in drifts.items():
            own, true = drift(frames), 0.0 if truth is None else drift(truth)
            values[name] = None if own is None or true is None else own - true
        return values


def _mean(items: tuple[Found, ...] | list, value: Callable[..., float | bool | None]) -> float | None:
    """Of what was measured; ``None`` when nothing was."""
    known = [float(v) for v in map(value, items) if v is not None]
    return float(np.mean(known)) if known else None
