"""A procedural world: short clips of moving sprites with exact annotations, captions, and every task in VACE form.

``draw_scene(seed)`` is a :class:`Scene`, a description that is JSON-able and a pure function of its arguments, seen
from far or, with ``view="near"``, with larger things; ``render(scene)`` is a :class:`Clip`, its frames and, when
asked for, depth, flow, masks, boxes, outlines and pose; ``caption(scene, rng)`` says it in words; ``draw_task(seed,
task)`` makes a training example of it. Scenes of ``split="test"`` hold no combination of colour, shape and motion
that a training scene holds.

A second on one core of a busy machine gives 150 to 200 clips of 17x64x64, 110 tasks with all parts, or 3000 captions.
"""

from vdot.data.sprites.captions import PHRASINGS, caption, corpus
from vdot.data.sprites.draw import draw_scene, scenes
from vdot.data.sprites.render import Clip, render
from vdot.data.sprites.scene import (
    BACKGROUNDS,
    COLOURS,
    FPS,
    SHAPES,
    Background,
    Motion,
    Scene,
    Thing,
    split_of,
)
from vdot.data.sprites.tasks import CONTROLS, NEEDS_PERSON, TASKS, TaskClip, build_task, count_references, draw_task

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "CONTROLS",
    "FPS",
    "NEEDS_PERSON",
    "PHRASINGS",
    "SHAPES",
    "TASKS",
    "Background",
    "Clip",
    "Motion",
    "Scene",
    "TaskClip",
    "Thing",
    "build_task",
    "caption",
    "corpus",
    "count_references",
    "draw_scene",
    "draw_task",
    "render",
    "scenes",
    "split_of",
]
