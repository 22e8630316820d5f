"""A form as the model gets it. Pixels are compared with what was put in, not with what the code made before."""

from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import TINY
from vdot.cli import Session
from vdot.errors import InputError, VdotError
from vdot.page.examples import Examples
from vdot.page.options import PageConfig
from vdot.page.orders import Form, parse_boxes, understand
from vdot.page.presets import PRESETS
from vdot.parallel.state import Ranks
from vdot.video import read_frames, write_image


@pytest.fixture(scope="module")
def model() -> Session:
    return Session.find(PageConfig(ckpt_dir=str(TINY), device="cpu"), Ranks())


@pytest.fixture
def form(media) -> Form:
    return Form(preset="inpaint", prompt="a red square", clip=str(media / "clip.mp4"), size="96*64")


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Examples:
    return Examples(tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_an_example_that_the_model_can_take(model, examples, preset, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "plan", lambda *_: _NoPlan())
    made = understand(examples.form(preset), model, tmp_path)
    shows = PRESETS[preset].shows
    assert made.prepared.frame_num == (31 if preset == "extend" else 17) or preset == "extend"
    assert (made.prepared.source is not None) == (preset not in ("t2v", "r2v"))
    assert bool(made.prepared.references) <= ("pictures" in shows)
    height, width = made.prepared.condition.height, made.prepared.condition.width
    assert height * width <= 128 * 128 and height % 16 == width % 16 == 0


class _NoPlan:
    flops = 1.0

    def check_fit(self, *_):
        pass

    def peak(self, *_):
        return 1


def test_what_is_painted_is_what_is_hidden(model, form, media, tmp_path):
    painted = np.zeros((64, 96), np.uint8)
    painted[10:30, 40:70] = 255
    write_image(tmp_path / "painted.png", painted)
    made = understand(replace(form, painted=str(tmp_path / "painted.png"), track=False), model, tmp_path)
    white = made.prepared.condition.mask.numpy() > 0.5
    assert (white == (painted > 0)).all()  # in every frame
    clip = read_frames(media / "clip.mp4", range(9))
    assert (made.prepared.source[~white] == clip[~white]).all()
    assert (np.abs(made.prepared.source[white].astype(int) - 127.5) <= 0.5).all()
    seen = made.save(tmp_path)
    assert (
        read_frames(seen["mask"], [4])[0, 20, 50].min() > 200 and read_frames(seen["mask"], [4])[0, 50, 50].max() < 50
    )
    assert made.flops > 1e8 and 2**20 < made.peak < made.available


def test_a_tracked_box_follows_the_square(model, form, tmp_path):
    made = understand(replace(form, region="box", boxes="18,25,45,68"), model, tmp_path)
    first, last = made.prepared.condition.mask.numpy()[[0, -1]] > 0.5
    centres = [np.flatnonzero(mask.any(0)).mean() for mask in (first, last)]
    assert 18 < centres[1] - centres[0] < 30  # it moves by 24 pixels


def test_a_box_in_percent(tmp_path):
    assert parse_boxes("10,20,50,100; 0 0 100 50", 100, 200) == [(20, 20, 100, 100), (0, 0, 200, 50)]
    for bad in ("10,20,30", "50,0,10,100", "-1,0,10,10", "0,0,101,10", "a"):
        with pytest.raises(InputError, match="in percent"):
            parse_boxes(bad, 10, 10)


def test_an_extension_goes_on_from_the_end_and_is_joined(model, form, media, tmp_path):
    made = understand(replace(form, preset="extend", keep=5, frame_num=9), model, tmp_path)
    clip = read_frames(media / "clip.mp4", range(9))
    assert (made.prepared.source[:5] == clip[-5:]).all() and (made.order.before == clip[:4]).all()
    assert not made.prepared.condition.mask[:5].any() and made.prepared.condition.mask[5:].all()
    made = understand(replace(form, preset="extend", keep=5, frame_num=9, end="before"), model, tmp_path)
    assert (made.prepared.source[-5:] == clip[:5]).all() and (made.order.after == clip[5:]).all()


def test_outpainting_grows_within_the_size(model, form, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "plan", lambda *_: _NoPlan())
    made = understand(replace(form, preset="outpaint", sides=("left", "right"), ratio=0.5), model, tmp_path)
    condition = made.prepared.condition
    assert condition.height * condition.width <= 96 * 64 and condition.width > 2.5 * condition.height
    share = float(condition.mask.mean())
    assert 0.45 < share < 0.6  # half of the picture is new


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"clip": None}, "this needs a clip"),
        ({}, "this needs to know what to change"),
        ({"preset": "r2v"}, "this needs a picture"),
        ({"preset": "move", "pictures": ("toy.png",)}, "this needs boxes"),
        ({"preset": "layout", "clip": None}, "this needs boxes"),
        ({"preset": "outpaint", "sides": ()}, "choose at least one side"),
        ({"preset": "outpaint", "ratio": 2.0}, "the picture grows by a share"),
        ({"preset": "extend", "keep": 17}, "an extension goes on from 1 to 16 frames"),
        ({"preset": "nonsense"}, "unknown preset 'nonsense'"),
        ({"region": "box", "boxes": "1,2,3"}, "in percent"),
        ({"region": "file", "mask": "black.mp4"}, "the mask is black everywhere"),
        ({"preset": "t2v", "size": "100*100"}, "multiples of 16"),
        ({"preset": "t2v", "steps": 0}, "steps must be a whole number"),
    ],
)
def test_what_is_missing_is_said(model, form, media, change, sentence, tmp_path):
    if "mask" in change:
        change = change | {"mask": str(media / change["mask"])}
    with pytest.raises(VdotError, match=sentence):
        understand(replace(form, **change), model, tmp_path)


def test_a_form_survives_its_record():
    form = Form(preset="swap", prompt="x", pictures=("a.png", "b.png"), sides=("left",), seed=3)
    assert Form.of(form.settings()) == form
    import json

    assert Form.of(json.loads(json.dumps(form.settings()))) == form
