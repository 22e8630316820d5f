#!/usr/bin/env python
"""What separates two full checkpoints of one size, as a LoRA of a given rank.

    python scripts/extract_lora.py --base models/Wan2.1-VACE-14B --tuned results/train/vdot_14b/export --out vdot-lora

writes vdot-lora/{adapter_config.json, adapter_model.safetensors} for peft and diffusers, and comfyui.safetensors. Each
linear layer's difference is cut to its largest singular values; the printed share of its square that they hold says
how much of the tuning the adapter keeps. Norms, modulations and biases are not linear layers: they stay the base's.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as from an installation


def main(ranks: object) -> int:
    from vdot.checkpoints import inspect_checkpoint, load_dit
    from vdot.runtime import log, pick_device
    from vdot.training.lora import extract, save_adapters

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="checkpoint that the adapter will be put on")
    parser.add_argument("--tuned", required=True, help="checkpoint that it should then be like")
    parser.add_argument("--rank", type=int, default=64, help="singular values kept per layer (default: 64)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--device", help="where the singular values are computed (default: the best there is)")
    args = parser.parse_args()
    stored = (inspect_checkpoint(path).parts["dit"].stored_dtype for path in (args.base, args.tuned))
    base, tuned = (
        load_dit(path, dtype, mmap=True) for path, dtype in zip((args.base, args.tuned), stored, strict=True)
    )
    factors, kept = extract(base, tuned, args.rank, pick_device(args.device))
    save_adapters(args.out, factors, alpha=args.rank)
    log.info("%s: rank %d, %d layers, %.1f%% of the difference kept", args.out, args.rank, len(factors), 100 * kept)
    return 0


if __name__ == "__main__":
    from vdot.entry import enter

    sys.exit(enter(main))
