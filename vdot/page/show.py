"""Small pieces of HTML: progress, plan, messages. Everything that came from outside is escaped."""

import base64
from html import escape

from vdot.page.engine import Engine, Ticket
from vdot.page.orders import Understood, in_gib
from vdot.page.texts import text

CSS = """
.vdot-actions { position: sticky; top: 0; z-index: 5; background: var(--body-background-fill); padding: 6px 0; }
.vdot-bar { height: 10px; border-radius: 5px; background: var(--border-color-primary); overflow: hidden; }
.vdot-bar > div { height: 100%; background: var(--color-accent); transition: width .3s; }
.vdot-error { border-left: 4px solid #d33; padding: 6px 10px; }
.vdot-plan { white-space: pre-wrap; font-family: var(--font-mono); font-size: var(--text-sm); overflow-wrap: anywhere; }
.vdot-emerging img { width: 100%; max-width: 480px; image-rendering: auto; border-radius: 6px; }
#vdot-preset .wrap { gap: 6px; }
#vdot-preset label { padding: 4px 10px; }
.vdot-corner fieldset { padding: 4px 8px !important; }
.vdot-corner .wrap { flex-wrap: nowrap; }
.vdot-corner label { padding: 2px 8px !important; }
.vdot-head h1 { margin: 0; font-size: 1.5em; }
:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: 6px !important; }
  .vdot-top { flex-direction: column; }
  #vdot-tabs button { padding: 4px 8px; font-size: .85em; }
  #vdot-preset label { padding: 4px 7px; font-size: .85em; }
  .vdot-actions button { flex: 1 1 30%; }
}
"""
# Light or dark by hand; otherwise as the system has it. The page's language is said to screen readers.
DARK = "() => { document.body.classList.toggle('dark'); }"
LANG = "(language) => { document.documentElement.lang = language; return language; }"
SHARE = {"encode text": 0.02, "encode condition": 0.05, "sample": 0.15}
SAVING = 0.97


def head(language: str, model: str) -> str:
    return (
        f'<div class="vdot-head"><h1>{escape(text(language, "title"))}</h1>'
        f"<p>{escape(text(language, 'intro'))}</p><p><small>{escape(model)}</small></p></div>"
    )


def note(message: str) -> str:
    return f'<p role="status">{escape(message)}</p>'


def failure(language: str, message: str) -> str:
    return f'<p role="alert" class="vdot-error">{escape(text(language, "failed", message=message))}</p>'


def fraction(ticket: Ticket) -> float:
    """How far a running order is, from 0 to 1. A long clip goes through its stages once for each pass."""
    if ticket.stage == "save":
        return SAVING
    if not ticket.step:
        return SHARE.get(ticket.stage, 0.0)
    return SHARE["sample"] + (SAVING - SHARE["sample"]) * ticket.step / (ticket.steps + 1)


def progress(language: str, ticket: Ticket, ahead: int, ready: bool) -> str:
    """The bar of an order that waits or runs."""
    if ticket.status == "waiting":
        words = text(language, "waiting", n=ahead) if ahead else text(language, "next")
        if not ready:
            words += " " + text(language, "loading")
    else:
        step = min(ticket.step + 1, ticket.steps)
        words = text(language, f"stage_{ticket.stage}", step=step, steps=ticket.steps)
    percent = round(100 * fraction(ticket))
    label = escape(text(language, "status"))
    return (
        f'<p role="status">{escape(words)}</p><div class="vdot-bar" role="progressbar" aria-label="{label}" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}"><div style="width:{percent}%"></div></div>'
    )


def emerging(language: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    words = escape(text(language, "emerging"))
    return (
        f'<figure class="vdot-emerging"><img alt="{words}" src="data:image/webp;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def plan(language: str, understood: Understood, engine: Engine) -> str:
    """The resampling plan and what it takes, in words."""
    lines = escape("\n".join(understood.lines))
    return f'<p>{escape(estimate(language, understood, engine))}</p><div class="vdot-plan">{lines}</div>'


def estimate(language: str, understood: Understood, engine: Engine) -> str:
    seconds = engine.seconds_for(understood.flops)
    memory = {"peak": in_gib(understood.peak), "available": in_gib(understood.available)}
    if seconds is None:
        return f"{memory['peak']} / {memory['available']}"
    rough = "" if engine.measured else text(language, "rough")
    return text(language, "estimate", seconds=duration(language, seconds), rough=rough, **memory)


def duration(language: str, seconds: float) -> str:
    if seconds < 90:
        return text(language, "seconds", n=f"{max(seconds, 0.1):.2g}" if seconds < 10 else round(seconds))
    return text(language, "minutes", n=f"{seconds / 60:.0f}")
