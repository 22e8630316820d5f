"""The page in a real browser. One walk through it is quick; the rest is slow (``pytest -m slow tests/page``)."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.page.conftest import MINUTES, serving
from vdot.page.presets import PRESETS
from vdot.page.texts import TEXTS
from vdot.video import probe, read_frames

ENGLISH = {key: words[0] for key, words in TEXTS.items()}


# --- hands -----------------------------------------------------------------------------------------------------------


def choose(tab: Any, preset: str) -> None:
    tab.get_by_label(ENGLISH[preset], exact=True).check()
    tab.locator("#vdot-about").get_by_text(ENGLISH[f"{preset}_help"]).wait_for()
    wait_quiet(tab)


def load_example(tab: Any, preset: str) -> None:
    choose(tab, preset)
    tab.locator("#vdot-example").click()
    tab.locator("#vdot-status").get_by_text(ENGLISH["example_hint"]).wait_for()
    wait_quiet(tab)


def wait_quiet(tab: Any, seconds: float = 0.7) -> None:
    """Until the page has not changed for a while: answers of the server have come in."""
    tab.evaluate(
        """(pause) => new Promise(done => {
            let timer = setTimeout(finish, pause);
            const watch = new MutationObserver(() => { clearTimeout(timer); timer = setTimeout(finish, pause); });
            function finish() { watch.disconnect(); done(); }
            watch.observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
            setTimeout(finish, 8 * pause);
        })""",
        1000 * seconds,
    )


def set_value(tab: Any, name: str, value: str) -> None:
    field = tab.locator(f"#vdot-{name} input, #vdot-{name} textarea").first
    field.fill(value)
    field.blur()


def upload(tab: Any, name: str, *paths: Path) -> None:
    tab.locator(f"#vdot-{name} input[type=file]").first.set_input_files([str(path) for path in paths])


def status(tab: Any, pattern: str) -> str:
    found = tab.locator("#vdot-status").get_by_text(re.compile(pattern))
    found.first.wait_for()
    return found.first.inner_text()


def generate(tab: Any, ends: str = "Done in|did not work") -> str:
    working = "Preparing|queue|next|Starting|Reading|Looking|Step|Drawing|Saving|did not work"
    if "Done in" not in tab.locator("#vdot-status").inner_text():
        working += "|Done in"  # a small model may be ready before anybody looks
    tab.locator("#vdot-generate").click()
    status(tab, working)
    return status(tab, ends)


def begin(tab: Any, steps: int) -> None:
    """Start the example of words alone, with so many steps."""
    load_example(tab, "t2v")
    tab.get_by_role("button", name=ENGLISH["advanced"]).click()
    set_value(tab, "steps", str(steps))
    tab.locator("#vdot-generate").click()


def playing(tab: Any, name: str) -> float:
    """Seconds of a video that the browser could load."""
    handle = tab.locator(f"#vdot-{name} video").first
    handle.wait_for()
    return handle.evaluate(
        """video => new Promise((done, fail) => {
            const look = () => { if (video.readyState >= 1) done(video.duration); else setTimeout(look, 100); };
            setTimeout(() => fail(new Error('it does not play: ' + (video.error && video.error.message))), 120000);
            look();
        })"""
    )


def paint(tab: Any, around: float = 0.1, height: float = 0.5) -> None:
    """A stroke across the middle of the picture."""
    canvas = tab.locator("#vdot-canvas canvas").first
    canvas.scroll_into_view_if_needed()
    wait_quiet(tab)
    box = canvas.bounding_box()
    x, y, reach = box["x"] + box["width"] / 2, box["y"] + box["height"] * height, around * box["height"]
    tab.mouse.move(x - reach, y)
    tab.mouse.down()
    for step in range(11):
        tab.mouse.move(x - reach + 0.2 * reach * step, y)
    tab.mouse.up()
    wait_quiet(tab)


def newest(page: Any, name: str) -> Path:
    """The file of that name that was written last, of all sessions."""
    return max(page.results.glob(f"*/*/{name}"), key=lambda path: path.stat().st_mtime)


# --- one walk --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_paint_look_generate(page, visit, media):
    tab = visit(page)
    choose(tab, "inpaint")
    upload(tab, "clip", media / "clip.mp4")
    tab.locator("#vdot-canvas canvas").first.wait_for()
    wait_quiet(tab)
    set_value(tab, "prompt", "a blue ball")
    tab.locator("#vdot-write_out").click()
    assert "Your words were: a blue ball" in status(tab, "Written out by writer at")
    assert tab.locator("#vdot-prompt textarea").input_value().startswith("In soft light, a blue ball, seen")
    paint(tab)
    tab.locator("#vdot-look").click()
    status(tab, "About")
    assert playing(tab, "overlay") > 0.5
    mask = read_frames(newest(page, "src_mask.mp4"), [0])[0, ..., 0] > 127
    rows, cols = np.nonzero(mask)
    assert 0.005 < mask.mean() < 0.3  # the stroke, not the frame
    assert abs(rows.mean() / mask.shape[0] - 0.5) < 0.1 and abs(cols.mean() / mask.shape[1] - 0.5) < 0.1
    assert "used  9 of them" in tab.locator("#vdot-plan").inner_text()
    assert generate(tab).startswith("Done in")
    assert playing(tab, "result") == pytest.approx(9 / 8, abs=0.1) and playing(tab, "side") > 0.5
    video = newest(page, "out_video.mp4")
    kept = ~(read_frames(video.with_name("src_mask.mp4"), range(9))[..., 0] > 20)
    made, given = (read_frames(video.with_name(name), range(9)) for name in ("out_video.mp4", "src_video.mp4"))
    assert np.abs(made[kept].astype(int) - given[kept]).mean() < 3  # the compression of two files
    tab.get_by_role("tab", name=ENGLISH["tab_session"]).click()
    assert tab.locator("#vdot-gallery img").count() == 1


# --- slow ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A page with room: no password, steps that one can watch."""
    with serving(tmp_path_factory.mktemp("wide"), "--max_queue", "40") as served:
        served.wait_said(r"load +\d")
        yield served


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_once(wide, visit, preset):
    tab = visit(wide, login=None)
    load_example(tab, preset)
    for name in ("clip", "pictures", "region", "boxes", "sides", "end", "ready"):
        assert tab.locator(f"#vdot-{name}").is_visible() == (name in PRESETS[preset].shows), name
    assert generate(tab).startswith("Done in")
    assert playing(tab, "result") > 1
    assert probe(newest(wide, "out_video.mp4")).frames == (29 if preset == "extend" else 17)


