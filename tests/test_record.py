"""Runs on disk: folders, fingerprints, leftovers."""

import os
import platform
import threading
import uuid
from pathlib import Path

import pytest

from vdot.config import GenerateConfig
from vdot.errors import OutputError
from vdot.record import check_overwrites, default_folder, fingerprint, input_files, run_record, writable
from vdot.video.output import atomic_path, remove_leftovers


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    with writable(tmp_path / "a" / "b") as folder:
        assert folder.is_dir() and os.listdir(folder) == []
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), writable(tmp_path / "a"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with writable(tmp_path / "a" / "b") as folder:
        (folder / "x").touch()
    assert (tmp_path / "a" / "b" / "x").exists()
    (tmp_path / "kept").mkdir()
    with writable(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept").is_dir()  # it was there before


def test_runs_started_together_get_folders_of_their_own(tmp_path):
    got, meet = [], threading.Barrier(8)

    def run():
        with writable(tmp_path / "results" / "now", fresh=True) as folder:
            got.append(folder.name)
            meet.wait()
            (folder / "x").touch()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(["now", *(f"now_{i}" for i in range(2, 9))])


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "nul\0"])
def test_a_folder_that_cannot_be_is_an_output_error(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="give another --save_dir"), writable(tmp_path / place):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_the_default_folder_has_the_checkpoints_name(tmp_path, monkeypatch):
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "my model")
    assert default_folder(Path(".")).parent == Path("results/my model")


def test_nested_writing_names_the_outer_file(tmp_path):
    with pytest.raises(OutputError) as caught, atomic_path(tmp_path / "a" / "out.mp4") as outer, atomic_path(outer):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == f"{tmp_path / 'a' / 'out.mp4'} could not be written: No space left on device."
    assert os.listdir(tmp_path) == []


def test_leftovers_of_dead_processes_go_and_others_stay(tmp_path):
    host = "".join(c for c in platform.node() if c.isalnum())[:16]
    dead = 2**22 - 3  # beyond any process that runs here
    names = [f".vdot-{host}-{pid}-{uuid.uuid4().hex}.tmp" for pid in (dead, os.getpid())]
    names += [f".vdot-otherhost-{dead}-{uuid.uuid4().hex}.tmp", ".vdot-x.tmp", "mine.tmp"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names[1:])


def test_fingerprints_see_names_sizes_and_both_ends(tmp_path):
    def of(name, data):
        (tmp_path / name).write_bytes(data)
        return fingerprint([tmp_path / name])

    body = bytes(3 * 2**20)
    prints = [of("a", body), of("b", body), of("a", body[:-1]), of("a", b"x" + body[1:]), of("a", body[:-1] + b"x")]
    assert len(set(prints)) == 5 and of("a", body) == prints[0]
    of("a", b"1"), of("b", b"2")
    assert fingerprint([tmp_path / "a", tmp_path / "b"]) == fingerprint([tmp_path / "b", tmp_path / "a"])


def test_only_references_are_a_list(tmp_path):
    config = GenerateConfig(src_video="a,b.mp4", src_mask="", src_ref_images="c.png,d.png")
    assert input_files(config) == {"src_video": ["a,b.mp4"], "src_mask": [], "src_ref_images": ["c.png", "d.png"]}


def test_overwriting_is_found_through_links(tmp_path):
    (tmp_path / "real.mp4").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "src_video.mp4").symlink_to(tmp_path / "real.mp4")
    config = GenerateConfig(src_video=str(tmp_path / "real.mp4"))
    with pytest.raises(OutputError, match="would overwrite the input"):
        check_overwrites(config, tmp_path / "out", tmp_path / "out" / "out_video.mp4")
    check_overwrites(config, tmp_path, tmp_path / "out_video.mp4")


def test_a_record_repeats_what_was_decided(tiny):
    result = tiny("x", size="32*16", frame_num=1, seed=9)
    config = GenerateConfig(prompt="x", base_seed=-1, src_video="a,b.mp4", src_ref_images="c.png, d.png")
    checkpoint = {"path": "models/x", "layout": "native", "fingerprint": "f"}
    values = run_record(result, config, checkpoint, {}, {"dtype": "float32"})["config"]
    assert values["base_seed"] == 9 and values["sample_steps"] == 4 and values["dtype"] == "float32"
    assert values["ckpt_dir"] == os.path.abspath("models/x")
    assert values["src_video"] == os.path.abspath("a,b.mp4")
    assert values["src_ref_images"] == f"{os.path.abspath('c.png')},{os.path.abspath('d.png')}"
    assert not {"save_dir", "save_file", "jobs", "dry_run"} & set(values)
