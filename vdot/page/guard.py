"""At the door, before Gradio: events that point at addresses or at files nobody uploaded, and uploads onto a full disk.

Gradio itself refuses files outside its upload folder, but would fetch a web address on a visitor's behalf.
"""

import json
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from vdot.runtime import log

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_JSON = 8 * 2**20  # bytes of an event; media come as uploads, not in it
SPARE = 2**30  # bytes that uploads leave free on the disk


class Guard:
    """ASGI middleware: 400 with a sentence for an event that names what was not uploaded, 507 for a full disk."""

    def __init__(self, app: App, cache: str) -> None:
        self.app, self.cache = app, Path(cache).resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if scope["path"].rstrip("/").endswith("/upload"):
            if shutil.disk_usage(self.cache).free < SPARE:
                return await _refuse(send, 507, "the disk of this machine is full: no uploads are taken at the moment")
            return await self.app(scope, receive, send)
        if dict(scope["headers"]).get(b"content-type", b"").startswith(b"multipart/form-data"):
            return await self.app(scope, receive, send)  # bytes, in the size that Gradio was told
        body = await _body(receive)
        if body is None:
            return await _refuse(send, 413, f"an event is larger than {MOST_JSON // 2**20} MB: upload files instead")
        wrong = next((path for path in named_files(body) if not self._uploaded(path)), None)
        if wrong is not None:
            log.warning("refused an event that names a file which was not uploaded here")
            return await _refuse(send, 400, "only files that were uploaded to this page are read: upload it first")

        async def again() -> dict[str, Any]:
            nonlocal body
            if body is None:
                return await receive()
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        return await self.app(scope, again, send)

    def _uploaded(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.cache)


def named_files(body: bytes) -> Iterator[str]:
    """Every "path" in a JSON text, which is how Gradio names files, web addresses among them."""
    try:
        stack = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


async def _body(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > MOST_JSON:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence, "detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
