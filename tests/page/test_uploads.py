"""What a browser may send, and under which names it is kept."""

import re

import pytest

from vdot.errors import InputError
from vdot.page.guard import named_files
from vdot.page.uploads import Uploads, display_name


@pytest.fixture
def uploads(tmp_path) -> Uploads:
    (tmp_path / "in").mkdir()
    return Uploads(tmp_path / "in", 2**20, 4.0, 512, 8)


def test_an_upload_is_copied_under_a_name_of_ours(uploads, media, tmp_path):
    given = uploads.root / "Ein Clip; rm -rf.MP4"
    given.write_bytes((media / "clip.mp4").read_bytes())
    stored = uploads.take(given, "clip", tmp_path / "session")
    assert stored == tmp_path / "session" / "clip_1.mp4" and stored.read_bytes() == given.read_bytes()
    assert uploads.take(given, "clip", tmp_path / "session").name == "clip_2.mp4"


@pytest.mark.parametrize(
    "file,kind,sentence",
    [
        ("empty.mp4", "clip", "empty.mp4 is empty (0 bytes)"),
        ("words.mp4", "clip", "words.mp4 is not a video file that can be read"),
        ("huge.mp4", "clip", "huge.mp4 has 3 MB, at most 1 MB are taken"),
        ("long.mp4", "clip", "long.mp4 lasts 9 s, at most 4 s are taken: cut the part you need"),
        ("wide.mp4", "clip", "wide.mp4 is 1024x16, at most 512 pixels on a side are taken: scale it down"),
        ("toy.png", "clip", "toy.png is a picture, not a video: give it where pictures are asked for"),
        ("clip.mp4", "picture", "clip.mp4 is not a picture that can be read: use PNG, JPEG or WebP"),
        ("words.mp4", "mask", "words.mp4 is not a video file that can be read"),
    ],
)
def test_what_cannot_be_taken_is_said_without_our_paths(uploads, media, tmp_path, file, kind, sentence):
    given = uploads.root / file
    given.write_bytes((media / file).read_bytes())
    with pytest.raises(InputError, match=re.escape(sentence)) as error:
        uploads.take(given, kind, tmp_path / "session")
    assert str(tmp_path) not in str(error.value)
    assert not (tmp_path / "session").exists()


def test_nothing_outside_the_upload_folder_is_opened(uploads, media, tmp_path):
    outside = tmp_path / "secret.mp4"
    outside.write_bytes((media / "clip.mp4").read_bytes())
    link = uploads.root / "link.mp4"
    link.symlink_to(outside)
    for path in (outside, uploads.root / ".." / "secret.mp4", link, "/etc/passwd", "http://example.com/clip.mp4"):
        with pytest.raises(InputError, match="was not uploaded to this page"):
            uploads.take(path, "clip", tmp_path / "session")


@pytest.mark.parametrize(
    "path,name",
    [
        ("/tmp/a/b.mp4", "b.mp4"),
        ("..\\..\\x.mp4", "x.mp4"),
        ("/t/<script>alert(1)</script>.mp4", "script_.mp4"),
        ("/t/猫.mp4", "猫.mp4"),
        ("/", "the file"),
    ],
)
def test_names_as_they_are_shown(path, name):
    assert display_name(path) == name


def test_every_file_that_an_event_names_is_seen():
    body = (
        b'{"data": [{"video": {"path": "/a"}}, [[{"image": {"path": "http://b", "meta": {}}}]], "path", {"path": 3}]}'
    )
    assert sorted(named_files(body)) == ["/a", "http://b"]
    assert list(named_files(b"not json")) == [] and list(named_files(b"")) == []
