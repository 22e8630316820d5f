"""One video of a benchmark -> every number that can be had of it, and a score.

The score of a sample. For each metric m with the anchors worst and best below: ``s = clip((v - worst) / (best - worst),
0, 1)``, v by its magnitude where 0 is best. The score is 100 times the mean over groups of the mean over their metrics.
Only what needs no weights counts, so that everybody measures the same; the rest is told beside it. What was not
measured is ``None`` and counts nowhere. The paper's own normalised average could not be established.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vdot.annotate.backends import Tools
from vdot.annotate.controls import make_control
from vdot.data.sprites.tasks import TaskClip
from vdot.errors import MissingDependencyError
from vdot.evaluate import control, kept, motion, picture
from vdot.evaluate.cases import Case
from vdot.evaluate.fields import luminance
from vdot.evaluate.measure import METRICS, Better, Measurer, Values

VBENCH = (
    "aesthetic_quality", "background_consistency", "dynamic_degree", "imaging_quality", "motion_smoothness",
    "subject_consistency",
)  # fmt: skip
# The paper's Table: normalised average of VBench's six dimensions, in percent, by number of network evaluations.
PAPER: dict[str, dict[str, float]] = {
    "VACE-14B, 100 evaluations": {
        "depth": 77.34, "pose": 79.56, "flow": 80.35, "scribble": 76.63, "gray": 72.44, "outpainting": 75.49,
        "extension": 77.10, "r2v": 82.54,
    },
    "VDOT, 4 evaluations": {
        "depth": 78.50, "pose": 80.54, "flow": 80.18, "scribble": 76.77, "gray": 72.13, "outpainting": 76.54,
        "extension": 80.53, "r2v": 81.32,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How a metric is read: ``worst`` and ``best`` are what give 0 and 1; without them it is told and not scored.

    ``needs``: what must be there for it to be measured.
    """

    group: str
    better: Better
    unit: str
    worst: float | None
    best: float | None
    about: str
    source: str
    needs: str = ""

    def skill(self, value: float) -> float | None:
        """0..1, or ``None`` where it is not scored."""
        if self.worst is None or self.best is None:
            return None
        v = abs(value) if self.better == "zero" else value
        return float(np.clip((v - self.worst) / (self.best - self.worst), 0, 1))


def _known(name: str, worst: float, best: float, source: str, needs: str = "") -> Scale:
    """Of a metric of :data:`vdot.evaluate.measure.METRICS`."""
    m = METRICS[name]
    return Scale(m.group, m.better, m.unit, worst, best, m.about, source, needs)


