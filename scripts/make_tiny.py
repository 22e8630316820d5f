"""Write ``models/vdot-tiny`` with seeded weights: the architecture of the embedded checkpoint, before any training.

    python scripts/make_tiny.py --out models/vdot-tiny --seed 0

The same seed gives the same weights. The tokenizer is trained on two thousand made-up captions.
"""

import argparse
import itertools
import json
import random
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vdot.models.presets import PRESETS
from vdot.models.vace import VaceDiT
from vdot.request import Defaults
from vdot.sampling import FewStepSchedule

COLOURS = "red green blue yellow orange purple white black grey brown pink cyan".split()
SHAPES = "ball cube star ring triangle heart boat car fox bird cat dog tree house person flower fish robot".split()
MOTIONS = [
    "moves to the left", "moves to the right", "rises slowly", "falls down", "bounces up and down", "spins around",
    "circles the centre", "grows larger", "shrinks away", "crosses behind the other one", "runs", "waves a hand",
]  # fmt: skip
PLACES = ["on a plain wall", "over the grass", "in the snow", "at night", "in soft light", "on a wooden table",
          "in front of the sea", "on a checkered floor", "under a cloudy sky"]  # fmt: skip
CHINESE = [
    "一个红色的球向左移动",
    "一只蓝色的鸟在天空中飞",
    "绿色的方块在雪地上旋转",
    "黄色的星星慢慢升起",
    "一个人挥手",
]


def captions(count: int) -> list[str]:
    """Sentences like those the tiny world is captioned with, and some Chinese."""
    everything = list(itertools.product(COLOURS, SHAPES, MOTIONS, PLACES))
    picked = random.Random(0).sample(everything, count)
    return [f"A {colour} {shape} {motion} {place}." for colour, shape, motion, place in picked] + CHINESE * 8


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A unigram tokenizer in the form of UMT5's: pad 0, end 1, unknown 2, white space as a leading mark."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(captions(2000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)


def wake(dit: VaceDiT) -> None:
    """Give the zero-initialised ends small values, so that untrained weights still react to every input."""
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("before_proj", "after_proj", "head.head")):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def write(folder: Path, seed: int) -> None:
    preset = PRESETS["tiny"]
    torch.manual_seed(seed)
    dit = VaceDiT(preset.dit)
    wake(dit)
    text = UMT5EncoderModel(UMT5Config(**asdict(preset.text), feed_forward_proj="gated-gelu"))
    vae = AutoencoderKLWan(base_dim=preset.vae_base_dim)
    half = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in dit.state_dict().items()}
    save_file(half, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {"_class_name": "VaceWanModel", "model_type": "vace", **asdict(preset.dit)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    text.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer", preset.text.vocab_size)
    FewStepSchedule(steps=4, shift=8.0, solver="unipc").save(folder)
    Defaults(size="128*128", frame_num=17, fps=8.0, negative_prompt="").save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/vdot-tiny"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    card = args.out / "README.md"
    kept = card.read_text(encoding="utf-8") if card.is_file() else None
    with tempfile.TemporaryDirectory(dir=args.out.absolute().parent) as scratch:
        folder = Path(scratch, "model")
        folder.mkdir()
        write(folder, args.seed)
        if kept is not None:
            (folder / "README.md").write_text(kept, encoding="utf-8")
        if args.out.exists():
            shutil.rmtree(args.out)
        folder.rename(args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
