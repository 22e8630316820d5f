"""The training loop, and the run around it: opened, resumed, saved, shown, exported."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vdot.errors import ConfigError
from vdot.parallel.launch import arrange
from vdot.parallel.state import Ranks
from vdot.runtime import log
from vdot.training.checkpoint import CheckpointStore, restore_rng, rng_state
from vdot.training.config import TrainConfig
from vdot.training.metrics import Metrics, Progress, Timer, memory_used, peak_flops
from vdot.training.objectives import Objective
from vdot.training.stop import StopSignal

SHOWN = ("loss", "loss_dmd", "loss_fake", "loss_gan", "ot_marginal_error", "norm_generator")
ASIDE = ("time_sample", "time_save")  # not part of a step's pace

Open = Callable[[], Objective]  # loads networks and data; all ranks call alike


def train(config: TrainConfig, ranks: Ranks, device: torch.device, open_objective: Open) -> str | None:
    """Train to ``config.steps``, from the newest checkpoint if there is one, and export.

    Returns None when done, or the reason for an early stop, after which everything is saved.

    Raises:
        VdotError: whatever does not fit, before the first step; a diagnosis when numbers stop being finite.
    """
    with Run(config, ranks, device, open_objective) as run, StopSignal(ranks) as stop:
        for step in range(run.start, config.steps):
            with run.timer("data"):
                batches = [next(run.feeder).to(device) for _ in range(config.accumulation)]
            values = run.objective.step(step, batches, run.timer)
            done = step + 1
            run.tell(done, values, batches[0])
            stopping = stop.agreed()
            if stopping or done == config.steps or run.due(config.save_every, done):
                run.save(done, blocking=stopping)
            if stopping:
                return stop.reason or "a signal to another process"
            if run.due(config.sample_every, done):
                run.sample(done)
            if run.due(config.export_every, done) and done < config.steps:
                run.objective.export()
        run.objective.export()
    return None


def export_only(config: TrainConfig, ranks: Ranks, device: torch.device, open_objective: Open) -> Path:
    """Write the newest checkpoint of the run as an export."""
    with Run(config, ranks, device, open_objective) as run:
        if not run.start:
            raise ConfigError(f"{run.folder} has no checkpoint to export: train first")
        return run.objective.export()


class Run:
    """Everything beside the loop, in the folder of the run."""

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device, open_objective: Open) -> None:
        assert config.output_dir is not None
        self.config, self.ranks, self.device = config, ranks, device
        self.folder = Path(config.output_dir)
        arrange(ranks, device, config.parallel.ulysses_size, config.parallel.ring_size)
        with ExitStack() as stack:  # what was opened is closed again when the next thing cannot be
            self.store = stack.enter_context(CheckpointStore(self.folder / "checkpoints", config.keep, ranks))
            self.objective = open_objective()
            self.start = self._resume()
            self.feeder = stack.enter_context(self.objective.batches(self.start * config.accumulation))
            self.metrics = stack.enter_context(self._metrics())
            peak = peak_flops(device)
            peak = peak and peak * ranks.world
            self.progress = stack.enter_context(Progress(config.steps, device, peak=peak, ranks=ranks))
            self.stack = stack.pop_all()
        self.timer = Timer(device)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def _metrics(self) -> Metrics:
        c = self.config
        return Metrics(
            self.folder, asdict(c), start=self.start, wandb=c.wandb, project=c.wandb_project, ranks=self.ranks
        )

    @staticmethod
    def due(every: int, done: int) -> bool:
        return bool(every) and done % every == 0

    def _resume(self) -> int:
        newest = self.store.latest()
        if newest is None:
            return 0
        notes = self.store.load(self.objective.state(), newest)
        meta = notes["meta"]
        self.objective.guard.restore(meta["guard"])
        if notes["rank"] is not None:
            restore_rng(notes["rank"], self.device)
        now = {"config": asdict(self.config), "notes": self.objective.notes()}
        for change in differences({"config": meta["config"], "notes": meta["notes"]}, now):
            log.info("note  since the checkpoint was saved, %s", change)
        log.info("resumed %s at step %d", self.folder, newest)
        return newest

    def save(self, step: int, blocking: bool = False) -> None:
        objective = self.objective
        meta = {"config": asdict(self.config), "notes": objective.notes(), "guard": objective.guard.state()}
        state: dict[str, Any] = {**objective.state(), "meta": meta, "rank": rng_state(self.device)}
        with self.timer("save"):
            self.store.save(step, state, blocking)

    def sample(self, step: int) -> None:
        with self.timer("sample"):
            self.metrics.log_media(step, self.objective.sample(step))

    def tell(self, done: int, values: dict[str, float], batch: Any) -> None:
        """One line of metrics, and the live line."""
        times = {f"time_{name}": seconds for name, seconds in self.timer.step().items()}
        seconds = sum(value for name, value in times.items() if name not in ASIDE)
        samples = self.config.batch_size * self.config.accumulation
        tokens, flops = (samples * each for each in self.objective.work(done - 1, batch))
        more = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_second": flops / seconds / 1e12,
            "memory_gb": memory_used(self.device) / 1e9,
            "bad_steps": float(self.objective.guard.total),
            "bad_rows": float(getattr(self.feeder, "failures", 0)),
        }
        self.metrics.log(done, values | more | times)
        shown = {name: values[name] for name in SHOWN if name in values}
        self.progress.update(done, seconds, tokens=tokens, flops=flops, values=shown)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What of two configurations is not alike, in words."""
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} has changed from {a} to {b}"
