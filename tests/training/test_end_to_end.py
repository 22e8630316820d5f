"""The whole life of a run: killed, stopped, resumed, exported, and a video made with the result."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.training.test_loop import start, wait_for_step
from vdot.training.metrics import read_metrics
from vdot.video import probe

STEPS = 200


@pytest.mark.slow
def test_two_hundred_steps_killed_resumed_exported_and_sampled(tmp_path: Path) -> None:
    output = tmp_path / "run"
    values = (f"steps={STEPS}", "save_every=20", "sample_every=100", "world.clips=32", "batch_size=2")
    first = start(output, *values)
    wait_for_step(output, 50, 600)
    first.kill()
    first.communicate()
    before = {line["step"]: line for line in read_metrics(output / "metrics.jsonl")}
    second = start(output, *values)
    wait_for_step(output, max(before) + 40, 600)
    second.send_signal(signal.SIGTERM)
    out, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    resumed = int(out.split("at step ")[1].split()[0])
    assert 40 <= resumed <= 60  # the newest multiple of save_every, or the one before if it was being written
    third = start(output, *values)
    out, errors = third.communicate(timeout=900)
    assert third.returncode == 0, errors
    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:  # steps that were done twice, before the kill and after it, came out the same
        twin = before.get(line["step"])
        assert twin is None or twin["loss_fake"] == line["loss_fake"]
    assert (output / "samples" / "step_00000200.png").is_file()
    command = [sys.executable, str(ROOT / "inference" / "vace_wan_inference.py"), "--ckpt_dir", str(output / "export")]
    video = tmp_path / "video.mp4"
    command += ["--prompt", "a red circle", "--size", "64*64", "--frame_num", "17", "--save_file", str(video)]
    subprocess.run([*command, "--save_dir", str(tmp_path / "out")], check=True, capture_output=True, timeout=600)
    assert probe(video).frames == 17
