"""Convert a checkpoint between layouts, or blend two. `python scripts/convert_checkpoint.py --help` shows how."""

import argparse
import logging
import sys

from vdot.checkpoints import CheckpointInfo, inspect_checkpoint, load_dit, load_text_encoder, load_vae, save_checkpoint
from vdot.checkpoints.blending import blend
from vdot.checkpoints.saving import LAYOUTS
from vdot.errors import VdotError

EPILOG = """
layouts
  native     transformer in Wan2.1's names at the top, text_encoder/ and vae/ as library folders, schedule.json
  diffusers  transformer/ text_encoder/ vae/ tokenizer/ scheduler/: opens with diffusers' WanVACEPipeline
  vdot       vdot-weights/*.pt, models_t5_umt5-xxl-enc-bf16.pth, Wan2.1_VAE.pth, google/umt5-xxl/: the release's files

examples
  what is in a folder (reads headers only)
    python scripts/convert_checkpoint.py models/VDOT
  the published VDOT-14B for diffusers, halved to bfloat16
    python scripts/convert_checkpoint.py models/VDOT models/VDOT-diffusers --layout diffusers --dtype bfloat16
  only the transformer of a training run's raw .pt
    python scripts/convert_checkpoint.py results/run/step_1000.pt models/mine --state_key generator_ema --parts dit
  half way between two states of one training
    python scripts/convert_checkpoint.py results/train/mine/export models/mean --blend results/train/more/export

Peak memory is the size of the converted weights, with --blend twice the transformer more; nothing appears at the
target until it is complete.
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", help="folder of any layout, or a single weight file")
    parser.add_argument("target", nargs="?", help="folder to write; without it, the source is only described")
    parser.add_argument("--layout", choices=LAYOUTS, default="native")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored, else float32")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("dit", "text_encoder", "vae"),
        help="default: all there are; the transformer always",
    )
    parser.add_argument("--state_key", help="which state dict of a .pt that holds several, e.g. generator_ema")
    parser.add_argument("--blend", metavar="OTHER", help="mix in the transformer of another state of the same training")
    parser.add_argument("--share", type=float, default=0.5, help="with --blend: of OTHER, 0 to 1 (default: 0.5)")
    parser.add_argument("--overwrite", action="store_true", help="replace the target folder if it exists")
    return parser.parse_args(argv)


def describe(info: CheckpointInfo) -> None:
    print(f"{info.path}: layout {info.layout}, {info.nbytes / 2**30:.2f} GiB")
    for name, part in info.parts.items():
        dtypes = ", ".join(part.dtypes)
        print(f"  {name}: {part.parameters / 1e9:.3f} B parameters in {part.tensors} tensors ({dtypes})")
    for name, value in (("dit config", info.dit), ("tokenizer", info.tokenizer), ("schedule", info.schedule)):
        if value is not None:
            print(f"  {name}: {value}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        info = inspect_checkpoint(args.source)
        describe(info)
        if args.target is None:
            return 0
        wanted = {part for part in info.parts if args.parts is None or part in args.parts}
        dtype = {part: args.dtype or info.parts[part].stored_dtype for part in wanted}
        dit = load_dit(args.source, dtype["dit"] if "dit" in wanted else "float32", state_key=args.state_key)
        if args.blend is not None:
            dit = blend(dit, load_dit(args.blend, "float32"), args.share)
        text = load_text_encoder(args.source, dtype["text_encoder"]) if "text_encoder" in wanted else None
        vae = load_vae(args.source, dtype["vae"]) if "vae" in wanted else None
        notes = {"schedule": info.schedule, "defaults": info.defaults}
        folder = save_checkpoint(args.target, dit, text, vae, layout=args.layout, overwrite=args.overwrite, **notes)
    except VdotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"written: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
