"""VBench's six dimensions for any video, by an installed VBench in an environment of its own.

It pins libraries that cannot be installed beside ours, so nothing of it is imported here: its Python is started with
one folder of all videos, and what it writes is read. The scale is VBench's own, 0..1, higher is better.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdot.errors import InputError
from vdot.evaluate.measure import Values
from vdot.evaluate.uvcbench import VBENCH
from vdot.runtime import log
from vdot.video.output import atomic_path

# Run by VBench's Python: folder of videos, folder for results, device, dimensions.
DRIVER = """
import os, sys
import torch, vbench
videos, results, device, *dimensions = sys.argv[1:]
info = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
bench = vbench.VBench(torch.device(device), info, results)
bench.evaluate(videos_path=videos, name="videos", dimension_list=dimensions, mode="custom_input")
"""
JOIN = "__"  # between subtask and sample_id in the names that VBench gets: it wants one flat folder


def check_python(python: str) -> str:
    """The executable's full path. ``InputError`` if there is none."""
    found = shutil.which(python)
    if found is None:
        raise InputError(f"--vbench_python {python} cannot be run: give the python of the environment VBench is in")
    return found


def run_vbench(
    python: str, videos: Mapping[str, Path], folder: Path, device: str, hashes: Mapping[str, str]
) -> dict[str, Values]:
    """Values of each video by key, resumed from ``folder/values.json`` where the same videos were measured before.

    What VBench says goes to ``folder/log.txt``. A dimension that it does not give stays away.

    Raises:
        InputError: it ends with an error, or without results.
    """
    digest = hashlib.sha256(json.dumps([check_python(python), dict(sorted(hashes.items()))]).encode()).hexdigest()
    kept = folder / "values.json"
    try:
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        if earlier["videos"] == digest:
            return earlier["values"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    flat = folder / "videos"
    flat.mkdir(parents=True)
    for key, video in videos.items():
        os.symlink(video.resolve(), flat / f"{key.replace('/', JOIN)}.mp4")
    log.info("VBench on %d videos, by %s; its messages go to %s", len(videos), python, folder / "log.txt")
    # Our own libraries must not be found by its Python.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    command = [check_python(python), "-c", DRIVER, str(flat.resolve()), str(folder.resolve()), device, *VBENCH]
    with (folder / "log.txt").open("wb") as output:
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=clean, cwd=folder)
    if ended.returncode:
        last = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["no message"]
        raise InputError(f"VBench ended with code {ended.returncode}: {last[-1]} (all of it: {folder / 'log.txt'})")
    values = read_vbench(folder, list(videos))
    with atomic_path(kept) as temporary:
        Path(temporary).write_text(json.dumps({"videos": digest, "values": values}) + "\n", encoding="utf-8")
    return values


def read_vbench(place: Path | str, keys: Sequence[str]) -> dict[str, Values]:
    """What a VBench's ``*_eval_results.json`` says of these videos, by key ``<subtask>/<sample_id>``.

    ``place`` is such a file or a folder of some; videos are known by ``<subtask>/<sample_id>.mp4`` at the end of their
    path, or ``<subtask>__<sample_id>.mp4``.

    Raises:
        InputError: no such file, or none of the videos in them.
    """
    place = Path(place)
    files = sorted(place.glob("*_eval_results.json")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise InputError(f"{place} holds no VBench results: *_eval_results.json is what VBench writes")
    values: dict[str, Values] = {}
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            for dimension in set(found) & set(VBENCH):
                for key, value in _of_videos(dimension, found[dimension], keys).items():
                    values.setdefault(key, {})[f"vbench_{dimension}"] = value
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{file} is not what VBench writes: {error}") from error
    if not values:
        raise InputError(f"{place} says nothing of these videos: it must name them <subtask>/<sample_id>.mp4")
    return values


def _of_videos(dimension: str, found: Any, keys: Sequence[str]) -> dict[str, float]:
    """From ``[mean, [{"video_path": ..., "video_results": ...}, ...]]``."""
    by_name = {name: key for key in keys for name in (key, key.replace("/", JOIN))}
    values = {}
    for row in found[1]:
        path = Path(row["video_path"])
        for name in (path.stem, f"{path.parent.name}/{path.stem}"):
            if name in by_name:
                values[by_name[name]] = float(row["video_results"])
    # Its mean of imaging quality is in 0..1, its single videos are in percent.
    if dimension == "imaging_quality" and max(values.values(), default=0) > 1:
        values = {key: value / 100 for key, value in values.items()}
    return values
