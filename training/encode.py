#!/usr/bin/env python
"""A training table through text encoder and autoencoder, once: training then reads what comes of it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone as from an installation

OPTIONS = {
    "path": ("--table", "TABLE", "CSV or JSONL of training rows, see below"),
    "root": ("--root", "FOLDER", "folder that relative paths start from (default: the table's own)"),
    "ckpt_dir": ("--ckpt_dir", "FOLDER", "checkpoint whose text encoder and autoencoder are used, of any layout"),
    "out": ("--out", "FOLDER", "folder to fill; filled already, only what is missing is encoded"),
    "size": ("--size", "SIZE", '"480p", "720p" or "W*H"; with a clip the area limit (default: the checkpoint\'s)'),
    "frame_num": ("--frame_num", "N", "frames of every clip (default: the clip's, at most the checkpoint's)"),
    "frame_mode": ("--frame_mode", "MODE", "spread (over the whole clip), trim (the first frames) or resample"),
    "fps": ("--fps", "X", "frames taken of each second with resample (default: 16)"),
    "negative_prompt": ("--negative_prompt", "TEXT", "for guided teachers (default: the checkpoint's)"),
    "skip_bad_rows": ("--skip_bad_rows", None, "list rows that cannot be used and go on without them"),
    "store": ("--store", "TYPE", "bfloat16 (default) or float32 for text and contexts; real clips are float32"),
    "device": ("--device", "DEVICE", "cuda, cuda:N, mps or cpu (default: the best there is)"),
    "dtype": ("--dtype", "TYPE", "precision of the text encoder (default: bfloat16, float32 on a CPU)"),
    "vae_dtype": ("--vae_dtype", "TYPE", "precision of the autoencoder (default: as --dtype)"),
    "workers": ("--workers", "N", "processes that decode video (default: 2)"),
}
EPILOG = """the table (or world.clips=N clips of the procedural world, see WorldConfig), one example a row:
  task_name        what the row teaches; training weighs rows by it
  src_video_path   clip to follow or edit, or empty
  mask_video_path  white generates, black keeps; or empty
  ref_image_path   pictures of what appears, separated by commas; or empty
  internvl_short   the prompt
  video_path       the real clip; without it video.mp4 or gt.mp4 beside the source, else none

examples:
  %(prog)s --table data/train.csv --ckpt_dir models/VDOT --out data/encoded --size 480p
  torchrun --nproc_per_node 8 %(prog)s --table data/train.csv --ckpt_dir models/VDOT --out data/encoded
  %(prog)s world.clips=24000 world.seed=1000000 --ckpt_dir models/vdot-tiny --out data/world
  %(prog)s --table mine.jsonl --ckpt_dir models/vdot-tiny --out /tmp/encoded size=128*128 skip_bad_rows=true

Killed, or the table has grown? The same command again does what is left. Training then takes data.encoded=FOLDER."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from vdot.errors import ConfigError

        raise ConfigError(f"{message} (see --help)")


def parse(argv: Sequence[str]) -> Any:
    from vdot.config import load_config
    from vdot.data.encoding import EncodeConfig

    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser("encode.py", description=__doc__, epilog=EPILOG, formatter_class=form, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any option below, the other way to write it")
    parser.add_argument("--config", metavar="FILE", help="YAML of options")
    for name, (flag, value, text) in OPTIONS.items():
        how: dict[str, Any] = {"metavar": value} if value else {"action": "store_const", "const": True}
        parser.add_argument(flag, dest=name, help=text, **how)
    args = vars(parser.parse_intermixed_args(argv))
    given = {name: args[name] for name in OPTIONS if args[name] is not None}
    return load_config(EncodeConfig, args["config"], args["overrides"], given)


def run(argv: Sequence[str], ranks: Any) -> int:
    from vdot.data.encoding import encode_table
    from vdot.parallel.launch import Launch, own_device
    from vdot.runtime import log, pick_device

    with ranks.agree():
        config = parse(argv)
        device = own_device(pick_device(config.device), Launch.from_environment())
    summary = encode_table(config, device, ranks)
    for line in summary.lines() if summary is not None else ():
        log.info("%s", line)
    return 0


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 done, 2 something is to be mended (one sentence on stderr), 130 Ctrl-C."""
    from vdot.entry import enter

    return enter(lambda ranks: run(argv, ranks))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # the libraries take seconds to import
        sys.exit(130)
