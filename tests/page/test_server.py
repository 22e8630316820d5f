"""What reaches the page without its buttons: programs, and people who mean no good."""

import json
import re
import uuid
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT
from tests.page.conftest import LOGIN, MINUTES, Served

PATIENT = {"timeout": MINUTES}


@pytest.fixture(scope="module")
def web(page):
    with httpx.Client(base_url=page.url, timeout=MINUTES) as client:
        assert client.post("/login", data={"username": LOGIN[0], "password": LOGIN[1]}).status_code == 200
        yield client


def test_it_listens_on_this_machine_alone(page):
    import psutil

    port = int(page.url.rsplit(":", 1)[1])
    listening = [c.laddr for c in psutil.Process(page.process.pid).net_connections() if c.status == "LISTEN"]
    assert {address.ip for address in listening if address.port == port} == {"127.0.0.1"}


def test_without_the_password_nothing_is_shown(page):
    with httpx.Client(base_url=page.url, timeout=MINUTES) as stranger:
        for user, password in (("tester", "wrong"), ("nobody", "secret"), ("tester", "")):
            assert stranger.post("/login", data={"username": user, "password": password}).status_code in (400, 422)
        assert stranger.get("/config").status_code == 401
        event = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert stranger.post("/gradio_api/queue/join", json=event).status_code == 401
        sent = stranger.post("/gradio_api/upload", files={"files": ("a.mp4", b"x")})
        assert sent.status_code == 401


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", str(ROOT / "setup.py"), "C:/Windows/win.ini"],
)
def test_no_file_of_the_machine_is_served(web, path):
    for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/"):
        answer = web.get(route + path)
        assert answer.status_code in (403, 404), (route, answer.status_code)
        assert "root:" not in answer.text and "setup(" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../etc/passwd",
        "http://127.0.0.1:1/clip.mp4",
        "https://example.com/a.mp4",
        "file:///etc/passwd",
    ],
)
def test_events_may_only_name_uploads(web, path):
    clip = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event = {"data": ["depth", "a cat", clip], "fn_index": 0, "session_hash": uuid.uuid4().hex}
    for route in ("/gradio_api/queue/join", "/gradio_api/call/generate", "/gradio_api/run/generate"):
        answer = web.post(route, json=event)
        assert answer.status_code == 400 and "uploaded to this page" in answer.text


def test_an_upload_cannot_choose_where_it_lies(web, page, media):
    name = "../../../../tmp/evil.mp4"
    answer = web.post("/gradio_api/upload", files={"files": (name, (media / "clip.mp4").read_bytes())})
    (stored,) = answer.json()
    assert "vdot-uploads-" in stored and ".." not in stored and Path(stored).name == "evil.mp4"
    assert not Path("/tmp/evil.mp4").exists()


def test_a_file_that_is_too_large_is_refused_on_the_way(web, media):
    answer = web.post("/gradio_api/upload", files={"files": ("huge.mp4", (media / "huge.mp4").read_bytes())})
    assert answer.status_code == 413 and "exceeded maximum allowed size" in answer.text


def test_an_event_is_no_way_around_it(web):
    answer = web.post("/gradio_api/queue/join", content=b'{"data": ["' + b"x" * (9 * 2**20) + b'"]}')
    assert answer.status_code == 413


def documented() -> str:
    """The example of the README, as it stands there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return next(code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "gradio_client" in code)


def test_the_documented_example_works(page: Served, media, monkeypatch, tmp_path):
    import gradio_client

    class Ours(gradio_client.Client):
        def __init__(self, url: str) -> None:
            assert url == "http://127.0.0.1:7860"
            super().__init__(page.url, auth=LOGIN, verbose=False, download_files=tmp_path, httpx_kwargs=PATIENT)

    monkeypatch.setattr(gradio_client, "Client", Ours)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.chdir(media)
    values: dict = {}
    exec(documented(), values)
    assert Path(values["video"]).stat().st_size > 1000
    assert values["facts"]["seed"] == 7 and values["facts"]["frames"] == 9
    settings = list(page.results.glob("*/*/page.json"))
    assert any(json.loads(file.read_text())["settings"]["preset"] == "inpaint" for file in settings)


def test_the_sentence_of_a_failing_call_reaches_the_program(page, monkeypatch):
    from gradio_client import Client

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    client = Client(page.url, auth=LOGIN, verbose=False, httpx_kwargs=PATIENT)
    with pytest.raises(Exception, match="the prompt is empty: describe the video in a sentence"):
        client.predict(preset="t2v", prompt="", api_name="/generate")
    with pytest.raises(Exception, match="this needs a clip"):
        client.predict(preset="depth", prompt="a cat", api_name="/generate")
