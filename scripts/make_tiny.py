"""A new, untrained transformer beside encoders that are trained: the folder that the teacher of the procedural world
starts from.

    python scripts/make_tiny.py --encoders results/train/tiny_vae/export --out results/train/tiny_start

``--encoders`` has vae/, text_encoder/ and tokenizer/. The same seed gives the same weights. No output is biased at
first: hints and velocities begin at zero, as the original's do.
"""

import argparse
from pathlib import Path

import torch

from vdot.checkpoints import load_text_encoder, load_vae, save_checkpoint
from vdot.models.presets import PRESETS
from vdot.models.vace import VaceDiT
from vdot.request import Defaults
from vdot.sampling import FewStepSchedule

FORM = argparse.RawDescriptionHelpFormatter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORM)
    parser.add_argument("--encoders", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    dit = VaceDiT(PRESETS["tiny"].dit)
    save_checkpoint(
        args.out,
        dit,
        load_text_encoder(args.encoders, torch.bfloat16),
        load_vae(args.encoders, torch.bfloat16),
        schedule=FewStepSchedule(steps=50, shift=3.0, solver="unipc", guide_scale=3.0),
        defaults=Defaults(size="64*64", frame_num=17, fps=8.0, negative_prompt=""),
        overwrite=True,
    )
    print(args.out)


if __name__ == "__main__":
    main()
