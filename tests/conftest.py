"""Shared fixtures: where the golden data lies, and how tensors are read from it."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("VDOT_SHARED", ROOT.parent / "shared"))


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
