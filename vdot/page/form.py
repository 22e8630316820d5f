"""The inputs of the page as Gradio's components, their words in both languages, and which of them a preset shows."""

from collections.abc import Sequence
from typing import Any

from vdot.page.orders import REGIONS, SHAPES, SIDES
from vdot.page.presets import PRESETS, Preset
from vdot.page.texts import LANGUAGES, text
from vdot.pipeline import checkpoint_defaults, checkpoint_schedule
from vdot.request import MODES
from vdot.sampling import SOLVERS

# Components whose values make a Form, in the order that events pass them.
FORM = (
    "preset", "prompt", "negative", "clip", "ready", "pictures", "cut_out", "region", "canvas", "mask", "shape",
    "track", "boxes", "sides", "ratio", "end", "keep", "size", "frame_num", "frame_mode", "fps", "steps", "shift",
    "solver", "guide_scale", "context_scale", "keep_source", "feather", "seed",
)  # fmt: skip


class Words:
    """Remembers which words each component shows, so that a language can be put over all of them at once."""

    def __init__(self, language: str = "en") -> None:
        self.language = language
        self.components: dict[str, Any] = {}
        self._keys: dict[str, dict[str, Any]] = {}

    def add(self, name: str, kind: Any, words: dict[str, Any], **options: Any) -> Any:
        """``words``: attribute -> key of a text, or for "choices" pairs of key and value."""
        component = kind(**self._said(words, self.language), elem_id=f"vdot-{name}", **options)
        self.components[name], self._keys[name] = component, words
        return component

    def __getitem__(self, name: str) -> Any:
        return self.components[name]

    def updates(self, language: str) -> dict[Any, Any]:
        import gradio as gr

        return {
            self.components[name]: gr.update(**self._said(words, language))
            for name, words in self._keys.items()
            if words
        }

    @staticmethod
    def _said(words: dict[str, Any], language: str) -> dict[str, Any]:
        return {
            attribute: [(text(language, key), value) for key, value in keys]
            if attribute == "choices"
            else text(language, keys)
            for attribute, keys in words.items()
        }


def choices(values: Sequence[str], prefix: str = "") -> list[tuple[str, str]]:
    return [(prefix + value, value) for value in values]


def preset_words(preset: str, language: str) -> str:
    return f"**{text(language, preset)}.** {text(language, preset + '_help')}"


def build_inputs(words: Words, first: Any, info: Any) -> None:
    """What is dropped, painted and written. ``first``: a :class:`PageConfig` with the first values."""
    import gradio as gr

    add = words.add
    add("preset", gr.Radio, {"label": "preset", "choices": choices(tuple(PRESETS))}, value="t2v")
    add("about", gr.Markdown, {}, value=preset_words("t2v", words.language))
    add("example", gr.Button, {"value": "example"}, size="sm")
    add("clip", gr.Video, {"label": "clip"}, sources=["upload"], visible=False, height=240, include_audio=True)
    add("ready", gr.Checkbox, {"label": "ready_box", "info": "ready_info"}, visible=False)
    add(
        "pictures", gr.Gallery, {"label": "pictures"}, visible=False, interactive=True, file_types=["image"],
        type="filepath", columns=4, height=180, object_fit="contain", sources=["upload"],
    )  # fmt: skip
    add("cut_out", gr.Checkbox, {"label": "cut_out"}, visible=False)
    _region(words)
    add("sides", gr.CheckboxGroup, {"label": "sides", "choices": choices(SIDES)}, value=list(SIDES), visible=False)
    add("ratio", gr.Slider, {"label": "ratio"}, minimum=0.05, maximum=1, value=0.25, step=0.05, visible=False)
    add("end", gr.Radio, {"label": "end", "choices": choices(("after", "before"))}, value="after", visible=False)
    most = max(1, checkpoint_defaults(info).frame_num - 4)
    add("keep", gr.Slider, {"label": "keep"}, minimum=1, maximum=most, value=min(5, most), step=4, visible=False)
    add("prompt", gr.Textbox, {"label": "prompt", "placeholder": "prompt_hint"}, lines=3, max_length=5000)
    add("write_out", gr.Button, {"value": "write_out"}, size="sm")
    with gr.Row():
        add("seed", gr.Number, {"label": "seed"}, value=max(first.base_seed, 0), precision=0, minimum=0, min_width=120)
        add("dice", gr.Button, {"value": "dice"}, min_width=100, size="sm")
    _advanced(words, first, info)


def _region(words: Words) -> None:
    """Where something changes or goes."""
    import gradio as gr

    add = words.add
    add("region", gr.Radio, {"label": "region", "choices": choices(REGIONS, "region_")}, value="paint", visible=False)
    add(
        "canvas", gr.ImageEditor, {"label": "canvas"}, visible=False, type="numpy", sources=[], transforms=(),
        layers=False, brush=gr.Brush(colors=["#ff2d2d"], color_mode="fixed", default_size=24), height=360,
        canvas_size=(768, 768),
    )  # fmt: skip
    add("mask", gr.File, {"label": "mask"}, visible=False, file_types=["image", "video"], type="filepath", height=120)
    add("boxes", gr.Textbox, {"label": "boxes", "info": "boxes_info"}, visible=False, lines=2, max_length=2000)
    add("box_picture", gr.Image, {"label": "box_picture"}, visible=False, interactive=False, height=240, buttons=[])
    shapes = choices(SHAPES, "shape_")
    add("shape", gr.Radio, {"label": "shape", "choices": shapes}, value="auto", visible=False)
    add("track", gr.Checkbox, {"label": "track", "info": "track_info"}, value=True, visible=False)


