"""Tables as people write them: read right, every bad row told by line, reason and fix, laid out as inference does."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import MIXED
from vdot.config import merge_config
from vdot.data import manifest
from vdot.data.manifest import (
    BadRow,
    DataConfig,
    Layout,
    Row,
    check_rows,
    check_table,
    explain,
    read_manifest,
)
from vdot.errors import ConfigError, InputError
from vdot.request import Defaults, prepare
from vdot.video import write_video

HEADER = "task_name,src_video_path,mask_video_path,ref_image_path,internvl_short,video_path"
DEFAULTS = Defaults(size="128*128", frame_num=17)


@pytest.fixture
def read(tmp_path):
    """``read(bytes or text, name)`` -> rows and bad rows of a file with that content."""

    def write_and_read(content, name="table.csv", root="/data"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_manifest(path, root)

    return write_and_read


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_row_of_the_release(read):
    rows, bad = read(f'{HEADER}\ndepth,a/src.mp4,a/mask.mp4,"a/1.png, a/2.png","a dog, running",a/real.mp4\n')
    ref = ("/data/a/1.png", "/data/a/2.png")
    assert bad == []
    assert rows == [Row(2, "depth", "a dog, running", "/data/a/src.mp4", "/data/a/mask.mp4", ref, "/data/a/real.mp4")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_byte_order_mark_and_line_ends(read, start, end):
    lines = [HEADER, "a,x.mp4,,,one,", "", '"b","y.mp4",,,"two\u2028lines",']
    rows, bad = read(start + end.join(lines) + end)
    assert not bad and [(r.line, r.task, r.prompt) for r in rows] == [(2, "a", "one"), (4, "b", "two\u2028lines")]


def test_none_and_nan_mean_nothing(read):
    rows, bad = read(f"{HEADER}\na,None,nan, NULL ,p,\n")
    assert not bad and rows == [Row(2, "a", "p")]


def test_lines_are_counted_through_quoted_breaks(read):
    rows, bad = read(f'{HEADER}\na,,,,"first\nsecond\n\nlast",\nb,,,,p,\n,,,,no task,\n')
    assert [(r.line, r.prompt) for r in rows] == [(2, "first\nsecond\n\nlast"), (6, "p")]
    assert [b.line for b in bad] == [7] and "task_name" in bad[0].reason


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=6))
def test_any_prompt_that_python_writes_is_read_back(tmp_path_factory, prompts):
    """Against the standard library's writer; the line is counted from what it wrote."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(manifest.COLUMNS)
    lines = []
    for prompt in prompts:
        lines.append(len(list(io.StringIO(file.getvalue(), newline=""))) + 1)
        writer.writerow(["t", "", "", "", prompt, ""])
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(file.getvalue().encode())
    rows, bad = read_manifest(path)
    wanted = [(n, p.strip()) for n, p in zip(lines, prompts, strict=True) if p.strip().lower() not in manifest.NOTHING]
    assert [(row.line, row.prompt) for row in rows] == wanted
    assert len(bad) == len(prompts) - len(wanted) and all("no prompt" in b.reason for b in bad)


def test_a_stray_quote_costs_its_row_alone(read):
    rows, bad = read(f'{HEADER}\na,,,,one,\na,,,,"open,\nb,,,,"two, and",\nc,,,,"x" y,\nd,,,,a 5" pipe,\n')
    assert [(r.line, r.prompt) for r in rows] == [(2, "one"), (4, "two, and"), (6, 'a 5" pipe')]
    assert [b.line for b in bad] == [3, 5] and all("quote" in b.reason and "double" in b.fix for b in bad)


def test_rows_that_do_not_parse_are_told_apart(read):
    rows, bad = read(f"{HEADER}\na,,,,p\na,,,,p,,\na,,,,\0,\na,,m.mp4,,p,\na,,,,,\na,,,,good,\n")
    assert [r.line for r in rows] == [7]
    reasons = [(b.line, b.reason) for b in bad]
    for (line, reason), (want, word) in zip(
        reasons, [(2, "5 cells"), (3, "7 cells"), (4, "NUL"), (5, "no source"), (6, "no prompt")], strict=True
    ):
        assert line == want and word in reason


