"""The command line of ``training/train.py``: parse, check everything before step 0, train or say what it would take."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from vdot.checkpoints import inspect_checkpoint
from vdot.config import load_config
from vdot.data.dataset import Source, open_source
from vdot.data.encoding import load_encoder
from vdot.data.world import WorldSource
from vdot.entry import enter
from vdot.errors import ConfigError
from vdot.memory import is_out_of_memory
from vdot.parallel.launch import Launch, own_device
from vdot.parallel.state import Ranks
from vdot.pipeline import checkpoint_defaults
from vdot.runtime import log, pick_device, total_memory
from vdot.training.autoencoder import Autoencoder
from vdot.training.config import TrainConfig
from vdot.training.loop import export_only, train
from vdot.training.memory import Split
from vdot.training.objectives import Distill, Flow, Objective
from vdot.training.plan import largest, plan_training, read_rows
from vdot.training.text import TextEncoder

OBJECTIVES: dict[str, Callable[..., Objective]] = {"distill": Distill, "flow": Flow}
# These need no checkpoint, and draw their data from the procedural world themselves.
FROM_NOTHING: dict[str, Callable[..., Objective]] = {"vae": Autoencoder, "text": TextEncoder}
ROOT = Path(__file__).resolve().parents[2]
EPILOG = """examples:
  bash training/train_vdot.sh                                   the tiny model, on any machine, in minutes
  bash training/train_vdot.sh vdot_14b data.path=train.csv      configs/train/vdot_14b.yaml on all GPUs of this machine
  python training/train.py --config configs/train/tiny.yaml steps=50 distill.ot.eps=0.05
  torchrun --nproc_per_node 8 training/train.py --config configs/train/vdot_14b.yaml data.encoded=data/encoded
  python training/train.py --config configs/train/vdot_14b.yaml --dry_run --gpus 8

The same command goes on where it was stopped: by Ctrl-C, SIGTERM or SIGUSR1, which save first, or by a crash.
Every key of vdot/training/config.py can be written as key=value; each YAML in configs/train opens with its hardware,
memory and result. While it runs: metrics.jsonl, samples/ and checkpoints/ in output_dir; at the end export/."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Exit code: 0 trained, or stopped on request with everything saved; 2 something is to be mended; 130 Ctrl-C."""
    return enter(partial(_run, sys.argv[1:] if argv is None else argv, prog))