_OWN, _WORLD = "this project", "the truth of the procedural world"
SCALES: dict[str, Scale] = {
    **{name: _known(name, 0, 1, _OWN, _WORLD) for name in (
        "things_right", "present", "shape_right", "motion_right", "count_right", "shape_overlap", "place_overlap")},
    "colour_error": _known("colour_error", 50, 0, "CIE 1976", _WORLD),
    "motion_error": _known("motion_error", 0.25, 0, _OWN, _WORLD),
    "place_error": _known("place_error", 0.5, 0, _OWN, _WORLD),
    "scribble_f1": _known("scribble_f1", 0, 1, "edge F1, Martin et al. 2004"),
    "depth_edges": _known("depth_edges", 0, 1, _OWN),
    "flow_control_error": _known("flow_control_error", 1, 0, "end-point error, Baker et al. 2011", _WORLD),
    "gray_error": _known("gray_error", 64, 0, "mean absolute error"),
    "gray_ssim": _known("gray_ssim", 0, 1, "Wang et al. 2004"),
    "skeleton_overlap": _known("skeleton_overlap", 0, 1, _OWN, _WORLD),
    "box_overlap": _known("box_overlap", 0, 1, "intersection over union", _WORLD),
    "scribble_agreement": Scale("control", "higher", "0..1", 0, 1,
        "F1 of the lines drawn again from the video against the control's", "edge F1, Martin et al. 2004"),
    "flow_agreement": Scale("control", "lower", "levels of 255, from 0", 64, 0,
        "mean difference of the flow's picture made again and the control's", _OWN),
    "depth_agreement": Scale("control", "higher", "-1..1", 0, 1,
        "correlation of depth estimated again with the control's", "scale and shift free, Ranftl et al. 2020",
        "a depth network in models/annotators"),
    "pose_agreement": Scale("control", "higher", "0..1", 0, 1,
        "F1 of the limbs found again against the control's", "edge F1, Martin et al. 2004", "mediapipe"),
    "kept_psnr": _known("kept_psnr", 10, 50, "peak signal-to-noise ratio"),
    "kept_ssim": _known("kept_ssim", 0, 1, "Wang et al. 2004"),
    "seam": _known("seam", 32, 0, _OWN),
    "joint": Scale("kept", "lower", "levels of 255", 32, 0, "step in time from kept to generated, above that beside it",
        _OWN),
    "reference_colour": _known("reference_colour", 0, 1, "Swain and Ballard 1991"),
    "reference_gradient": _known("reference_gradient", 0, 1, "Dalal and Triggs 2005"),
    "motion_ratio": _known("motion_ratio", 2, 0, _OWN, _WORLD),
    "motion_amount": Scale("motion", "higher", "short sides a frame", 0, 0.002,
        "mean length of the flow; scored up to the best, and only where no truth says how much is right",
        "dense inverse search, Kroeger et al. 2016"),
    "motion_jerk": _known("motion_jerk", 1.5, 0, _OWN),
    "flicker": _known("flicker", 24, 0, "second difference along the flow"),
    "sharpness": _known("sharpness", 3, 0, "Pech-Pacheco et al. 2000", _WORLD),
    "laplacian": Scale("picture", "higher", "levels squared", None, None,
        "variance of the Laplacian: sharpness, but noise counts as such", "Pech-Pacheco et al. 2000"),
    "brightness_drift": _known("brightness_drift", 32, 0, _OWN),
    "saturation_drift": _known("saturation_drift", 32, 0, _OWN),
    "clip_text": Scale("text", "higher", "-1..1", None, None, "cosine of prompt and frames, mean over frames",
        "CLIPScore, Hessel et al. 2021", "--clip_model"),
    "dino_identity": Scale("identity", "higher", "-1..1", None, None,
        "cosine of references and frames, mean over frames", "DINO, Caron et al. 2021", "--dino_model"),
    **{f"vbench_{name}": Scale("vbench", "higher", "0..1", None, None, f"VBench's {name.replace('_', ' ')}",
        "Huang et al. 2024", "--vbench_python or --vbench_results") for name in VBENCH},
    "evaluations": Scale("cost", "lower", "network evaluations", None, None, "guidance makes it two a step", _OWN,
        "a run.json beside the video"),
    "seconds": Scale("cost", "lower", "s", None, None, "from the prepared input to pixels, without loading", _OWN,
        "a run.json beside the video"),
    "peak_memory": Scale("cost", "lower", "GiB", None, None,
        "most in use at once: allocated on a GPU, resident in the process on a CPU", _OWN,
        "a run.json beside the video"),
}  # fmt: skip
GROUPS = tuple(dict.fromkeys(scale.group for scale in SCALES.values()))
SCORED = tuple(group for group in GROUPS if any(s.group == group and s.worst is not None for s in SCALES.values()))
# Stand-ins, and what counts in their stead where it was measured.
INSTEAD = {
    "motion_amount": "motion_ratio",
    "scribble_f1": "scribble_agreement",
    "depth_edges": "depth_agreement",
}
LIMBS = 60  # of 255: what is brighter in a pose picture is drawn


