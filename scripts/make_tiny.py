#!/usr/bin/env python
"""What a teacher of the procedural world starts from: a folder with a transformer beside encoders that are trained.

    python scripts/make_tiny.py --encoders results/train/tiny_decoder/export --out results/train/tiny_start
    python scripts/make_tiny.py --finer results/train/tiny_near/export --out results/train/tiny_fine_start

The first has a new, untrained transformer; --encoders has vae/, text_encoder/ and tokenizer/. The same seed gives the
same weights. No output is biased at first: hints and velocities begin at zero, as the original's do.

The second goes on from a trained checkpoint, encoders and all, with a token for every latent pixel in place of one
for four (vdot/models/finer.py): about four times the work a clip, and to be trained on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as from an installation


def main(ranks: object) -> int:
    import torch

    from vdot.checkpoints import load_dit, load_text_encoder, load_vae, save_checkpoint
    from vdot.errors import ConfigError
    from vdot.models.finer import finer
    from vdot.models.presets import PRESETS
    from vdot.models.vace import VaceDiT
    from vdot.request import Defaults
    from vdot.sampling import FewStepSchedule

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--encoders", type=Path, help="folder of the encoders for a new transformer")
    source.add_argument("--finer", type=Path, help="checkpoint to go on from with smaller patches")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights (default: 0)")
    args = parser.parse_args()
    if args.finer:
        coarse = load_dit(args.finer)
        try:
            dit = finer(coarse)
        except ValueError as error:
            raise ConfigError(f"{args.finer}: {error}") from None
    else:
        torch.manual_seed(args.seed)
        dit = VaceDiT(PRESETS["tiny"].dit)
    encoders = args.finer or args.encoders
    save_checkpoint(
        args.out,
        dit,
        load_text_encoder(encoders, torch.bfloat16),
        load_vae(encoders, torch.bfloat16),
        schedule=FewStepSchedule(steps=50, shift=3.0, solver="unipc", guide_scale=3.0),
        defaults=Defaults(size="64*64", frame_num=17, fps=8.0, negative_prompt=""),
        overwrite=True,
    )
    print(args.out)
    return 0


if __name__ == "__main__":
    from vdot.entry import enter

    sys.exit(enter(main))