def parse(argv: Sequence[str], prog: str) -> tuple[TrainConfig, argparse.Namespace]:
    """Defaults, then ``--config``, then ``key=value``. ``ConfigError`` for anything not understood."""
    form = argparse.RawDescriptionHelpFormatter
    description = "Distil a VACE teacher into a few-step generator (VDOT), or train what comes before."
    parser = _Parser(prog, description=description, epilog=EPILOG, formatter_class=form, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the YAML")
    parser.add_argument("--config", metavar="FILE", help="YAML of configs/train, or your own")
    parser.add_argument("--dry_run", action="store_true", help="check everything and print memory, work and data")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --dry_run: on so many (default: as started)")
    parser.add_argument("--export", action="store_true", help="export the newest checkpoint instead of training")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and not args.overrides:
        names = ", ".join(sorted(path.name for path in (ROOT / "configs" / "train").glob("*.yaml")))
        raise ConfigError(f"give --config FILE; there are configs/train: {names}")
    config = load_config(TrainConfig, _find(args.config), args.overrides)
    if config.ckpt_dir is None and config.objective not in FROM_NOTHING:
        raise ConfigError("ckpt_dir is missing: give the checkpoint folder of the teacher, ckpt_dir=models/...")
    name = Path(args.config).stem if args.config else "run"
    # Beside the code, so that the same command resumes from whatever folder it is given.
    output = config.output_dir or str((ROOT if (ROOT / "configs").is_dir() else Path()) / "results" / "train" / name)
    return replace(config, output_dir=output, ckpt_dir=config.ckpt_dir and _in_root(config.ckpt_dir)), args


def _find(path: str | None) -> str | None:
    """A YAML from here, or by its name in configs/train."""
    if path is None or Path(path).is_file():
        return path
    folder = ROOT / "configs" / "train"
    for candidate in (folder / path, folder / f"{path}.yaml", ROOT / path):
        if candidate.is_file():
            return str(candidate)
    names = [p.stem for p in folder.glob("*.yaml")]
    near = difflib.get_close_matches(Path(path).stem, names, n=1)
    raise ConfigError(f"there is no config {path}: " + (f"did you mean {near[0]}?" if near else ", ".join(names)))


def _in_root(path: str) -> str:
    """The models of this repository are found from any folder."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path


def _run(argv: Sequence[str], prog: str, ranks: Ranks) -> int:
    with ranks.agree():
        config, args = parse(argv, prog)
        device = own_device(pick_device(config.device), Launch.from_environment())
        torch.set_float32_matmul_precision("high" if config.parallel.tf32 else "highest")
        if config.ckpt_dir is not None:
            inspect_checkpoint(config.ckpt_dir)
    if args.dry_run:
        dry_run(config, ranks, args.gpus or ranks.world)
        return 0
    with ExitStack() as stack:

        def open_objective() -> Objective:
            if config.objective in FROM_NOTHING:
                return FROM_NOTHING[config.objective](config, ranks, device)
            source = open_data(config, device, ranks)
            stack.callback(source.close)
            if device.type == "cuda":
                with ranks.agree():
                    latent = largest(source.shapes)
                    plan_training(config, latent, ranks.world).memory.check_fit(total_memory(device))
            return OBJECTIVES[config.objective](config, ranks, device, source)

        if args.export:
            export_only(config, ranks, device, open_objective)
            return 0
        with ranks.agree():
            Split.of(config, ranks.world)
        try:
            stopped = train(config, ranks, device, open_objective)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                "the device ran out of memory: use parallel.recompute=full, more processes for each video "
                "(parallel.ulysses_size), lora.rank, or smaller clips; --dry_run counts what each takes"
            ) from error
    if stopped is not None:
        log.info("stopped by %s, everything is saved: resume with the same command", stopped)
    else:
        log.info("done: %s", config.output_dir)
    return 0


def dry_run(config: TrainConfig, ranks: Ranks, gpus: int) -> None:
    """Check the configuration, every row and the checkpoints' headers, and say what the run would take."""
    if config.objective in FROM_NOTHING:
        log.info(
            "%s: the configuration is valid; its data is drawn as it trains, and it fits any GPU", config.objective
        )
        return
    with ranks.agree():
        check_named(config)
        if config.generator_init is not None:
            inspect_checkpoint(config.generator_init)
        Split.of(config, gpus)
    rows = read_rows(config, ranks)
    with ranks.agree():
        if ranks.rank == 0:
            plan = plan_training(config, largest(rows.shapes), gpus)
            log.info("%s", "\n".join([*plan.describe(), *rows.describe(config, plan.dit)]))


def check_named(config: TrainConfig) -> None:
    """``ConfigError`` unless the configuration names its data, and once."""
    named = [config.data.encoded is not None, config.data.path is not None, config.world.clips > 0]
    if sum(named) != 1:
        raise ConfigError(
            "name the training data, one of: data.encoded=FOLDER (made by training/encode.py), data.path=TABLE.csv, "
            "or world.clips=NUMBER of the procedural world"
        )
    if config.data.stills.encoded is not None and config.data.encoded is None:
        raise ConfigError(
            "data.stills.encoded is a second folder: give the first one, that of the clips, as data.encoded"
        )


def open_data(config: TrainConfig, device: torch.device, ranks: Ranks) -> Source:
    """What the configuration names: encoded rows, a table, or clips of the procedural world."""
    assert config.ckpt_dir is not None
    check_named(config)
    if not config.world.clips:
        return open_source(config.data, config.ckpt_dir, device, ranks=ranks)
    with ranks.agree():
        encoder = load_encoder(config.ckpt_dir, device, "float32")
        negative = config.data.negative_prompt
        if negative is None:
            negative = checkpoint_defaults(inspect_checkpoint(config.ckpt_dir)).negative_prompt
        return WorldSource(config.world, encoder, negative)
