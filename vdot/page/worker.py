"""The process that generates: one model, one order after the other, alone or with the ranks that torchrun started.

It is a child of the process that serves the page, so that whatever ends it (host memory, a GPU's fault, a lost rank)
leaves the page standing. Between orders ranks wait on the launcher's store and not in a collective, which would time
out over night.
"""

import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdot.chunks import heaviest
from vdot.cli import Session, find_model, open_session
from vdot.config import GenerateConfig
from vdot.entry import enter
from vdot.errors import VdotError, one_line
from vdot.memory import is_out_of_memory
from vdot.page.options import PageConfig
from vdot.page.preview import Estimate, animation, fit_colours, paint
from vdot.parallel.state import Board, Ranks
from vdot.pipeline import VideoResult, explain_out_of_memory
from vdot.record import write_run
from vdot.request import Prepared, Request, prepare
from vdot.runtime import log
from vdot.sampling import FewStepSchedule
from vdot.video import FramePlan

LOOK = 0.05  # seconds between two looks for a new order
TRIAL = 1024  # side of the matrices whose product is timed


@dataclass(frozen=True)
class Order:
    """What the page asks of the worker. Media in ``request`` are arrays at the model's size."""

    request: Request
    schedule: FewStepSchedule
    folder: str  # where the results go
    settings: dict[str, Any]  # of the page, for the record
    original: np.ndarray | None = None  # uint8 [T, H, W, 3]: the clip before anything was made of it, to compare
    plan: FramePlan | None = None  # of the uploaded clip, if the frames are its own
    sound: str | None = None  # the file whose sound goes with the result
    before: np.ndarray | None = None  # uint8 [T, H, W, 3] that the result continues, and so on the other side
    after: np.ndarray | None = None

    def told(self) -> "Order":
        """Without pixels."""
        request = replace(self.request, src_video=None, src_mask=None, src_ref_images=None)
        return replace(self, request=request, original=None, before=None, after=None)


class Cancelled(Exception):
    """The user does not want it any more; every rank raises it at the same step."""


