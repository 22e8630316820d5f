"""The small networks around the transformer: trained as they will be used, resumable, exported to be loaded."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.conftest import ROOT
from vdot.checkpoints import load_text_encoder, load_vae
from vdot.config import load_config
from vdot.data.captions import ABSENT, CLASSES, attributes, draw_captions
from vdot.data.pictures import PictureFeeder, Stage, draw_clip
from vdot.data.sprites import TASKS, corpus, draw_scene, draw_task
from vdot.data.sprites.sprite import Track
from vdot.data.world import WorldConfig
from vdot.errors import ConfigError
from vdot.models.vae import WanVAE
from vdot.models.vae_whole import WholeClipVAE, start
from vdot.parallel.state import Ranks
from vdot.training.autoencoder import Autoencoder, edge_error, latent_statistics, motion_error, psnr, settle
from vdot.training.config import TrainConfig
from vdot.training.loop import export_only, train
from vdot.training.muon import Muon, orthogonal
from vdot.training.text import scores, train_tokenizer

CPU = torch.device("cpu")
TINY = ["vae.base_dim=4", "world.size=32", "world.frames=9", "save_every=2", "vae.evaluate_clips=2",
        "vae.statistics_clips=4", "generator.warmup=1", "sample_tasks=4", "ema_start=1",
        "generator.decay=constant", "export_dtype=float32"]  # fmt: skip


def config_of(name, folder, *overrides):
    config = load_config(TrainConfig, ROOT / "configs" / "train" / f"{name}.yaml", list(overrides))
    return replace(config, output_dir=str(folder))


STAGES = [Stage(3, [1], 16, 4), Stage(0, [1, 9], 0, 2)]


def small_vae(folder, *overrides):
    config = config_of("tiny_vae", folder, *TINY, *overrides)
    return replace(config, vae=replace(config.vae, stages=STAGES))


def run(config, kind=Autoencoder):
    assert train(config, Ranks(), CPU, lambda: kind(config, Ranks(), CPU)) is None


@pytest.fixture(scope="module")
def autoencoder():
    """Untrained, base 4, its weights disturbed so that no part of it is silent."""
    model = AutoencoderKLWan(base_dim=4)
    start(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def copy_of(model):
    other = AutoencoderKLWan.from_config(model.config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "frames", [1, 9, pytest.param(5, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow)]
)
def test_whole_clips_and_pieces_are_one_function(autoencoder, frames):
    """Both against the library's own loop, to float32 rounding."""
    library, pieces, whole = copy_of(autoencoder), WanVAE(copy_of(autoencoder)), WholeClipVAE(copy_of(autoencoder))
    video = torch.rand(2, 3, frames, 32, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        want = library.encode(video).latent_dist
        mean, log_variance = whole.encode(video)
        torch.testing.assert_close(mean, want.mean, rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(log_variance, want.logvar, rtol=1e-4, atol=3e-5)
        pixels = whole.decode(mean)
        torch.testing.assert_close(pixels.clamp(-1, 1), library.decode(mean).sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pixels.clamp(-1, 1), pieces.decode(pieces.encode(video)), rtol=1e-4, atol=1e-4)


def test_grey_has_finite_gradients():
    """Zeros have no direction: a norm of them must not poison the weights."""
    model = AutoencoderKLWan(base_dim=4)
    start(model, seed=0)
    network = WholeClipVAE(model)
    mean, log_variance = network.encode(torch.zeros(1, 3, 5, 16, 16))
    (network.decode(mean).square().mean() + log_variance.mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_compiled_norms_are_the_same_function(autoencoder):
    """Values and gradients, to float32 rounding."""
    pixels = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    made, gradients = [], []
    for compiled in (False, True):
        network = WholeClipVAE(copy_of(autoencoder), compiled)
        made.append(network.decode(network.encode(pixels)[0]))
        made[-1].square().mean().backward()
        # A picture has no past: its share of the kernels that look back has no gradient.
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5 * gradients[0].abs().max().item())


def test_a_new_autoencoder_keeps_variances():
    """What the start is for: latents of unit order, noise below them, pixels that depend on the latents."""
    model = AutoencoderKLWan(base_dim=8)
    start(model, seed=0)
    network = WholeClipVAE(model)
    clips = torch.stack([draw_clip(WorldConfig(size=32), i, 5, False) for i in range(4)])
    with torch.no_grad():
        mean, log_variance = network.encode(clips)
        spread = network.decode(mean).std(0).mean()
        assert 0.2 < mean.std() < 3 and (0.5 * log_variance).exp().max() < 0.1
        assert spread > 0.1 * network.decode(mean).std()


def test_settled_latents_are_standard_and_pixels_the_same(autoencoder):
    world = WorldConfig(size=32, frames=9)
    vae = WanVAE(copy_of(autoencoder))
    clips = torch.stack([draw_clip(world, i, 9, False) for i in range(6)])
    with torch.no_grad():
        before = vae.decode(vae.encode(clips), clamp=False)
        logvar = vae.model.quant_conv(torch.ones(1, 32, 1, 1, 1)).flatten()[16:]
        mean, std = latent_statistics(vae, world, 6)
        settle(vae, mean, std)
        latents = vae.encode(clips)
        torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-3)
        torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), rtol=1e-2, atol=0)
        torch.testing.assert_close(vae.decode(latents, clamp=False), before, rtol=1e-3, atol=1e-3)
        # The posterior's width follows its mean: as much noise for the signal as before.
        wider = vae.model.quant_conv(torch.ones(1, 32, 1, 1, 1)).flatten()[16:] - logvar
        torch.testing.assert_close(wider, -2 * std.log().float(), rtol=1e-3, atol=1e-3)


