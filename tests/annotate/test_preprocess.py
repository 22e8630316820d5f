"""``inference/vace_preprocess.py`` on files: what is written, real raw material, tables, sound, errors, the video."""

import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT
from vdot.annotate.cli import main
from vdot.annotate.material import SIDECAR
from vdot.video import probe, read_frames, read_image, write_image, write_video


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """clip.mp4 64x48, 9 frames at 12 fps, a bright square that slides; mask.png of it; toy.png on grey."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    ground = cv2.GaussianBlur(rng.uniform(20, 120, (48, 64, 3)).astype(np.float32), (0, 0), 3).astype(np.uint8)
    frames = np.repeat(ground[None], 9, 0)
    for t in range(9):
        frames[t, 16:32, 8 + 2 * t : 24 + 2 * t] = (230, 190, 40)
    write_video(folder / "clip.mp4", frames, 12)
    mask = np.zeros((48, 64), np.uint8)
    mask[16:32, 8:24] = 255
    write_image(folder / "mask.png", mask)
    toy = np.full((60, 60, 3), 120, np.uint8)
    cv2.circle(toy, (30, 30), 18, (200, 30, 30), -1)
    write_image(folder / "toy.png", toy)
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_files_sidecar_and_exactness(files, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(
        "--task", "inpainting", "--video", files / "clip.mp4", "--mask", files / "mask.png", "--pre_save_dir", out
    )
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == [
        SIDECAR,
        "preview.mp4",
        "preview.png",
        "src_mask.mp4",
        "src_video.mp4",
    ]
    for name in ("src_video.mp4", "src_mask.mp4", "preview.mp4"):
        info = probe(out / name)
        assert (info.frames, info.width, info.height, info.fps) == (9, 64, 48, 12), name
    mask = read_frames(out / "src_mask.mp4", range(9))[..., 0]
    source = read_frames(out / "src_video.mp4", range(9))
    white = cv2.erode((mask[4] > 200).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert np.abs(source[4][white].astype(int) - 127).max() <= 4  # grey survives the file
    assert mask[4, 24, 24] > 200 and mask[4, 24, 10] < 50  # it has moved on by 8 pixels
    facts = json.loads((out / SIDECAR).read_text())
    assert (facts["task"], facts["frames"], facts["fps"], facts["size"]) == ("inpainting", 9, 12, "64*48")
    assert facts["backends"] == {"track": "template"} and facts["asked"]["video"] == str(files / "clip.mp4")
    assert abs(facts["generated_share"] - 256 / (48 * 64)) < 0.02
    printed = capsys.readouterr().out
    assert "out   9 frames, 12 fps, 64x48" in printed and "by    track: template" in printed
    # Another task into the same folder leaves nothing of the first.
    assert run("--task", "subject", "--image", files / "toy.png", "--pre_save_dir", out, "--mode", "plain") == 0
    assert sorted(p.name for p in out.iterdir()) == [SIDECAR, "preview.png", "src_ref_image_0.png"]
    assert (read_image(out / "src_ref_image_0.png") == read_image(files / "toy.png")).all()


def test_sound_and_rate_are_carried(files, tmp_path):
    import av

    with_sound = tmp_path / "loud.mp4"
    frames = read_frames(files / "clip.mp4", range(9))
    tone = tmp_path / "tone.wav"
    with av.open(str(tone), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        wave = (8000 * np.sin(np.arange(16000) * 0.2)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_video(with_sound, frames, 12, audio_from=tone)
    assert probe(with_sound).has_audio
    run("--task", "gray", "--video", with_sound, "--pre_save_dir", tmp_path / "same")
    assert probe(tmp_path / "same" / "src_video.mp4").has_audio
    run("--task", "gray", "--video", with_sound, "--pre_save_dir", tmp_path / "other", "--save_fps", "24")
    other = probe(tmp_path / "other" / "src_video.mp4")
    assert other.fps == 24 and other.frames == 9 and not other.has_audio
    run("--task", "clipref", "--video", with_sound, "--expand_num", "4", "--pre_save_dir", tmp_path / "longer")
    assert not probe(tmp_path / "longer" / "src_video.mp4").has_audio


REAL = {
    "gray": (), "scribble": (), "flow": (), "plain": (), "outpainting": ("--direction", "left,right"),
    "outpainting_inner": ("--expand_ratio", "0.2"), "firstlastframe": (), "clipref": ("--expand_num", "6"),
    "inpainting": ("--mode", "bboxtrack", "--bbox", "0,290,340,710", "--maskaug_mode", "bbox_expand"),
    "layout_track": ("--mode", "bboxtrack", "--bbox", "180,300,340,700"),
    "layout_bbox": ("--bbox", "10,10,200,300 200,300,500,760"),
    "firstframe_scribble": (), "reference_gray": ("--image", "test.jpg", "--mode", "salient"),
    "swap_anything": ("--bbox", "180,300,340,700", "--mode", "bboxtrack,plain", "--image", "test2.jpg"),
}  # fmt: skip


@pytest.fixture(scope="module")
def raw(real_inputs, tmp_path_factory) -> Path:
    """The real clip's first nine frames at 256x384 and the real pictures, under their names."""
    folder, real = tmp_path_factory.mktemp("real"), real_inputs / "raw"
    write_video(folder / "test2.mp4", read_frames(real / "test2.mp4", range(9), (384, 256)), 25)
    for name in ("test.jpg", "test2.jpg", "test.png"):
        image = read_image(real / name)
        size = (image.shape[1] // 2, image.shape[0] // 2)
        write_image(folder / name, cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    return folder


def real_clip(raw: Path, out: Path, task: str, scale: int, frames: int) -> None:
    """One task on a clip of 512x768 over ``scale``; pictures in ``REAL`` lie beside it, boxes are of the full size."""
    words: list[object] = []
    for word in REAL[task]:
        if "," in word and word[0].isdigit():
            word = " ".join(",".join(str(int(n) // scale) for n in box.split(",")) for box in word.split())
        words.append(raw / word if word.endswith(".jpg") else word)
    assert run("--task", task, "--video", raw / "test2.mp4", *words, "--pre_save_dir", out) == 0
    info = probe(out / "src_video.mp4")
    facts = json.loads((out / SIDECAR).read_text())
    total = frames + 6 * (task == "clipref")
    # 512 + 2 * 154 is 820, twelve more to a multiple of 16; 256 + 2 * 77 is 410, six more.
    size = {"outpainting": {1: (832, 768), 2: (416, 384)}[scale]}.get(task, (512 // scale, 768 // scale))
    assert (info.frames, info.width, info.height, info.fps) == (total, *size, 25)
    assert (out / "preview.png").stat().st_size > 1000 and facts["frames"] == total
    if (out / "src_mask.mp4").exists():
        mask = read_frames(out / "src_mask.mp4", [0, total - 1])
        assert ((mask > 200) | (mask < 55)).mean() > 0.98  # but for what the codec does at edges
        assert 0.01 < facts["generated_share"] < 0.99


@pytest.mark.parametrize("task", REAL)
def test_a_real_clip_through_every_task_without_weights(raw, tmp_path, task):
    real_clip(raw, tmp_path, task, scale=2, frames=9)


@pytest.mark.slow
@pytest.mark.parametrize("task", REAL)
def test_a_real_clip_at_its_full_size(real_inputs, tmp_path, task):
    real_clip(real_inputs / "raw", tmp_path, task, scale=1, frames=25)


def test_real_pictures(raw, tmp_path):
    masked = ("--image", raw / "test2.jpg", "--mask", raw / "test.png")
    assert run("--task", "object", *masked, "--pre_save_dir", tmp_path / "object") == 0
    reference = read_image(tmp_path / "object" / "src_ref_image_0.png")
    assert (reference == 255).all(-1).mean() > 0.2 and reference.shape[0] > 250
    assert run("--task", "image_inpainting", *masked, "--pre_save_dir", tmp_path / "still") == 0
    assert probe(tmp_path / "still" / "src_video.mp4").frames == 1
    short = ("--expand_num", "4", "--pre_save_dir")
    assert run("--task", "frameref", "--image", raw / "test.jpg", *short, tmp_path / "first") == 0
    assert probe(tmp_path / "first" / "src_video.mp4").frames == 5
    both = f"{raw / 'test.jpg'},{raw / 'test2.jpg'}"
    grown = ("--direction", "left", "--mode", "firstframe,plain")
    assert run("--task", "expand_anything", "--image", both, *grown, *short, tmp_path / "expand") == 0
    assert probe(tmp_path / "expand" / "src_video.mp4").frames == 5


def test_a_prompt_goes_straight_on_to_the_video(files, tmp_path, capsys):
    made = tmp_path / "video"
    words = ("--task", "inpainting", "--video", files / "clip.mp4", "--bbox", "8,16,24,32", "--mode", "bbox")
    assert run(*words, "--pre_save_dir", tmp_path / "in", "--prompt", "a red ball", "--save_dir", made, "seed=1") == 2
    assert "unknown key 'seed'" in capsys.readouterr().err and not (tmp_path / "in").exists()
    code = run(
        *words, "--pre_save_dir", tmp_path / "in", "--prompt", "a red ball", "--save_dir", made, "--sample_steps", "1"
    )
    assert code == 0
    assert probe(made / "out_video.mp4").frames == 9
    record = json.loads((made / "run.json").read_text())
    assert record["config"]["src_mask"] == str(tmp_path / "in" / "src_mask.mp4")
    given = read_frames(tmp_path / "in" / "src_video.mp4", range(9))
    found = read_frames(made / "out_video.mp4", range(9))
    kept = read_frames(tmp_path / "in" / "src_mask.mp4", range(9))[..., 0] < 10
    assert np.abs(given[kept].astype(int) - found[kept]).mean() < 4  # kept pixels, through two files


def test_tables_prepare_generate_and_resume(files, tmp_path, capsys):
    table = tmp_path / "jobs.jsonl"
    rows = [
        {"id": "a", "task": "gray", "video": str(files / "clip.mp4")},
        {
            "id": "b",
            "task": "frameref",
            "image": str(files / "toy.png"),
            "expand_num": 4,
            "prompt": "a ball",
            "base_seed": 3,
        },
        {"id": "bad", "task": "gray", "video": "nowhere.mp4"},
        {"id": "typo", "task": "gray", "vido": "x"},
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    words = ("--jobs", table, "--pre_save_dir", tmp_path / "out", "--sample_steps", "1", "--size", "32*32")
    assert run(*words) == 1
    printed = capsys.readouterr().out
    assert "2 done, 0 skipped, 2 failed" in printed and "unknown or not per-video option 'vido'" in printed
    assert (tmp_path / "out" / "a" / "src_video.mp4").is_file() and not (tmp_path / "out" / "bad").exists()
    assert probe(tmp_path / "out" / "videos" / "b.mp4").frames == 5
    record = json.loads((tmp_path / "out" / "videos" / "b" / "run.json").read_text())
    assert record["config"]["base_seed"] == 3
    before = (tmp_path / "out" / "videos" / "b.mp4").stat().st_mtime_ns
    assert run(*words) == 1
    assert "0 done, 2 skipped, 2 failed" in capsys.readouterr().out
    assert (tmp_path / "out" / "videos" / "b.mp4").stat().st_mtime_ns == before
    assert run(*words, "--dry_run") == 1 and "2 of 4 would fail" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "grey"], "unknown task 'grey'"),
        (["--video", "CLIP"], "name the task: --task"),
        (["--task", "gray", "--video", "missing.mp4"], "missing.mp4 does not exist"),
        (["--task", "gray", "--video", "TOY"], "is an image, not a video"),
        (["--task", "gray", "--video", "CLIP", "--src_video", "CLIP"], "--src_video is what is made here"),
        (["--task", "inpainting", "--video", "CLIP", "--mask", "TOY"], "draw it on the picture"),
        (["--task", "inpainting", "--video", "CLIP", "--bbox", "1,2"], "box '1,2' is not understood"),
        (["--task", "gray", "--video", "CLIP", "--save_fps", "0"], "save_fps must be a number above 0"),
        (["--task", "gray", "--video", "CLIP", "--bakend", "dis"], "did you mean --backend?"),
        (["--task", "gray", "--video", "CLIP", "--backend", "raft"], "has no use for the backend raft"),
        (["--task", "outpainting", "--video", "CLIP", "--expand_ratio", "wide"], "which is not a number"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(files, tmp_path, capsys, words, message):
    names = {"CLIP": str(files / "clip.mp4"), "TOY": str(files / "toy.png")}
    out = tmp_path / "out"
    assert run(*[names.get(word, word) for word in words], "--pre_save_dir", out) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert not out.exists()


def test_help_and_recipes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(
        word in shown for word in ("character_replacement", "--maskaug_ratio", "--sample_steps")
    )
    for name in ("character_replacement", "try_on"):
        script = ROOT / "scripts" / f"{name}.sh"
        recipe = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
        assert (
            f"bash scripts/{name}.sh clip.mp4" in recipe.stdout and "pip install --no-deps mediapipe" in recipe.stdout
        )
        short = subprocess.run(["bash", script, "clip.mp4"], capture_output=True, text=True)
        assert short.returncode == 2 and "give a clip, a picture and a prompt" in short.stderr
