"""The whole way from a request to a video against the golden runs, and what the pipeline promises around it."""

import json
import shutil

import numpy as np
import pytest
import torch
from tests.conftest import ROOT

from vdot import VdotPipeline
from vdot.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from vdot.request import Defaults
from vdot.sampling import FewStepSchedule
from vdot.video import read_image

LATENT_TOLERANCE, VIDEO_TOLERANCE = 2e-4, 2e-3  # absolute, float32 (reference README, section 7)
TINY = ROOT / "models" / "vdot-tiny"


@pytest.fixture(scope="module")
def original(reference, golden_json, tmp_path_factory) -> VdotPipeline:
    """The tiny networks that the golden runs were made with, laid out as a Wan2.1-VACE folder and loaded as one."""
    folder = tmp_path_factory.mktemp("wan")
    shutil.copy(reference / "dit" / "tiny_weights.safetensors", folder / "diffusion_pytorch_model.safetensors")
    shutil.copy(reference / "t5" / "tiny_weights.safetensors", folder / "models_t5_tiny.safetensors")
    shutil.copy(reference / "vae" / "tiny_weights.safetensors", folder / "Wan2.1_VAE.safetensors")
    shutil.copytree(reference / "t5" / "tokenizer", folder / "google" / "umt5-xxl")
    (folder / "config.json").write_text(json.dumps(golden_json("dit/cases")["tiny"]["config"]))
    return VdotPipeline.from_pretrained(folder, device="cpu", dtype="float32")


CASES = [
    "t2v",
    "v2v_gray",
    "v2v_gray_17",
    "mv2v",
    "r2v_1ref",
    "r2v_2refs",
    "composite",
    "t2v_cfg5",
    "t2v_dpmpp",
    "t2v_unipc10",
]


@pytest.mark.parametrize("case", CASES)
def test_latents_and_pixels_equal_the_original(case, original, golden, golden_json, reference):
    info, tensors = golden_json("e2e/cases")["info"][case], golden("e2e/e2e_cases")
    inputs: dict = {}
    if case.startswith("v2v"):
        grey = tensors["v2v_gray.src_u8"][: info["frames"]].numpy()
        inputs["src_video"] = np.repeat(grey.reshape(*grey.shape[:3], -1)[..., :1], 3, axis=-1)
    if case in ("mv2v", "composite"):
        inputs["src_video"] = tensors["mv2v.src_u8"].numpy()
        inputs["src_mask"] = tensors["mv2v.mask_u8"].numpy().reshape(9, 64, 64)
    if info["n_refs"]:
        images = [reference / "e2e" / "images" / name for name in ("ref_wide.png", "ref_tall.png")]
        # The original drops alpha where we composite on white.
        inputs["src_ref_images"] = [read_image(image, alpha="drop") for image in images[: info["n_refs"]]]
    result = original(
        info["prompt"],
        negative_prompt=info["n_prompt"],
        size=f"{info['width']}*{info['height']}",
        frame_num=None if "src_video" in inputs else info["frames"],
        steps=info["steps"],
        shift=float(info["shift"]),
        solver=info["solver"],
        guide_scale=info["guide_scale"],
        context_scale=info["context_scale"],
        seed=info["seed"],
        keep_source=False,
        **inputs,
    )
    expected = tensors[f"{case}.final_latent"][:, info["n_refs"] :]
    torch.testing.assert_close(result.latents, expected, atol=LATENT_TOLERANCE, rtol=0)
    assert result.frames.shape == (info["frames"], info["height"], info["width"], 3)
    pixels = torch.from_numpy(result.frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    if f"{case}.video_f16" in tensors:
        expected = tensors[f"{case}.video_f16"].float()
    elif f"{case}.video_f16_stride2" in tensors:
        expected, pixels = tensors[f"{case}.video_f16_stride2"].float(), pixels[:, :, ::2, 1::2]
    else:
        return
    # uint8 rounding adds half a grey level to the golden tolerance
    torch.testing.assert_close(pixels, expected, atol=VIDEO_TOLERANCE + 0.5 / 127.5, rtol=0)