@pytest.mark.slow
def test_cancel_stops_at_the_next_step(wide, visit):
    tab = visit(wide, login=None)
    begin(tab, 900)
    status(tab, r"Step \d+ of 900")
    assert tab.locator("#vdot-emerging img").evaluate("image => image.naturalWidth") > 0
    tab.locator("#vdot-cancel").click()
    status(tab, r"Cancelled\.")  # had it gone on, it would say that it is done
    set_value(tab, "steps", "2")
    assert generate(tab).startswith("Done in")


@pytest.mark.slow
def test_a_reload_finds_its_video_again(wide, visit):
    tab = visit(wide, login=None)
    begin(tab, 500)
    status(tab, r"Step \d+ of 500")
    tab.reload()
    status(tab, r"Step \d+ of 500")
    status(tab, "Done in")
    assert playing(tab, "result") > 1
    tab.reload()
    tab.get_by_role("tab", name=ENGLISH["tab_session"]).click()
    tab.locator("#vdot-gallery img").first.click()
    tab.get_by_role("tab", name=ENGLISH["tab_result"]).click()
    assert playing(tab, "result") > 1
    other = visit(wide, login=None)  # another browser sees nothing of it
    other.get_by_role("tab", name=ENGLISH["tab_session"]).click()
    wait_quiet(other)
    assert other.locator("#vdot-gallery img").count() == 0