def _advanced(words: Words, first: Any, info: Any) -> None:
    import gradio as gr

    schedule, defaults = checkpoint_schedule(info), checkpoint_defaults(info)
    add = words.add
    given = {name: getattr(first, f"sample_{name}") for name in ("steps", "shift", "solver", "guide_scale")}
    schedule = schedule.override(**given)
    with add("advanced", gr.Accordion, {"label": "advanced"}, open=False):
        add("negative", gr.Textbox, {"label": "negative"}, value=first.negative_prompt or "", max_length=5000)
        add("size", gr.Textbox, {"label": "size"}, value=first.size or defaults.size, max_length=20)
        add("frame_num", gr.Number, {"label": "frame_num"}, value=first.frame_num, precision=0)
        add("frame_mode", gr.Radio, {"label": "frame_mode", "choices": choices(MODES)}, value=first.frame_mode)
        add("fps", gr.Number, {"label": "fps"}, value=first.fps)
        add("schedule_note", gr.Markdown, {"value": "schedule_note"})
        with gr.Row():
            add("steps", gr.Number, {"label": "steps"}, value=schedule.steps, precision=0, min_width=100)
            add("shift", gr.Number, {"label": "shift"}, value=schedule.shift, min_width=100)
        with gr.Row():
            add("solver", gr.Dropdown, {"label": "solver"}, choices=list(SOLVERS), value=schedule.solver, min_width=100)
            add("guide_scale", gr.Number, {"label": "guide_scale"}, value=schedule.guide_scale, min_width=100)
        add("context_scale", gr.Slider, {"label": "context_scale"}, minimum=0, maximum=2, value=first.context_scale)
        add("keep_source", gr.Checkbox, {"label": "keep_source"}, value=first.keep_source)
        add("feather", gr.Number, {"label": "feather"}, value=first.feather)


def build_outputs(words: Words) -> None:
    """Progress, the result, what the model sees, and the session."""
    import gradio as gr

    add = words.add
    with gr.Row(elem_classes="vdot-actions"):
        add("generate", gr.Button, {"value": "generate"}, variant="primary", min_width=140)
        add("look", gr.Button, {"value": "look"}, min_width=140)
        add("cancel", gr.Button, {"value": "cancel"}, variant="stop", min_width=90, interactive=False)
    add("status", gr.HTML, {}, value="")
    add("emerging", gr.HTML, {}, value="", visible=False)
    with add("tabs", gr.Tabs, {}):
        with add("tab_result", gr.Tab, {"label": "tab_result"}, id="result"):
            add("result", gr.Video, {"label": "result"}, interactive=False, autoplay=True, loop=True, height=360)
            add("side", gr.Video, {"label": "side"}, interactive=False, loop=True, visible=False, height=300)
            with gr.Row():
                add("download", gr.DownloadButton, {"label": "download"}, interactive=False, min_width=100)
                add("reuse", gr.Button, {"value": "reuse"}, interactive=False, min_width=100)
                add("extend_this", gr.Button, {"value": "extend_this"}, interactive=False, min_width=100)
            with add("settings_fold", gr.Accordion, {"label": "settings"}, open=False):
                add("settings", gr.JSON, {}, show_label=False)
        with add("tab_look", gr.Tab, {"label": "tab_look"}, id="look"):
            add("plan", gr.HTML, {}, value="")
            add("source", gr.Video, {"label": "source"}, interactive=False, loop=True, visible=False, height=240)
            add("overlay", gr.Video, {"label": "overlay"}, interactive=False, loop=True, visible=False, height=240)
            add("mask_seen", gr.Video, {"label": "mask_seen"}, interactive=False, loop=True, visible=False, height=240)
            add(
                "references", gr.Gallery, {"label": "references"}, interactive=False, visible=False, columns=4,
                height=200, object_fit="contain", buttons=[],
            )  # fmt: skip
        with add("tab_session", gr.Tab, {"label": "tab_session"}, id="session"):
            add(
                "gallery", gr.Gallery, {"label": "gallery"}, interactive=False, columns=3, height=360,
                object_fit="contain", allow_preview=False, buttons=[],
            )  # fmt: skip


def shown(preset: Preset, region: str) -> dict[str, bool]:
    """Which inputs apply to a preset."""
    has = set(preset.shows)
    boxed = "boxes" in has or ("region" in has and region == "box")
    return {
        "clip": "clip" in has,
        "ready": "ready" in has,
        "pictures": "pictures" in has,
        "cut_out": "pictures" in has and preset.key not in ("i2v", "move"),
        "region": "region" in has,
        "canvas": "region" in has and region == "paint",
        "mask": "region" in has and region == "file",
        "shape": "region" in has,
        "track": "region" in has and region != "file",
        "boxes": boxed,
        "box_picture": boxed,
        "sides": "sides" in has,
        "ratio": "sides" in has,
        "end": "end" in has,
        "keep": "end" in has,
        "keep_source": "region" in has or preset.key in ("outpaint", "extend", "i2v", "move", "expand"),
        "feather": "region" in has or preset.key == "outpaint",
        "frame_mode": "clip" in has and preset.key != "extend",
        "context_scale": bool(has),
    }


def language_choices() -> list[tuple[str, str]]:
    return [(name, key) for key, name in LANGUAGES.items()]
