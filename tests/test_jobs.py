"""Tables of jobs: rows are isolated, finished ones are skipped, half-written and changed ones are made anew."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vdot.cli
from tests.conftest import ROOT, TINY
from vdot import VdotPipeline
from vdot.config import GenerateConfig
from vdot.errors import InputError
from vdot.jobs import Job, Outcome, is_finished, read_jobs, run_jobs, summary
from vdot.record import settings_hash
from vdot.video import probe

SMALL = {"size": "32*16", "frame_num": 5}


@pytest.fixture
def cli(capsys, tiny, monkeypatch):
    """``cli(args...) -> (exit code, stdout, stderr)`` with the pipeline of all tests and one memory plan."""
    plans: list = []
    count = vdot.cli.plan_generation
    monkeypatch.setattr(VdotPipeline, "from_pretrained", lambda *args: tiny)
    monkeypatch.setattr(vdot.cli, "plan_generation", lambda *args: (plans or plans.append(count(*args)) or plans)[0])

    def run(*args):
        code = vdot.cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def write(path: Path, rows: list) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def status(out: str) -> dict[str, str]:
    """id -> status, from the closing table."""
    lines = out.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("id ") and "seconds" in line)
    return {line.split()[0]: line.split()[1] for line in lines[start + 1 : -1]}


# --- reading the table -----------------------------------------------------------------------------------------------


def test_jsonl_and_csv_say_the_same(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", [{"id": "a", "prompt": 'say "x, y"', "frame_num": 5, "keep_source": False}])
    (tmp_path / "a.csv").write_text('id,prompt,frame_num,keep_source,fps\na,"say ""x, y""",5,false,\n')
    one, two = (read_jobs(path, GenerateConfig()) for path in (jsonl, tmp_path / "a.csv"))
    assert one == two == [Job("a", GenerateConfig(prompt='say "x, y"', frame_num=5, keep_source=False))]


def test_a_row_is_laid_over_the_command_line(tmp_path):
    base = GenerateConfig(prompt="base", sample_steps=2, src_mask="m.mp4")
    table = write(tmp_path / "a.jsonl", [{}, {"prompt": "own", "src_mask": None, "src_video": ""}])
    first, second = read_jobs(table, base)
    assert (first.id, first.config) == ("0001", base)
    assert second.config == GenerateConfig(prompt="own", sample_steps=2, src_video="")


def test_media_lie_beside_the_table_or_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    for name in ("t/a,b.png", "t/c.png", "here.png"):
        (tmp_path / name).touch()
    rows = [{"src_ref_images": "a,b.png,c.png,here.png"}, {"src_ref_images": ["a,b.png", "here.png"]}]
    first, second = read_jobs(write(tmp_path / "t" / "j.jsonl", rows), GenerateConfig())
    beside = str(tmp_path / "t")
    assert first.config.src_ref_images == f"{beside}/a,b.png,{beside}/c.png,here.png"
    assert second.config.src_ref_images == f"{beside}/a,b.png,here.png"


def test_line_breaks_inside_values(tmp_path):
    (tmp_path / "a.csv").write_text('id,prompt\na,"two\nlines"\n', newline="")
    assert read_jobs(tmp_path / "a.csv", GenerateConfig())[0].config.prompt == "two\nlines"
    table = write(tmp_path / "a.jsonl", [{"prompt": "one\u2028two"}])
    assert read_jobs(table, GenerateConfig())[0].config.prompt == "one\u2028two"


BAD_ROWS = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ("[" * 100_000, "not JSON"),
    ({"promt": "x"}, "unknown or not per-video option 'promt'"),
    ({"ckpt_dir": "x"}, "not per-video option 'ckpt_dir'"),
    ({"save_dir": "/"}, "not per-video option 'save_dir'"),
    ({"frame_num": "five"}, "frame_num is 'five'"),
    ({"prompt": ["x"]}, "prompt is ['x']"),
    *(
        ({"id": name}, "cannot be a file name")
        for name in ("../up", "a/b", "a\\b", "/etc/x", "..", ".hidden", "", " ", "a ", "a.", "a\n", "a\0b", "é" * 150)
    ),
    *(({"id": name}, "cannot be a file name") for name in ("con:x", "a.mp4", True, 1.5, ["a"], {"a": 1})),
]


