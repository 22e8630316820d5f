"""Measuring shared by 1, 2 and 3 ranks: the same rows in the same order, each measured once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from vdot.bench.scoring import Scorer, score_all
from vdot.evaluate.cases import Sample
from vdot.parallel.state import Ranks
from vdot.video import write_video


class Counting(Scorer):
    def __call__(self, sample: Sample) -> Any:
        self.how["calls"].append(sample.key)
        return Scorer(self.folder, {"by": "test"})(sample)


def measure(folder: Path, world: int, monkeypatch: Any) -> tuple[list[Any], list[str]]:
    """The rows of each rank and the samples that were measured, by ranks as threads around a launcher's store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    samples = [Sample("gray", f"{i}", "words", folder / "source.mp4") for i in range(5)]
    scorer = Counting(folder / f"of{world}", {"calls": []})
    with ThreadPoolExecutor(world) as threads:
        found = list(threads.map(lambda rank: score_all(samples, scorer, Ranks(rank=rank, world=world)), range(world)))
    return [[(row.key, row.values, row.message) for row in rows] for rows in found], scorer.how["calls"]


def test_any_number_of_ranks_gives_the_same_rows(tmp_path, monkeypatch):
    """Real processes: ``test_one_two_and_three_processes_give_the_same_table`` (slow)."""
    write_video(tmp_path / "source.mp4", np.random.default_rng(9).integers(0, 256, (5, 32, 32, 3), np.uint8), 8)
    found = {}
    for world in (1, 2, 3):
        for i in range(4):  # the fifth has no video
            frames = np.random.default_rng(i).integers(0, 256, (5, 32, 32, 3), np.uint8)
            write_video(tmp_path / f"of{world}" / "gray" / f"{i}.mp4", frames, 8)
        found[world] = measure(tmp_path, world, monkeypatch)
    rows = found[1][0][0]
    assert [key for key, _, _ in rows] == [f"gray/{i}" for i in range(5)]
    assert rows[4][2] == "no video" and rows[0][1]["gray_error"] > 10
    for world, (answers, calls) in found.items():
        assert answers == [rows] + [[]] * (world - 1)
        assert sorted(calls) == [f"gray/{i}" for i in range(5)], world
