"""The page: components, and what happens when they are used."""

import asyncio
import secrets
import shutil
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vdot.cli import Session as Model
from vdot.errors import InputError, VdotError, one_line
from vdot.page import show
from vdot.page.engine import Engine, Ticket
from vdot.page.examples import Examples
from vdot.page.form import FORM, Words, build_inputs, build_outputs, language_choices, preset_words, shown
from vdot.page.options import PageConfig
from vdot.page.orders import Form, Understood, first_frame, understand
from vdot.page.parts import (
    LOOK,
    Writers,
    clean,
    gallery_items,
    number,
    painted,
    picture_paths,
    result_updates,
    say,
    until_set,
    update,
    whole,
    with_boxes,
)
from vdot.page.presets import PRESETS
from vdot.page.results import Result, Session, Sessions
from vdot.page.texts import preferred, text
from vdot.page.uploads import Uploads, display_name
from vdot.video import read_image

MOST_SEED = 2**31
AT_ONCE = 2  # inputs that are prepared at the same time: each holds a clip in memory


class Page:
    """One page for all browsers; what belongs to one of them is in its :class:`Session`."""

    def __init__(
        self, config: PageConfig, model: Model, world: int, engine: Engine, sessions: Sessions, uploads: Uploads
    ) -> None:
        self.config, self.model, self.world, self.engine = config, model, world, engine
        self.sessions, self.uploads = sessions, uploads
        self.examples = Examples(sessions.root / "examples")
        self.writers = Writers(config)
        self._room = threading.Semaphore(AT_ONCE)
        self.words = Words()

    # -- the look ------------------------------------------------------------------------------------------------

    def build(self) -> Any:
        import gradio as gr

        words = self.words
        hours = max(1, round(self.config.keep_hours))
        with gr.Blocks(title="VDOT", analytics_enabled=False, delete_cache=(600, hours * 3600)) as blocks:
            words.components["token"] = gr.BrowserState("", storage_key="vdot-session", secret="vdot")
            words.components["spoken"] = gr.BrowserState("", storage_key="vdot-language", secret="vdot")
            words.components["chosen"] = gr.State(-1)
            words.components["corner"] = gr.State(None)
            with gr.Row(elem_classes="vdot-top"):
                words.add("head", gr.HTML, {}, value=show.head("en", self._about()), min_width=300)
                with gr.Column(min_width=200, scale=0, elem_classes="vdot-corner"):
                    words.add("language", gr.Radio, {"label": "language"}, choices=language_choices(), value="en")
                    words.add("dark", gr.Button, {"value": "dark"}, size="sm")
            with gr.Row():
                with gr.Column(min_width=320):
                    build_inputs(words, self.config, self.model.info)
                    words.add("limits", gr.Markdown, {}, value=self._limits("en"))
                with gr.Column(min_width=320):
                    build_outputs(words)
            self._offer_api()  # first: names are given in the order of coming
            self._wire(blocks)
        blocks.queue(default_concurrency_limit=4, max_size=None)
        return blocks

    def _about(self) -> str:
        return f"{self.model.path.name} · {self.model.device} · {str(self.model.dtype).removeprefix('torch.')}"

    def _limits(self, language: str) -> str:
        c = self.config
        return text(language, "limits", mb=c.max_upload_mb, seconds=f"{c.max_seconds:g}", side=c.max_side)

    def _wire(self, blocks: Any) -> None:
        import gradio as gr

        w = self.words.components
        quick = {"show_progress": "hidden", "concurrency_limit": 16, "api_visibility": "private"}
        long = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        form = [w[name] for name in FORM]
        who = [w["token"], w["language"]]
        running = self._running_outputs()
        loaded = [w["token"], w["language"], w["gallery"], w["status"]]

        def arrive(token: str, spoken: str, request: gr.Request) -> tuple[Any, ...]:
            return self.arrive(token, spoken or preferred(request.headers.get("accept-language", "")))

        def corner(picture: Any, boxes: str, first: Any, event: gr.SelectData) -> tuple[str, Any]:
            return self.corner(picture, boxes, first, event.index)

        def choose(token: str, event: gr.SelectData) -> tuple[Any, ...]:
            return self.choose(token, event.index)

        blocks.load(arrive, [w["token"], w["spoken"]], loaded, **quick).then(self.rejoin, who, running, **long)
        w["language"].change(None, w["language"], w["language"], js=show.LANG, api_visibility="private")
        arranged = [*self.words.updates("en"), w["head"], w["limits"], w["about"], w["spoken"]]
        w["language"].change(self.speak, [w["language"], w["preset"]], arranged, **quick)
        w["dark"].click(None, js=show.DARK, api_visibility="private")
        layout = [w["about"], *(w[name] for name in shown(PRESETS["t2v"], "paint"))]
        for name in ("preset", "region"):
            w[name].change(self.arrange, [w["preset"], w["region"], w["language"]], layout, **quick)
        w["clip"].change(
            self.new_clip, [*who, w["clip"], w["boxes"]], [w["canvas"], w["box_picture"], w["status"]], **quick
        )
        w["pictures"].change(self.draw_boxes, [*who, w["clip"], w["pictures"], w["boxes"]], w["box_picture"], **quick)
        w["boxes"].change(self.draw_boxes, [*who, w["clip"], w["pictures"], w["boxes"]], w["box_picture"], **quick)
        w["box_picture"].select(corner, [w["box_picture"], w["boxes"], w["corner"]], [w["boxes"], w["corner"]], **quick)
        w["write_out"].click(self.write_out, [w["language"], w["prompt"]], [w["prompt"], w["status"]], **long)
        w["dice"].click(self.dice, None, w["seed"], **quick)
        filled = [*form, w["status"]]
        w["example"].click(self.example, [w["preset"], w["language"]], filled, **quick)
        w["look"].click(self.look, [*who, *form], running, **long)
        w["generate"].click(self.generate, [*who, *form], running, trigger_mode="once", **long)
        w["prompt"].submit(self.generate, [*who, *form], running, trigger_mode="once", **long)
        w["cancel"].click(self.cancel, who, w["status"], **quick)
        picked = [w["chosen"], *self._result_outputs()]
        w["gallery"].select(choose, w["token"], picked, **quick)
        w["reuse"].click(self.reuse, [*who, w["chosen"]], filled, **quick)
        w["extend_this"].click(self.extend, [*who, w["chosen"]], filled, **quick)

    def _offer_api(self) -> None:
        """What programs call: /generate and /presets, see the README."""
        import gradio as gr

        w = self.words.components
        names = ("preset", "prompt", "clip", "mask", "pictures", "boxes", "ready", "size", "frame_num", "steps", "seed")
        hidden = gr.Button(visible=False)
        facts = gr.JSON(label="facts", visible=False)
        video = gr.Video(label="video", visible=False, interactive=False)
        hidden.click(
            self.api_generate, [w[name] for name in names], [video, facts], api_name="generate", concurrency_limit=None
        )
        gr.api(self.api_presets, api_name="presets")

    def _result_outputs(self) -> list[Any]:
        names = ("result", "side", "download", "reuse", "extend_this", "settings", "tabs")
        return [self.words[name] for name in names]

    def _running_outputs(self) -> list[Any]:
        names = ("status", "emerging", "generate", "cancel", "gallery", "chosen", "plan", "source", "overlay",
                 "mask_seen", "references")  # fmt: skip
        return [*(self.words[name] for name in names), *self._result_outputs()]

    # -- arriving ------------------------------------------------------------------------------------------------

    def arrive(self, token: str, language: str) -> tuple[Any, ...]:
        """A browser comes, or comes again: its session, its language, its results."""
        session = self.sessions.open(token)
        state = show.note(text(language, "ready" if self.engine.ready.is_set() else "loading"))
        return session.token, language, gallery_items(session), state

    async def rejoin(self, token: str, language: str) -> AsyncIterator[dict[Any, Any]]:
        """After a reload: follow what is still being made, or wait until something can be."""
        session = self.sessions.open(token)
        if session.busy and session.ticket is not None:
            async for change in self._follow(session, session.ticket, language):
                yield change
            return
        while not self.engine.ready.is_set() and self.engine.broken is None and not session.busy:
            await asyncio.sleep(LOOK)
        if self.engine.ready.is_set() and not session.busy:
            yield {self.words["status"]: show.note(text(language, "ready"))}

    def speak(self, language: str, preset: str) -> dict[Any, Any]:
        return {
            **self.words.updates(language),
            self.words["head"]: show.head(language, self._about()),
            self.words["limits"]: self._limits(language),
            self.words["about"]: preset_words(preset, language),
            self.words["spoken"]: language,
        }

    def arrange(self, preset: str, region: str, language: str) -> dict[Any, Any]:
        visible = shown(PRESETS[preset], region)
        return {
            self.words["about"]: preset_words(preset, language),
            **{self.words[name]: update(visible=on) for name, on in visible.items()},
        }

    # -- filling in ----------------------------------------------------------------------------------------------

    def new_clip(self, token: str, language: str, clip: str | None, boxes: str) -> dict[Any, Any]:
        """The first frame to paint on, or why the clip cannot be taken."""
        w = self.words
        canvas: dict[str, Any] = {"background": None, "layers": [], "composite": None}
        if clip is None:
            return {w["canvas"]: canvas, w["box_picture"]: None}
        session = self.sessions.open(token)
        try:
            frame = first_frame(self._take(session, clip, "clip"))
        except VdotError as error:
            words = show.failure(language, clean(error, session))
            return {w["canvas"]: canvas, w["box_picture"]: None, w["status"]: words}
        return {w["canvas"]: {**canvas, "background": frame}, w["box_picture"]: with_boxes(frame, boxes)}

    def draw_boxes(self, token: str, language: str, clip: str | None, pictures: Any, boxes: str) -> Any:
        session = self.sessions.open(token)
        try:
            if clip is not None:
                frame = first_frame(self._take(session, clip, "clip"))
            elif paths := picture_paths(pictures):
                frame = read_image(self._take(session, paths[0], "picture"))
            else:
                frame = np.full((256, 256, 3), 230, np.uint8)
        except VdotError:
            return None  # said when the file was dropped, and again when it is used
        return with_boxes(frame, boxes)

    def corner(self, picture: Any, boxes: str, first: Any, at: Any) -> tuple[str, Any]:
        """Two clicks in the picture are a box."""
        if picture is None:
            return boxes, None
        height, width = picture.shape[:2]
        here = (100 * at[0] / width, 100 * at[1] / height)
        if first is None:
            return boxes, here
        (left, right), (top, bottom) = (sorted(pair) for pair in zip(first, here, strict=True))
        line = ",".join(f"{value:.0f}" for value in (left, top, right, bottom))
        return "\n".join([*(x for x in boxes.splitlines() if x.strip()), line]), None

    async def write_out(self, language: str, prompt: str) -> AsyncIterator[dict[Any, Any]]:
        """The prompt as a language model writes it out; what comes of it can be edited before it is used."""
        w = self.words
        yield {w["status"]: show.note(text(language, "writing"))}
        try:
            written = await asyncio.to_thread(self.writers.extend, prompt or "", language)
        except VdotError as error:
            yield {w["status"]: show.failure(language, one_line(error))}
            return
        words = text(language, "written", by=written.by, original=written.original)
        yield {w["prompt"]: written.prompt, w["status"]: show.note(words)}

    def dice(self) -> int:
        return secrets.randbelow(MOST_SEED)

    def example(self, preset: str, language: str) -> dict[Any, Any]:
        hint = show.note(text(language, "example_hint"))
        return {**self._fill(self.examples.form(preset)), self.words["status"]: hint}

    def _fill(self, form: Form) -> dict[Any, Any]:
        """Updates that make the inputs say what ``form`` says."""
        schedule = self.model.schedule(self.config)
        values = form.settings() | {
            "negative": form.negative_prompt,
            "pictures": list(form.pictures) or None,
            "sides": list(form.sides),
            "mask": form.mask or form.painted,
            "region": "file" if form.region == "paint" and form.painted else form.region,
            "size": form.size or self.words["size"].value,
        }
        for name in ("steps", "shift", "solver", "guide_scale"):
            values[name] = getattr(schedule, name) if values[name] is None else values[name]
        return {self.words[name]: values[name] for name in FORM if name in values}

    def reuse(self, token: str, language: str, chosen: int) -> dict[Any, Any]:
        result = self._result(token, chosen)
        if result is None:
            return {self.words["status"]: show.note(text(language, "no_result"))}
        return {**self._fill(Form.of(result.settings)), self.words["status"]: ""}

    def extend(self, token: str, language: str, chosen: int) -> dict[Any, Any]:
        result = self._result(token, chosen)
        if result is None:
            return {self.words["status"]: show.note(text(language, "no_result"))}
        old = Form.of(result.settings)
        form = Form(preset="extend", prompt=old.prompt, clip=str(result.video), seed=old.seed, size=old.size)
        return {**self._fill(form), self.words["status"]: ""}

    # -- doing ---------------------------------------------------------------------------------------------------

    async def look(self, token: str, language: str, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        session = self.sessions.open(token)
        yield {self.words["status"]: show.note(text(language, "preparing"))}
        folder = session.fresh("look")
        try:
            form = await asyncio.to_thread(self._form, session, values)
            understood = await asyncio.to_thread(self._understand, form, folder)
            yield {
                **await asyncio.to_thread(self._seen, understood, folder, language),
                self.words["status"]: show.note(show.estimate(language, understood, self.engine)),
                self.words["tabs"]: update(selected="look"),
            }
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            yield {self.words["status"]: show.failure(language, say(error, session))}

    async def generate(self, token: str, language: str, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        session = self.sessions.open(token)
        if session.busy:
            yield {self.words["status"]: show.failure(language, text(language, "busy"))}
            return
        yield {self.words["status"]: show.note(text(language, "preparing")), self.words["emerging"]: ""}
        folder = session.fresh("video")
        try:
            form = await asyncio.to_thread(self._form, session, values)
            understood = await asyncio.to_thread(self._understand, form, folder)
            seen = await asyncio.to_thread(self._seen, understood, session.fresh("look"), language)
            if session.busy:
                raise InputError(text(language, "busy"))
            ticket = self.engine.submit(understood.order)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            yield {self.words["status"]: show.failure(language, say(error, session))}
            return
        session.follow(ticket)
        yield seen
        async for change in self._follow(session, ticket, language):
            yield change

    async def _follow(self, session: Session, ticket: Ticket, language: str) -> AsyncIterator[dict[Any, Any]]:
        """Progress until the end, then the result."""
        w = self.words
        yield {w["generate"]: update(interactive=False), w["cancel"]: update(interactive=True)}
        bar, picture = "", None
        while not ticket.over:
            now = show.progress(language, ticket, self.engine.position(ticket), self.engine.ready.is_set())
            change = {w["status"]: now} if now != bar else {}
            if ticket.preview is not picture and ticket.preview is not None:
                picture = ticket.preview
                change[w["emerging"]] = update(value=show.emerging(language, picture), visible=True)
            if change:
                bar = now
                yield change
            await asyncio.sleep(LOOK)
        await until_set(session.kept)
        yield {
            w["generate"]: update(interactive=True),
            w["cancel"]: update(interactive=False),
            w["emerging"]: update(value="", visible=False),
            **self._ended(session, ticket, language),
        }

    def _ended(self, session: Session, ticket: Ticket, language: str) -> dict[Any, Any]:
        w = self.words
        if ticket.status == "done" and not ticket.message:
            words = show.note(text(language, "done", seconds=f"{ticket.seconds:.1f}"))
            result = session.results[-1]
            return {
                w["status"]: words,
                w["gallery"]: gallery_items(session),
                w["chosen"]: len(session.results) - 1,
                **dict(zip(self._result_outputs(), result_updates(result), strict=True)),
            }
        if ticket.status == "cancelled":
            return {w["status"]: show.note(text(language, "cancelled"))}
        return {w["status"]: show.failure(language, ticket.message)}

    def cancel(self, token: str, language: str) -> str:
        session = self.sessions.open(token)
        if not session.busy or session.ticket is None:
            return show.note(text(language, "nothing"))
        self.engine.cancel(session.ticket)
        return show.note(text(language, "cancelling"))

    def choose(self, token: str, at: Any) -> tuple[Any, ...]:
        session = self.sessions.open(token)
        index = len(session.results) - 1 - int(at)
        result = session.results[index]
        return (index, *result_updates(result))

    def _result(self, token: str, chosen: int) -> Result | None:
        results = self.sessions.open(token).results
        return results[chosen] if isinstance(chosen, int) and 0 <= chosen < len(results) else None

    def _seen(self, understood: Understood, folder: Path, language: str) -> dict[Any, Any]:
        """What the model gets, in the tab that shows it."""
        seen = understood.save(folder)
        w = self.words
        pictures = [(str(path), f"{i + 1}") for i, path in enumerate(seen["references"])]
        return {
            w["plan"]: show.plan(language, understood, self.engine),
            **{
                w[name]: update(value=None if seen[key] is None else str(seen[key]), visible=seen[key] is not None)
                for name, key in (("source", "source"), ("overlay", "overlay"), ("mask_seen", "mask"))
            },
            w["references"]: update(value=pictures, visible=bool(pictures)),
        }

    def _understand(self, form: Form, folder: Path) -> Understood:
        with self._room:
            return understand(form, self.model, folder, self.world, self.config.backend)

    # -- from values to a form -----------------------------------------------------------------------------------

    def _take(self, session: Session, path: str, kind: str) -> str:
        """An upload as the session's own file; the same one is copied once."""
        key = f"{kind}:{path}"
        stored = session.taken.get(key)
        if stored is None or not Path(stored).is_file():
            stored = str(self.uploads.take(path, kind, session.uploads))
            session.taken[key] = stored
            session.names[stored] = display_name(path)
        return stored

    def _form(self, session: Session, values: tuple[Any, ...]) -> Form:
        """``InputError`` for an upload that cannot be taken."""
        v = dict(zip(FORM, values, strict=True))
        preset = PRESETS.get(v["preset"])
        if preset is None:
            raise InputError("choose what you want to make")
        visible = shown(preset, v["region"])
        paths = picture_paths(v["pictures"]) if visible["pictures"] else []
        if len(paths) > self.uploads.references:
            raise InputError(f"{len(paths)} pictures are too many: at most {self.uploads.references} are taken")
        take = partial(self._take, session)
        return Form(
            preset=preset.key,
            prompt=v["prompt"] or "",
            negative_prompt=v["negative"] or "",
            clip=take(v["clip"], "clip") if visible["clip"] and v["clip"] else None,
            ready=bool(v["ready"]) and visible["ready"],
            pictures=tuple(take(path, "picture") for path in paths),
            cut_out=bool(v["cut_out"]),
            region=v["region"],
            painted=painted(v["canvas"], session) if visible["canvas"] else None,
            mask=take(v["mask"], "mask") if visible["mask"] and v["mask"] else None,
            shape=v["shape"],
            track=bool(v["track"]),
            boxes=(v["boxes"] or "") if visible["boxes"] else "",
            sides=tuple(v["sides"] or ()),
            ratio=number(v["ratio"], "the share by which the picture grows"),
            end=v["end"],
            keep=int(number(v["keep"], "the frames to go on from")),
            size=(v["size"] or "").strip(),
            frame_num=whole(v["frame_num"], "frames"),
            frame_mode=v["frame_mode"],
            fps=v["fps"] or None,
            steps=whole(v["steps"], "steps"),
            shift=v["shift"],
            solver=v["solver"],
            guide_scale=v["guide_scale"],
            context_scale=number(v["context_scale"], "the strength"),
            keep_source=bool(v["keep_source"]),
            feather=number(v["feather"], "the feather"),
            seed=whole(v["seed"], "the seed") or 0,
        )

    # -- for programs --------------------------------------------------------------------------------------------

    async def api_generate(
        self, preset: str, prompt: str, clip: Any = None, mask: Any = None, pictures: Any = None,
        boxes: str | None = None, ready: bool = False, size: str | None = None, frame_num: float | None = None,
        steps: float | None = None, seed: float = 0,
    ) -> tuple[str, dict[str, Any]]:  # fmt: skip
        """One video: what the page makes of the same inputs, and its facts."""
        import gradio as gr

        session = self.sessions.open(None)
        values = {name: self.words[name].value for name in FORM} | {
            "preset": preset, "prompt": prompt, "clip": clip, "mask": mask, "pictures": pictures, "boxes": boxes or "",
            "ready": ready, "size": size, "frame_num": frame_num, "steps": steps, "seed": seed, "canvas": None,
            "region": "box" if mask is None else "file",
        }  # fmt: skip
        try:
            form = await asyncio.to_thread(self._form, session, tuple(values[name] for name in FORM))
            understood = await asyncio.to_thread(self._understand, form, session.fresh("video"))
            ticket = self.engine.submit(understood.order)
            session.follow(ticket)
            await until_set(session.kept)
        except Exception as error:
            raise gr.Error(say(error, session), print_exception=False) from error
        if ticket.status != "done":
            raise gr.Error(ticket.message or "cancelled", print_exception=False)
        result = session.results[-1]
        return str(result.video), result.facts

    def api_presets(self) -> dict[str, list[str]]:
        """What can be made, and which inputs each needs."""
        return {key: list(preset.needs) for key, preset in PRESETS.items()}