def by_mask_file(tab: Any, clip: Path, mask: Path) -> None:
    """Fill in a fresh page."""
    tab.reload()
    status(tab, "Ready")
    choose(tab, "inpaint")
    set_value(tab, "prompt", "a ball")
    tab.get_by_label(ENGLISH["region_file"], exact=True).check()
    wait_quiet(tab)
    upload(tab, "clip", clip)
    upload(tab, "mask", mask)
    tab.locator("#vdot-mask").get_by_text(mask.stem).first.wait_for()
    wait_quiet(tab)


@pytest.mark.slow
def test_bad_files_bring_their_sentence_and_the_next_one_works(page, visit, media):
    tab = visit(page)
    choose(tab, "inpaint")
    for name, sentence in (
        ("words.mp4", "words.mp4 is not a video file that can be read"),
        ("empty.mp4", "empty.mp4 is empty"),
        ("long.mp4", "long.mp4 lasts 9 s, at most 4 s"),
        ("wide.mp4", "wide.mp4 is 1024x16, at most 512 pixels"),
    ):
        upload(tab, "clip", media / name)
        assert sentence in status(tab, re.escape(sentence))
        tab.locator("#vdot-clip").get_by_label(
            "Clear"
        ).last.click()  # a clip that will not play has two, one upon the other
        wait_quiet(tab)
    upload(tab, "clip", media / "huge.mp4")
    tab.get_by_text(re.compile("exceed", re.I)).first.wait_for()
    by_mask_file(tab, media / "clip.mp4", media / "black.mp4")
    tab.locator("#vdot-generate").click()
    assert "black everywhere" in status(tab, "did not work")
    by_mask_file(tab, media / "clip.mp4", media / "mask.mp4")
    assert generate(tab).startswith("Done in")


