"""Tasks to evaluate on: held out, every task equally often, the same for everybody."""

from collections.abc import Iterator, Sequence

from vdot.data.sprites.tasks import TASKS, TaskClip, draw_task
from vdot.errors import InputError

COUNT = 512  # 16 of each task
FIRST_SEED = 900_000  # far from the seeds that training starts at; the split keeps the scenes apart in any case


def benchmark_tasks(
    count: int = COUNT,
    tasks: Sequence[str] = TASKS,
    *,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    view: str = "far",
) -> Iterator[TaskClip]:
    """``count`` held-out examples, the tasks in turn: a function of its arguments alone.

    No combination of colour, shape and motion in them occurs in a training scene. ``InputError`` for unknown tasks.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks:
        raise InputError(f"unknown tasks {', '.join(unknown) or '(none named)'}: use some of {', '.join(TASKS)}")
    options = {"frames": frames, "height": height, "width": width, "view": view}
    return (draw_task(FIRST_SEED + i, tasks[i % len(tasks)], split="test", **options) for i in range(count))


def benchmark_prompts(count: int = COUNT, tasks: Sequence[str] = TASKS) -> list[str]:
    """The prompts of :func:`benchmark_tasks`, at its usual size."""
    return [task.prompt for task in benchmark_tasks(count, tasks)]
