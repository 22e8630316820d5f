"""Whole runs at toy size: what is trained, saved, resumed, skipped and exported."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.training.toy import ToySource, toy_checkpoint, toy_config
from vdot import VdotPipeline
from vdot.checkpoints import load_dit
from vdot.data.dataset import JointSource, latent_pixels, make_sampler
from vdot.errors import CheckpointError, ConfigError, InputError, TrainingError
from vdot.parallel.state import Ranks
from vdot.training.checkpoint import CheckpointStore
from vdot.training.cli import OBJECTIVES, check_named, main
from vdot.training.config import TrainConfig
from vdot.training.loop import export_only, train
from vdot.training.lora import extract
from vdot.training.metrics import read_metrics
from vdot.video import probe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("teacher") / "toy")


def run(config: TrainConfig, source: ToySource | None = None) -> str | None:
    kind = OBJECTIVES[config.objective]
    return train(config, Ranks(), CPU, partial(kind, config, Ranks(), CPU, source or ToySource()))


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read without knowing what it should hold."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = folder / "checkpoints" / f"step_{step:08d}"
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


VARIANTS = {
    "distill": {},
    "adapters": {"lora__rank": 2},
    "flow": {"objective": "flow"},
    "accumulation": {"accumulation": 2, "generator__betas": "[0.9,0.99]"},
    "half precision": {"parallel__compute": "bfloat16", "parallel__recompute": "full"},
    "autocast": {"parallel__compute": "bfloat16", "parallel__autocast": "true"},
}


QUICK = ("distill",)


@pytest.mark.parametrize("variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_resumed_equals_uninterrupted_bit_for_bit(variant, teacher, tmp_path):
    values = VARIANTS[variant]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(toy_config(teacher, whole, **values)) is None
    assert run(toy_config(teacher, parts, **values | {"steps": 3})) is None
    assert run(toy_config(teacher, parts, **values)) is None
    assert equal(saved(whole, 6), saved(parts, 6))
    assert not equal(saved(whole, 3), saved(whole, 6))
    timing = ("time", "seconds", "tokens_per_second", "tflops_per_second", "memory_gb")
    lines = [
        [{k: v for k, v in line.items() if not k.startswith(timing)} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, parts)
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]


class Stills(ToySource):
    """The same examples, single frames."""

    identity = "stills"

    def __init__(self) -> None:
        super().__init__()
        self.shapes = [replace(shape, frames=1) for shape in self.shapes]


@pytest.mark.parametrize("objective", ["flow", "distill"])
def test_clips_and_stills_train_together_and_go_on(objective, teacher, tmp_path):
    """Tokens are 2 x 2 latent pixels; a batch of stills has the 64 latent pixels of two clips without a reference."""
    source = JointSource(ToySource(), Stills())
    values = {"objective": objective, "data__encoded": "clips", "data__stills__encoded": "stills", "seed": 3}
    whole, parts = (toy_config(teacher, tmp_path / name, **values) for name in ("whole", "parts"))
    run(whole, source)
    run(replace(parts, steps=3), source)
    run(parts, source)
    assert equal(saved(tmp_path / "whole", 6), saved(tmp_path / "parts", 6))
    drawn = [make_sampler(source, whole.data, 2, 3).draw(number) for number in range(6)]
    counted = [sum(latent_pixels(source.shapes[row]) for row in rows) // 4 for rows in drawn]
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [round(line["tokens_per_second"] * line["seconds"]) for line in lines] == counted
    assert {source.shapes[rows[0]].frames for rows in drawn} == {1, 2} and {len(rows) for rows in drawn} > {2}


def test_stills_go_beside_an_encoded_folder(teacher, tmp_path):
    given = toy_config(teacher, tmp_path, data__path="table.csv", data__stills__encoded="stills")
    with pytest.raises(ConfigError, match="give the first one, that of the clips"):
        check_named(given)


def test_a_checkpoint_of_other_networks_is_refused(teacher, tmp_path):
    run(toy_config(teacher, tmp_path, steps=2))
    with pytest.raises(CheckpointError, match="another training setup"):
        run(toy_config(teacher, tmp_path, lora__rank=2))


def test_only_the_generator_moves_every_second_step_and_the_teacher_never(teacher, tmp_path):
    before = load_dit(teacher).state_dict()
    run(toy_config(teacher, tmp_path, steps=2, save_every=1, keep=5))
    one, two = saved(tmp_path, 1), saved(tmp_path, 2)
    for name in before:
        assert torch.equal(one[f"generator/{name}"], two[f"generator/{name}"])
    assert any(not torch.equal(one[f"generator/{name}"], t) for name, t in before.items())
    assert any(not torch.equal(one[f"critic/{name}"], two[f"critic/{name}"]) for name in before)
    assert not any(key.startswith("real") for key in one)
    assert all(torch.equal(before[k], v) for k, v in load_dit(teacher).state_dict().items())


def test_metrics_say_what_a_researcher_asks(teacher, tmp_path):
    run(toy_config(teacher, tmp_path, steps=4))
    first, second, third, _ = read_metrics(tmp_path / "metrics.jsonl")
    scores = {"loss_dmd", "grad_dmd", "grad_ot", "cosine_dmd_ot", "ot_marginal_error", "ot_iterations", "ot_cost"}
    always = {"loss_fake", "norm_critic", "lr_critic", "tokens_per_second", "bad_steps", "bad_rows", "memory_gb"}
    assert scores | always | {"norm_generator", "time_rollout", "time_scores", "time_ot"} <= first.keys()
    assert always <= second.keys() and "norm_generator" not in second
    assert {"loss_gan", "grad_gan", "logit_gap"} <= third.keys()
    assert {"loss_discriminator", "logit_real", "logit_fake"} <= second.keys() and "logit_real" not in first
    assert first["ot_iterations"] == 60


def test_rows_without_a_real_clip_train_the_other_terms(teacher, tmp_path):
    run(toy_config(teacher, tmp_path, steps=12, save_every=12), ToySource(gaps=True))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    turns = [line for line in lines if (line["step"] - 1) % 4 == 2]  # the adversarial ones
    kinds = {("loss_gan" in line, "loss_dmd" in line) for line in turns}
    assert kinds == {(True, False), (False, True)}


def test_rows_without_a_real_clip_cannot_train_the_discriminator_alone(teacher, tmp_path):
    with pytest.raises(InputError, match="video_path"):
        run(toy_config(teacher, tmp_path, distill__dmd__weight=0, distill__ot_weight=0), ToySource(2, gaps=True))


def test_a_step_that_is_not_finite_is_skipped_and_counted(teacher, tmp_path):
    source = ToySource(24, bad=(4, 7, 10))
    run(toy_config(teacher, tmp_path, steps=16, save_every=16, seed=1), source)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["bad_steps"] > 0
    assert any(line["loss_fake"] is None for line in lines)
    assert all(torch.isfinite(t).all() for t in saved(tmp_path, 16).values())


def test_many_such_steps_end_training_with_a_diagnosis(teacher, tmp_path):
    source = ToySource(24, bad=tuple(range(24)))
    with pytest.raises(TrainingError, match=r"3 updates in a row were not finite.*lower learning rate"):
        run(toy_config(teacher, tmp_path, max_bad_steps=3), source)


def test_a_gallery_shows_the_same_examples_with_the_same_noise(teacher, tmp_path):
    """Per task a video and together a picture; frozen weights give the same bytes at every step."""
    rates = {"generator__lr": 0.0, "generator__weight_decay": 0.0}
    run(toy_config(teacher, tmp_path, steps=4, sample_every=2, **rates))
    folder = tmp_path / "samples"
    assert sorted(p.name for p in folder.iterdir()) == [
        "step_00000002",
        "step_00000002.png",
        "step_00000004",
        "step_00000004.png",
    ]
    for task in ("t2v", "r2v"):
        before, after = ((folder / f"step_{step:08d}" / f"{task}.mp4") for step in (2, 4))
        assert before.read_bytes() == after.read_bytes()
        info = probe(before)
        assert (info.frames, info.height, info.width) == (5, 32, 4 * 32)  # kept | changed | real | made


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_half_precision_by_autocast_trains_as_by_fsdp(recompute, teacher, tmp_path):
    """Losses of four steps, relative 2%: bfloat16 has 8 bits and the two round at different places.

    The weights that are saved are float32 both times.
    """
    ways = {"fsdp": {}, "autocast": {"parallel__autocast": "true"}}
    for name, way in ways.items():
        half = {"parallel__compute": "bfloat16", "parallel__recompute": recompute}
        run(toy_config(teacher, tmp_path / name, steps=4, save_every=4, **half, **way))
        assert all(t.dtype == torch.float32 for k, t in saved(tmp_path / name, 4).items() if k.startswith("generator/"))
    fsdp, autocast = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ways)
    for a, b in zip(fsdp, autocast, strict=True):
        for key in ("loss_fake", "loss_dmd", "norm_critic", "norm_generator"):
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=0.02)


@pytest.mark.slow
def test_compiled_blocks_train_alike(teacher, tmp_path):
    """Losses and norms of three steps, relative 1e-4: other kernels, float32."""
    for name, more in (("eager", {}), ("compiled", {"parallel__compile": "true", "parallel__recompute": "full"})):
        run(toy_config(teacher, tmp_path / name, steps=3, **more))
    eager, compiled = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("eager", "compiled"))
    for a, b in zip(eager, compiled, strict=True):
        assert a.keys() == b.keys()  # the generator has not a turn in every step
        for key in a.keys() & {"loss_fake", "norm_critic", "loss_dmd", "norm_generator"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4)


# --- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "vdot", "diffusers"])
def test_an_export_is_loaded_by_the_pipeline_with_its_schedule(layout, teacher, tmp_path):
    config = toy_config(teacher, tmp_path, steps=3, export_layouts=f"[{layout}]", export_dtype="float32")
    run(config)
    folder = tmp_path / ("export" if layout == "native" else f"export-{layout}")
    pipe = VdotPipeline.from_pretrained(folder, device="cpu", dtype="float32")
    assert pipe.schedule == config.distill.schedule.build()
    state = saved(tmp_path, 3)
    exported = load_dit(folder).state_dict()
    assert all(torch.equal(exported[name], state[f"ema/{name}"]) for name in exported)
    assert not all(torch.equal(exported[name], state[f"generator/{name}"]) for name in exported)
    assert len(pipe("a red ball", size="32*32", frame_num=5).frames) == 5
    if layout == "vdot":
        assert (folder / "vdot-weights" / "vdot.pt").is_file()


def test_diffusers_makes_the_same_video_of_its_export(teacher, tmp_path):
    """As it opens, diffusers' noise levels are up to 1e-3 higher than ours; given ours, the videos are equal."""
    from diffusers import WanVACEPipeline

    from vdot.sampling import draw_noise

    values = {"distill__schedule__solver": "unipc", "export_layouts": "[native,diffusers]", "export_dtype": "float32"}
    run(toy_config(teacher, tmp_path, steps=3, **values))
    ours = VdotPipeline.from_pretrained(tmp_path / "export", device="cpu", dtype="float32")
    prompt, seed = "a red ball rolls", 7
    video, unlike = (ours(prompt, size="32*32", frame_num=9, seed=s).frames.astype(float) for s in (seed, seed + 1))
    theirs = WanVACEPipeline.from_pretrained(tmp_path / "export-diffusers")
    theirs.set_progress_bar_config(disable=True)
    noise, _ = draw_noise((16, 3, 4, 4), seed)
    sizes = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 1.0}

    def difference() -> float:
        other = theirs(prompt, latents=noise[None], max_sequence_length=64, output_type="np", **sizes).frames[0]
        return np.abs(video - 255 * other).mean()

    assert difference() < 0.1 * np.abs(video - unlike).mean()
    default = theirs.scheduler.set_timesteps

    def our_levels(*args, **kwargs):
        default(*args, **kwargs)
        theirs.scheduler.sigmas, theirs.scheduler.timesteps = ours.schedule.sigmas(), ours.schedule.timesteps()

    theirs.scheduler.set_timesteps = our_levels
    assert difference() < 0.3  # of 255: rounding to bytes alone is 0.25