def measure_video(case: TaskClip | Case, frames: np.ndarray) -> tuple[Values, dict[str, str]]:
    """What needs no weights, and agreement with controls made again; and by whom they were made, or why not.

    Raises:
        InputError: the video is not of the case's shape.
    """
    values = dict.fromkeys(SCALES) | {name: v for name, v in Measurer(case)(frames).items() if name in SCALES}
    values["motion_amount"] = motion.motion_amount(frames)
    values["laplacian"] = picture.laplacian_variance(frames)
    mask = None if case.src_mask is None else kept.generated(case.src_mask)
    if mask is not None:
        values["joint"] = kept.joint(frames, mask)
    again, by = agreement(case, frames, mask)
    return {name: _finite(value) for name, value in (values | again).items()}, by


def _finite(value: float | None) -> float | None:
    """A plain number; what came out as none is not measured."""
    return float(value) if value is not None and np.isfinite(value) else None


def agreement(case: TaskClip | Case, frames: np.ndarray, where: np.ndarray | None) -> tuple[Values, dict[str, str]]:
    """The control made again from the video by the project's annotators and compared, where the mask generates.

    The procedural world's controls are exact and no annotator's, and are measured exactly.
    """
    given = case.src_video
    if case.scene is not None or given is None or case.control not in _COMPARED:
        return {}, {}
    name, compare = _COMPARED[case.control]
    tools = Tools()
    try:
        found = make_control(case.control, frames, tools)
    except MissingDependencyError as error:
        return {}, {case.control: str(error)}
    shown = np.ones(frames.shape[:3], bool) if where is None else where
    return {name: compare(found, given, shown)}, dict(tools.used)


def depth_agreement(found: np.ndarray, given: np.ndarray, where: np.ndarray) -> float | None:
    """Correlation of two depth pictures over the clip, -1..1, higher is better; ``None`` where one is flat.

    Blind to scale and shift, which depth networks leave open, and to which of near and far is bright only in so far as
    the sign says it.
    """
    a, b = (luminance(clip)[where].astype(np.float64) for clip in (found, given))
    if not a.size or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def line_agreement(found: np.ndarray, given: np.ndarray, where: np.ndarray) -> float | None:
    """F1 of what two clips draw on black, 0..1, higher is better; ``None`` where neither draws anything."""
    a, b = ((clip.max(-1) > LIMBS) & where for clip in (found, given))
    return control.edge_scores(a, b, control.tolerance_of(given))[2] if a.any() or b.any() else None


def picture_agreement(found: np.ndarray, given: np.ndarray, where: np.ndarray) -> float | None:
    """Mean absolute difference of two pictures in levels of 255, 0 is best."""
    gaps = np.abs(found.astype(np.float32) - given)[where]
    return float(gaps.mean()) if gaps.size else None


_COMPARED = {
    "depth": ("depth_agreement", depth_agreement),
    "pose": ("pose_agreement", line_agreement),
    "scribble": ("scribble_agreement", line_agreement),
    "flow": ("flow_agreement", picture_agreement),
}


def group_skills(values: Values) -> dict[str, float]:
    """Mean skill of each group that something was measured of, 0..1."""
    skills: dict[str, list[float]] = {}
    for name, value in values.items():
        if value is None or values.get(INSTEAD.get(name, "")) is not None:
            continue
        skill = SCALES[name].skill(value)
        if skill is not None:
            skills.setdefault(SCALES[name].group, []).append(skill)
    return {group: float(np.mean(found)) for group, found in skills.items()}


def score_of(values: Values) -> float | None:
    """0..100, higher is better; ``None`` when nothing was measured."""
    groups = group_skills(values)
    return 100 * float(np.mean(list(groups.values()))) if groups else None


def vbench_average(values: Values | dict[str, float]) -> float | None:
    """100 times the plain mean of VBench's six dimensions; ``None`` unless all six were measured."""
    found: Sequence[float | None] = [values.get(f"vbench_{name}") for name in VBENCH]
    known = [value for value in found if value is not None]
    return 100 * float(np.mean(known)) if len(known) == len(VBENCH) else None