@pytest.mark.slow
def test_twenty_clients_at_once(wide, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from gradio_client import Client

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def one(number: int) -> dict[str, Any]:
        client = Client(wide.url, verbose=False, httpx_kwargs={"timeout": MINUTES})
        settings = {"size": "32*32", "frame_num": 5, "steps": 1, "seed": number}
        video, facts = client.predict(preset="t2v", prompt=f"ball {number}", **settings, api_name="/generate")
        assert Path(video).stat().st_size > 300
        return facts

    with ThreadPoolExecutor(20) as pool:
        facts = list(pool.map(one, range(20)))
    assert [fact["seed"] for fact in facts] == list(range(20)) and {fact["size"] for fact in facts} == {"32*32"}


@pytest.mark.slow
def test_others_in_the_queue_are_counted(wide, visit):
    tabs = [visit(wide, login=None) for _ in range(3)]
    for tab in tabs:
        begin(tab, 300)
        status(tab, r"Step|queue")
    assert status(tabs[2], r"[12] before you in the queue")
    for tab in tabs:
        assert status(tab, "Done in")


@pytest.mark.slow
def test_reuse_and_extend(wide, visit):
    tab = visit(wide, login=None)
    load_example(tab, "inpaint")
    set_value(tab, "seed", "77")
    assert generate(tab).startswith("Done in")
    load_example(tab, "t2v")
    tab.locator("#vdot-reuse").click()
    tab.locator("#vdot-about").get_by_text(ENGLISH["inpaint_help"]).wait_for()
    wait_quiet(tab)
    assert tab.locator("#vdot-seed input").input_value() == "77"
    assert generate(tab).startswith("Done in")
    first, again = sorted(wide.results.glob("*/*/out_video.mp4"), key=lambda path: path.stat().st_mtime)[-2:]
    assert first.read_bytes() == again.read_bytes()  # the same settings, the same video
    tab.locator("#vdot-extend_this").click()
    tab.locator("#vdot-about").get_by_text(ENGLISH["extend_help"]).wait_for()
    wait_quiet(tab)
    assert generate(tab).startswith("Done in")
    longer = newest(wide, "out_video.mp4")
    assert probe(longer).frames == 29
    start = read_frames(longer, range(12)).astype(int) - read_frames(again, range(12))
    assert np.abs(start).mean() < 6  # it begins as the video that it extends, compressed once more


@pytest.mark.slow
def test_two_clicks_are_a_box(wide, visit, media):
    tab = visit(wide, login=None)
    choose(tab, "layout")
    upload(tab, "clip", media / "clip.mp4")
    picture = tab.locator("#vdot-box_picture img")
    picture.wait_for()
    wait_quiet(tab)
    box = picture.bounding_box()
    for x, y in ((0.45, 0.3), (0.55, 0.7)):
        picture.click(position={"x": box["width"] * x, "y": box["height"] * y})
        wait_quiet(tab)
    left, top, right, bottom = map(int, tab.locator("#vdot-boxes textarea").input_value().split(","))
    assert left < right and abs(top - 30) < 6 and abs(bottom - 70) < 6


@pytest.mark.slow
def test_keyboard_alone(wide, visit):
    tab = visit(wide, login=None)
    tab.locator("#vdot-prompt textarea").focus()
    tab.keyboard.type("a red ball")
    reached = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.closest('[id^=vdot-]')?.id"))
        if reached[-1] == "vdot-generate":
            break
    assert {"vdot-seed", "vdot-dice", "vdot-generate"} <= set(reached), reached
    tab.keyboard.press("Enter")
    assert status(tab, "Done in")


@pytest.mark.slow
def test_fields_have_names(wide, visit):
    tab = visit(wide, login=None)
    for preset in ("inpaint", "layout", "outpaint", "extend"):
        choose(tab, preset)
        nameless = tab.evaluate(
            """() => [...document.querySelectorAll('[id^=vdot-] input:not([type=file]), [id^=vdot-] textarea, button')]
                .filter(e => e.offsetParent !== null)
                .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.title || e.innerText?.trim()
                               || e.getAttribute('aria-labelledby')))
                .map(e => e.outerHTML.slice(0, 200))"""
        )
        assert nameless == []


@pytest.mark.slow
def test_chinese_by_the_browser_and_by_hand(wide, visit):
    tab = visit(wide, login=None, locale="zh-CN")
    tab.get_by_role("button", name="生成", exact=True).wait_for()
    tab.get_by_label("局部重绘", exact=True).check()
    tab.get_by_label("跟踪").wait_for()
    tab.get_by_label("English", exact=True).check()
    tab.get_by_role("button", name="Generate", exact=True).wait_for()
    assert tab.get_by_label("Change a region", exact=True).is_checked()
    assert tab.evaluate("document.documentElement.lang") == "en"
    wait_quiet(tab)
    tab.reload()
    status(tab, "Ready")  # what was chosen by hand stays


@pytest.mark.slow
def test_pictures_of_the_page(wide, visit, tmp_path):
    """Desktop and phone, light and dark; $VDOT_SCREENSHOTS is where they go (docs/page.png is one of them)."""
    import os

    folder = Path(os.environ.get("VDOT_SCREENSHOTS", tmp_path))
    tab = visit(wide, login=None, viewport={"width": 1360, "height": 1000})
    load_example(tab, "inpaint")
    tab.get_by_label(ENGLISH["region_paint"], exact=True).check()
    tab.locator("#vdot-canvas canvas").first.wait_for()
    for height in (0.35, 0.4, 0.45, 0.5, 0.55):
        paint(tab, height=height)
    assert generate(tab).startswith("Done in")
    tab.get_by_role("tab", name=ENGLISH["tab_look"]).click()
    playing(tab, "overlay")
    tab.screenshot(path=folder / "desktop.png", full_page=True)
    tab.locator("#vdot-dark").click()
    assert tab.evaluate("document.body.classList.contains('dark')")
    background = tab.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 200  # dark
    tab.screenshot(path=folder / "dark.png", full_page=True)
    for locale, name in (("en-US", "phone.png"), ("zh-CN", "phone_zh.png")):
        options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "locale": locale}
        phone = visit(wide, login=None, **options)
        wait_quiet(phone)
        phone.screenshot(path=folder / name, full_page=True)
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
