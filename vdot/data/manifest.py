"""The table of training examples: read, checked in full before the first step, and laid out as inference would.

Columns, as in the VDOT release:

=====================  =========================================================================================
``task_name``          what the row teaches; weights are given by task
``src_video_path``     clip to follow or edit; empty: the row is made of text and references alone
``mask_video_path``    video or picture, white generates, black keeps; needs a source; empty: all may change
``ref_image_path``     pictures of what appears, separated by commas
``internvl_short``     the prompt
``video_path``         the real clip that the row was made from, frame by frame as long as its source
=====================  =========================================================================================

The first and the prompt must be there, the others where a row has them. Empty, ``None`` and ``nan`` mean none.

The real clip is what the adversarial term compares with. Without ``video_path`` it is ``video.mp4`` or ``gt.mp4`` in
the folder of the source, if no row of the table uses that file as its source or mask; else the row has none, and
trains without the adversarial term.
"""

import csv
import difflib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vdot.data.batch import Shape
from vdot.errors import ConfigError, InputError, one_line
from vdot.parallel.state import Ranks
from vdot.request import Defaults, Request, parse_size, prepare, reference_list
from vdot.runtime import log
from vdot.video import FramePlan, VideoInfo, model_frames, plan_frames, probe, read_image

COLUMNS = ("task_name", "src_video_path", "mask_video_path", "ref_image_path", "internvl_short", "video_path")
REQUIRED = ("task_name", "internvl_short")
NOTHING = ("", "none", "nan", "null")
REAL_NAMES = ("video.mp4", "gt.mp4")
PROBES = 8  # files looked at together: half of that time is waiting for the disk
ASPECT_TOLERANCE = 0.02  # between a real clip and its source; more and they cannot show the same picture
RATE_TOLERANCE = 0.01


@dataclass
class TableConfig:
    """Which table, and how its clips are laid out: as in inference, so that training sees what inference sees."""

    path: str | None = None  # CSV or JSONL
    root: str | None = None  # folder that relative paths start from; None: the table's own
    size: str | None = None  # "480p", "720p" or "W*H"; with a source clip the area limit. None: the checkpoint's
    frame_num: int | None = None  # frames of every clip. None: the source's own, at most the checkpoint's
    frame_mode: str = "spread"  # spread, trim or resample
    fps: float | None = None  # frames taken of each second with resample; None: 16
    negative_prompt: str | None = None  # None: the checkpoint's
    skip_bad_rows: bool = False  # log rows that cannot be used and go on without them
    workers: int = 2  # processes that decode files; in training also the threads that load ahead


@dataclass
class StillsConfig:
    """A second encoded folder that a share of the batches comes from: shorter clips, as a rule single frames.

    As many of them make a batch as have the latent pixels of a batch of the other folder's smallest clips.
    """

    encoded: str | None = None  # None: there is none
    share: float = 0.5  # of the batches
    task_weights: dict[str, float] = field(default_factory=dict)  # among themselves, as those of the clips

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                f"data.stills.share is a share of the batches, above 0 and below 1, got {self.share}; to train on "
                "stills alone give their folder as data.encoded"
            )


@dataclass
class DataConfig(TableConfig):
    """What a training run reads: a table, encoded on the fly, or a folder that ``training/encode.py`` made of one."""

    encoded: str | None = None
    task_weights: dict[str, float] = field(default_factory=dict)  # relative; 1 for a task that is not named
    prefetch: int = 2  # batches loaded ahead
    keep: int = 0  # encoded rows that stay in memory (of each folder), so that small ones are read and checked once
    stills: StillsConfig = field(default_factory=StillsConfig)  # beside the clips of ``encoded``


