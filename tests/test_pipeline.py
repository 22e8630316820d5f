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


# --- promises around the networks ------------------------------------------------------------------------------------

SMALL = {"size": "32*16", "frame_num": 5}


@pytest.fixture
def counted(tiny, monkeypatch):
    """The tiny pipeline with empty caches, and what is asked of its networks."""
    asked = {"forwards": 0, "prompts": [], "encoded": 0}
    monkeypatch.setattr(tiny, "_prompts", type(tiny._prompts)())
    monkeypatch.setattr(tiny, "_contexts", type(tiny._contexts)())
    encode = tiny.vae.encode

    def counting_encode(*args, **kwargs):
        asked["encoded"] += 1
        return encode(*args, **kwargs)

    monkeypatch.setattr(tiny.vae, "encode", counting_encode)
    hooks = [
        tiny.dit.register_forward_pre_hook(lambda *_: asked.update(forwards=asked["forwards"] + 1)),
        tiny.text_encoder.register_forward_pre_hook(lambda module, args: asked["prompts"].extend(args[0])),
    ]
    yield tiny, asked
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def clip():
    """uint8 [5, 32, 48, 3] of noise, and a mask [5, 32, 48] whose right half generates."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    mask = np.zeros((5, 32, 48), np.uint8)
    mask[:, :, 24:] = 255
    return frames, mask


def test_guidance_one_costs_one_forward_a_step_and_no_negative_prompt(counted):
    pipe, asked = counted
    pipe("a cat", **SMALL, steps=3, guide_scale=1.0, negative_prompt="ugly")
    assert asked == {"forwards": 3, "prompts": ["a cat"], "encoded": 0}
    pipe("a cat", **SMALL, steps=3, guide_scale=1.5, negative_prompt="ugly")
    assert asked == {"forwards": 9, "prompts": ["a cat", "ugly"], "encoded": 0}


def test_guidance_is_a_real_number(tiny):
    made = [tiny("a cat", **SMALL, guide_scale=g, negative_prompt="ugly").latents for g in (1.0, 1.5, 1.9, 0.5)]
    assert all(not torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])


@pytest.mark.parametrize(
    "use, encoded",
    [("none", 0), ("source", 1), ("source mask", 2), ("source mask refs", 4), ("refs", 2), ("grey source", 0)],
)
def test_constant_clips_are_never_encoded_and_conditions_only_once(use, encoded, counted, clip):
    pipe, asked = counted
    source = np.full_like(clip[0], 127) if "grey" in use else clip[0] if "source" in use else None
    refs = [clip[0][0], clip[0][1]] if "refs" in use else None
    how = {"src_video": source, "src_mask": clip[1] if "mask" in use else None, "src_ref_images": refs, "size": "48*32"}
    how |= {} if source is not None else {"frame_num": 5}
    first = pipe("x", **how, seed=1)
    assert asked["encoded"] == encoded
    second = pipe("x", **how, seed=2)
    assert asked["encoded"] == encoded and asked["prompts"] == ["x"]
    assert not torch.equal(first.latents, second.latents)


def test_a_remembered_condition_is_not_mistaken_for_another(counted, clip):
    pipe, asked = counted
    pipe("x", src_video=clip[0])
    other = clip[0].copy()
    other[0, 0, 0, 0] ^= 255
    pipe("x", src_video=other)
    pipe("x", src_video=clip[0], src_mask=clip[1])
    assert asked["encoded"] == 4
    for i in range(8):
        pipe(f"prompt {i}", **SMALL)
    assert len(pipe._prompts) <= 4 and len(pipe._contexts) <= 4


def test_same_seed_same_bytes(tiny):
    a, b, c = (tiny("x", **SMALL, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(a.frames, b.frames) and torch.equal(a.latents, b.latents)
    assert not np.array_equal(a.frames, c.frames)


def test_the_noise_is_the_contracts(tiny, clip):
    """What the network first sees is one randn([16, R + F, H, W]) of a CPU generator."""
    seen = []
    hook = tiny.dit.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        tiny("x", size="48*32", frame_num=5, src_ref_images=[clip[0][0]], seed=77)
    finally:
        hook.remove()
    expected = torch.randn([16, 1 + 2, 4, 6], generator=torch.Generator("cpu").manual_seed(77))
    assert torch.equal(seen[0][0], expected)


@pytest.mark.parametrize("frames", [1, 2, 5, 16, 17, 18])
def test_n_frames_asked_are_n_frames_got(frames, tiny, inputs):
    result = tiny("x", size="16*16", frame_num=frames)
    assert result.frames.shape == (frames, 16, 16, 3)
    assert result.latents.shape == (16, (frames + 2) // 4 + 1, 2, 2)
    result = tiny("x", src_video=inputs / "clip.mp4", size="32*16", frame_num=frames)
    assert len(result.frames) == frames


def test_context_scale_matters(tiny, clip):
    made = [tiny("x", src_video=clip[0], context_scale=scale).latents for scale in (0.0, 0.5, 1.0)]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
    free = tiny("x", size="48*32", frame_num=5, context_scale=0.0).latents
    assert torch.equal(made[0], free)  # at 0 the clip does nothing at all


@pytest.mark.parametrize("keep", [True, False])
def test_kept_pixels_are_the_sources_own(keep, tiny, clip):
    result = tiny("x", src_video=clip[0], src_mask=clip[1], keep_source=keep)
    assert np.array_equal(result.frames[:, :, :24], clip[0][:, :, :24]) == keep
    assert not np.array_equal(result.frames[:, :, 32:], clip[0][:, :, 32:])


def test_a_white_mask_keeps_nothing(tiny, clip):
    white = np.full_like(clip[1], 255)
    with_mask, without = tiny("x", src_video=clip[0], src_mask=white), tiny("x", src_video=clip[0])
    assert np.array_equal(with_mask.frames, without.frames)


def test_references_are_no_frames_of_the_result(tiny, clip):
    result = tiny("x", size="48*32", frame_num=5, src_ref_images=[clip[0][0], clip[0][1], clip[0][2]])
    assert result.frames.shape == (5, 32, 48, 3) and result.latents.shape == (16, 2, 4, 6)


def test_steps_are_reported(tiny):
    seen = []
    result = tiny("x", **SMALL, steps=3, on_step=lambda step, steps, x: seen.append((step, steps, tuple(x.shape))))
    assert seen == [(i, 3, (1, 16, 2, 2, 4)) for i in (1, 2, 3)]
    assert set(result.seconds) == {"read inputs", "encode text", "encode condition", "sample", "decode"}


def test_an_error_in_a_callback_leaves_the_pipeline_usable(tiny):
    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny("x", **SMALL, on_step=stop)
    assert tiny("x", **SMALL).frames.shape == (5, 16, 32, 3)


def test_a_result_that_is_not_finite_is_an_error_not_a_black_video(tiny, clip):
    with pytest.raises(InputError, match="not finite"):
        tiny("x", src_video=clip[0], context_scale=1e38)


def test_bfloat16_is_close_to_float32(tiny):
    """Relative error of the latents below 5%, mean error of the pixels below 6 of 255."""
    half = VdotPipeline.from_pretrained(TINY, device="cpu", dtype="bfloat16")
    a, b = tiny("a red ball", size="64*64", frame_num=5), half("a red ball", size="64*64", frame_num=5)
    assert b.latents.dtype == torch.float32
    assert (a.latents - b.latents).norm() / a.latents.norm() < 0.05
    assert np.abs(a.frames.astype(int) - b.frames).mean() < 6


@pytest.mark.parametrize("offload", ["true", "block"])
def test_offloading_on_a_cpu_changes_nothing(offload, tiny):
    pipe = VdotPipeline.from_pretrained(TINY, device="cpu", dtype="float32", offload=offload, t5_cpu=True)
    assert np.array_equal(pipe("x", **SMALL).frames, tiny("x", **SMALL).frames)


def test_the_schedule_and_defaults_travel_with_the_checkpoint(tiny):
    assert tiny.schedule == FewStepSchedule(4, 2.0, "renoise", 1.0)
    assert tiny.defaults == Defaults("64*64", 17, 8.0, "")
    result = tiny("x", **SMALL)
    assert (result.schedule, result.fps, result.seed) == (tiny.schedule, 8.0, 2025)


@pytest.mark.parametrize(
    "how, error",
    [
        ({"prompt": ""}, InputError),
        ({"size": "17*16"}, InputError),
        ({"frame_num": 0}, InputError),
        ({"context_scale": float("nan")}, InputError),
        ({"seed": -1}, InputError),
        ({"steps": 0}, ConfigError),
        ({"steps": 2.5}, ConfigError),
        ({"guide_scale": float("nan")}, ConfigError),
        ({"guide_scale": "5"}, ConfigError),
        ({"shift": -1.0}, ConfigError),
        ({"solver": "ddim"}, ConfigError),
        ({"src_video": "gone.mp4"}, InputError),
        ({"src_mask": "gone.mp4"}, InputError),
    ],
)
def test_python_raises_typed_errors(how, error, tiny):
    with pytest.raises(error) as caught:
        tiny(**{"prompt": "x", **SMALL, **how})
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how, error",
    [
        ({"path": "nowhere"}, CheckpointError),
        ({"device": "tpu"}, ConfigError),
        ({"dtype": "int8"}, ConfigError),
        ({"offload": "disk"}, ConfigError),
        ({"attention": "fast"}, ConfigError),
    ],
)
def test_loading_raises_typed_errors_before_reading_weights(how, error, monkeypatch):
    monkeypatch.setattr("vdot.pipeline.load_dit", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(error):
        VdotPipeline.from_pretrained(**{"path": TINY, "device": "cpu", **how})


def test_an_attention_backend_that_is_not_installed_names_what_to_install(monkeypatch):
    monkeypatch.setattr("vdot.pipeline.load_dit", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setitem(__import__("sys").modules, "sageattention", None)
    with pytest.raises(MissingDependencyError, match="pip install sageattention"):
        VdotPipeline.from_pretrained(TINY, device="cpu", attention="sage")