def test_exported_adapters_are_one_change_in_every_form(teacher, tmp_path):
    """Merged weights, peft's folder and ComfyUI's file all add alpha / r * B A to the teacher."""
    from safetensors.torch import load_file

    run(
        toy_config(
            teacher, tmp_path, steps=3, lora__rank=2, lora__alpha=3.0, export_layouts="[native]", export_dtype="float32"
        )
    )
    before, after = load_dit(teacher).state_dict(), load_dit(tmp_path / "export").state_dict()
    comfy = load_file(tmp_path / "export-lora" / "comfyui.safetensors")
    peft = load_file(tmp_path / "export-lora" / "adapter_model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    layers = {key.removeprefix("diffusion_model.").rpartition(".lora_down")[0] for key in comfy if "lora_down" in key}
    assert set(changed) == {f"{layer}.weight" for layer in layers} and changed
    for layer in layers:
        down, up = (comfy[f"diffusion_model.{layer}.lora_{side}.weight"] for side in ("down", "up"))
        change = comfy[f"diffusion_model.{layer}.alpha"] / len(down) * up @ down
        torch.testing.assert_close(after[f"{layer}.weight"] - before[f"{layer}.weight"], change, atol=1e-6, rtol=1e-4)
        a, b = (peft[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a, down) and torch.equal(b, up)


def test_the_peft_folder_is_read_by_peft(teacher, tmp_path):
    from peft import PeftModel

    run(toy_config(teacher, tmp_path, steps=2, lora__rank=2, export_layouts="[native]", export_dtype="float32"))
    merged, base = load_dit(tmp_path / "export"), load_dit(teacher)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "export-lora"))
    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(1, 16, 2, 4, 4, generator=g), torch.tensor([500.0]), torch.randn(1, 5, 128, generator=g))
    context = torch.randn(1, 96, 2, 4, 4, generator=g)
    with torch.no_grad():
        torch.testing.assert_close(adapted(*inputs, context), merged(*inputs, context), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_lora_extracted_from_two_checkpoints_is_their_difference(teacher, tmp_path):
    """A change of rank 2 comes back whole at rank 2, and its better half at rank 1."""
    from safetensors.torch import load_file

    run(toy_config(teacher, tmp_path, steps=2, lora__rank=2, export_layouts="[native]", export_dtype="float32"))
    command = [sys.executable, str(ROOT / "scripts" / "extract_lora.py"), "--base", str(teacher), "--device", "cpu"]
    command += ["--tuned", str(tmp_path / "export"), "--rank", "2", "--out", str(tmp_path / "lora")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "100.0% of the difference kept" in done.stdout
    before, after = load_dit(teacher), load_dit(tmp_path / "export")
    peft = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    name = "blocks.1.self_attn.q"
    a, b = (peft[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    change = after.get_submodule(name).weight - before.get_submodule(name).weight
    torch.testing.assert_close(b @ a, change.detach(), atol=1e-6, rtol=1e-4)
    factors, kept = extract(before, after, 1, CPU)
    values = torch.linalg.svdvals(change.detach())
    assert 0.5 <= kept < 0.999
    left = (change.detach() - factors[name][1] @ factors[name][0]).norm()
    torch.testing.assert_close(left, values[1:].norm(), atol=1e-6, rtol=1e-4)


def test_export_on_demand_needs_a_checkpoint(teacher, tmp_path):
    config = toy_config(teacher, tmp_path)
    opened = partial(OBJECTIVES["distill"], config, Ranks(), CPU, ToySource())
    with pytest.raises(ConfigError, match="no checkpoint to export"):
        export_only(config, Ranks(), CPU, opened)


# --- as a user runs it -----------------------------------------------------------------------------------------------


def start(output: Path, *values: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--config", "tiny", f"output_dir={output}"]
    values = ("sample_every=0", "batch_size=1", "world.clips=4", "world.size=32", "world.frames=5", *values)
    return subprocess.Popen(
        [*command, *values],
        cwd=output.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(output: Path, step: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        path = output / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_metrics(path)):
            return
        time.sleep(0.05)
    pytest.fail(f"no step {step} within {seconds:.0f} s")


def test_a_stopped_run_saves_and_goes_on(tmp_path):
    """SIGTERM: exit code 0, everything saved, and how to go on; the same command then ends the run and exports."""
    output = tmp_path / "run"
    first = start(output, "steps=1000")
    wait_for_step(output, 2)
    first.send_signal(signal.SIGTERM)
    out, errors = first.communicate(timeout=600)
    assert first.returncode == 0, errors
    assert "resume with" in out and "SIGTERM" in out
    step = CheckpointStore(output / "checkpoints", read_only=True).latest()
    assert step == read_metrics(output / "metrics.jsonl")[-1]["step"] >= 2
    second = start(output, f"steps={step + 1}")
    out, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    assert f"resumed {output} at step {step}" in out
    assert json.loads((output / "export" / "schedule.json").read_text())["solver"] == "renoise"


@pytest.mark.parametrize(
    "argv,message",
    [
        ([], "give --config FILE"),
        (["--config", "tinny"], "did you mean tiny?"),
        (["--config", "tiny", "distil.ot_weight=1"], "unknown key 'distil'; did you mean distill?"),
        (["--config", "tiny", "distill.ot.epz=1"], "unknown key 'epz'; did you mean eps?"),
        (["--config", "tiny", "distill.balance=rsm"], "balance must be one of rms, release"),
        (["--config", "tiny", "ckpt_dir=nowhere"], "nowhere"),
        (["--config", "tiny", "world.clips=0"], "name the training data"),
        (["--config", "tiny", "world.tasks=[teleport]"], "the world has no task 'teleport'"),
        (["--config", "tiny", "batch_size=0"], "batch_size must be at least 1"),
        (["--config", "tiny", "data.path=missing.csv", "world.clips=0"], "missing.csv"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_input_gets_one_sentence(argv, message, tmp_path, capsys):
    output = [f"output_dir={tmp_path / 'run'}"] if argv and argv[0] == "--config" else []
    code = main([*argv, *output])
    error = capsys.readouterr().err.strip()
    assert code == 2 and message in error and len(error.splitlines()) == 1 and error.startswith("error: ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
