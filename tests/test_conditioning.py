"""The VACE context against the golden tensors, and the compositing of kept pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdot.conditioning import Condition, encode_context, explain_mask, feather, keep_source, mask_latents


class CountingVae:
    """A stand-in that encodes by average pooling and counts what it is asked for."""

    def __init__(self):
        self.encoded, self.constants = 0, 0

    def encode(self, video):
        self.encoded += 1
        return self._latents(video)

    def encode_constant(self, value, frames, height, width):
        self.constants += 1
        return self._latents(torch.full((1, 3, frames, height, width), value))

    @staticmethod
    def _latents(video):
        pooled = torch.nn.functional.avg_pool3d(video[:, :1], (1, 8, 8))[:, :, ::4]
        return pooled.expand(-1, 16, -1, -1, -1)


def test_mask_time_index_equals_the_original(golden_json):
    table = golden_json("vace/context_cases")["info"]["mask_time_index_by_depth"]
    for frames, expected in table.items():
        frames = int(frames)
        mask = torch.arange(frames).float()[:, None, None].expand(frames, 8, 8)
        assert mask_latents(mask)[0, :, 0, 0].int().tolist() == expected


def test_mask_folding_equals_the_original(golden):
    tensors = golden("vace/context_cases")
    assert torch.equal(mask_latents(tensors["mask_unfold.in"][0]), tensors["mask_unfold.out"])


CASES = ["no_source", "no_source_2refs", "video_no_mask", "video_mask", "video_mask_1ref", "video_mask_2refs"]


@pytest.fixture(scope="module")
def tiny_vae(reference):
    from vdot.checkpoints import load_vae

    return load_vae(reference / "vae" / "tiny_weights.safetensors", dtype="float32")


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_context_equals_the_original(case, golden, tiny_vae):
    """Tolerance 1e-5 (reference README, section 6)."""
    tensors = golden("vace/context_cases")
    pixels = tensors["src_u8"].permute(3, 0, 1, 2).float() / 127.5 - 1
    refs = [tensors[f"ref{i}_u8"].permute(3, 0, 1, 2).float() / 127.5 - 1 for i in range(2)]
    count = 2 if "2refs" in case else 1 if "1ref" in case else 0
    condition = Condition(
        9,
        64,
        64,
        source=pixels if "video" in case else None,
        mask=tensors["mask_u8"][0].float() / 255 if "video_mask" in case else None,
        references=refs[:count],
    )
    context = encode_context(tiny_vae, condition)[0]
    torch.testing.assert_close(context[:32], tensors[f"{case}.frames_latent"], atol=1e-5, rtol=0)
    if f"{case}.mask_latent_u8" in tensors:
        expected = tensors[f"{case}.mask_latent_u8"].float() / 255
        torch.testing.assert_close(context[32:], expected, atol=1e-6, rtol=0)
    elif "mask" not in case or case == "video_no_mask":
        assert (context[32:, count:] == 1).all() and (context[32:, :count] == 0).all()
    assert condition.latent_shape[1:] == tuple(context.shape[1:])


@pytest.mark.parametrize(
    "source, mask, refs, encoded",
    [(False, False, 0, 0), (True, False, 0, 1), (True, True, 0, 2), (True, True, 2, 4), (False, False, 1, 1)],
)
def test_constant_clips_are_never_encoded(source, mask, refs, encoded):
    torch.manual_seed(0)
    vae = CountingVae()
    binary = (torch.rand(5, 16, 32) > 0.5).float()
    condition = Condition(
        5,
        16,
        32,
        source=torch.rand(3, 5, 16, 32) if source else None,
        mask=binary if mask else None,
        references=[torch.rand(3, 1, 16, 32) for _ in range(refs)],
    )
    assert encode_context(vae, condition).shape == (1, 96, refs + 2, 2, 4)
    assert vae.encoded == encoded


def test_a_white_mask_equals_no_mask():
    torch.manual_seed(0)
    source = torch.rand(3, 5, 16, 16)
    white = encode_context(CountingVae(), Condition(5, 16, 16, source, torch.ones(5, 16, 16)))
    assert torch.equal(white, encode_context(CountingVae(), Condition(5, 16, 16, source)))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"frames": 6, "height": 16, "width": 16},
        {"frames": 5, "height": 24, "width": 40},
        {"frames": 5, "height": 16, "width": 16, "mask": torch.ones(5, 16, 16)},
        {"frames": 5, "height": 16, "width": 16, "source": torch.ones(3, 4, 16, 16)},
        {"frames": 5, "height": 16, "width": 16, "references": [torch.ones(3, 2, 16, 16)]},
    ],
)
def test_parts_that_do_not_fit_are_refused(kwargs):
    with pytest.raises(ValueError):
        Condition(**kwargs)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 12), st.floats(0, 1))
def test_kept_pixels_are_the_source_exactly(seed, radius, density):
    rng = np.random.default_rng(seed)
    mask = (rng.random((2, 20, 24)) < density).astype(np.float32)
    source, generated = rng.integers(0, 256, (2, 2, 20, 24, 3), dtype=np.uint8)
    out = keep_source(generated, source, mask, radius)
    assert np.array_equal(out[mask == 0], source[mask == 0])
    alpha = feather(mask, radius)
    assert (alpha[mask == 1] > 0).all() and alpha.max(initial=0) <= 1


def test_feather_ramps_inside_a_large_region_and_spares_thin_ones():
    mask = np.zeros((1, 64, 64), np.float32)
    mask[0, 16:48, 16:48] = 1
    mask[0, 4, 4:60] = 1  # a stroke one pixel thin
    alpha = feather(mask, 8)
    assert alpha[0, 4, 30] == pytest.approx(1, abs=0.06)
    ramp = alpha[0, 32, 16:24]
    assert (np.diff(ramp) > 0).all() and ramp[0] < 0.2 and alpha[0, 32, 32] == 1


def test_the_seam_closes_without_the_unknown_source():
    """A generation that is 40 levels too bright meets the kept pixels without a step and is itself deep inside."""
    mask = np.zeros((1, 96, 96), np.float32)
    mask[0, 24:72, 24:72] = 1
    source = np.full((1, 96, 96, 3), 100, np.uint8)
    generated = np.full_like(source, 140)
    out = keep_source(generated, source, mask, radius=8)
    row = out[0, 48, :, 0].astype(int)
    assert abs(row[24] - 100) <= 6 and row[48] == 140
    assert np.abs(np.diff(row)).max() <= 8  # 40 levels over 8 pixels, and no halo
    source[0, 24:72, 24:72] = 127  # what the source holds inside the mask must not matter
    assert np.array_equal(keep_source(generated, source, mask, 8)[mask > 0], out[mask > 0])


def test_mask_is_explained():
    source = np.full((1, 16, 16, 3), 127, np.uint8)
    mask = np.zeros((1, 16, 16), np.float32)
    assert any("inverted" in note for note in explain_mask(source, mask))
    mask[:, :8] = 1
    notes = explain_mask(source, mask)
    assert "50.0%" in notes[0] and "made up freely" in notes[-1]
    assert "steers" in explain_mask(np.zeros_like(source), mask)[-1]
