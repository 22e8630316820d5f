"""Sessions of the page: a folder for each browser, its results with their settings, and their end.

A session is known by a token that only its browser has; the folder's name is a hash of it, so that a path in a record
gives nobody the session.
"""

import hashlib
import json
import re
import secrets
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vdot.page.engine import Ticket
from vdot.runtime import log
from vdot.video import fit_frames, probe, read_frames, write_image, write_video
from vdot.video.output import atomic_path

SETTINGS = "page.json"
SWEEP = 300.0  # seconds between two looks for what nobody wants any more


@dataclass(frozen=True)
class Result:
    """One video of a session."""

    folder: Path
    settings: dict[str, Any]  # the form that made it
    facts: dict[str, Any]  # frames, size, fps, seed, seconds

    @property
    def video(self) -> Path:
        return self.folder / "out_video.mp4"

    @property
    def thumbnail(self) -> Path:
        return self.folder / "thumbnail.png"

    @property
    def side_by_side(self) -> Path | None:
        path = self.folder / "side_by_side.mp4"
        return path if path.is_file() else None


@dataclass
class Session:
    token: str
    folder: Path
    results: list[Result] = field(default_factory=list)
    ticket: Ticket | None = None
    touched: float = field(default_factory=time.time)
    kept: threading.Event = field(default_factory=threading.Event)  # the ticket's result is in ``results``
    taken: dict[str, str] = field(default_factory=dict)  # uploads by kind and path, as files of ``uploads``
    names: dict[str, str] = field(default_factory=dict)  # those files, as the user calls them

    @property
    def busy(self) -> bool:
        return self.ticket is not None and not self.ticket.over

    @property
    def uploads(self) -> Path:
        return self.folder / "uploads"

    def fresh(self, name: str) -> Path:
        """An empty folder ``<name>_<n>`` of this session."""
        n = 1
        while (folder := self.folder / f"{name}_{n}").exists():
            n += 1
        folder.mkdir(parents=True)
        return folder

    def follow(self, ticket: Ticket) -> None:
        """Take the result into the session when it is there, whether or not anybody looks."""
        self.ticket = ticket
        self.kept.clear()
        threading.Thread(target=self._keep, args=(ticket,), name="vdot-page-keep", daemon=True).start()

    def _keep(self, ticket: Ticket) -> None:
        ticket.ended.wait()
        folder = Path(ticket.order.folder)
        try:
            if ticket.status == "done":
                self.results.append(finish(folder, ticket))
            else:
                shutil.rmtree(folder, ignore_errors=True)
        except Exception as error:
            log.error("a result could not be kept", exc_info=True)
            ticket.message = f"the result could not be kept: {type(error).__name__}"
        finally:
            self.touched = time.time()
            ticket.order = ticket.order.told()  # pixels are on the disk now
            self.kept.set()


def finish(folder: Path, ticket: Ticket) -> Result:
    """Thumbnail, comparison and settings beside a video that was just made."""
    record = ticket.record
    facts = {key: record[key] for key in ("frames", "fps", "size", "plan", "notes")}
    facts["checkpoint"] = f"{Path(record['checkpoint']['path']).name} {record['checkpoint']['fingerprint']}"
    facts |= {"seed": ticket.order.request.seed, "seconds": round(ticket.seconds, 1)}
    result = Result(folder, dict(record["page"]), facts)
    count = probe(result.video).frames
    write_image(result.thumbnail, read_frames(result.video, [count // 2])[0])
    source = folder / "src_video.mp4"
    left = ticket.order.original
    if left is None and source.is_file() and ticket.order.before is None and ticket.order.after is None:
        left = read_frames(source, range(probe(source).frames))
    if left is not None:
        write_side_by_side(left, result.video, folder / "side_by_side.mp4")
    with atomic_path(folder / SETTINGS) as temporary:
        text = json.dumps({"settings": result.settings, "facts": facts}, indent=2, ensure_ascii=False)
        Path(temporary).write_text(text + "\n", encoding="utf-8")
    return result


def write_side_by_side(left: np.ndarray, right: Path, path: Path) -> None:
    """``left [T, H, W, 3]`` beside the clip ``right``, at its size; the last frame of the shorter one is held."""
    clips = [left, read_frames(right, range(probe(right).frames))]
    height, width = clips[1].shape[1:3]
    clips[0] = fit_frames(clips[0], height, width)
    count = max(map(len, clips))
    clips = [np.concatenate([clip, np.repeat(clip[-1:], count - len(clip), axis=0)]) for clip in clips]
    gap = np.full((count, height, 4, 3), 255, np.uint8)
    write_video(path, np.concatenate([clips[0], gap, clips[1]], axis=2), probe(right).fps)


class Sessions:
    """All sessions of a page. Those that nobody has touched for ``hours`` are deleted."""

    def __init__(self, root: Path, hours: float, temporary: bool) -> None:
        self.root, self.seconds, self.temporary = root, hours * 3600, temporary
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        root.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._sweep, name="vdot-page-sweep", daemon=True).start()

    def open(self, token: Any) -> Session:
        """The session of a token; a new one for a token that is not ours."""
        with self._lock:
            valid = isinstance(token, str) and re.fullmatch(r"[0-9a-f]{32}", token) is not None
            session = self._sessions.get(token) if valid else None
            if session is None:
                session = self._restore(token) if valid else None
            if session is None:
                token = secrets.token_hex(16)
                session = Session(token, self.root / _folder_name(token))
            session.touched = time.time()
            self._sessions[session.token] = session
            return session

    def _restore(self, token: str) -> Session | None:
        """A session of an earlier life of the page, if its folder was kept."""
        folder = self.root / _folder_name(token)
        if not folder.is_dir():
            return None
        session = Session(token, folder)
        for file in sorted(folder.glob(f"*/{SETTINGS}"), key=lambda path: path.stat().st_mtime):
            with suppress(OSError, ValueError, KeyError):
                values = json.loads(file.read_text(encoding="utf-8"))
                session.results.append(Result(file.parent, values["settings"], values["facts"]))
        return session

    def sweep(self, now: float | None = None) -> int:
        """Delete what is out of date; how many sessions went."""
        now = time.time() if now is None else now
        with self._lock:
            old = [s for s in self._sessions.values() if not s.busy and now - s.touched > self.seconds]
            for session in old:
                del self._sessions[session.token]
        known = {session.folder for session in self._sessions.values()}
        for session in old:
            shutil.rmtree(session.folder, ignore_errors=True)
        for folder in self.root.iterdir():  # of earlier lives
            stale = re.fullmatch(r"[0-9a-f]{32}", folder.name) and folder not in known
            if stale and now - folder.stat().st_mtime > self.seconds:
                shutil.rmtree(folder, ignore_errors=True)
        return len(old)

    def _sweep(self) -> None:
        while not self._ended.wait(SWEEP):
            with suppress(OSError):
                self.sweep()

    def close(self) -> None:
        self._ended.set()
        if self.temporary:
            shutil.rmtree(self.root, ignore_errors=True)


def _folder_name(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()[:32]