def test_a_silent_channel_is_named(autoencoder):
    with pytest.raises(ConfigError, match="channel of the latents is constant"):
        settle(WanVAE(copy_of(autoencoder)), torch.zeros(16), torch.zeros(16))


def test_errors_against_numbers():
    true = torch.zeros(2, 3, 5, 8, 8)
    made = true.clone()
    made[0] += 0.2
    assert psnr(made, true)[0].item() == pytest.approx(20.0, abs=1e-3)  # a tenth of the range
    assert edge_error(made, true) == 0 and motion_error(made, true) == 0
    made[1, :, 2] = 1.0
    assert edge_error(made, true) == 0
    assert motion_error(made, true).item() == pytest.approx(2 / 4 / 2)  # two of four steps, one of two clips
    assert motion_error(made[:, :, :1], true[:, :, :1]) == 0


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    weights = {"pixels": 1.0, "squares": 3.0, "edges": 0.5, "motion": 0.75, "kl": 0.01}
    named = [f"vae.{name}={weight}" for name, weight in weights.items() if name != "pixels"]
    config = small_vae(tmp_path, "steps=1", "vae.dim_mult=[1,2,2,3]", *named)
    run(config)
    values = load_line((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    parts = sum(weight * values[f"loss_{name}"] for name, weight in weights.items())
    assert values["loss"] == pytest.approx(parts, rel=1e-5)
    made = load_vae(tmp_path / "export", "float32").model
    assert list(made.config.dim_mult) == [1, 2, 2, 3] and made.decoder.conv_in.weight.shape[0] == 12


@pytest.mark.slow
def test_training_learns_and_resumes_bit_for_bit(tmp_path):
    straight = small_vae(tmp_path / "straight", "steps=6", "vae.evaluate_every=6", "sample_every=6")
    run(straight)
    lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    first, last = (load_line(line) for line in (lines[0], lines[-1]))
    assert last["loss"] < first["loss"]
    assert {"psnr_clips", "psnr_conditions", "psnr_pictures", "psnr_picture_conditions"} <= last.keys()
    assert (tmp_path / "straight" / "samples" / "step_00000006.png").is_file()

    run(small_vae(tmp_path / "halves", "steps=4", "vae.evaluate_every=6"))
    run(small_vae(tmp_path / "halves", "steps=6", "vae.evaluate_every=6"))
    one, two = (load_vae(tmp_path / name / "export", "float32") for name in ("straight", "halves"))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name

    latents = torch.cat([one.encode(draw_clip(straight.world, i, 9, False)[None]).flatten(2) for i in range(4)], dim=2)
    torch.testing.assert_close(latents.mean(2)[0], torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(2)[0], torch.ones(16), rtol=1e-2, atol=0)
    again = export_only(straight, Ranks(), CPU, lambda: Autoencoder(straight, Ranks(), CPU))
    assert again == tmp_path / "straight" / "export"

    # An export is a place to begin from.
    more = small_vae(tmp_path / "more", "steps=1", f"ckpt_dir={again}")
    network = Autoencoder(more, Ranks(), CPU).network.model
    assert torch.equal(network.decoder.conv_out.weight, one.model.decoder.conv_out.weight)


def test_a_frozen_encoder_keeps_its_latents(tmp_path):
    run(small_vae(tmp_path / "first", "steps=1", "vae.evaluate_every=0"))
    first = tmp_path / "first" / "export"
    run(small_vae(tmp_path / "then", "steps=2", "vae.evaluate_every=0", f"ckpt_dir={first}", "vae.freeze_encoder=true"))
    before, after = (load_vae(folder, "float32") for folder in (first, tmp_path / "then" / "export"))
    clip = draw_clip(WorldConfig(size=32, frames=9), 5, 9, condition=False)[None]
    assert torch.equal(before.encode(clip), after.encode(clip))
    moved = {name for name, p in after.model.named_parameters() if not torch.equal(p, before.model.get_parameter(name))}
    assert {name.split(".")[0] for name in moved} == {"decoder", "post_quant_conv"}
    with pytest.raises(ConfigError, match="name its ckpt_dir"):
        Autoencoder(small_vae(tmp_path / "new", "vae.freeze_encoder=true"), Ranks(), CPU)


def load_line(line):
    import json

    return json.loads(line)


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([], "at least one"),
        ([Stage(0), Stage(0)], "number of steps"),
        ([Stage(lengths=[17])], "lengths"),
        ([Stage(lengths=[4])], "lengths"),
        ([Stage(lengths=[])], "lengths"),
        ([Stage(lengths=[1], crop=20)], "crop"),
        ([Stage(lengths=[1], crop=64)], "crop"),
        ([Stage(lengths=[1], clips=3)], "clips"),
        ([Stage(lengths=[1], pieces=0)], "pieces"),
    ],
)
def test_stages_that_do_not_fit_are_named(stages, reason):
    with pytest.raises(ConfigError, match=reason):
        PictureFeeder(WorldConfig(size=32, frames=9), stages, 0.4, 0, 2)


