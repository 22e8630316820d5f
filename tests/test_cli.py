"""The command line end to end: what it makes, what it says, and what it refuses in one sentence with nothing left."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import vdot.cli
from tests.conftest import ROOT, TINY
from tests.test_request import KINDS, broken
from tests.test_video import make, turn
from vdot import VdotPipeline
from vdot.config import GenerateConfig
from vdot.errors import OutputError
from vdot.video import output, probe, read_frames

SMALL = ("--size", "64*32", "--frame_num", "5")
SCRIPT = ROOT / "inference" / "vace_wan_inference.py"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Load each pipeline once for all tests of this file, and let one memory plan do (test_memory.py counts them).

    Gives the list of what was asked to be loaded.
    """
    patch, loads, pipelines, plans = pytest.MonkeyPatch(), [], {}, {}
    load, plan = VdotPipeline.from_pretrained.__func__, vdot.cli.plan_generation

    def cached_load(cls, *args, **kwargs):
        loads.append(args)
        key = (Path(args[0]).resolve(), *args[1:], *kwargs.items())
        if key not in pipelines:
            pipelines[key] = load(cls, *args, **kwargs)
        return pipelines[key]

    def cached_plan(*args):
        return plans.get("plan") or plans.setdefault("plan", plan(*args))

    patch.setattr(VdotPipeline, "from_pretrained", classmethod(cached_load))
    patch.setattr(vdot.cli, "plan_generation", cached_plan)
    patch.delenv("WORLD_SIZE", raising=False)
    yield loads
    patch.undo()


def outputs(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "run.json"}


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


# --- what it makes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, extra",
    [
        ((), []),
        (("src_ref_images",), ["src_ref_image_0.png", "src_ref_image_1.png"]),
        (("src_video",), ["src_video.mp4"]),
        (("src_video", "src_mask"), ["src_video.mp4", "src_mask.mp4"]),
        (
            ("src_video", "src_mask", "src_ref_images"),
            ["src_video.mp4", "src_mask.mp4", "src_ref_image_0.png", "src_ref_image_1.png"],
        ),
    ],
)
def test_the_output_folder_and_its_repetition_byte_for_byte(given, extra, cli, inputs, tmp_path):
    files = {
        "src_video": inputs / "clip.mp4",
        "src_mask": inputs / "mask.mp4",
        "src_ref_images": f"{inputs / 'toy.png'},{inputs / 'mask.png'}",
    }
    media = [item for name in given for item in (f"--{name}", files[name])]
    args = ("--prompt", "a ball: ${x}", "--base_seed", -1, "--sample_guide_scale", 1.5, *media, *SMALL)
    code, _, err = cli(*args, "--save_dir", tmp_path / "a")
    assert (code, err) == (0, "")
    assert sorted(os.listdir(tmp_path / "a")) == sorted(["out_video.mp4", "run.json", *extra])
    first = record(tmp_path / "a")
    assert first["outputs"] == outputs(tmp_path / "a") and first["config"]["base_seed"] >= 0
    assert probe(tmp_path / "a" / "out_video.mp4").frames == 5

    again = cli("--config", tmp_path / "a" / "run.json", "--save_dir", tmp_path / "b")
    assert again[0] == 0 and outputs(tmp_path / "b") == outputs(tmp_path / "a")


