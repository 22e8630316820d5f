"""Every word in both languages, and nothing that is written into the page unescaped."""

import re
import string

import pytest

from vdot.errors import ConfigError
from vdot.page import show
from vdot.page.engine import Ticket
from vdot.page.form import shown
from vdot.page.options import credentials, read_options
from vdot.page.presets import INPUTS, PRESETS
from vdot.page.texts import TEXTS, preferred, text
from vdot.page.worker import Order
from vdot.request import Request
from vdot.sampling import FewStepSchedule


@pytest.mark.parametrize("key", TEXTS)
def test_both_languages_say_the_same_fields(key):
    english, chinese = TEXTS[key]
    names = [{name for _, name, _, _ in string.Formatter().parse(words) if name} for words in (english, chinese)]
    assert names[0] == names[1]
    assert english.isascii() or "🎲" in english
    assert re.search(r"[\u4e00-\u9fff]", chinese) or chinese == english


def test_presets_have_words_and_known_inputs():
    for key, preset in PRESETS.items():
        assert key in TEXTS and f"{key}_help" in TEXTS
        assert set(preset.needs) <= set(preset.shows) <= set(INPUTS)
        visible = shown(preset, "paint")
        assert visible["clip"] == ("clip" in preset.shows) and visible["canvas"] == ("region" in preset.shows)


def test_the_first_language_of_the_browser():
    assert preferred("zh-CN,zh;q=0.9") == "zh" and preferred("de,zh;q=0.5") == "en" and preferred("") == "en"


def test_words_from_outside_are_escaped():
    attack = "<img src=x onerror=alert(1)>"
    assert "<img" not in show.failure("en", attack) + show.note(attack) + show.head("en", attack)


def test_progress_of_an_order():
    ticket = Ticket(1, Order(Request("x"), FewStepSchedule(), "", {}))
    assert text("en", "waiting", n=2) in show.progress("en", ticket, 2, True)
    ticket.status, ticket.stage, ticket.step, ticket.steps = "running", "sample", 2, 4
    shown_ = show.progress("zh", ticket, 0, True)
    assert "第 3 / 4 步" in shown_ and 'aria-valuenow="48"' in shown_


@pytest.mark.parametrize(
    "argv,sentence",
    [
        (["--auth", "nobody"], "auth must be USER:PASS"),
        (["--port", "99999"], "port must be a number"),
        (["--max_seconds", "0"], "max_seconds must be positive"),
        (["--hots", "x"], "unknown option --hots; did you mean --host"),
        (["--offload_model", "some"], "offload_model must be one of"),
        (["--attention", "none"], "unknown attention"),
    ],
)
def test_options_that_do_not_fit(argv, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_options(argv, "vdot_gradio.py")


def test_safe_by_default():
    config = read_options([], "vdot_gradio.py")
    assert config.host == "127.0.0.1" and not config.share and config.auth is None
    assert credentials("a:b,c:d:e") == [("a", "b"), ("c", "d:e")]
