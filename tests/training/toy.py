"""A small teacher on disk, examples without files, a run of a few steps; the same in every process."""

from pathlib import Path
from typing import Any

import torch

from tests.conftest import TINY, recipe_tensor
from vdot.checkpoints import load_text_encoder, load_vae, save_checkpoint
from vdot.config import load_config
from vdot.data.batch import Example, Shape
from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT
from vdot.training.config import TrainConfig

DIT = DitConfig(dim=48, ffn_dim=64, num_heads=4, num_layers=4, vace_layers=(0, 2), text_dim=128, text_len=64)


def toy_dit(seed: int = 1) -> VaceDiT:
    dit = VaceDiT(DIT)
    dit.load_state_dict({k: recipe_tensor(seed, k, tuple(v.shape)) for k, v in dit.state_dict().items()})
    return dit.eval()


def toy_checkpoint(folder: Path) -> Path:
    """A teacher with the shipped model's encoders."""
    text_encoder = load_text_encoder(TINY, text_len=DIT.text_len)
    return save_checkpoint(folder, toy_dit(), text_encoder, load_vae(TINY), schedule={"steps": 8, "shift": 5.0})


class ToySource:
    """Random examples of two tasks, one of them with a reference; every third has no real clip where ``gaps``."""

    identity = "toy"

    def __init__(self, count: int = 24, gaps: bool = False, bad: tuple[int, ...] = ()) -> None:
        self.tasks = ["t2v" if i % 2 == 0 else "r2v" for i in range(count)]
        self.shapes = [Shape(i % 2, 2, 4, 4) for i in range(count)]
        self.paired = [not (gaps and i % 3 == 0) for i in range(count)]
        self.bad = bad  # rows whose context is not a number

    def __len__(self) -> int:
        return len(self.tasks)

    def load(self, index: int) -> Example:
        g = torch.Generator().manual_seed(index)
        shape = self.shapes[index]
        latent = shape.latent
        context = torch.randn(96, *latent[1:], generator=g)
        if index in self.bad:
            context[0, 0, 0, 0] = torch.nan
        real = torch.randn(latent, generator=g) if self.paired[index] else None
        text = torch.randn(4 + index % 3, DIT.text_dim, generator=g)
        return Example(text, context, real, shape.references, self.tasks[index], f"prompt {index}", index)

    def negative(self) -> torch.Tensor:
        return torch.randn(3, DIT.text_dim, generator=torch.Generator().manual_seed(999))

    def close(self) -> None:
        pass


def toy_config(checkpoint: Path | str, output: Path | str, **values: Any) -> TrainConfig:
    """A run on the CPU; ``values`` by dotted key, dots written as two underscores."""
    rates = [f"{who}.lr=1e-3" for who in ("generator", "critic")]
    fixed = ["device=cpu", "steps=6", "batch_size=2", "save_every=3", "sample_every=0", "data.workers=0"]
    fixed += [
        "parallel.compute=float32",
        "distill.generator_every=2",
        "ema_start=1",
        "distill.ot.tol=0",
        "export_layouts=[]",
    ]
    given = [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    paths = {"ckpt_dir": str(checkpoint), "output_dir": str(output)}
    return load_config(TrainConfig, None, [*fixed, *rates, *given], paths)
