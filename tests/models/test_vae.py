"""WanVAE against the golden latents and pixels, diffusers' own loop, and itself cut into tiles, steps and slices."""

import copy
import gzip
import json

import pytest
import torch
from diffusers import AutoencoderKLWan

import vdot.models.vae as module
from tests.conftest import recipe_tensor
from vdot.checkpoints import keymaps
from vdot.models.vae import WanVAE

GOLDEN = 1e-5  # of the golden data
ROUNDING = 1e-5  # the same sums in another order, on values of order one


def build(base_dim: int, seed: int = 7) -> WanVAE:
    """Random weights by the golden recipe, none of them zero."""
    vae = AutoencoderKLWan(base_dim=base_dim)
    vae.load_state_dict(
        {k: recipe_tensor(seed, keymaps.VAE.to_native(k), tuple(t.shape)) for k, t in vae.state_dict().items()}
    )
    return WanVAE(vae).requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return build(6)


def library(vae: WanVAE) -> AutoencoderKLWan:
    """The library's own autoencoder with these weights: WanVAE swaps layer classes in the one it is given."""
    model = AutoencoderKLWan.from_config(vae.model.config).to(vae.dtype)
    model.load_state_dict(vae.model.state_dict())
    return model.eval()


def library_encode(vae: WanVAE, video: torch.Tensor) -> torch.Tensor:
    config = vae.model.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    return (library(vae).encode(video.to(vae.dtype)).latent_dist.mode() - mean) / std


def library_decode(vae: WanVAE, latents: torch.Tensor) -> torch.Tensor:
    config = vae.model.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    return library(vae).decode((latents * std + mean).to(vae.dtype)).sample