@pytest.mark.parametrize("row, words", BAD_ROWS, ids=[str(row)[:20] for row, _ in BAD_ROWS])
def test_a_bad_row_spares_the_others(row, words, tmp_path):
    bad, good = read_jobs(write(tmp_path / "a.jsonl", [row, {"id": "ok"}]), GenerateConfig())
    assert bad.config is None and words in bad.error and good == Job("ok", GenerateConfig())


@given(st.text() | st.integers())
def test_any_id_names_one_file_in_the_folder_or_is_refused(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "ids"
    folder.mkdir(exist_ok=True)
    job = read_jobs(write(folder / "a.jsonl", [json.dumps({"id": name})]), GenerateConfig())[0]
    if job.config is not None:
        target = folder / f"{job.id}.mp4"
        assert target.parent == folder and job.id == str(name)
        target.touch()
        target.unlink()


@pytest.mark.parametrize("names", [("a", "a"), ("a", "A"), ("0002", None)])
def test_ids_used_twice_are_refused(names, tmp_path):
    rows = [{"id": name} if name else {} for name in names]
    with pytest.raises(InputError, match="used more than once"):
        read_jobs(write(tmp_path / "a.jsonl", rows), GenerateConfig())


NO_TABLES = [
    ("a.jsonl", b""),
    ("a.jsonl", b"\n\n"),
    ("a.csv", b"id,prompt\n"),
    ("a.jsonl", b"\xff\xfe\x00"),
    ("a.xlsx", b"PK"),
    ("a.json", b"[]"),
]


@pytest.mark.parametrize("name, content", NO_TABLES)
def test_tables_that_are_none(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError):
        read_jobs(tmp_path / name, GenerateConfig())
    with pytest.raises(InputError):
        read_jobs(tmp_path / "missing.csv", GenerateConfig())
    with pytest.raises(InputError):
        read_jobs(tmp_path, GenerateConfig())


def test_a_csv_row_with_more_cells_than_the_header_is_bad(tmp_path):
    (tmp_path / "a.csv").write_text("id,prompt\na,red, round\nb,blue\n")
    bad, good = read_jobs(tmp_path / "a.csv", GenerateConfig())
    assert "more cells" in bad.error and good.config.prompt == "blue"


# --- running it ------------------------------------------------------------------------------------------------------


def test_errors_of_every_kind_end_their_own_job_only(tmp_path):
    def generate(config, video):
        if config.prompt == "vdot":
            raise InputError("no such\nclip")
        if config.prompt == "bug":
            raise ZeroDivisionError("oops")

    jobs = [Job(name, GenerateConfig(prompt=name)) for name in ("vdot", "bug", "good")] + [Job("bad", None, "row")]
    outcomes = run_jobs(jobs, tmp_path, generate, lambda config: "")
    assert [(o.status, o.message) for o in outcomes] == [
        ("failed", "no such clip"),
        ("failed", "unexpected ZeroDivisionError: oops"),
        ("done", str(tmp_path / "good.mp4")),
        ("failed", "row"),
    ]
    lines = summary(outcomes)
    assert len(lines) == 6 and lines[-1] == "1 done, 0 skipped, 3 failed"


def test_ctrl_c_ends_the_batch(tmp_path):
    def generate(config, video):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([Job("a", GenerateConfig())], tmp_path, generate, lambda config: "")


def test_a_summary_lines_up():
    lines = summary([Outcome("a", "done", 1.25, "x.mp4"), Outcome("long-name", "failed", 100, "why")])
    assert lines[0].index("status") == lines[1].index("done") == lines[2].index("failed")


def test_a_table_end_to_end(cli, inputs, tmp_path):
    rows = [
        {"id": "text", "prompt": "a", **SMALL},
        {"id": "gone", "prompt": "b", "src_video": "gone.mp4"},
        "{ not json",
        {"id": "odd size", "prompt": "c", "size": "30*30"},
        {"id": "edit", "prompt": "d", "src_video": "clip.mp4", "src_mask": "mask.mp4", "size": "64*32"},
        {"id": "pictures", "prompt": "e", "src_ref_images": ["toy.png", "mask.png"], **SMALL},
    ]
    shutil.copytree(inputs, tmp_path / "t")
    table = write(tmp_path / "t" / "jobs.jsonl", rows)
    out_dir = tmp_path / "out"
    code, out, err = cli("--jobs", table, "--save_dir", out_dir)
    assert (code, err) == (1, "")
    done = {"text": "done", "gone": "failed", "0003": "failed", "odd": "size", "edit": "done", "pictures": "done"}
    assert status(out) == done and out.splitlines()[-1] == "3 done, 0 skipped, 3 failed"
    assert sorted(os.listdir(out_dir)) == sorted(f"{i}{s}" for i in ("text", "edit", "pictures") for s in ("", ".mp4"))
    assert sorted(os.listdir(out_dir / "edit")) == ["run.json", "src_mask.mp4", "src_video.mp4"]
    assert probe(out_dir / "text.mp4").frames == 5

    again = cli("--config", out_dir / "edit" / "run.json", "--save_dir", tmp_path / "again")
    assert again[0] == 0
    assert (tmp_path / "again" / "out_video.mp4").read_bytes() == (out_dir / "edit.mp4").read_bytes()

    good = write(tmp_path / "t" / "good.jsonl", [rows[0], rows[4]])
    code, out, _ = cli("--jobs", good, "--save_dir", out_dir)
    assert code == 0 and status(out) == {"text": "skipped", "edit": "skipped"}


def test_what_makes_a_job_be_made_anew(cli, inputs, tmp_path):
    shutil.copy(inputs / "toy.png", tmp_path / "toy.png")
    row = {"id": "a", "prompt": "x", "src_ref_images": "toy.png", **SMALL}
    table, folder = write(tmp_path / "jobs.jsonl", [row]), tmp_path / "out"

    def run(*args):
        return status(cli("--jobs", table, "--save_dir", folder, *args)[1])["a"]

    assert [run(), run(), run("--offload_model", "block")] == ["done", "skipped", "skipped"]
    shutil.copy(inputs / "mask.png", tmp_path / "toy.png")  # same name, other content
    assert [run(), run()] == ["done", "skipped"]
    assert [run("--base_seed", 3), run("--base_seed", 3)] == ["done", "skipped"]
    (folder / "a.mp4").write_bytes((folder / "a.mp4").read_bytes()[:-1])  # not the video of the record any more
    assert [run("--base_seed", 3), run("--base_seed", 3)] == ["done", "skipped"]
    (folder / "a" / "run.json").write_text("[]")
    assert run("--base_seed", 3) == "done"
    (folder / "a" / "run.json").unlink()
    assert run("--base_seed", 3) == "done"


def test_is_finished_never_raises(tmp_path):
    for text in ("", "[]", "{}", '{"settings_hash": "x"}', '{"settings_hash": "x", "outputs": []}'):
        (tmp_path / "run.json").write_text(text)
        assert not is_finished(tmp_path / "a.mp4", tmp_path / "run.json", "x")


def test_a_dry_run_of_a_table(cli, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", **SMALL}, {"prompt": "b", "src_video": "gone.mp4"}, "{", {"prompt": "c", **SMALL}]
    table = write(inputs / "dry.jsonl", rows)
    monkeypatch.setattr(VdotPipeline, "from_pretrained", lambda *args: pytest.fail("weights were loaded"))
    code, out, err = cli("--jobs", table, "--dry_run", "--save_dir", tmp_path / "out")
    assert (code, err) == (1, "") and os.listdir(tmp_path) == []
    assert out.count("network evaluations") == 2 and "gone.mp4 does not exist" in out
    assert out.splitlines()[-1] == "2 of 4 would fail"


def test_a_table_that_cannot_be_run_at_all_is_one_error(cli, tmp_path):
    code, _, err = cli("--jobs", tmp_path / "none.jsonl", "--save_dir", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and os.listdir(tmp_path) == []
    table = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    code, _, err = cli("--jobs", table, "--save_dir", table / "under" / "a" / "file")
    assert code == 2 and err.startswith("error: cannot write results to")


def test_the_settings_hash_covers_every_setting(tmp_path):
    """Any per-video option and what changes bits of the model makes another hash; where results go does not."""
    base = GenerateConfig(prompt="x")
    hashes = {settings_hash(base, "w")}
    other = dict(prompt="y", negative_prompt="n", src_video="v", src_mask="m", src_ref_images="r", size="480p")
    other |= dict(frame_num=5, frame_mode="trim", fps=8.0, keep_source=False, feather=1.0, sample_steps=3)
    other |= dict(sample_shift=2.0, sample_solver="euler", sample_guide_scale=2.0, context_scale=0.5, base_seed=1)
    other |= dict(dtype="bfloat16", vae_dtype="bfloat16", attention="flex", compile=True, device="cpu")
    for key, value in other.items():
        hashes.add(settings_hash(GenerateConfig(**{"prompt": "x", key: value}), "w"))
    assert len(hashes) == len(other) + 1
    same = dict(save_dir="a", save_file="b", jobs="c", dry_run=True, offload_model="block", ckpt_dir="z")
    assert settings_hash(GenerateConfig(prompt="x", **same), "w") in hashes
    assert settings_hash(base, "v") not in hashes


def test_resumption_after_a_kill(cli, tmp_path):
    """SIGKILL in the middle of job 2 of 3: job 1 is skipped, leftovers go, the rest is made."""
    rows = [{"id": name, "prompt": name, **SMALL} for name in ("one", "two", "three")]
    table = write(tmp_path / "jobs.jsonl", [rows[0], {**rows[1], "sample_steps": 1000}, rows[2]])
    folder = tmp_path / "out"
    command = [sys.executable, str(ROOT / "inference" / "vace_wan_inference.py"), "--jobs", str(table)]
    command += ["--save_dir", str(folder), "--ckpt_dir", str(TINY)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    encoded = 0
    for line in process.stdout:
        encoded += line.startswith("encode condition")
        if encoded == 2:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    assert sorted(os.listdir(folder)) == ["one", "one.mp4", *(["two"] if (folder / "two").exists() else [])]

    host = "".join(c for c in platform.node() if c.isalnum())[:16]
    (folder / "two").mkdir(exist_ok=True)
    left = [f / f".vdot-{host}-{process.pid}-{uuid.uuid4().hex}.tmp" for f in (folder, folder / "two")]
    alive = folder / f".vdot-{host}-{os.getpid()}-{uuid.uuid4().hex}.tmp"  # of a process that still writes
    for path in (*left, alive):
        path.write_bytes(b"half a video")
    (folder / "two.mp4").write_bytes(b"half a video")

    before = (folder / "one.mp4").stat().st_mtime_ns
    write(table, rows)
    code, out, _ = cli("--jobs", table, "--save_dir", folder, "--ckpt_dir", TINY)
    assert code == 0 and status(out) == {"one": "skipped", "two": "done", "three": "done"}
    assert (folder / "one.mp4").stat().st_mtime_ns == before and probe(folder / "two.mp4").frames == 5
    assert not any(path.exists() for path in left) and alive.exists()

    write(table, [*rows[:2], {**rows[2], "base_seed": 5}])
    code, out, _ = cli("--jobs", table, "--save_dir", folder, "--ckpt_dir", TINY)
    assert code == 0 and status(out) == {"one": "skipped", "two": "skipped", "three": "done"}
