"""What a browser sends: inside the upload folder, small enough, of the right kind, and under a name of ours.

The page never opens a path that came from outside: Gradio hands over the files that it stored itself, and what lies
anywhere else, or is a link, is refused here once more.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vdot.errors import InputError, one_line
from vdot.page.options import PageConfig
from vdot.video import is_image, probe
from vdot.video.source import open_image

KINDS = {"clip": "clip", "mask": "mask", "picture": "picture"}


@dataclass(frozen=True)
class Uploads:
    """Takes files from Gradio's folder ``root`` into a session's own."""

    root: Path
    bytes: int
    seconds: float
    side: int
    references: int

    @classmethod
    def of(cls, config: PageConfig, root: Path) -> "Uploads":
        return cls(root, config.max_upload_mb * 2**20, config.max_seconds, config.max_side, config.max_references)

    def take(self, path: str | os.PathLike, kind: str, folder: Path) -> Path:
        """Check an upload and copy it to ``folder`` as ``clip_<n>.mp4`` and the like.

        Raises:
            InputError: outside the upload folder, empty, too large, too long, or not of this kind; it names the file
                as the user knows it.
        """
        name = display_name(path)
        source = self._inside(path, name)
        size = source.stat().st_size
        if size == 0:
            raise InputError(f"{name} is empty (0 bytes)")
        if size > self.bytes:
            raise InputError(f"{name} has {size / 2**20:.0f} MB, at most {self.bytes / 2**20:.0f} MB are taken")
        with renamed(source, name):
            if kind == "picture":
                self._check_picture(source, name)
            else:
                self._check_clip(source, name, kind == "mask")
        folder.mkdir(parents=True, exist_ok=True)
        target = _free(folder, kind, _suffix(source))
        shutil.copyfile(source, target)
        return target

    def _inside(self, path: str | os.PathLike, name: str) -> Path:
        given = Path(os.fspath(path))
        real = given.resolve()
        inside = real.is_relative_to(self.root.resolve()) and real.is_file() and not given.is_symlink()
        if not inside:
            raise InputError(f"{name} was not uploaded to this page: choose the file again")
        return real

    def _check_picture(self, path: Path, name: str) -> None:
        if not is_image(path):
            raise InputError(f"{name} is not a picture that can be read: use PNG, JPEG or WebP")
        with open_image(path) as image:  # its header only: a bomb is not unpacked
            self._check_side(name, *image.size)

    def _check_clip(self, path: Path, name: str, still: bool) -> None:
        if is_image(path):
            if not still:
                raise InputError(f"{name} is a picture, not a video: give it where pictures are asked for")
            return self._check_picture(path, name)
        info = probe(path)
        self._check_side(name, info.width, info.height)
        if info.duration > self.seconds:
            raise InputError(
                f"{name} lasts {info.duration:.0f} s, at most {self.seconds:.0f} s are taken: cut the part you need"
            )

    def _check_side(self, name: str, width: int, height: int) -> None:
        if max(width, height) > self.side:
            raise InputError(
                f"{name} is {width}x{height}, at most {self.side} pixels on a side are taken: scale it down"
            )


def display_name(path: str | os.PathLike) -> str:
    """The file's own name, as far as it can be shown."""
    name = os.path.basename(os.fspath(path).replace("\\", "/"))
    return re.sub(r"[^\w. ()+-]", "_", name)[-80:] or "the file"


@contextmanager
def renamed(path: Path, name: str) -> Iterator[None]:
    """Errors of the block speak of ``name`` where they would show where the file lies."""
    try:
        yield
    except InputError as error:
        raise InputError(one_line(error).replace(str(path), name)) from error


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ""


def _free(folder: Path, kind: str, suffix: str) -> Path:
    number = 1 + sum(1 for _ in folder.glob(f"{KINDS[kind]}_*"))
    while (target := folder / f"{KINDS[kind]}_{number}{suffix}").exists():
        number += 1
    return target