def test_json_lines(read):
    objects = [
        {"task_name": "a", "internvl_short": "p", "ref_image_path": ["1.png", "2,3.png"], "src_video_path": None},
        {"task_name": "b", "internvl_short": "q", "src_video_path": float("nan"), "ref_image_path": "1.png,2.png"},
    ]
    lines = [json.dumps(each) for each in objects]
    bad_lines = [
        "{",
        "[1]",
        '{"task_name": 3, "internvl_short": "p"}',
        '{"task_name": "a", "internvl_short": "\\ud800"}',
    ]
    rows, bad = read("\ufeff" + "\r\n".join([lines[0], "", *bad_lines, lines[1]]), "t.jsonl")
    assert [(r.line, r.references) for r in rows] == [
        (1, ("/data/1.png", "/data/2,3.png")),
        (7, ("/data/1.png", "/data/2.png")),
    ]
    words = ["not JSON", "not a JSON object", "3, which is not text", "half a character"]
    assert [b.line for b in bad] == [3, 4, 5, 6] and all(w in b.reason for w, b in zip(words, bad, strict=True))


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "no rows"),
        (HEADER.encode(), "no rows"),
        (b"task_name,src_video_path\na,b\n", "lacks the column internvl_short"),
        (b"task_name;internvl_short\na;b\n", "commas"),
        (b"task_name,internvl_short,task_name\na,b,c\n", "more than once"),
        (b"task_name,internvl_short,src_video\na,b,c\n", "did you mean src_video_path"),
        (b"task_name,internvl_short\na,caf\xe9\n", "line 2 .* UTF-8"),
        (b'"task_name\na,b\n', "header"),
    ],
)
def test_what_is_wrong_with_the_whole_table_is_one_sentence(read, content, word):
    with pytest.raises(InputError, match=word):
        read(content)


@pytest.mark.parametrize(
    "content, word",
    [
        (b"[{}]", "one JSON list"),
        (b'{"taskname": "a", "internvl_short": "p"}', "did you mean task_name"),
        (b"", "no rows"),
    ],
)
def test_json_tables_too(read, content, word):
    with pytest.raises(InputError, match=word):
        read(content, "t.jsonl")


def test_a_missing_or_utf16_table(read, tmp_path):
    with pytest.raises(InputError, match="cannot read the table"):
        read_manifest(tmp_path / "none.csv")
    rows, bad = read(f"{HEADER}\na,,,,p,\n".encode("utf-16"))
    assert len(rows) == 1 and not bad


def test_other_columns_are_named_and_not_used(read, said):
    rows, _ = read("task_name,internvl_short,source_url\na,p,http://x\n")
    assert rows == [Row(2, "a", "p")] and "source_url" in said[0]


def test_a_comma_inside_a_reference_that_exists(tmp_path):
    (tmp_path / "a,b.png").write_bytes(b"x")
    (tmp_path / "t.csv").write_text('task_name,internvl_short,ref_image_path\nr,p,"a,b.png,c.png"\n')
    rows, _ = read_manifest(tmp_path / "t.csv")
    assert rows[0].references == (str(tmp_path / "a,b.png"), str(tmp_path / "c.png"))


def test_the_real_clip_beside_the_source(tmp_path):
    """video.mp4 or gt.mp4 of the source's folder, unless the table uses it otherwise; else none."""
    for name in (
        "one/src.mp4",
        "one/video.mp4",
        "two/src.mp4",
        "two/gt.mp4",
        "flat/a.mp4",
        "flat/video.mp4",
        "bare/s.mp4",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    sources = ["one/src.mp4", "two/src.mp4", "flat/a.mp4", "flat/video.mp4", "bare/s.mp4", ""]
    lines = [f"t,{name},p," for name in sources] + ["t,one/src.mp4,p,two/gt.mp4"]
    (tmp_path / "t.csv").write_text("task_name,src_video_path,internvl_short,video_path\n" + "\n".join(lines))
    rows, _ = read_manifest(tmp_path / "t.csv")
    wanted = ["one/video.mp4", "two/gt.mp4", None, None, None, None, "two/gt.mp4"]
    assert [row.video for row in rows] == [None if w is None else str(tmp_path / w) for w in wanted]


# -- checking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"frame_num": 6},
        {"frame_num": 33, "frame_mode": "trim"},
        {"frame_mode": "resample", "fps": 3.0},
        {"frame_mode": "trim", "size": "32*32"},
        {"size": "480p", "frame_num": 1},
    ],
    ids=str,
)
def test_shapes_are_those_that_inference_makes(table, change):
    config = replace(DataConfig(path=table(MIXED)), **change)
    entries, layout = check_table(config, DEFAULTS)
    for entry in entries:
        # `prepare` decodes the files and lays the condition out; its shape is what the pipeline samples
        condition = prepare(layout.request(entry.row), layout.defaults).condition
        assert entry.shape.latent == condition.latent_shape
        assert entry.shape.references == len(condition.references)


