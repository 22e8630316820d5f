"""The command: rank 0 serves the page and keeps a worker, every other rank keeps a worker."""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdot.cli import Session as Model
from vdot.errors import ConfigError, MissingDependencyError, VdotError, one_line
from vdot.page import show
from vdot.page.app import Page
from vdot.page.crew import Crew, attend
from vdot.page.engine import Engine
from vdot.page.guard import Guard
from vdot.page.options import PageConfig, credentials, read_options
from vdot.page.results import Sessions
from vdot.page.uploads import Uploads
from vdot.parallel.launch import Launch
from vdot.parallel.state import Ranks
from vdot.runtime import log, setup_logging

LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None, prog: str = "vdot_gradio.py") -> int:
    """Serve until Ctrl-C. Exit code 2 and one sentence for what cannot be served."""
    setup_logging()
    try:
        config = read_options(sys.argv[1:] if argv is None else argv, prog)
        launch = Launch.from_environment()
        return serve(config, launch) if launch.rank == 0 else attend(config, launch)
    except VdotError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def serve(config: PageConfig, launch: Launch) -> int:
    """Rank 0: the page, and the worker behind it."""
    _gradio()
    crew = Crew(config, launch)
    model = Model.find(config, Ranks())  # sizes and plans only; the worker loads the weights
    root = Path(config.save_dir) if config.save_dir else Path(tempfile.mkdtemp(prefix="vdot-page-"))
    cache = Path(tempfile.mkdtemp(prefix="vdot-uploads-"))
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    engine = Engine(crew, config.max_queue)
    sessions = Sessions(root, config.keep_hours, temporary=config.save_dir is None)
    for number in (signal.SIGTERM, signal.SIGINT):  # also where a shell started us with Ctrl-C turned off
        signal.signal(number, _interrupt)
    try:
        engine.begin()
        blocks = Page(config, model, launch.world, engine, sessions, Uploads.of(config, cache)).build()
        _launch(blocks, config, root, cache)
        while engine.broken is None:
            time.sleep(0.5)
        raise ConfigError(f"the model does not start: {engine.broken}")
    except KeyboardInterrupt:
        log.info("the page ends")
        return 0
    finally:
        engine.close()
        sessions.close()
        shutil.rmtree(cache, ignore_errors=True)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('the page needs Gradio: pip install -e ".[demo]"') from error


def _launch(blocks: Any, config: PageConfig, root: Path, cache: Path) -> None:
    """Listen, and say where and to whom."""
    import gradio as gr
    from starlette.middleware import Middleware

    pairs = credentials(config.auth)
    fonts = [["system-ui", "sans-serif"], ["ui-monospace", "monospace"]]  # nothing is fetched from elsewhere
    try:
        _, local, public = blocks.launch(
            server_name=config.host,
            server_port=config.port or None,
            share=config.share,
            auth=pairs,
            max_file_size=config.max_upload_mb * 2**20,
            max_threads=64,
            allowed_paths=[str(root.resolve())],
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            ssr_mode=False,
            footer_links=["api", "settings"],
            theme=gr.themes.Default(font=fonts[0], font_mono=fonts[1]),
            css=show.CSS,
            app_kwargs={"middleware": [Middleware(Guard, cache=str(cache))]},
        )
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: choose another --port") from error
    log.info("the page: %s", local)
    if public:
        log.info("on the internet: %s", public)
    if (config.share or config.host not in LOCAL) and not pairs:
        log.info("note  anybody who can reach it can use it: --auth USER:PASS asks for a password")