@pytest.mark.parametrize("widths", ["[1,2,4]", "[1,2,4,0]", "[]"])
def test_widths_that_do_not_fit_are_named(widths, tmp_path):
    with pytest.raises(ConfigError, match=r"vae\.dim_mult must be four"):
        small_vae(tmp_path, f"vae.dim_mult={widths}")


# --- pictures --------------------------------------------------------------------------------------------------------


def test_batches_depend_on_their_number_alone():
    world = WorldConfig(size=32, frames=9)
    stages = [Stage(3, [1], 16, 4), Stage(0, [1, 5, 9], 0, 2)]
    feeder = PictureFeeder(world, stages, 0.4)
    with feeder.batches(2, workers=2, prefetch=2) as batches:
        ahead = [next(batches) for _ in range(4)]
    shapes = [(4, 3, 1, 16, 16), (18, 3, 1, 32, 32), (3, 3, 5, 32, 32), (2, 3, 9, 32, 32)]
    assert [tuple(batch.pixels.shape) for batch in ahead] == shapes
    for number, batch in enumerate(ahead, start=2):
        assert batch.number == number and torch.equal(batch.pixels, feeder.draw(number).pixels)
        assert batch.pixels.abs().max() <= 1
    halves = [PictureFeeder(world, stages, 0.4, rank, 2).draw(5).pixels for rank in range(2)]
    assert torch.equal(torch.cat(halves), ahead[3].pixels)