@dataclass(frozen=True)
class Row:
    """One line of the table; paths are resolved, nothing is opened yet."""

    line: int  # of the file, where the row begins; the header of a CSV is line 1
    task: str
    prompt: str
    src_video: str | None = None
    src_mask: str | None = None
    references: tuple[str, ...] = ()
    video: str | None = None  # the real clip


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: what is wrong with it, and what to do."""

    line: int
    reason: str
    fix: str


@dataclass(frozen=True)
class Entry:
    """A row whose files are there, and the grid that they come to."""

    row: Row
    shape: Shape

    @property
    def paired(self) -> bool:
        return self.row.video is not None


@dataclass(frozen=True)
class Layout:
    """How clips are cut: with a row's files, all that decides the pixels of its example."""

    size: str  # "W*H"
    frame_num: int | None
    frame_mode: str
    fps: float | None
    most_frames: int  # where ``frame_num`` says nothing: of a long source, and of rows without one

    @classmethod
    def of(cls, config: TableConfig, defaults: Defaults) -> "Layout":
        """``InputError`` for a size, a number of frames or a mode that no clip could have."""
        width, height = parse_size(config.size or defaults.size)
        if config.frame_mode == "all":
            raise InputError("frame_mode all makes a clip in several passes: training takes spread, trim or resample")
        layout = cls(f"{width}*{height}", config.frame_num, config.frame_mode, config.fps, defaults.frame_num)
        prepare(layout.request(Row(0, "", "any")), layout.defaults)
        return layout

    @property
    def defaults(self) -> Defaults:
        return Defaults(size=self.size, frame_num=max(self.most_frames, self.frame_num or 0))  # never in chunks

    def request(self, row: Row) -> Request:
        """What a user would ask for to generate this row."""
        return Request(
            prompt=row.prompt,
            src_video=row.src_video,
            src_mask=row.src_mask,
            src_ref_images=list(row.references),
            size=self.size,
            frame_num=self.frame_num,
            frame_mode=self.frame_mode,
            fps=self.fps,
        )

    def plan(self, info: VideoInfo, mask: VideoInfo | None = None, frame_num: int | None = None) -> FramePlan:
        """Frames and size of a clip, by the rule of :func:`vdot.request.prepare`."""
        width, height = parse_size(self.size)
        return plan_frames(
            info,
            max_area=width * height,
            frame_num=frame_num or self.frame_num,
            mode=self.frame_mode,  # type: ignore[arg-type]
            mask=mask,
            budget_frames=self.most_frames,
            fps=self.fps,
        )

    def free_plan(self, info: VideoInfo) -> FramePlan:
        """Frames of the real clip of a row without a source: as many as the row is generated with."""
        return self.plan(info, frame_num=self.frame_num or self.most_frames)

    def shape(self, row: Row, source: VideoInfo | None, mask: VideoInfo | None) -> Shape:
        if source is None:
            width, height = parse_size(self.size)
            frames = model_frames(self.frame_num or self.most_frames)
        else:
            plan = self.plan(source, mask)
            width, height, frames = plan.width, plan.height, plan.model_frames
        return Shape(len(row.references), (frames - 1) // 4 + 1, height // 8, width // 8)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(path: str | Path, root: str | Path | None = None) -> tuple[list[Row], list[BadRow]]:
    """Rows of a CSV with a header, or of a file of one JSON object a line, and the rows that do not parse.

    A list in JSON may stand for the comma list. Columns that are not known are named in the log and not used.

    Raises:
        InputError: the file cannot be read, is empty, or lacks a column.
    """
    path = Path(path)
    text = _read_text(path)
    records = list(_json_records(text, path) if _is_json(path, text) else _csv_records(text, path))
    if not records:
        raise InputError(f"{path} has no rows: write a CSV with a header, or one JSON object a line")
    folder = str(path.parent if root is None else root)
    rows: list[Row] = []
    bad: list[BadRow] = []
    for record in records:
        row = record if isinstance(record, BadRow) else _row(*record, folder)
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            rows.append(row)
    return _find_real_clips(rows), bad


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the table {path}: {error.strerror or error}") from error
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # what spreadsheets call "Unicode text"
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {line} of the table {path} is not UTF-8 text: save it as UTF-8") from error


def _is_json(path: Path, text: str) -> bool:
    suffix = path.suffix.lower()
    if text.lstrip()[:1] == "[" and suffix != ".csv":
        raise InputError(f"{path} is one JSON list: write one object a line (JSON lines)")
    return suffix in (".jsonl", ".json") or (suffix != ".csv" and text.lstrip()[:1] == "{")


_Record = tuple[int, dict[str, Any]]


def _lines(text: str) -> list[str]:
    r"""With their ends, at \n, \r\n and \r only: ``splitlines`` would also break a prompt at U+2028."""
    return list(io.StringIO(text, newline=""))


def _json_records(text: str, path: Path) -> Iterator[_Record | BadRow]:
    seen: dict[str, None] = {}
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = f"the line is not JSON: {getattr(error, 'msg', error)}{where}"
            yield BadRow(number, reason, "write one JSON object on one line")
            continue
        if not isinstance(values, dict):
            yield BadRow(number, "the line is not a JSON object", 'write {"task_name": ..., "internvl_short": ...}')
            continue
        seen.update(dict.fromkeys(values))
        yield number, values
    if seen:
        _check_columns(path, list(seen))


def _csv_records(text: str, path: Path) -> Iterator[_Record | BadRow]:
    rows = _csv_rows(text)
    number, header = next(rows, (0, []))
    if isinstance(header, str):
        raise InputError(f"the header, line {number} of {path}, is not CSV: {header}")
    names = [name.strip() for name in header]
    if len(names) == 1 and any(separator in names[0] for separator in ";\t"):
        raise InputError(f"the cells of {path} are not separated by commas: save it as CSV with commas")
    double = next((name for name in names if name in COLUMNS and names.count(name) > 1), None)
    if double is not None:
        raise InputError(f"the column {double} is in the header of {path} more than once")
    if names:
        _check_columns(path, names)
    for number, cells in rows:
        if isinstance(cells, str):
            yield BadRow(number, cells, 'put the cell into quotes and double those inside it: "a ""b"" c"')
        elif len(cells) != len(names):
            reason = f"the row has {len(cells)} cells, the header {len(names)}"
            yield BadRow(number, reason, "put a cell that holds a comma or a line break into quotes")
        else:
            yield number, dict(zip(names, cells, strict=True))


def _csv_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """(line on which it begins, cells or what is wrong) of each row that is not blank.

    A stray quote swallows text up to the next one. The row that it stands in is given up and reading goes on with the
    line after it, so that one slip costs one row.
    """
    lines, at = _lines(text), 0
    while at < len(lines):
        begin = at
        reader = csv.reader((lines[i] for i in range(begin, len(lines))), strict=True)
        try:
            for cells in reader:
                number, at = at + 1, begin + reader.line_num
                if any(cell.strip() for cell in cells):
                    yield number, cells
        except csv.Error:
            yield at + 1, "a quote opens a cell and is not closed at its end"
            at += 1


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """A name that is nearly right is a slip that would silently leave a whole column out."""
    unknown = [name for name in names if name and name not in COLUMNS]
    for name in unknown:
        near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.7)
        if near and near[0] not in names:
            raise InputError(f"the column {name!r} of {path} is not known: did you mean {near[0]}?")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise InputError(f"{path} lacks the column {' and '.join(missing)}: it has {', '.join(names)}")
    if unknown:
        log.info("note  columns of %s that are not used: %s", path, ", ".join(unknown))