def random_video(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# -- goldens --------------------------------------------------------------------------------------------------------


def from_u8(frames: torch.Tensor) -> torch.Tensor:
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@pytest.fixture(scope="module")
def golden_vae(golden) -> WanVAE:
    model = AutoencoderKLWan(base_dim=6)
    model.load_state_dict({keymaps.VAE.to_library(k): v.float() for k, v in golden("vae/tiny_weights").items()})
    return WanVAE(model).requires_grad_(False)


def test_golden_latents_and_pixels(golden, golden_vae: WanVAE) -> None:
    data = golden("vae/tiny_cases")
    video = from_u8(data["video_u8"])
    for frames in (1, 5, 9, 17):
        assert gap(golden_vae.encode(video[:, :, :frames])[0], data[f"encode.{frames}.latent"]) < GOLDEN
    for frames in (1, 17):
        latents = data["decode.latent"][None, :, : (frames + 3) // 4]
        raw = data[f"decode.{frames}.raw_unclamped"]
        assert gap(golden_vae.decode(latents, clamp=False)[0], raw) < GOLDEN
        assert gap(golden_vae.decode(latents)[0], raw.clamp(-1, 1)) < GOLDEN


def test_golden_at_another_width(golden) -> None:
    data, vae = golden("vae/recipe_cases"), build(16, seed=1033)
    assert gap(vae.encode(from_u8(data["video_u8"]))[0], data["encode.9.latent"]) < GOLDEN
    assert gap(vae.decode(data["encode.9.latent"][None], clamp=False)[0], data["decode.9.raw_unclamped"]) < GOLDEN


def test_keys_and_shapes_of_the_published_autoencoder(reference) -> None:
    with torch.device("meta"):
        vae = WanVAE(AutoencoderKLWan())
    table = json.loads(gzip.open(reference / "keys" / "wan21_vae_diffusers.json.gz").read())
    state = vae.model.state_dict()
    assert {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in state.items()} == table
    assert (vae.latent_channels, vae.stride) == (16, (4, 8, 8))


# -- the library ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 16, 24), (5, 8, 8), (13, 40, 24)])
def test_equals_diffusers(vae: WanVAE, shape: tuple[int, int, int]) -> None:
    video = random_video(2, 3, *shape)
    latents = vae.encode(video)
    assert gap(latents, library_encode(vae, video)) < ROUNDING
    assert gap(vae.decode(latents), library_decode(vae, latents)) < ROUNDING


def test_steps_and_slices_do_not_matter(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    video = random_video(3, 3, 17, 32, 24)
    latents = vae.encode(video)
    pixels = vae.decode(latents)
    for step_pixels in (1, 3 * 32 * 24 * 2):  # one latent frame of one sample at a time; two frames of all
        monkeypatch.setattr(module, "STEP_PIXELS", step_pixels)
        assert gap(vae.encode(video), latents) < ROUNDING
        assert gap(vae.decode(latents), pixels) < ROUNDING


def test_a_narrow_network_takes_more_pixels_at_once(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "counts_for", "cuda")
    width = vae.model.config.base_dim
    monkeypatch.setattr(module, "WIDTH", width)
    assert (vae._step_frames(1, 480, 832), vae._step_frames(1, 480, 416)) == (1, 2)
    monkeypatch.setattr(module, "WIDTH", 6 * width)
    assert (vae._step_frames(1, 480, 832), vae._step_frames(1, 480, 416)) == (6, 8)


# -- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [5, 8])  # latents; frames of 11 x 9 latents: never divisible
def test_tiled_equals_untiled(vae: WanVAE, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    video = random_video(1, 3, 5, 11 * 8, 9 * 8)
    latents = vae.encode(video, tiled=False)
    assert gap(vae.encode(video, tiled=True), latents) < ROUNDING
    pixels = vae.decode(latents, clamp=False, tiled=False)
    assert gap(vae.decode(latents, clamp=False, tiled=True), pixels) < ROUNDING
    streamed = torch.cat(list(vae.decode_stream(latents, clamp=False, tiled=True)), dim=2)
    assert gap(streamed, pixels) < ROUNDING


def test_margins_are_the_reach_of_the_convolutions(vae: WanVAE) -> None:
    """What one position of the middle block's output can change lies within the margin, and fills it."""
    width, at = 40, 20
    middle = torch.zeros(1, 24, 1, 1, width, dtype=torch.float64)
    double = copy.deepcopy(vae).double()  # far ends of the reach are faint: they would drown in float32 rounding
    still = next(double._decoder_tail([middle], 1, width, None))
    middle[..., at] = 100.0
    changed = (next(double._decoder_tail([middle], 1, width, None)) != still).any(dim=1).flatten(0, 2).any(dim=0)
    first, last = changed.nonzero().flatten()[[0, -1]] // 8
    margin = vae._decoder_margins[0]
    assert (at - first, last - at) == (margin, margin)


def test_tiles_without_margins_show(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """The equality above is the margins' doing: without them the same tiles are visibly off."""
    monkeypatch.setattr(module, "TILE", 14)
    latents = torch.randn(1, 16, 1, 2, 28, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(vae, "_decoder_margins", [0] * 4)
    assert gap(vae.decode(latents, clamp=False, tiled=True), vae.decode(latents, clamp=False, tiled=False)) > 0.1


def test_large_frames_are_tiled_by_themselves() -> None:
    assert not module._use_tiles("auto", 90, 160)  # 720p is not
    assert module._use_tiles("auto", 136, 240)
    assert module._use_tiles(True, 2, 2) and not module._use_tiles(False, 999, 999)


def test_tiles_cover_once() -> None:
    for height, width in ((1, 1), (48, 49), (97, 200)):
        seen = torch.zeros(height, width)
        for (top, bottom), (left, right) in module._tiles(height, width):
            assert 0 < bottom - top <= module.TILE and 0 < right - left <= module.TILE
            seen[top:bottom, left:right] += 1
        assert (seen == 1).all()


# -- streaming and constants ----------------------------------------------------------------------------------------


def test_stream_is_lazy_and_equal(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_PIXELS", 1)
    latents = torch.randn(2, 16, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    stream = vae.decode_stream(latents)
    first = next(stream)
    assert first.shape == (2, 3, 1, 24, 40) and first.dtype == torch.float32
    assert [piece.shape[2] for piece in stream] == [4, 4, 4]
    assert gap(torch.cat(list(vae.decode_stream(latents)), dim=2), vae.decode(latents)) < ROUNDING


@pytest.mark.parametrize("shape", [(1, 16, 24), (5, 184, 152), (5, 144, 160), (13, 160, 8)])
@pytest.mark.parametrize("value", [0.0, -0.7])
def test_constant_clip_equals_encoding_it(vae: WanVAE, shape: tuple[int, int, int], value: float) -> None:
    """Sizes below, at and above the canvas that holds both borders (18 latents)."""
    latents = vae.encode_constant(value, *shape)
    assert gap(latents, vae.encode(torch.full((1, 3, *shape), value))) < ROUNDING


def test_constant_clip_is_computed_once(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    first = vae.encode_constant(0.25, 5, 32, 32)
    monkeypatch.setattr(vae.model.encoder, "forward", None)
    monkeypatch.setattr(WanVAE, "_encode_constant", None)
    again = vae.encode_constant(0.25, 5, 32, 32)
    assert torch.equal(first, again)
    again.zero_()  # what a caller does to its copy does not reach the cache
    assert torch.equal(first, vae.encode_constant(0.25, 5, 32, 32))


# -- types and errors -----------------------------------------------------------------------------------------------


def test_bfloat16_stays_close_and_statistics_stay_float32() -> None:
    exact, half = build(16), build(16).to(torch.bfloat16)
    video = random_video(1, 3, 5, 32, 32)
    latents, rounded = exact.encode(video), half.encode(video)
    assert rounded.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert (rounded - latents).norm() / latents.norm() < 0.02  # 8 mantissa bits through about 30 layers
    pixels = half.decode(latents)
    assert pixels.dtype == torch.float32
    assert (pixels - exact.decode(latents)).norm() / exact.decode(latents).norm() < 0.03


def test_channels_last_is_the_same_function(vae: WanVAE) -> None:
    video = random_video(1, 3, 9, 32, 24)
    packed = copy.deepcopy(vae).channels_last()
    latents = vae.encode(video)
    assert gap(packed.encode(video), latents) < ROUNDING
    assert gap(packed.decode(latents), vae.decode(latents)) < ROUNDING


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers compute as they do on CUDA, with the CPU's kernels."""
    monkeypatch.setattr(module, "_plain_cpu", lambda x: False)
    monkeypatch.setattr(module, "_on_gpu", lambda x: True)


@pytest.mark.parametrize("laid_out", [False, True])
def test_the_layers_of_a_gpu_equal_diffusers(vae: WanVAE, as_on_a_gpu: None, laid_out: bool) -> None:
    video = random_video(1, 3, 9, 32, 24)
    own = copy.deepcopy(vae).channels_last() if laid_out else vae
    latents = own.encode(video)
    assert gap(latents, library_encode(vae, video)) < ROUNDING
    assert gap(own.decode(latents), library_decode(vae, latents)) < ROUNDING
    assert gap(own.decode(latents, tiled=True), library_decode(vae, latents)) < ROUNDING


def test_the_layers_of_a_gpu_round_no_worse_than_diffusers(vae: WanVAE, as_on_a_gpu: None) -> None:
    """bfloat16: as near to the library's float32 result as the library's own, give or take a tenth of that."""
    video = random_video(1, 3, 9, 32, 24)
    half = copy.deepcopy(vae).to(torch.bfloat16).channels_last()
    latents = library_encode(vae, video)
    pixels = library_decode(vae, latents)

    def off(found: torch.Tensor, exact: torch.Tensor) -> float:
        return ((found.float() - exact).norm() / exact.norm()).item()

    assert 0 < off(half.encode(video), latents) < 1.1 * off(library_encode(half, video), latents)
    assert 0 < off(half.decode(latents), pixels) < 1.1 * off(library_decode(half, latents), pixels)


def test_gradients_flow_when_enabled(vae: WanVAE) -> None:
    video = random_video(1, 3, 5, 16, 16).requires_grad_()
    latents = vae.encode(video)
    vae.decode(latents, clamp=False).square().mean().backward()
    assert video.grad is not None and video.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "shape, sentence",
    [
        ((1, 3, 7, 16, 16), r"4k \+ 1 frames, got 7; the nearest are 5 and 9"),
        ((1, 3, 5, 16, 20), "multiples of 8, got 16 x 20"),
        ((1, 1, 5, 16, 16), r"\[B, 3, frames, height, width\]"),
        ((1, 3, 0, 16, 16), r"\[B, 3, frames, height, width\]"),
        ((3, 5, 16, 16), r"\[B, 3, frames, height, width\]"),
    ],
)
def test_wrong_videos(vae: WanVAE, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        vae.encode(torch.zeros(shape))


def test_wrong_latents_and_constants(vae: WanVAE) -> None:
    with pytest.raises(ValueError, match=r"\[B, 16, frames, rows, columns\]"):
        vae.decode(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(ValueError, match=r"\[B, 16, frames, rows, columns\]"):
        next(vae.decode_stream(torch.zeros(16, 2, 2, 2)))
    with pytest.raises(ValueError, match="got 6"):
        vae.encode_constant(0, 6, 16, 16)


def test_wan22_autoencoder_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"Wan2\.2"):
        WanVAE(AutoencoderKLWan(base_dim=6, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2))
