"""scripts/convert_checkpoint.py: describes, converts, and fails with one sentence and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TINY
from vdot.checkpoints import inspect_checkpoint, load_dit, save_checkpoint

SCRIPT = ROOT / "scripts" / "convert_checkpoint.py"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import convert_checkpoint

    return convert_checkpoint.main


def test_describe_and_convert(layouts: dict[str, Path], tmp_path: Path, main, capsys: pytest.CaptureFixture) -> None:
    assert main([str(layouts["vdot"])]) == 0
    assert "layout vdot" in capsys.readouterr().out
    assert main([str(layouts["vdot"]), str(tmp_path / "out"), "--layout", "diffusers"]) == 0
    info = inspect_checkpoint(tmp_path / "out")
    assert info.layout == "diffusers" and info.parts["dit"].dtypes["bfloat16"] > 0
    left, right = load_dit(tmp_path / "out").state_dict(), load_dit(layouts["vdot"]).state_dict()
    assert all(torch.equal(left[k], right[k]) for k in right)


def test_parts_and_overwrite(layouts: dict[str, Path], tmp_path: Path, main, capsys: pytest.CaptureFixture) -> None:
    command = [str(layouts["wan"]), str(tmp_path / "out"), "--parts", "dit", "--dtype", "bfloat16"]
    assert main(command) == 0 and list(inspect_checkpoint(tmp_path / "out").parts) == ["dit"]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_errors_are_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "no")], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.strip().startswith("error: ") and "Traceback" not in run.stderr


def test_blend_is_the_weighted_mean(
    layouts: dict[str, Path], tmp_path: Path, main, capsys: pytest.CaptureFixture
) -> None:
    """A quarter of the way to weights that are all one more, in float64: float32 rounds at 1e-6."""
    dit = load_dit(layouts["wan"])
    with torch.no_grad():
        for weight in dit.parameters():
            weight += 1
    other = save_checkpoint(tmp_path / "other", dit)
    target = str(tmp_path / "out")
    command = [str(layouts["wan"]), target, "--dtype", "float32", "--blend", str(other), "--share", "0.25"]
    assert main(command) == 0
    got, was = load_dit(target).state_dict(), load_dit(layouts["wan"]).state_dict()
    for name in was:
        torch.testing.assert_close(got[name].double(), was[name].double() + 0.25, rtol=0, atol=1e-6)
    assert main([*command, "--overwrite", "--share", "1.5"]) == 2
    assert "share of the other checkpoint is from 0 to 1" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--blend", str(TINY)]) == 2
    assert "these two transformers differ in size" in capsys.readouterr().err
    assert torch.equal(load_dit(target).state_dict()[name], got[name])  # nothing was written over it
