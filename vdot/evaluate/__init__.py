"""Generated videos measured without weights: against the world they show, the control they got, and real clips.

``evaluate(clips)`` makes the table; ``judge(frames, scene)`` says what of a scene is there; the metrics themselves are
functions of uint8 clips ``[T, H, W, 3]`` in ``control``, ``kept``, ``motion``, ``picture``, ``identity`` and
``distribution``. What cannot be measured is ``None``. Frames come from the caller: nothing here generates.
"""

from vdot.evaluate.benchmark import benchmark_prompts, benchmark_tasks
from vdot.evaluate.measure import METRICS, Measurer, Metric
from vdot.evaluate.report import Table, compare, compare_scores, evaluate, reference_points
from vdot.evaluate.truth import Found, Judge, Verdict, judge

__all__ = [
    "METRICS",
    "Found",
    "Judge",
    "Measurer",
    "Metric",
    "Table",
    "Verdict",
    "benchmark_prompts",
    "benchmark_tasks",
    "compare",
    "compare_scores",
    "evaluate",
    "judge",
    "reference_points",
]
