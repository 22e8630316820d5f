"""Every sample measured once: shared by all processes, kept beside the videos, made anew when anything changed."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vdot.bench.manifest import digest, sample_hash
from vdot.data.sprites.tasks import TaskClip
from vdot.errors import VdotError, one_line
from vdot.evaluate.cases import Case, Loader, Sample
from vdot.evaluate.networks import ClipText, DinoIdentity
from vdot.evaluate.results import Measured
from vdot.evaluate.uvcbench import SCALES, Values, measure_video
from vdot.parallel.mesh import Mesh
from vdot.parallel.state import Queue, Ranks
from vdot.record import file_hash
from vdot.runtime import clock, log
from vdot.video import probe, read_frames
from vdot.video.output import atomic_path

MISSING = "no video"


@dataclass(frozen=True)
class Scorer:
    """Measures samples whose videos lie in ``folder``; ``how`` is :func:`vdot.bench.manifest.measurement`'s."""

    folder: Path
    how: Mapping[str, Any]
    clip: ClipText | None = None
    dino: DinoIdentity | None = None

    def video(self, sample: Sample) -> Path:
        return self.folder / f"{sample.key}.mp4"

    def record(self, sample: Sample) -> dict[str, Any]:
        """The run.json that speaks of this very video; empty when there is none (somebody else's video)."""
        video = self.video(sample)
        try:
            values = json.loads((self.folder / sample.key / "run.json").read_text(encoding="utf-8"))
            return values if values["outputs"][video.name] == file_hash(video) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def __call__(self, sample: Sample) -> Measured:
        """Never raises for a video that is missing or bad: the sample says so, the others are measured."""
        row = (sample.key, sample.subtask, sample.sample_id, sample.task, sample.prompt)
        nothing: Values = dict.fromkeys(SCALES)
        if not self.video(sample).is_file():
            return Measured(*row, nothing, MISSING)
        try:
            record = self.record(sample)
            values, notes = self._kept(sample, record)
            return Measured(*row, values | cost(record), "", notes)
        except VdotError as error:
            return Measured(*row, nothing, one_line(error))
        except Exception as error:  # a bug of ours: it is shown in full, and the other videos are measured all the same
            log.error("%s: unexpected error", sample.key, exc_info=True)
            return Measured(*row, nothing, f"unexpected {type(error).__name__}: {one_line(error)}")

    def load(self, sample: Sample, record: Mapping[str, Any] | None = None) -> tuple[TaskClip | Case, np.ndarray]:
        """What is measured against, and the video's frames."""
        config = (self.record(sample) if record is None else record).get("config", {})
        video = self.video(sample)
        frames = read_frames(video, range(probe(video).frames))
        return Loader(sample, config.get("frame_mode") or "spread", config.get("fps"))(frames.shape), frames

    def _kept(self, sample: Sample, record: Mapping[str, Any]) -> tuple[Values, dict[str, str]]:
        """From ``scores/<key>.json``, if that speaks of this video and this way of measuring."""
        path = self.folder / "scores" / f"{sample.key}.json"
        timing = {name: record.get("config", {}).get(name) for name in ("frame_mode", "fps")}
        of = digest([dict(self.how), file_hash(self.video(sample)), sample_hash(sample), timing])
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["of"] == of:
                return dict.fromkeys(SCALES) | known["values"], known["notes"]
        case, frames = self.load(sample, record)
        values, notes = measure_video(case, frames)
        if self.clip is not None:
            values["clip_text"] = self.clip(frames, sample.prompt)
        if self.dino is not None:
            values["dino_identity"] = self.dino(frames, case.references)
        with atomic_path(path) as temporary:
            text = json.dumps({"of": of, "values": values, "notes": notes}, indent=1) + "\n"
            Path(temporary).write_text(text, encoding="utf-8")
        return values, notes


def cost(record: Mapping[str, Any]) -> Values:
    """What a video took, of its run.json; nothing is known of others' videos."""
    seconds = {name: value for name, value in record.get("seconds", {}).items() if name != "load"}
    schedule, peak = record.get("schedule") or {}, record.get("machine", {}).get("peak_memory")
    guided = schedule.get("guide_scale") not in (None, 1, 1.0)
    return {
        "seconds": sum(seconds.values()) if seconds else None,
        "evaluations": schedule["steps"] * (2.0 if guided else 1.0) if "steps" in schedule else None,
        "peak_memory": peak / 2**30 if peak else None,
    }


def score_all(samples: list[Sample], scorer: Scorer, ranks: Ranks) -> list[Measured]:
    """Each process takes the next sample when it is free; all of them, in order, on the first one."""
    alone = replace(ranks, mesh=Mesh(), control=None)  # a video is measured by one process, whatever made it
    queue, start = Queue(alone, len(samples), "vdot-scores"), time.perf_counter()
    for index in queue:
        measured = scorer(samples[index])
        if measured.message:
            log.warning("%s: %s", measured.key, measured.message)
        if (index + 1) % 20 == 0:  # of all processes together
            left = (time.perf_counter() - start) / (index + 1) * (len(samples) - index - 1)
            log.info("measured %d of %d (about %s to go)", index + 1, len(samples), clock(left))
        queue.report(index, asdict(measured))
    rows = [Measured(**row) for row in queue.collect()]
    queue.close()
    return rows