class _Wrong(Exception):
    """(reason, fix) of a row."""


def _row(line: int, values: dict[str, Any], root: str) -> Row | BadRow:
    try:
        task, prompt = _text(values, "task_name"), _text(values, "internvl_short")
        if task is None:
            raise _Wrong("it has no task_name", "name its task")
        if prompt is None:
            raise _Wrong("it has no prompt", "describe the video in internvl_short")
        source, mask, real = (_text(values, f"{name}_path") for name in ("src_video", "mask_video", "video"))
        if mask is not None and source is None:
            raise _Wrong("it has a mask and no source video", "give the src_video_path that the mask belongs to")
        paths = [None if name is None else os.path.join(root, name) for name in (source, mask, real)]
        references = tuple(os.path.join(root, name) for name in _names(values.get("ref_image_path"), root))
        return Row(line, task, prompt, paths[0], paths[1], references, paths[2])
    except _Wrong as wrong:
        return BadRow(line, *wrong.args)


def _text(values: dict[str, Any], column: str) -> str | None:
    value = values.get(column)
    if value is None or (isinstance(value, float) and value != value):
        return None
    if not isinstance(value, str):
        raise _Wrong(f"its {column} is {value!r}, which is not text", "write it in quotes")
    if "\0" in value:
        raise _Wrong(f"its {column} holds a NUL byte", "write the row anew: the table is damaged there")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"its {column} holds half a character", "write the row anew as UTF-8") from None
    value = value.strip()
    return None if value.lower() in NOTHING else value


