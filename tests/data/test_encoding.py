"""Encoded rows: what the pipeline gives the network, computed once, never half-written, never silently wrong."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, TINY
from tests.data.conftest import MIXED
from tests.parallel.conftest import free_port
from vdot.checkpoints import load_dit, load_text_encoder, load_vae, save_checkpoint
from vdot.data import encoding
from vdot.data.dataset import EncodedSource, LiveSource, check_settings
from vdot.data.decoding import decode
from vdot.data.encoding import EncodeConfig, Encoder, encode_table, weights_identity
from vdot.data.manifest import DataConfig, check_table
from vdot.data.shards import INDEX, META, Settings, pack, part_files, unpack
from vdot.errors import ConfigError, InputError, OutputError
from vdot.parallel.state import Ranks
from vdot.request import Defaults, read_image
from vdot.video import letterbox, read_frames, to_model

ENCODE = str(ROOT / "training" / "encode.py")
DEFAULTS = Defaults.from_dict(json.loads((TINY / "defaults.json").read_text()))
CPU = torch.device("cpu")


@pytest.fixture
def encode(tmp_path, encoder, monkeypatch):
    """``encode(table, ...)`` in this process, with the networks that are loaded already -> the folder."""
    monkeypatch.setattr(encoding, "load_encoder", lambda *_: encoder)

    def run(table: str, out: str = "encoded", **options) -> Path:
        folder = tmp_path / out
        config = EncodeConfig(path=table, ckpt_dir=str(TINY), out=str(folder), **{"workers": 0, **options})
        run.summary = encode_table(config, CPU, Ranks())
        return folder

    return run


def launcher(ranks: int, *command: str) -> list[str]:
    """A command line that needs no environment of its own."""
    threads = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return ["env", "OMP_NUM_THREADS=1", *threads, f"--master_port={free_port()}", *command]


def equal(a, b) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


# -- against the pipeline ---------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    pass


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_an_example_is_what_the_pipeline_gives_its_network(number, table, tiny, encoder):
    entries, layout = check_table(DataConfig(path=table(MIXED)), DEFAULTS)
    entry = entries[number]
    example = encoder.encode(entry, decode(entry.row, layout), number)
    given = {}

    def keep(_, args):
        given.update(text=args[2], context=args[3])
        raise _EnoughError  # what comes after is no matter of the data

    hook = tiny.dit.register_forward_pre_hook(keep)
    row = entry.row
    with pytest.raises(_EnoughError):
        tiny(row.prompt, row.src_video, row.src_mask, list(row.references), guide_scale=1.0)
    hook.remove()
    assert torch.equal(example.text[None], given["text"])
    assert torch.equal(example.context[None], given["context"])
    assert (example.task, example.prompt, example.row) == (row.task, row.prompt, number)
    assert example.shape == entry.shape


def test_real_latents_are_the_references_then_the_clip_at_the_same_frames_and_size(table, tiny, encoder, clips):
    """Against the autoencoder on its own."""
    rows = [
        {**MIXED[3], "src": "tall.mp4", "mask": "still.png", "video": "tall.mp4"},
        {"refs": "toy.png", "video": "tall.mp4"},
    ]
    entries, layout = check_table(DataConfig(path=table(rows), frame_num=5), DEFAULTS)
    with_source, without = (encoder.encode(entry, decode(entry.row, layout), 0) for entry in entries)
    # 5 of 13 frames, spread evenly; the source's own size, and the checkpoint's where there is none
    for example, names, size in (
        (with_source, ("toy.png", "odd.png"), (48, 32)),
        (without, ("toy.png",), (64, 64)),
    ):
        clip = to_model(read_frames(clips / "tall.mp4", [0, 3, 6, 9, 12], size))
        parts = [letterbox(read_image(clips / name), *size) for name in names]
        with torch.no_grad():
            wanted = torch.cat([tiny.vae.encode(part[None])[0] for part in (*parts, clip)], dim=1)
        assert example.real.dtype == torch.float32 and torch.allclose(example.real, wanted, atol=1e-5)
        assert torch.equal(example.real[:, : len(names)], example.context[:16, : len(names)])


def test_a_source_that_is_its_own_real_clip_has_equal_latents(table, encoder):
    """Without a mask all of the source may change: its latents are channels 16 to 31 of the context."""
    entries, layout = check_table(DataConfig(path=table([{"src": "wide.mp4", "video": "wide.mp4"}])), DEFAULTS)
    example = encoder.encode(entries[0], decode(entries[0].row, layout), 0)
    assert torch.equal(example.real, example.context[16:32])


def test_equal_prompts_and_clips_are_computed_once(table, encoder, monkeypatch):
    rows = [{**MIXED[0], "prompt": "one"}, {**MIXED[0], "prompt": "two"}, {**MIXED[2], "prompt": "one"}]
    entries, layout = check_table(DataConfig(path=table(rows)), DEFAULTS)
    fresh, calls = Encoder(encoder.text_encoder, encoder.vae, keep=2), []
    monkeypatch.setattr(fresh.vae, "encode", lambda x, real=fresh.vae.encode: calls.append(x.shape) or real(x))
    for entry in entries:
        fresh.encode(entry, decode(entry.row, layout), 0)
    # one source for rows 1 and 2, one real clip for all; row 3 has both halves of a masked source
    assert len(calls) == 1 + 1 + 2
    fresh.embed("three")
    assert all(len(kept) <= 2 for kept in fresh._kept.values())


def test_files_that_changed_their_shape_since_the_check_are_refused(table, encoder, clips, tmp_path):
    entries, layout = check_table(DataConfig(path=table([MIXED[0]])), DEFAULTS)
    moved = replace(entries[0], row=replace(entries[0].row, src_video=str(clips / "tall.mp4"), video=None))
    with pytest.raises(InputError, match="have changed"):
        encoder.encode(moved, decode(moved.row, layout), 0)


# -- stored and read back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
def test_stored_rows_are_the_live_ones(store, table, encode, encoder):
    folder = encode(table(MIXED), store=store)
    source = EncodedSource(folder)
    live = LiveSource(*check_table(DataConfig(path=table(MIXED)), DEFAULTS), encoder, "", workers=0)
    assert (source.shapes, source.tasks, source.paired) == (live.shapes, live.tasks, live.paired)
    for index in range(len(MIXED)):
        stored, fresh = source.load(index), live.load(index)
        assert (stored.task, stored.prompt, stored.row, stored.shape) == (fresh.task, fresh.prompt, index, fresh.shape)
        assert torch.equal(stored.context[32:], fresh.context[32:])  # masks are bytes, also the soft ones
        assert (stored.real is None) == (fresh.real is None)
        assert stored.real is None or equal(stored.real, fresh.real)  # always float32
        kind = getattr(torch, store)
        assert equal(stored.text, fresh.text.to(kind))
        assert equal(stored.context[:32], fresh.context[:32].to(kind).float())
    assert equal(source.negative(), live.negative().to(kind))


def test_masks_of_one_value_take_one_byte(table, encoder):
    entries, layout = check_table(DataConfig(path=table(MIXED)), DEFAULTS)
    soft, still = (encoder.encode(entries[i], decode(entries[i].row, layout), 0) for i in (2, 3))
    assert pack(soft, torch.float32)["mask"].shape == (64, 3, 4, 8)
    packed = pack(still, torch.float32)
    assert packed["mask"].numel() == 1 and torch.equal(unpack(packed, still.references)[0], still.context)


def test_any_flipped_byte_is_found(table, encode, said):
    """64 places of the file, header included: refused at once, or when a row is read, or without effect."""
    folder = encode(table(MIXED))
    (path,) = part_files(folder)
    good = path.read_bytes()
    before = [EncodedSource(folder).load(i) for i in range(len(MIXED))]
    header = int.from_bytes(good[:8], "little")
    places = np.random.default_rng(0).integers(0, len(good), 40).tolist()
    places += np.random.default_rng(1).integers(0, header, 24).tolist()
    found = set()
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        try:
            source = EncodedSource(folder)
        except InputError:
            found.add(place)
            continue
        for index, example in enumerate(before):
            try:
                now = source.load(index)
            except InputError as error:
                assert str(path) in str(error)
                found.add(place)
                continue
            assert equal(now.text, example.text) and equal(now.context, example.context)
            assert now.real is None or equal(now.real, example.real)
    assert len(found) > 0.9 * len(set(places))


@pytest.mark.parametrize("left", [0, 5, 500, -1])
def test_a_file_that_is_cut_short_is_refused(left, table, encode):
    folder = encode(table(MIXED[:2]))
    (path,) = part_files(folder)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError, match=r"part-.* is damaged: delete it and encode the table again"):
        EncodedSource(folder)


def test_a_folder_that_cannot_be_trained_from(tmp_path, table, encode):
    with pytest.raises(InputError, match="holds no encoded rows"):
        EncodedSource(tmp_path)
    folder = encode(table(MIXED[:2]))
    (path,) = part_files(folder)
    path.rename(tmp_path / "away")
    with pytest.raises(InputError, match="lacks 2 of its 2 rows"):
        EncodedSource(folder)
    (tmp_path / "away").rename(path)
    for name, content, word in [
        (INDEX, '{"key": 3}', "damaged"),
        (META, "{", "damaged"),
        (META, '{"version": 0}', "another version"),
    ]:
        kept = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=word):
            EncodedSource(folder)
        (folder / name).write_text(kept)
    (folder / INDEX).unlink()
    with pytest.raises(InputError, match="not encoded to its end"):
        EncodedSource(folder)


# -- once, and again --------------------------------------------------------------------------------------------------


def test_a_grown_table_encodes_its_new_rows_and_a_changed_file_its_own(tmp_path, clips, table, encode):
    (tmp_path / "mine.mp4").write_bytes((clips / "wide.mp4").read_bytes())
    rows = [*MIXED[:2], {"task": "mine", "src": str(tmp_path / "mine.mp4")}]
    folder = encode(table(rows))
    assert [bool(o.seconds) for o in encode.summary.outcomes] == [True] * 3
    first = part_files(folder)
    encode(table(rows))
    assert part_files(folder) == first and not any(o.seconds for o in encode.summary.outcomes)

    encode(table([*rows, MIXED[4], MIXED[4] | {"task": "again", "prompt": "prompt 3"}]))
    new = [bool(o.seconds) for o in encode.summary.outcomes]
    assert new == [False, False, False, True, False]  # equal rows share their encoded form, whatever their task
    assert EncodedSource(folder).tasks == ["depth", "depth", "mine", "r2v", "again"]

    (tmp_path / "mine.mp4").write_bytes((clips / "real.mp4").read_bytes())
    encode(table(rows))
    assert [bool(o.seconds) for o in encode.summary.outcomes] == [False, False, True]
    assert len(EncodedSource(folder)) == 3  # the table's rows, not the folder's
    assert "depth: 2" in "\n".join(encode.summary.lines())


def test_a_folder_with_other_settings_is_not_mixed_into(table, encode):
    path = table(MIXED[:1])
    encode(path)
    for change, word in [
        ({"size": "128*128"}, r"size 64\*64, not 128\*128"),
        ({"frame_num": 5}, "frame_num"),
        ({"store": "float32"}, "store"),
    ]:
        with pytest.raises(ConfigError, match=word):
            encode(path, **change)
    encode(path, negative_prompt="grey")
    assert Settings.read(encode(path, negative_prompt="blue")).negative_prompt == "blue"


def test_training_refuses_other_settings_and_other_weights(tmp_path, table, encode):
    source = EncodedSource(encode(table(MIXED[:1])))
    check_settings(source, DataConfig(), TINY)
    check_settings(source, DataConfig(size="64x64"), TINY)
    for change, word in [
        ({"size": "480p"}, "size"),
        ({"frame_num": 9}, "frame_num"),
        ({"frame_mode": "trim"}, "frame_mode"),
        ({"negative_prompt": "x"}, "negative_prompt"),
    ]:
        with pytest.raises(ConfigError, match=f"{word} .* is asked for"):
            check_settings(source, replace(DataConfig(), **change), TINY)

    other = tmp_path / "other"
    for part in ("vae", "text_encoder"):
        (other / part).mkdir(parents=True)
        for file in (TINY / part).iterdir():
            (other / part / file.name).write_bytes(file.read_bytes())
    check_settings(source, DataConfig(), other)
    weights = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"] + 0.1
    save_file(weights, other / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match="another autoencoder"):
        check_settings(source, DataConfig(), other)


def test_weights_are_the_same_in_every_layout_and_precision(tmp_path):
    networks = load_dit(TINY), load_text_encoder(TINY), load_vae(TINY)
    for layout in ("vdot", "diffusers"):
        folder = save_checkpoint(tmp_path / layout, *networks, layout=layout)  # float32, where TINY is bfloat16
        assert weights_identity(folder) == weights_identity(TINY)
    assert weights_identity(tmp_path / "diffusers" / "transformer") == {}  # nothing to compare with


def test_a_full_disk_is_one_sentence_and_leaves_nothing(table, encode, monkeypatch, tmp_path):
    path = table(MIXED[:1])
    folder = encode(path)
    files = sorted(folder.iterdir())

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="could not be written: No space left on device"):
            encode(table(MIXED[:2]))
    assert sorted(folder.iterdir()) == files


def test_a_row_that_passes_the_check_and_does_not_decode(tmp_path, clips, table, encode, said, monkeypatch):
    """Its frame table is whole, its frames are not: listed at the end, the rest is kept."""

    def broken(row, layout):
        if row.task == "depth":
            raise InputError("frame 3 cannot be decoded")
        return decode(row, layout)

    monkeypatch.setattr(encoding.FileReader, "function", staticmethod(broken))
    path = table(MIXED[1:5])
    with pytest.raises(InputError, match="1 of 4 rows could not be encoded"):
        encode(path)
    assert any(line.startswith("line 2: frame 3 cannot be decoded") for line in said)
    source = EncodedSource(encode(path, skip_bad_rows=True))
    assert not any(o.seconds for o in encode.summary.outcomes) and source.tasks == ["inpaint", "inpaint", "r2v"]


def test_damaged_files_are_encoded_anew(table, encode, said):
    folder = encode(table(MIXED[:2]))
    (path,) = part_files(folder)
    path.write_bytes(path.read_bytes()[:-1])
    encode(table(MIXED[:2]))
    assert all(o.seconds for o in encode.summary.outcomes) and any("is damaged" in line for line in said)
    EncodedSource(folder).load(1)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("encode_script", ROOT / "training" / "encode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_refuses_in_one_sentence(script, table, capsys, tmp_path):
    path = table([{"src": "gone.mp4"}])
    for argv, word in [
        (["--table", path, "--ckpt_dir", str(TINY), "--out", str(tmp_path / "o")], "cannot be used"),
        (["--table", path, "--ckpt_dir", str(tmp_path / "no"), "--out", "o"], "does not exist"),
        (["--table", path], "give the checkpoint"),
        (["--tabel", path], "unrecognized arguments"),
        (["sise=480p"], "did you mean size"),
        (["--ckpt_dir", str(TINY), "--out", "o"], "no training table"),
    ]:
        assert script.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and word in err, err
    assert not (tmp_path / "o").exists()


def test_help_names_every_option_and_the_columns(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert all(
        word in text
        for word in ("torchrun", "task_name", "video_path", "--skip_bad_rows", "data.encoded", "world.clips")
    )
    assert {*script.OPTIONS, "world"} == set(EncodeConfig.__dataclass_fields__)


def test_killed_and_started_again(table, encode, tmp_path):
    """kill -9 once something is written: what is there is kept, and the same command does the rest."""
    rows = [{**MIXED[n % 3], "prompt": f"number {n}"} for n in range(120)]
    path, folder = table(rows), tmp_path / "encoded"
    flags = ["--table", path, "--ckpt_dir", str(TINY), "--out", str(folder), "workers=0"]
    run = subprocess.Popen([sys.executable, ENCODE, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 600
    while not part_files(folder) and run.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    run.kill()
    run.wait()
    written = {file: file.read_bytes() for file in part_files(folder)}
    assert written and not (folder / INDEX).exists(), run.stderr.read().decode()[-2000:]

    encode(path)
    done = [outcome for outcome in encode.summary.outcomes if not outcome.seconds]
    assert len(encode.summary.outcomes) == 120 and 64 <= len(done) < 120
    assert all(file.read_bytes() == content for file, content in written.items())
    source = EncodedSource(folder)
    alone = EncodedSource(encode(path, out="alone"))
    for index in range(0, 120, 7):
        a, b = source.load(index), alone.load(index)
        # Processes of another number of threads sum in another order, which moves a value to the next bfloat16.
        for mine, other in ((a.text, b.text), (a.context, b.context), (a.real, b.real)):
            torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-3)


def test_two_ranks_to_the_end(table, encode, tmp_path):
    path, folder = table([*MIXED, {"src": "gone.mp4"}]), tmp_path / "shared"
    flags = ["--table", path, "--ckpt_dir", str(TINY), "--out", str(folder), "--skip_bad_rows", "workers=0"]
    run = subprocess.run(launcher(2, ENCODE, *flags), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "6 rows are encoded, 6 of them now" in run.stdout and run.stdout.count("gone.mp4") == 1
    alone = encode(path, skip_bad_rows=True)
    assert (folder / INDEX).read_text() == (alone / INDEX).read_text()
    assert EncodedSource(folder).identity == EncodedSource(alone).identity
