"""From raw material to what the model takes: source video, mask and references of every VACE task.

``annotate(task, Material(...))`` is an :class:`Annotated`, which saves itself; ``control`` and ``track`` are the parts
that others use alone. What can be done without weights is; for the rest backends are chosen (:mod:`.backends`).
"""

from vdot.annotate.controls import CONTROLS
from vdot.annotate.material import UNKNOWN, Annotated, Material
from vdot.annotate.tasks import TASKS, annotate, control, track

__all__ = ["CONTROLS", "TASKS", "UNKNOWN", "Annotated", "Material", "annotate", "control", "track"]