def _names(value: Any, root: str) -> list[str]:
    """Of a comma list or a JSON list."""
    parts = value if isinstance(value, list) else [value]
    texts = [_text({"ref_image_path": part}, "ref_image_path") for part in parts]
    if not isinstance(value, list):
        texts = [str(name) for name in reference_list(texts[0], root)]
    return [text for text in texts if text is not None and text.lower() not in NOTHING]


def _find_real_clips(rows: list[Row]) -> list[Row]:
    """Rows without ``video_path`` get the real clip beside their source, where there is one."""
    used = {os.path.abspath(name) for row in rows for name in (row.src_video, row.src_mask) if name is not None}
    beside: dict[str, str | None] = {}

    def find(folder: str) -> str | None:
        if folder not in beside:
            names = (os.path.join(folder, name) for name in REAL_NAMES)
            beside[folder] = next((n for n in names if os.path.abspath(n) not in used and os.path.isfile(n)), None)
        return beside[folder]

    return [
        replace(row, video=find(os.path.dirname(row.src_video))) if row.src_video and row.video is None else row
        for row in rows
    ]


# -- checking ---------------------------------------------------------------------------------------------------------


def check_rows(rows: Sequence[Row], layout: Layout, progress: bool = True) -> tuple[list[Entry], list[BadRow]]:
    """Look into every file, each one once, and lay every row out; nothing but a first frame is decoded.

    ``progress`` draws a bar on a terminal.
    """
    found = _probe_all(rows, progress)
    entries: list[Entry] = []
    bad: list[BadRow] = []
    for row in rows:
        checked = _check(row, layout, found)
        if isinstance(checked, Entry):
            entries.append(checked)
        else:
            bad.append(checked)
    return entries, bad


_File = tuple[str, str]  # column, path
_Found = dict[_File, "VideoInfo | InputError | None"]


def _files(row: Row) -> list[_File]:
    named = [("src_video_path", row.src_video), ("mask_video_path", row.src_mask), ("video_path", row.video)]
    named += [("ref_image_path", name) for name in row.references]
    return [(column, name) for column, name in named if name is not None]


def _probe_all(rows: Iterable[Row], progress: bool) -> _Found:
    files = list(dict.fromkeys(file for row in rows for file in _files(row)))
    bar = {"total": len(files), "desc": "check", "unit": "file", "leave": False, "disable": None if progress else True}
    with ThreadPoolExecutor(PROBES, "vdot-check") as pool:
        return dict(zip(files, tqdm(pool.map(_probe, files), **bar), strict=True))


def _probe(file: _File) -> VideoInfo | InputError | None:
    column, path = file
    try:
        if column == "ref_image_path":
            read_image(path)
            return None
        return probe(path, allow_image=column == "mask_video_path")
    except InputError as error:
        return error
    except OSError as error:  # it vanished between two looks
        return InputError(f"{path} cannot be read: {error.strerror or error}")


