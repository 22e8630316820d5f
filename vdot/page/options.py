"""What ``inference/vdot_gradio.py`` understands: the model options of the generator, and where and to whom to serve."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from vdot.annotate.backends import parse_backends
from vdot.cli import GROUPS, Form, parse
from vdot.config import GenerateConfig
from vdot.errors import ConfigError
from vdot.models.attention import BACKENDS
from vdot.offload import offload_mode


@dataclass
class PageConfig(GenerateConfig):
    """The generator's options, which are the page's first values, and the server's own."""

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    auth: str | None = None  # USER:PASS, several separated by commas
    max_upload_mb: int = 200
    max_seconds: float = 120.0
    max_side: int = 4096  # pixels
    max_references: int = 8
    max_queue: int = 64
    keep_hours: float = 24.0
    backend: str = "auto"  # of the annotators


EXAMPLES = """examples:
  the small model of this repository, on this machine alone
    %(prog)s
  the published VDOT-14B on four GPUs
    torchrun --nproc_per_node=4 %(prog)s --ckpt_dir models/VDOT --dit_fsdp --t5_fsdp
  for colleagues in the same network, with a password
    %(prog)s --host 0.0.0.0 --auth studio:correct-horse

Nobody but this machine reaches the page unless --host or --share says so."""

SERVER = {
    "host": "address to listen on (default 127.0.0.1: this machine alone; 0.0.0.0: everybody who can reach it)",
    "port": "port to listen on",
    "share": "also publish it on the internet through Gradio's link: anybody who knows it can use the page",
    "auth": "ask for a name and a password: USER:PASS, or several, USER:PASS,USER:PASS",
    "max_upload_mb": "largest file that is taken",
    "max_seconds": "longest clip that is taken",
    "max_side": "largest width or height that is taken, in pixels",
    "max_references": "most reference pictures of a video",
    "max_queue": "most videos that wait; further ones are refused",
    "backend": "annotators by name, as vace_preprocess.py takes them (default: the best that are there)",
    "keep_hours": "results of a session that nobody has looked at for so long are deleted",
}

_MODEL = "model and machine"
_PROMPTS = {name: text for name, text in GROUPS["what to make"].items() if "prompt_" in name and "negative" not in name}
_SAVE = {"save_dir": "folder of the sessions' results (default: a temporary one, gone when the page ends)"}
FORM = Form(
    PageConfig,
    {"the page": {**SERVER, **_SAVE}, "writing prompts out": _PROMPTS, _MODEL: GROUPS[_MODEL]},
    "Serve the page: drop a clip, paint what should change, write a line, generate.",
    EXAMPLES,
)


def read_options(argv: Sequence[str], prog: str) -> PageConfig:
    """``ConfigError`` for anything not understood or out of range."""
    config = cast(PageConfig, parse(argv, prog, FORM))
    offload_mode(config.offload_model)
    if config.attention not in BACKENDS:
        raise ConfigError(f"unknown attention {config.attention!r}: choose one of {', '.join(BACKENDS)}")
    if not 0 <= config.port < 65536:
        raise ConfigError(f"port must be a number from 0 to 65535, got {config.port}")
    for name in ("max_upload_mb", "max_seconds", "max_side", "max_references", "max_queue", "keep_hours"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be positive, got {getattr(config, name)}")
    parse_backends(config.backend)
    credentials(config.auth)
    return config


def credentials(auth: str | None) -> list[tuple[str, str]] | None:
    """``USER:PASS,USER:PASS`` -> pairs; None for none."""
    if auth is None:
        return None
    pairs = [tuple(item.split(":", 1)) for item in auth.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ConfigError("auth must be USER:PASS, or several of them separated by commas")
    return [(user, password) for user, password in pairs]