def test_crops_are_cut_around_things():
    """Each is a part of its clip, and a thing is in the middle half of it when the clip is halfway, or at the edge of
    the frame."""
    world, crop = WorldConfig(size=64, frames=5), 24
    feeder = PictureFeeder(world, [Stage(0, [5], crop, 8, 4)], conditions=0.0)
    pixels = feeder.draw(3).pixels.float()
    assert pixels.shape == (8, 3, 5, crop, crop)
    corners = []
    for i, piece in enumerate(pixels):
        number = 3 * feeder.most + i // 4
        clip = draw_clip(world, number, 5, condition=False)
        places = clip.unfold(2, crop, 1).unfold(3, crop, 1)  # [3, T, top, left, crop, crop]
        error = (places - piece[:, :, None, None]).abs().amax((0, 1, 4, 5))
        top, left = divmod(int(error.argmin()), error.shape[1])
        assert error.min() < 1e-3  # half precision
        corners.append((i // 4, left, top))
        names = np.random.default_rng((world.seed, number, False, 2)).integers(len(TASKS))
        scene = draw_task(world.seed + number, TASKS[int(names)], frames=5, width=64, height=64).scene
        inside = np.array([Track.of(thing, scene).centre[2] for thing in scene.things]) - (left, top)
        near = (inside >= crop / 4 - 1) | (np.array([left, top]) == 0)
        far = (inside <= crop * 3 / 4 + 1) | (np.array([left, top]) == 64 - crop)
        assert (near & far).all(1).any()
    assert len(set(corners)) > 4  # not the same piece again and again


def test_pieces_of_one_clip_have_their_own_times():
    world = WorldConfig(size=32, frames=9)
    one = PictureFeeder(world, [Stage(0, [1, 9], 0, 2, 1)], 0.0).draw(2).pixels
    many = PictureFeeder(world, [Stage(0, [1, 9], 0, 2, 6)], 0.0).draw(2).pixels
    assert many.shape == one.shape == (18, 3, 1, 32, 32)
    assert torch.equal(many[0], one[0]) and torch.equal(many[6], one[1])
    assert 1 < len({piece.numpy().tobytes() for piece in many[:6]}) <= 5  # as many pictures as are rendered


@pytest.mark.parametrize("task", TASKS)
def test_conditions_of_every_task(task):
    """Never a plain grey: where a task has nothing to encode, a plain colour stands in."""
    world = WorldConfig(size=32, frames=9, tasks=[task])
    for frames in (1, 9):
        clip = draw_clip(world, 7, frames, condition=True)
        assert clip.shape == (3, frames, 32, 32) and clip.dtype == torch.float32
        assert clip.abs().max() <= 1 and (clip.amax() - clip.amin() > 0.05 or clip.abs().min() > 0.01)


# --- text ------------------------------------------------------------------------------------------------------------


def test_classes_say_what_the_scene_has():
    for seed in range(50):
        scene = draw_scene(seed)
        said = dict(zip(CLASSES, attributes(scene), strict=True))
        assert CLASSES["background"][said["background"]] == scene.background.kind
        assert said["count"] == len(scene.things) - 1
        for i in range(3):
            if i < len(scene.things):
                assert CLASSES[f"colour_{i}"][said[f"colour_{i}"]] == scene.things[i].colour
            else:
                assert said[f"shape_{i}"] == said[f"motion_{i}"] == ABSENT


def test_scores():
    right = torch.ones(4, len(CLASSES))
    right[0, list(CLASSES).index("shape_1")] = 0
    right[:, list(CLASSES).index("shape_2")] = torch.nan
    got = scores(right)
    assert got["accuracy_shape"] == pytest.approx(7 / 8) and got["accuracy_colour"] == 1
    assert got["accuracy_scene"] == pytest.approx(3 / 4)


def test_tokenizer_has_the_words_of_the_world():
    tokenizer = train_tokenizer(corpus(300), 1024)
    assert tokenizer.backend_tokenizer.to_str() == train_tokenizer(corpus(300), 1024).backend_tokenizer.to_str()
    text = "A red ball slides to the left, in front of green hills."
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[:3] == ["▁A", "▁red", "▁ball"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in tokenizer("Zebras & 0123456789 {unseen} words?")["input_ids"]
    assert "红" in tokenizer.convert_ids_to_tokens(tokenizer("一个红色球")["input_ids"])


def test_text_encoder_learns_and_loads(tmp_path):
    from vdot.training.text import TextEncoder

    config = config_of(
        "tiny_text", tmp_path, "steps=4", "batch_size=8", "text.tokenizer_captions=200", "text.evaluate_captions=8",
        "text.evaluate_every=4", "generator.warmup=1", "generator.decay=constant", "save_every=4",
    )  # fmt: skip
    run(config, TextEncoder)
    lines = [load_line(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and 0 <= lines[-1]["accuracy"] <= 1
    encoder = load_text_encoder(tmp_path / "export", "float32")
    captions = draw_captions(range(2), "test")
    embeddings, lengths = encoder(list(captions.texts))
    assert embeddings.shape == (2, 512, 128) and np.all(lengths.numpy() > 5)


# --- the optimizer ---------------------------------------------------------------------------------------------------


def test_orthogonal_keeps_directions_and_evens_lengths():
    """Against the singular value decomposition: U V' up to the iteration's known spread of singular values."""
    for shape, compute in itertools.product(((16, 48), (48, 16)), (torch.float32, torch.bfloat16)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        got = orthogonal(matrix[None], compute)[0]
        assert got.dtype == torch.float32
        values = torch.linalg.svdvals(got)
        assert 0.6 < values.min() and values.max() < 1.3
        assert torch.nn.functional.cosine_similarity(got.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_muon_follows_adam_where_there_is_no_matrix():
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    muon = Muon({"bias": mine}, 1e-2, (0.9, 0.99), weight_decay=0.1)
    adam = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        mine.grad = torch.randn(5)
        theirs.grad = mine.grad.clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(mine, theirs)
