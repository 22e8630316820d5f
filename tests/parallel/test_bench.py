"""Measuring shared by 1, 2 and 3 processes: the same rows in the same order, each measured once."""

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from vdot.bench.scoring import Scorer, score_all
from vdot.evaluate.cases import Sample
from vdot.parallel.state import Ranks
from vdot.video import write_video


def measure(folder: str, world: int) -> tuple[list[Any], int]:
    """The rows that this rank got, and how many samples it measured."""
    clips = Path(folder)
    count = 0

    class Counting(Scorer):
        def __call__(self, sample: Sample) -> Any:
            nonlocal count
            count += 1
            return super().__call__(sample)

    samples = [Sample("gray", f"{i}", "words", clips / "source.mp4") for i in range(5)]
    ranks = Ranks() if world == 1 else Ranks(rank=dist.get_rank(), world=world)
    rows = score_all(samples, Counting(clips / f"of{world}", {"by": "test"}), ranks)
    return [(row.key, row.values, row.message) for row in rows], count


def test_any_number_of_processes_gives_the_same_rows(pool, tmp_path):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "source.mp4", rng.integers(0, 256, (5, 32, 32, 3), np.uint8), 8)
    for size in (1, 2, 3):
        for i in range(4):  # the fifth has no video
            frames = np.random.default_rng(i + 1).integers(0, 256, (5, 32, 32, 3), np.uint8)
            write_video(tmp_path / f"of{size}" / "gray" / f"{i}.mp4", frames, 8)
    found = {1: [measure(str(tmp_path), 1)]}
    found |= {size: pool.run(size, measure, str(tmp_path), size, seconds=300) for size in (2, 3)}
    rows = found[1][0][0]
    assert [key for key, _, _ in rows] == [f"gray/{i}" for i in range(5)]
    assert rows[4][2] == "no video" and rows[0][1]["gray_error"] > 10
    for size, answers in found.items():
        assert answers[0][0] == rows and all(others == [] for others, _ in answers[1:])
        assert sum(count for _, count in answers) == 5, size