def work(pipe: Any, config: PageConfig) -> None:
    """The body of the child process. ``pipe`` takes ("order", number, Order) and ("cancel", number), gives events."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page, which then closes the pipe
    sys.exit(enter(partial(_serve, pipe, config)))


def _serve(pipe: Any, config: PageConfig, ranks: Ranks) -> int:
    try:
        with ranks.agree():
            path, info = find_model(config)
        worker = Worker(pipe, open_session(config, path, info, ranks, many=False))
        worker.begin()
        while worker.serve_one():
            pass
        return 0
    except BaseException as error:
        known = isinstance(error, VdotError)  # anything else may be the echo of another rank's death
        message = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        pipe.send(("fatal", message, getattr(error, "exit_code", 1), known))
        raise


class Worker:
    """One rank. The first one has the page's pipe, gets the orders and says how they fare."""

    def __init__(self, pipe: Any, session: Session) -> None:
        self.pipe, self.session, self.ranks = pipe, session, session.ranks
        self.orders: queue.Queue[tuple[int, Order]] = queue.Queue()
        self.cancelled = -1
        self.number = 0  # of orders taken
        self.board = Board("vdot-page-orders") if self.ranks.world > 1 else None

    def begin(self) -> None:
        """Load the model, and say how fast the device is."""
        pipeline = self.session.pipeline
        self.estimate = Estimate(pipeline.dit)
        self.colours = fit_colours(pipeline)
        self.estimate.take(0)
        threading.Thread(target=self._listen, name="vdot-page-orders", daemon=True).start()
        self._say("ready", flops_per_second(self.session.device, self.session.dtype))

    def _listen(self) -> None:
        """Orders and cancellations, as they come. The end of the pipe is the end of the page, and of this process."""
        try:
            while True:
                kind, number, *rest = self.pipe.recv()
                if kind == "order":
                    self.orders.put((number, rest[0]))
                elif kind == "cancel":
                    self.cancelled = max(self.cancelled, number)
        except (EOFError, OSError):
            os._exit(0)

    def _say(self, *event: Any) -> None:
        if self.ranks.rank == 0:
            self.pipe.send(event)

    def serve_one(self) -> bool:
        """Wait for the next order, on all ranks, and carry it out."""
        order: tuple[int, Order] | None = None
        if self.ranks.rank == 0:
            order = self.orders.get()
            if self.board is not None:
                self.board.write(f"order/{self.number}", "1")
        else:
            assert self.board is not None
            while self.board.read(f"order/{self.number}") is None:
                time.sleep(LOOK)
        self.number += 1
        number, wanted = self.ranks.share(order)  # type: ignore[misc]
        try:
            self._carry_out(number, wanted)
        except Cancelled:
            self._say("cancelled", number)
        except VdotError as error:
            self._say("failed", number, one_line(error))
        except Exception as error:
            if self.ranks.world > 1:
                raise  # the others wait in a collective: all end, and all begin anew
            log.error("unexpected error", exc_info=True)
            self._say("failed", number, f"unexpected {type(error).__name__}: {one_line(error)}")
        finally:
            self.estimate.take(0)
        return True

    def _carry_out(self, number: int, order: Order) -> None:
        pipeline = self.session.pipeline
        with self.ranks.agree():
            prepared = replace(prepare(order.request, pipeline.defaults), plan=order.plan)
            heavy = heaviest(prepared.condition, prepared.chunks)
            plan = self.session.plan(heavy, order.schedule, self.ranks.mesh.sequence.size)
            self.session.check_fit(plan)
        report = partial(self._step, number, prepared)
        try:
            result = pipeline.generate(order.request, order.schedule, prepared, report, partial(self._stage, number))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.session.device.type == "cuda":
                torch.cuda.empty_cache()
            known = explain_out_of_memory(plan)
            if self.ranks.world > 1:
                raise RuntimeError(one_line(known)) from error
            raise known from error
        if self.ranks.leads:
            self._say("stage", number, "save")
            record = self._write(result, order)
            self._say("done", number, record, plan.flops * len(prepared.chunks))

    def _write(self, result: VideoResult, order: Order) -> dict[str, Any]:
        parts = [part for part in (order.before, result.frames, order.after) if part is not None]
        result.audio_from = order.sound if len(parts) == 1 else None
        result.frames = np.concatenate(parts)
        session, request, folder = self.session, order.request, Path(order.folder)
        config = GenerateConfig(**{f.name: getattr(session.config, f.name) for f in fields(GenerateConfig)})
        height, width = result.frames.shape[1:3]
        config = replace(
            config,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            src_video=None if request.src_video is None else str(folder / "src_video.mp4"),
            src_mask=None if request.src_mask is None else str(folder / "src_mask.mp4"),
            src_ref_images=",".join(
                str(folder / f"src_ref_image_{i}.png") for i in range(len(result.prepared.references))
            )
            or None,
            size=f"{width}*{height}",
            frame_num=result.prepared.frame_num,
            fps=result.fps,
            keep_source=request.keep_source,
            feather=request.feather,
            context_scale=request.context_scale,
            base_seed=request.seed,
        )
        checkpoint = {"path": str(session.path), "layout": session.info.layout, "fingerprint": session.fingerprint}
        resolved = {key: str(getattr(session, key)).removeprefix("torch.") for key in ("dtype", "vae_dtype")}
        record = write_run(result, config, folder, checkpoint, resolved=resolved)
        return record | {"page": order.settings}

    def _stage(self, number: int, name: str) -> None:
        self._check(number)
        self._say("stage", number, name)

    def _step(self, number: int, prepared: Prepared, step: int, steps: int, latents: Tensor) -> None:
        self._check(number)
        estimate = self.estimate.take(len(prepared.references))
        if self.ranks.rank or estimate is None:
            return
        picture = animation(paint(estimate, self.colours), prepared.fps / 4)  # a latent frame is four of the video's
        self._say("step", number, step, steps, picture)

    def _check(self, number: int) -> None:
        if self.ranks.share(self.cancelled == number):
            raise Cancelled


def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of a matrix product on this device, for a first guess at how long a video takes."""
    a = torch.ones(TRIAL, TRIAL, device=device, dtype=dtype)
    spent, runs = 0.0, 0
    for trial in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        if trial:  # the first one loads the library
            spent, runs = spent + time.perf_counter() - start, runs + 1
    return 2 * TRIAL**3 * runs / spent
