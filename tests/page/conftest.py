"""The page as a user starts it, and a real browser. Waits are minutes: a busy machine is no failure."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, TINY
from tests.parallel.conftest import free_port

pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[demo]"')

MINUTES = 180.0  # seconds
LOGIN = ("tester", "secret")


@dataclass
class Served:
    """A page in a process of its own."""

    url: str
    process: subprocess.Popen
    log: Path
    results: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_said(self, pattern: str, times: int = 1) -> None:
        end = time.monotonic() + MINUTES
        while len(re.findall(pattern, self.said())) < times:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, f"{pattern!r} was not said:\n{self.said()}"
            time.sleep(0.1)


@contextmanager
def serving(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> Iterator[Served]:
    """Start the command, wait until it listens, and end it."""
    port, log = free_port(), folder / "page.log"
    command = [sys.executable, *launcher, str(ROOT / "inference" / "vdot_gradio.py"), "--port", str(port)]
    command += ["--ckpt_dir", str(TINY), "--device", "cpu", "--save_dir", str(folder / "sessions"), *options]
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary")}
    (folder / "temporary").mkdir()
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=folder, env=values, stdout=stream, stderr=subprocess.STDOUT)
    served = Served(f"http://127.0.0.1:{port}", process, log, folder / "sessions")
    try:
        served.wait_said("the page: http")
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if not launcher:
        assert process.returncode == 0, served.said()
        assert not list(folder.glob("temporary/vdot-*"))  # uploads go with the page


class _Chat(BaseHTTPRequestHandler):
    """A language model with one thing to say."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        content = f"In soft light, {asked}, seen from the side, rolls slowly over the grass."
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="session")
def chat() -> Iterator[str]:
    """Address of an OpenAI-compatible endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture(scope="session")
def page(tmp_path_factory, chat) -> Iterator[Served]:
    """One page for the quick tests: small limits, a password, small videos, somebody who writes prompts out."""
    folder = tmp_path_factory.mktemp("page")
    limits = ("--max_upload_mb", "1", "--max_seconds", "4", "--max_side", "512", "--auth", ":".join(LOGIN))
    writer = ("--use_prompt_extend", "wan_en", "--prompt_url", chat, "--prompt_model", "writer")
    with serving(folder, *limits, *writer, "size=64*64") as served:
        yield served


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium: the system's, or the one that $VDOT_CHROMIUM names."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    names = (os.environ.get("VDOT_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or set VDOT_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., Any]]:
    """``visit(page, **context options)`` -> a tab with the page loaded, logged in; errors in it fail the test."""
    contexts, errors = [], []

    def go(served: Served, login: tuple[str, str] | None = LOGIN, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 1000}, "locale": "en-US", **options})
        contexts.append(context)
        context.set_default_timeout(1000 * MINUTES)
        if login is not None:
            form = {"username": login[0], "password": login[1]}
            assert context.request.post(f"{served.url}/login", form=form).ok
        tab = context.new_page()
        # A video that is replaced before it began to play is no error.
        tab.on("pageerror", lambda error: None if "play()" in str(error) else errors.append(str(error)))
        tab.goto(served.url)
        tab.locator("#vdot-status").get_by_text(re.compile("Ready|就绪")).wait_for()
        return tab

    yield go
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """clip.mp4 (9 frames of a moving square, 96x64), mask.mp4, black.mp4, toy.png, and files that are wrong."""
    from vdot.video import write_image, write_video

    folder = tmp_path_factory.mktemp("media")
    frames = np.full((9, 64, 96, 3), 90, np.uint8)
    for i, frame in enumerate(frames):
        frame[20:40, 20 + 3 * i : 40 + 3 * i] = (240, 60, 30)
    write_video(folder / "clip.mp4", frames, 8)
    write_video(folder / "long.mp4", np.repeat(frames, 8, axis=0), 8)  # 9 s
    write_video(folder / "wide.mp4", np.zeros((2, 16, 1024, 3), np.uint8), 8)
    mask = np.zeros_like(frames)
    mask[:, 16:48, 16:80] = 255
    write_video(folder / "mask.mp4", mask, 8)
    write_video(folder / "black.mp4", np.zeros_like(frames), 8)
    write_image(folder / "toy.png", frames[0])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "words.mp4").write_text("this is no video, whatever its name says")
    (folder / "huge.mp4").write_bytes(bytes(3 * 2**20))
    return folder
