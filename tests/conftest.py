"""Shared fixtures: where the golden data lies, and how tensors are read from it."""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

# A loaded machine is not a failure; the same examples every time, so that a failure is the change's own.
hypothesis.settings.register_profile("vdot", deadline=None, derandomize=True)
hypothesis.settings.load_profile("vdot")

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("VDOT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A test that runs an entry leaves the messages of the next ones where they were: in reach of ``caplog``."""
    log = logging.getLogger("vdot")
    before = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of golden tensors computed with the original models; tests that need it skip where it is absent."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        pytest.skip(f"golden data not found at {folder} (set VDOT_SHARED to the folder that holds reference/)")
    return folder


@pytest.fixture(scope="session")
def real_inputs() -> Path:
    folder = SHARED / "real_inputs"
    if not folder.is_dir():
        pytest.skip(f"real inputs not found at {folder} (set VDOT_SHARED to the folder that holds real_inputs/)")
    return folder


@pytest.fixture(scope="session")
def golden(reference: Path) -> Callable[[str], dict[str, torch.Tensor]]:
    """``golden("dit/tiny_cases")`` -> the tensors of that file, read once."""
    cache: dict[str, dict[str, torch.Tensor]] = {}

    def read(name: str) -> dict[str, torch.Tensor]:
        if name not in cache:
            cache[name] = load_file(reference / f"{name}.safetensors")
        return cache[name]

    return read


@pytest.fixture(scope="session")
def golden_json(reference: Path) -> Callable[[str], dict]:
    return lambda name: json.loads((reference / f"{name}.json").read_text())


def recipe_tensor(seed: int, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One weight by the golden data's recipe (section 1 of its README): depends on seed, name and shape alone."""
    rng = np.random.RandomState((seed + zlib.crc32(key.encode())) % 2**32)
    a = rng.standard_normal(int(np.prod(shape))).reshape(shape).astype(np.float32)
    last = key.rsplit(".", 1)[-1]
    if last == "modulation":
        a = np.float32(0.3) * a
    elif last == "register_tokens":
        a = np.float32(0.5) * a
    elif last == "gamma" or (last == "weight" and len(shape) == 1):
        a = np.float32(1) + np.float32(0.1) * a
    elif last == "bias":
        a = np.float32(0.1) * a
    elif "token_embedding" in key:
        a = np.float32(0.7) * a
    elif "pos_embedding" in key:
        a = np.float32(0.5) * a
    else:
        a = a / np.sqrt(np.float32(np.prod(shape[1:])))
    return torch.from_numpy(a).to(torch.bfloat16).float()


# --- the shipped tiny checkpoint, and small media -------------------------------------------------------------------

TINY = ROOT / "models" / "vdot-tiny"


@pytest.fixture(scope="session")
def tiny():
    """The shipped tiny pipeline, loaded once. Its caches are shared: tests that count calls empty them first."""
    from vdot import VdotPipeline

    return VdotPipeline.from_pretrained(TINY, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """clip.mp4 (9 frames, 64x32, 8 fps), mask.mp4 (right half white), sound.mp4 (with a tone), toy.png."""
    from PIL import Image

    from vdot.video import write_video

    folder = tmp_path_factory.mktemp("inputs")
    y, x = np.mgrid[:32, :64]
    frames = np.stack([np.stack([4 * x, 8 * y, 0 * x + 25 * i], -1) for i in range(9)]).astype(np.uint8)
    write_video(folder / "clip.mp4", frames, 8)
    mask = np.zeros_like(frames)
    mask[:, :, 32:] = 255
    write_video(folder / "mask.mp4", mask, 8)
    Image.fromarray(mask[0]).save(folder / "mask.png")
    Image.fromarray(frames[4]).save(folder / "toy.png")
    return folder


@pytest.fixture
def cli(capsys):
    """``cli(args...) -> (exit code, stdout, stderr)`` of ``inference/vace_wan_inference.py``."""
    from vdot.cli import main

    def run(*args):
        code = main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def one_memory_plan():
    """Let one memory plan do for all runs of a file: test_memory.py counts them."""
    import vdot.cli

    patch, plans, plan = pytest.MonkeyPatch(), {}, vdot.cli.plan_generation
    patch.setattr(vdot.cli, "plan_generation", lambda *args: plans.get(0) or plans.setdefault(0, plan(*args)))
    yield
    patch.undo()