def test_a_repetition_works_from_another_folder(cli, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    assert cli("--prompt", "x", "--src_ref_images", "toy.png", *SMALL, "--save_dir", tmp_path / "a")[0] == 0
    monkeypatch.chdir(tmp_path)
    assert cli("--config", "a/run.json", "--save_dir", "b")[0] == 0
    assert outputs(tmp_path / "b") == outputs(tmp_path / "a")


def test_seeds(cli, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli("--prompt", "x", *SMALL, "--base_seed", seed, "--save_dir", tmp_path / name)[0] == 0
    made = [outputs(tmp_path / name)["out_video.mp4"] for name in "abc"]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("frames, source", [(1, False), (18, False), (1, True), (2, True), (16, True)])
def test_n_frames_asked_are_n_frames_in_the_file(frames, source, cli, inputs, tmp_path):
    media = ("--src_video", inputs / "clip.mp4") if source else ()
    code, _, _ = cli("--prompt", "x", "--size", "32*16", *media, "--frame_num", frames, "--save_dir", tmp_path / "a")
    assert code == 0 and probe(tmp_path / "a" / "out_video.mp4").frames == frames


def test_the_first_line_says_which_checkpoint_and_why(cli, tmp_path, monkeypatch):
    plan = ("--prompt", "x", *SMALL, "--dry_run", "--t5_fsdp")
    assert cli(*plan)[1].splitlines()[0].startswith("checkpoint models/vdot-tiny (the small model of this repository")
    assert cli(*plan, "--ckpt_dir", TINY)[1].splitlines()[0] == f"checkpoint {TINY} (as asked)"
    (tmp_path / "models").mkdir()
    shutil.copytree(TINY, tmp_path / "models" / "VDOT")
    monkeypatch.chdir(tmp_path)
    assert cli(*plan)[1].splitlines()[0] == "checkpoint models/VDOT (found)"


def test_results_go_into_a_new_folder_by_model_and_time(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vdot.record.time, "strftime", lambda _: "now")
    for name in ("now", "now_2"):
        assert cli("--prompt", "x", *SMALL)[0] == 0
        assert (tmp_path / "results" / "vdot-tiny" / name / "run.json").is_file()


def test_a_second_run_into_one_folder_leaves_nothing_of_the_first(cli, inputs, tmp_path):
    folder = ("--save_dir", tmp_path / "a")
    assert cli("--prompt", "x", *SMALL, *folder, "--src_ref_images", f"{inputs}/toy.png,{inputs}/mask.png")[0] == 0
    (tmp_path / "a" / "mine.txt").touch()
    assert cli("--prompt", "x", *SMALL, *folder, "--src_video", inputs / "clip.mp4")[0] == 0
    assert sorted(os.listdir(tmp_path / "a")) == ["mine.txt", "out_video.mp4", "run.json", "src_video.mp4"]


def test_save_file_elsewhere(cli, tmp_path):
    target = tmp_path / "new folder" / "é.mp4"
    assert cli("--prompt", "x", *SMALL, "--save_dir", tmp_path / "a", "--save_file", target)[0] == 0
    assert os.listdir(tmp_path / "a") == ["run.json"] and probe(target).frames == 5


def test_sound_and_frame_rate_are_kept_and_said(cli, tmp_path):
    clip = make(tmp_path / "c.mp4", 17, size=(32, 64), fps=10, rate=44100)
    code, out, _ = cli("--prompt", "x", "--src_video", clip, "--size", "64*32", "--save_dir", tmp_path / "a")
    made = probe(tmp_path / "a" / "out_video.mp4")
    assert code == 0 and made.has_audio and made.fps == 10 and made.frames == 17
    assert "note  the sound of the source is carried over" in out
    fast = ("--fps", 20, "--save_dir", tmp_path / "b")
    code, out, _ = cli("--prompt", "x", "--src_video", clip, "--size", "64*32", *fast)
    assert code == 0 and "sound is left out" in out and not probe(tmp_path / "b" / "out_video.mp4").has_audio


@pytest.mark.parametrize("shape", ["portrait", "odd", "variable", "rotated", "gif", "one frame"])
def test_sources_as_users_have_them(shape, cli, tmp_path):
    how = {
        "portrait": {"size": (96, 48)},
        "odd": {"size": (50, 94)},
        "variable": {"pts": [0, 10, 200, 210, 400]},
        "gif": {"codec": "gif", "pix_fmt": "rgb8", "fps": 10},
    }.get(shape, {})
    name = tmp_path / ("a b,ü.gif" if shape == "gif" else "a b,ü.mp4")
    clip = make(name, 1 if shape == "one frame" else 5, **how)
    if shape == "rotated":
        clip = turn(clip, tmp_path / "turned.mp4", 90)
    args = ("--prompt", "x", "--src_video", clip, "--size", "96*64", "--save_dir", tmp_path / "out put")
    code, out, err = cli(*args)
    assert (code, err) == (0, "") and out.splitlines()[1].startswith("in    ")
    made = probe(tmp_path / "out put" / "out_video.mp4")
    assert (made.height > made.width) == (shape in ("portrait", "rotated"))
    assert made.height % 16 == made.width % 16 == 0
    again = cli("--config", tmp_path / "out put" / "run.json", "--save_dir", tmp_path / "b")
    assert again[0] == 0 and outputs(tmp_path / "b") == outputs(tmp_path / "out put")


def test_kept_pixels_survive_to_the_file_and_the_switch_works(cli, inputs, tmp_path):
    """Left half kept: within 6 grey levels of the source after H.264; without --keep_source it is made anew."""
    args = ("--prompt", "x", "--src_video", inputs / "clip.mp4", "--src_mask", inputs / "mask.mp4", "--size", "64*32")
    assert (
        cli(*args, "--save_dir", tmp_path / "a")[0] == cli(*args, "--no_keep_source", "--save_dir", tmp_path / "b")[0]
    )
    made = {name: read_frames(tmp_path / name / "out_video.mp4", range(5)).astype(int) for name in "ab"}
    source = read_frames(inputs / "clip.mp4", range(5)).astype(int)
    off = {name: np.abs(frames - source)[:, :, :24].mean() for name, frames in made.items()}
    assert off["a"] < 6 and off["b"] > 2 * off["a"], off


# --- what it understands ---------------------------------------------------------------------------------------------


def parsed(*argv):
    return vdot.cli.parse([str(a) for a in argv], "prog")


def test_flags_of_the_release_parse_with_their_meaning():
    argv = (
        "--model_name vace-14B --size 480p --frame_num 81 --ckpt_dir models/VDOT --offload_model True --ulysses_size 2 "
        "--ring_size 3 --t5_fsdp --t5_cpu --dit_fsdp --save_dir out --save_file out/a.mp4 --src_video v.mp4 "
        "--src_mask m.mp4 --src_ref_images a.png,b.png --prompt cat --use_prompt_extend plain --base_seed -1 "
        "--sample_solver unipc --sample_steps 4 --sample_shift 16 --sample_guide_scale 1.5"
    )
    expected = GenerateConfig(
        model_name="vace-14B",
        size="480p",
        frame_num=81,
        ckpt_dir="models/VDOT",
        offload_model="True",
        ulysses_size=2,
        ring_size=3,
        t5_fsdp=True,
        t5_cpu=True,
        dit_fsdp=True,
        save_dir="out",
        save_file="out/a.mp4",
        src_video="v.mp4",
        src_mask="m.mp4",
        src_ref_images="a.png,b.png",
        prompt="cat",
        base_seed=-1,
        sample_solver="unipc",
        sample_steps=4,
        sample_shift=16.0,
        sample_guide_scale=1.5,
    )
    assert parsed(*argv.split()) == expected


def test_switches_need_no_value_and_take_one():
    assert parsed("--dry_run", "prompt=x") == GenerateConfig(dry_run=True, prompt="x")
    assert parsed("--compile", "--t5_cpu", "false") == GenerateConfig(compile=True)
    assert parsed("--keep_source=off").keep_source is parsed("--no_keep_source").keep_source is False
    assert parsed("--offload_model").offload_model == "true"
    assert parsed("--offload_model", "block", "frame_num=5").offload_model == "block"
    assert parsed("--prompt", "a = b").prompt == "a = b"


def test_help_shows_examples_and_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        vdot.cli.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.count("\n    vace_wan_inference.py ") == 4
    assert [f.name for f in fields(GenerateConfig) if f"--{f.name} " not in text] == []


def test_the_examples_of_the_help_parse():
    examples = [line.strip() for line in vdot.cli.EXAMPLES.splitlines() if line.startswith("    %(prog)s")]
    import shlex

    for line in examples:
        assert parsed(*shlex.split(line)[1:]).prompt


# --- what it refuses -------------------------------------------------------------------------------------------------


def refuse(cli, folder: Path, loads: list, *args, words: str = "") -> str:
    """Exit code 2, one line on stderr, nothing loaded, nothing written."""
    before = len(loads)
    code, out, err = cli(*args, "--save_dir", folder)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert words in err and "Traceback" not in out + err
    assert len(loads) == before and not folder.exists()
    return err


WRONG = [
    ((), "the prompt is empty"),
    (("--prompt", ""), "the prompt is empty"),
    (("--prompt", "x", "--size", "500p"), "size '500p' is not understood"),
    (("--prompt", "x", "--size", "50*64"), 'the nearest is "48*64"'),
    (("--prompt", "x", "--frame_num", "0"), "frame_num must be at least 1"),
    (("--prompt", "x", "--frame_num", "-4"), "frame_num must be at least 1"),
    (("--prompt", "x", "--frame_num", "9" * 30), "frame_num must be at most"),
    (("--prompt", "x", "--frame_num", "five"), "frame_num is 'five', which is not a whole number"),
    (("--prompt", "x", "--sample_steps", "0"), "steps must be a whole number from 1"),
    (("--prompt", "x", "--sample_steps", "100000"), "steps must be a whole number from 1"),
    (("--prompt", "x", "--sample_shift", "0"), "shift must be a positive number"),
    (("--prompt", "x", "--sample_guide_scale", "nan"), "guide_scale must be a finite number"),
    (("--prompt", "x", "--sample_guide_scale", "inf"), "guide_scale must be a finite number"),
    (("--prompt", "x", "--sample_solver", "ddim"), "unknown solver 'ddim'"),
    (("--prompt", "x", "--context_scale", "nan"), "context_scale must be a number"),
    (("--prompt", "x", "--context_scale", "-1"), "context_scale must be a number"),
    (("--prompt", "x", "--fps", "0"), "fps must be a number"),
    (("--prompt", "x", "--base_seed", "9" * 30), "seed must be at most"),
    (("--prompt", "x", "--frame_mode", "most"), "unknown frame_mode"),
    (("--prompt", "x", "--src_video", "gone.mp4"), "gone.mp4 does not exist"),
    (("--prompt", "x", "--src_ref_images", "gone.png"), "gone.png does not exist"),
    (("--prompt", "x", "--src_mask", "m.mp4"), "a mask needs the source video"),
    (("--prompt", "x", "--device", "tpu"), "device"),
    (("--prompt", "x", "--device", "cuda:99"), "device 'cuda:99'"),
    (("--prompt", "x", "--dtype", "int8"), "unknown dtype"),
    (("--prompt", "x", "--attention", "fast"), "unknown attention 'fast'"),
    (("--prompt", "x", "--offload_model", "some"), "offload_model must be one of false, true, block"),
    (("--prompt", "x", "--model_name", "vace-14B"), "is not vace-14B: its transformer is 192 wide"),
    (("--prompt", "x", "--model_name", "wan"), "unknown model_name"),
    (("--prompt", "x", "--ckpt_dir", "nowhere"), "nowhere does not exist"),
    (("--prompt", "x", "--ulysses_size", "2"), "several processes"),
    (("--prompt", "x", "--use_prompt_extend", "wan"), "unknown use_prompt_extend 'wan': use one of plain, wan_zh"),
    (("--prompt", "x", "--save_file", "a.gif"), "must end in .mp4"),
    (("--prompt", "x", "--save_file", "a.mp4", "--jobs", "j.jsonl"), "save_file names one video"),
    (("--promt", "x"), "unknown option --promt; did you mean --prompt?"),
    (("--prompt", "x", "--frame-num", "5"), "did you mean --frame_num?"),
    (("--zzzz",), "see --help"),
    (("--prompt",), "expected one argument"),
    (("promt=x",), "unknown key 'promt'; did you mean prompt?"),
    (("a red ball",), "is not key=value"),
    (("--prompt", "x", "--t5_cpu", "maybe"), "t5_cpu is 'maybe', which is not true or false"),
    (("--config", "gone.yaml"), "cannot read the config gone.yaml"),
    (("--jobs", "gone.jsonl"), "cannot read the jobs file gone.jsonl"),
]


@pytest.mark.parametrize("args, words", WRONG, ids=[" ".join(map(str, a))[:50] or "nothing" for a, _ in WRONG])
def test_what_cannot_be_done_is_one_sentence(args, words, cli, quick, tmp_path):
    refuse(cli, tmp_path / "out", quick, *args, words=words)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_media(kind, cli, quick, inputs, tmp_path):
    path = broken(tmp_path, inputs, kind)
    refuse(cli, tmp_path / "out", quick, "--prompt", "x", "--src_video", path, words=str(path))
    if kind != "picture":
        edit = ("--prompt", "x", "--src_video", inputs / "clip.mp4", "--src_mask", path)
        refuse(cli, tmp_path / "out", quick, *edit, words=str(path))


@pytest.mark.parametrize("how", ["empty", "half downloaded", "no text encoder", "of another model", "a text file"])
def test_broken_checkpoints(how, cli, quick, tmp_path):
    folder = tmp_path / "ckpt"
    if how == "empty":
        folder.mkdir()
    elif how == "a text file":
        folder.write_text("weights")
    else:
        shutil.copytree(TINY, folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if how == "half downloaded":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif how == "no text encoder":
        shutil.rmtree(folder / "text_encoder")
    elif how == "of another model":
        shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", weights)
    refuse(cli, tmp_path / "out", quick, "--prompt", "x", *SMALL, "--ckpt_dir", folder, words="ckpt")


NOTES = [
    ("schedule.json", '{"stepz": 4}'),
    ("schedule.json", '{"shift": "8"}'),
    ("defaults.json", '{"frame_num": "x"}'),
    ("defaults.json", "{"),
]


@pytest.mark.parametrize("file, content", NOTES)
def test_broken_notes_of_a_checkpoint(file, content, cli, quick, tmp_path):
    shutil.copytree(TINY, tmp_path / "ckpt")
    (tmp_path / "ckpt" / file).write_text(content)
    refuse(cli, tmp_path / "out", quick, "--prompt", "x", "--ckpt_dir", tmp_path / "ckpt")


def test_half_of_a_launchers_environment_is_refused_plainly(cli, quick, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(cli, tmp_path / "out", quick, "--prompt", "x", words="start with torchrun")


def test_what_can_never_fit_is_refused_before_loading(cli, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(vdot.cli, "total_memory", lambda device: 2**20)
    refuse(
        cli,
        tmp_path / "out",
        quick,
        "--prompt",
        "x",
        *SMALL,
        words="use a smaller --size, --frame_num or --chunk_frames",
    )


def test_running_out_of_memory_is_explained(cli, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(VdotPipeline, "generate", fail)
    code, _, err = cli("--prompt", "x", *SMALL, "--save_dir", tmp_path / "out")
    assert code == 2 and "ran out of memory" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


# --- where it cannot write -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["under a file", "too long", "/proc/nowhere/x"])
def test_a_folder_that_cannot_be(place, cli, quick, tmp_path):
    (tmp_path / "file").touch()
    folder = {"under a file": tmp_path / "file" / "x" / "y", "too long": tmp_path / ("x" * 300)}.get(place, Path(place))
    before = len(quick)
    code, _, err = cli("--prompt", "x", *SMALL, "--save_dir", folder)
    assert code == 2 and err.startswith("error: cannot write results to") and err.count("\n") == 1
    assert len(quick) == before and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_is_found_before_loading(number, cli, quick, tmp_path, monkeypatch):
    def refuse_all(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(vdot.record.Path, "write_bytes", refuse_all)
    refuse(cli, tmp_path / "deep" / "out", quick, "--prompt", "x", *SMALL, words=os.strerror(number))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_disk_that_fills_up_while_writing_leaves_nothing(which, cli, inputs, tmp_path, monkeypatch):
    """The 1st, 2nd or 3rd of out_video, src_video and src_mask is half-written when the disk is full."""
    encode, calls = output._encode, []

    def fill_up(container, *args):
        encode(container, *args)
        calls.append(1)
        if len(calls) == which:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    args = ("--prompt", "x", "--src_video", inputs / "clip.mp4", "--src_mask", inputs / "mask.mp4", "--size", "64*32")
    folder = tmp_path / "deep" / "out"
    monkeypatch.setattr(output, "_encode", fill_up)
    code, _, err = cli(*args, "--save_dir", folder)
    assert code == 2 and "No space left" in err and err.count("\n") == 1 and ".tmp" not in err
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(output, "_encode", encode)
    assert cli(*args, "--save_dir", folder)[0] == 0
    kept = outputs(folder)
    calls.clear()
    monkeypatch.setattr(output, "_encode", fill_up)
    assert cli(*args, "--base_seed", 7, "--save_dir", folder)[0] == 2
    assert outputs(folder) == kept  # an earlier result survives


def test_python_callers_get_the_typed_error(tiny, tmp_path, monkeypatch):
    result = tiny("x", size="32*16", frame_num=1)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        result.save(tmp_path / "file" / "a.mp4")
    with pytest.raises(OSError):
        result.save(tmp_path)


def test_inputs_are_never_overwritten(cli, inputs, tmp_path):
    for name in ("src_video.mp4", "out_video.mp4", "src_ref_image_0.png"):
        option = "--src_video" if name.endswith("mp4") else "--src_ref_images"
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(inputs / ("clip.mp4" if name.endswith("mp4") else "toy.png"), folder / name)
        before = outputs(folder)
        code, _, err = cli("--prompt", "x", *SMALL, option, folder / name, "--save_dir", folder)
        assert code == 2 and "would overwrite the input" in err and outputs(folder) == before


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_of_10000_words_is_cut_with_a_warning_that_counts(cli, tmp_path):
    code, out, _ = cli("--prompt", "word " * 10_000, *SMALL, "--save_dir", tmp_path / "a")
    warning = next(line for line in out.splitlines() if "are cut" in line)
    assert (
        code == 0 and "512" in warning and any(int(n) > 9_000 for n in warning.replace(";", "").split() if n.isdigit())
    )


@pytest.mark.parametrize("prompt", ["日本の猫 🦊\n\t", "--not a flag", "%s %d {x} ${y} ???"])
def test_prompts_of_every_kind(prompt, cli, tmp_path):
    assert cli(f"--prompt={prompt}", *SMALL, "--save_dir", tmp_path / "a")[0] == 0
    assert record(tmp_path / "a")["config"]["prompt"] == prompt


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_plans_and_touches_nothing(cli, quick, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = len(quick)
    monkeypatch.setattr("vdot.pipeline.load_dit", lambda *a, **k: pytest.fail("weights were loaded"))
    media = ("--src_video", inputs / "clip.mp4", "--src_ref_images", inputs / "toy.png")
    code, out, err = cli("--prompt", "x", *media, "--size", "64*32", "--dry_run")
    assert (code, err) == (0, "") and len(quick) == before and os.listdir(tmp_path) == []
    for words in (
        "in    9 frames, 8 fps, 64x32",
        "out   9 frames",
        "refs  1 image",
        "4 network evaluations",
        "peak in host",
    ):
        assert words in out


# --- as a process ----------------------------------------------------------------------------------------------------


def start(*args, **how) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **how)


def test_ctrl_c_while_sampling_leaves_nothing(tmp_path):
    # Started from a background job, the tests and so their children ignore Ctrl-C: a person's terminal does not.
    listens = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    out = tmp_path / "deep" / "out"
    process = start("--prompt", "x", *SMALL, "--sample_steps", 1000, "--save_dir", out, **listens)
    for line in process.stdout:
        if line.startswith("encode condition"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "sample  " not in out
    assert err == "interrupted: nothing half-written is left\n" and os.listdir(tmp_path) == []


def test_from_a_bare_environment(tmp_path):
    """From another folder, without HOME and stdin, on an ASCII console whose reader leaves after the first line."""
    env = {k: v for k, v in os.environ.items() if k != "HOME"} | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--prompt", "x", *SMALL, "--save_dir", str(tmp_path / "日本")]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd="/", env=env, text=True, **streams)
    assert process.stdout.readline().startswith(f"checkpoint {TINY} (the small model")
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=600)
    assert "Traceback" not in err and sorted(os.listdir(tmp_path / "日本")) == ["out_video.mp4", "run.json"]


def test_a_console_of_another_encoding(tmp_path, monkeypatch, cli):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    _, _, err = cli("--prompt", "x", *SMALL, "--save_dir", tmp_path / "日本")
    stream.flush()
    assert err == "" and b"\\u65e5\\u672c/out_video.mp4: 5 frames" in stream.buffer.getvalue()