def _check(row: Row, layout: Layout, found: _Found) -> Entry | BadRow:
    problems = []
    for column, path in _files(row):
        outcome = found[column, path]
        if isinstance(outcome, InputError):
            there = os.path.isfile(path)
            fix = "replace the file or leave the row out" if there else "correct the path, or the folder given as root"
            problems.append((f"{column}: {one_line(outcome).rstrip('.')}", fix))
    if problems:
        reasons, fixes = zip(*dict.fromkeys(problems), strict=True)
        return BadRow(row.line, "; ".join(reasons), "; ".join(dict.fromkeys(fixes)))

    def info(column: str, path: str | None) -> Any:
        return None if path is None else found[column, path]

    source, mask = info("src_video_path", row.src_video), info("mask_video_path", row.src_mask)
    try:
        shape = layout.shape(row, source, mask)
        if row.video is not None:
            check_real(layout, info("video_path", row.video), source, mask)
    except InputError as error:
        return BadRow(row.line, one_line(error).rstrip("."), "make the clips fit, or leave the row out")
    return Entry(row, shape)


def check_real(layout: Layout, real: VideoInfo, source: VideoInfo | None, mask: VideoInfo | None) -> None:
    """``InputError`` when the real clip cannot show, frame by frame, what its source does."""
    if source is None:
        layout.free_plan(real)
        return
    wanted = max(layout.plan(source, mask).frame_ids) + 1
    if real.frames < wanted:
        raise InputError(f"the real clip has {real.frames} frames, {wanted} of its source are used")
    if real.frames != source.frames and abs(real.fps / (source.fps or real.fps or 1) - 1) > RATE_TOLERANCE:
        raise InputError(
            f"the real clip has {real.frames} frames at {real.fps:.4g} fps, its source {source.frames} at "
            f"{source.fps:.4g}: frame by frame they do not show the same time"
        )
    if abs((real.width / real.height) / (source.width / source.height) - 1) > ASPECT_TOLERANCE:
        raise InputError(
            f"the real clip is {real.width}x{real.height}, its source {source.width}x{source.height}: they are cropped "
            "differently and do not show the same place"
        )


def explain(bad: Sequence[BadRow]) -> list[str]:
    """One line per bad row, in the order of the file."""
    return [f"line {b.line}: {b.reason}. Fix: {b.fix}" for b in sorted(bad, key=lambda b: b.line)]


def check_table(config: TableConfig, defaults: Defaults, ranks: Ranks | None = None) -> tuple[list[Entry], Layout]:
    """Read and check the table of ``config``; every bad row is logged. Connected ranks share the work.

    Raises:
        ConfigError: no table is given. InputError: the table cannot be read, holds bad rows and ``skip_bad_rows`` is
            off, or has no good ones.
    """
    ranks = ranks or Ranks()
    with ranks.agree():
        if config.path is None:
            raise ConfigError("no training table is given: set path to a CSV or JSONL file")
        layout = Layout.of(config, defaults)
        rows, bad = read_manifest(config.path, config.root)
    peers = ranks.gather(ranks.rank)
    with ranks.agree():
        mine = check_rows(rows[peers.index(ranks.rank) :: len(peers)], layout, progress=ranks.rank == 0)
    parts = ranks.gather(mine)
    entries = sorted((entry for part, _ in parts for entry in part), key=lambda entry: entry.row.line)
    bad += [row for _, part in parts for row in part]
    _report(config, len(entries), bad)
    return entries, layout


def _report(config: TableConfig, good: int, bad: list[BadRow]) -> None:
    lines = explain(bad)
    say: Callable[..., None] = log.warning if config.skip_bad_rows else log.error
    for line in lines:
        say("%s", line)
    if bad and (not config.skip_bad_rows or not good):
        raise InputError(
            f"{len(bad)} of the {good + len(bad)} rows of {config.path} cannot be used (each is listed above), the "
            f"first on {lines[0]}" + ("" if not good else "; or go on without them with skip_bad_rows")
        )
    if bad:
        log.warning("%d of %d rows are left out", len(bad), good + len(bad))
    if not good:
        raise InputError(f"{config.path} has a header and no rows")