def test_every_kind_of_bad_row_is_listed(tmp_path, clips, table, said):
    (tmp_path / "cut.mp4").write_bytes((clips / "wide.mp4").read_bytes()[:700])
    (tmp_path / "text.png").write_text("no picture")
    thin = np.zeros((9, 8, 64, 3), np.uint8)
    write_video(tmp_path / "thin.mp4", thin, 8)
    fast = np.zeros((30, 32, 64, 3), np.uint8)
    write_video(tmp_path / "fast.mp4", fast, 24)
    here = {name: str(tmp_path / name) for name in ("cut.mp4", "text.png", "thin.mp4", "fast.mp4")}
    rows = [
        (
            {"src": "gone.mp4", "refs": "gone.png"},
            ["gone.mp4 does not exist", "gone.png does not exist", "correct the path"],
        ),
        ({"src": here["cut.mp4"]}, ["src_video_path", "damaged or truncated", "replace the file"]),
        ({"src": "toy.png"}, ["is an image, not a video"]),
        ({"src": "wide.mp4", "mask": here["text.png"]}, ["mask_video_path", "not a video"]),
        ({"refs": here["text.png"]}, ["ref_image_path", "not an image"]),
        ({"src": here["thin.mp4"]}, ["at least 16 pixels"]),
        ({"src": "wide.mp4", "video": "tall.mp4"}, ["not show the same place"]),
        ({"src": "tall.mp4", "video": "wide.mp4"}, ["9 frames, 13 of its source"]),
        ({"src": "wide.mp4", "video": here["fast.mp4"]}, ["30 frames at 24 fps, its source 9 at 8", "same time"]),
        ({"src": "."}, ["is a folder"]),
        ({"src": "wide.mp4"}, []),
    ]
    path = table([row for row, _ in rows])
    found, bad = check_rows(read_manifest(path)[0], Layout.of(DataConfig(), DEFAULTS))
    assert [entry.row.line for entry in found] == [len(rows) + 1]
    for line, (told, (_, words)) in enumerate(zip(explain(bad), rows, strict=False), start=2):
        assert told.startswith(f"line {line}: ") and "Fix: " in told and all(word in told for word in words), told

    with pytest.raises(InputError, match=f"{len(rows) - 1} of the {len(rows)} rows .* the first on line 2"):
        check_table(DataConfig(path=path), DEFAULTS)
    assert [line for line in said if line.startswith("line ")] == explain(bad)
    said.clear()
    entries, _ = check_table(DataConfig(path=path, skip_bad_rows=True), DEFAULTS)
    assert len(entries) == 1 and len(said) == len(rows) and "are left out" in said[-1]


def test_a_table_of_bad_rows_only_is_refused_even_if_they_may_be_skipped(table):
    with pytest.raises(InputError, match="1 of the 1 rows"):
        check_table(DataConfig(path=table([{"src": "gone.mp4"}]), skip_bad_rows=True), DEFAULTS)


def test_each_file_is_opened_once(table, monkeypatch):
    opened = []
    monkeypatch.setattr(manifest, "probe", lambda path, **_: opened.append(path) or real_probe(path, **_))
    real_probe = prepare.__globals__["probe"]
    entries, _ = check_table(DataConfig(path=table([MIXED[0]] * 200 + [MIXED[2]] * 200)), DEFAULTS)
    assert len(entries) == 400 and sorted(p.rsplit("/")[-1] for p in opened) == ["mask.mp4", "real.mp4", "wide.mp4"]


def test_settings_that_no_clip_could_have(table):
    path = table(MIXED)
    for change, word in [
        ({"size": "100*100"}, "multiples of 16"),
        ({"frame_num": 0}, "frame_num"),
        ({"frame_mode": "all"}, "frame_mode"),
        ({"size": "8192*8192"}, "smaller size"),
    ]:
        with pytest.raises(InputError, match=word):
            check_table(replace(DataConfig(path=path), **change), DEFAULTS)
    with pytest.raises(ConfigError, match="no training table"):
        check_table(DataConfig(), DEFAULTS)


def test_config_fields_come_from_yaml_and_the_command_line():
    config = merge_config(DataConfig(), {"task_weights": {"depth": 2}, "skip_bad_rows": "true", "fps": "8"}, "test")
    assert config.task_weights == {"depth": 2.0} and config.skip_bad_rows is True and config.fps == 8.0


def test_explain_sorts_by_line():
    assert explain([BadRow(9, "b", "y"), BadRow(2, "a", "x")]) == ["line 2: a. Fix: x", "line 9: b. Fix: y"]
