"""The autoencoder: pixels to latents and back, learned from clips of the procedural world."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from vdot.checkpoints import load_text_encoder, load_vae
from vdot.checkpoints.saving import save_encoders
from vdot.data.pictures import PictureFeeder, Pictures, draw_clip
from vdot.data.world import WorldConfig
from vdot.distillation.draws import keyed_generator
from vdot.distillation.steps import Log
from vdot.errors import ConfigError
from vdot.memory import count_stage
from vdot.models.vae import WanVAE
from vdot.models.vae_whole import WholeClipVAE, start
from vdot.parallel.state import Ranks
from vdot.runtime import DTYPES, log
from vdot.training.config import TrainConfig
from vdot.training.objectives import Section
from vdot.training.whole import WholeNetwork
from vdot.video import contact_sheet, from_model

SMALLEST_ERROR = 1e-6  # mean squared, of a clip of plain colour: counts as 66 dB


@dataclass(frozen=True)
class Held:
    """Held-out clips of one kind, ``pixels [B, 3, T, H, W]``."""

    name: str
    pixels: Tensor


class Autoencoder(WholeNetwork):
    """Reconstruction of clips, pictures and conditions, with a posterior kept near a normal distribution."""

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        super().__init__(config, ranks, device)
        vae = config.vae
        self.feeder = PictureFeeder(config.world, vae.stages, vae.conditions, self.everyone.rank, self.everyone.size)
        with ranks.agree():
            self.network = WholeClipVAE(initial(config), config.parallel.compile).to(device).train()
        if vae.freeze_encoder:
            for part in (self.network.model.encoder, self.network.model.quant_conv):
                part.requires_grad_(False)
        self.optimize({name: p for name, p in self.network.model.named_parameters() if p.requires_grad})
        self._held: list[Held] | None = None

    def batches(self, start: int) -> AbstractContextManager[Iterator[Pictures]]:
        return self.feeder.batches(start, self.config.data.workers, self.config.data.prefetch)

    def step(self, step: int, batches: Sequence[Pictures], section: Section) -> dict[str, float]:
        values = self.updater.update(step, batches, partial(self._differentiate, section), section)
        if self.ema is not None:
            self.ema.update(step)
        if self.due(self.config.vae.evaluate_every, step):
            with section("sample"):
                values |= self.evaluate()
        return values

    def _differentiate(self, section: Section, batch: Pictures, share: float) -> Log:
        with section("forward"), self.autocast():
            mean, log_variance = (part.float() for part in self.network.encode(batch.pixels))
            generator = keyed_generator(self.config.seed, "posterior", batch.number, self.everyone.rank)
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            made = self.network.decode(mean + (0.5 * log_variance).exp() * noise).float()
        vae = self.config.vae
        error = made - batch.pixels
        parts = {
            "loss_pixels": error.abs().mean(),
            "loss_squares": error.square().mean(),
            "loss_edges": edge_error(made, batch.pixels),
            "loss_motion": motion_error(made, batch.pixels),
            "loss_kl": kl_divergence(mean, log_variance),
        }
        weights = {
            "loss_pixels": 1.0,
            "loss_squares": vae.squares,
            "loss_edges": vae.edges,
            "loss_motion": vae.motion,
            "loss_kl": vae.kl,
        }
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        with section("backward"):
            (share * loss).backward()
        spread = mean.detach().std(dim=(0, 2, 3, 4))
        parts |= {"latent_std_least": spread.min(), "latent_std_most": spread.max()}
        return {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}

    def work(self, step: int, batch: Pictures) -> tuple[float, float]:
        clips, _, frames, height, width = batch.pixels.shape
        scale = clips * self.everyone.size / self.config.batch_size  # the loop counts batch_size samples
        tokens = ((frames - 1) // 4 + 1) * (height // 8) * (width // 8)
        widths = self.network.model.config
        flops = forward_flops(widths["base_dim"], tuple(widths["dim_mult"]), (frames, height, width))
        return scale * tokens, 3 * scale * flops

    # --- what it has learned

    def _reconstruct(self, pixels: Tensor) -> Tensor:
        with self.autocast():
            return self.network.decode(self.network.encode(pixels)[0]).float().clamp(-1, 1)

    @property
    def held(self) -> list[Held]:
        """Clips of scenes that training never shows: real ones, conditions, and single pictures of both."""
        if self._held is None:
            self._held = held_out(self.config)
        return self._held

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean PSNR in dB over the held-out clips of each kind, of the averaged weights."""
        with self.averaged(self.network):
            return {f"psnr_{held.name}": psnr(self._batched(held), held.pixels).mean().item() for held in self.held}

    def _batched(self, held: Held) -> Tensor:
        return torch.cat([self._reconstruct(part.to(self.device)).cpu() for part in held.pixels.split(2)])

    @torch.no_grad()
    def sample(self, step: int) -> dict[str, Path]:
        """``step_N.png``: of held-out clips the truth, and below it the reconstruction."""
        config = self.config
        assert config.output_dir is not None
        sheet = Path(config.output_dir, "samples", f"step_{step:08d}.png")
        rows: list[tuple[str, np.ndarray]] = []
        with self.averaged(self.network):
            for held in self.held:
                shown = Held(held.name, held.pixels[: max(1, config.sample_tasks // len(self.held))])
                made = self._batched(shown)
                decibels = psnr(made, shown.pixels).tolist()
                rows += [
                    (f"{held.name}, {db:.1f} dB", np.concatenate([from_model(truth), from_model(copy)], axis=1))
                    for truth, copy, db in zip(shown.pixels, made, decibels, strict=True)
                ]
        with self.ranks.agree():
            if self.ranks.rank == 0:
                contact_sheet(rows, sheet, columns=6, cell_width=128)
        return {"samples/sheet": sheet}

    def export(self) -> Path:
        """``export/`` with ``vae/`` and, where ``vae.text_encoder`` names one, a text encoder and its tokenizer."""
        config = self.config
        assert config.output_dir is not None
        folder = Path(config.output_dir, "export")
        with self.ranks.agree():
            if self.ranks.rank == 0:
                text = config.vae.text_encoder
                text_encoder = load_text_encoder(text, "bfloat16") if text is not None else None
                save_encoders(folder, text_encoder, self.normalised(), overwrite=True)
                log.info("exported %s", folder)
        return folder

    @torch.no_grad()
    def normalised(self) -> WanVAE:
        """The averaged network for inference, in ``export_dtype``, whose latents of real clips are standard: mean 0 and
        variance 1. Those of a frozen encoder are as they were."""
        config = self.config
        model = AutoencoderKLWan.from_config(self.network.model.config)
        with self.averaged(self.network):
            model.load_state_dict(self.network.model.state_dict())
        vae = WanVAE(model.to(self.device)).requires_grad_(False)
        if not config.vae.freeze_encoder:
            settle(vae, *latent_statistics(vae, config.world, config.vae.statistics_clips))
        return vae.to(DTYPES[config.export_dtype])


def initial(config: TrainConfig) -> AutoencoderKLWan:
    """The autoencoder of ``ckpt_dir``, or a new one. ``ConfigError``: a new one's encoder would never learn."""
    if config.ckpt_dir is None and config.vae.freeze_encoder:
        raise ConfigError("vae.freeze_encoder keeps the encoder of an existing autoencoder: name its ckpt_dir")
    if config.ckpt_dir is not None:
        old = load_vae(config.ckpt_dir, "float32").model
        model = AutoencoderKLWan.from_config(old.config)
        model.load_state_dict(old.state_dict())
        return model
    model = AutoencoderKLWan(base_dim=config.vae.base_dim, dim_mult=list(config.vae.dim_mult))
    start(model, config.seed)  # equal on all ranks
    return model


@lru_cache(maxsize=16)
def forward_flops(base_dim: int, dim_mult: tuple[int, ...], size: tuple[int, ...]) -> float:
    """Of encoding and decoding one clip of ``size`` (frames, height, width), by doing it on the meta device."""
    with torch.device("meta"):
        network = WholeClipVAE(AutoencoderKLWan(base_dim=base_dim, dim_mult=list(dim_mult)))
        pixels = torch.empty(1, 3, *size)
    return count_stage("vae", network, lambda: network.decode(network.encode(pixels)[0])).flops


# --- errors, each a mean over everything -----------------------------------------------------------------------------


def edge_error(made: Tensor, true: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours in rows and in columns, ``[B, 3, T, H, W]`` each."""
    error = made - true
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def motion_error(made: Tensor, true: Tensor) -> Tensor:
    """Mean absolute error of the differences between frames; 0 for pictures."""
    if made.shape[2] == 1:
        return made.new_zeros(())
    return (made - true).diff(dim=2).abs().mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of the posterior from a standard normal distribution, in nats per latent value."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def psnr(made: Tensor, true: Tensor) -> Tensor:
    """dB of each clip, ``[B]``; the peak is the range of the pixels, 2."""
    error = (made - true).square().mean(dim=(1, 2, 3, 4)) / 4
    return -10 * error.clamp(min=SMALLEST_ERROR / 4).log10()


# --- held-out clips and the latents' statistics ----------------------------------------------------------------------


def held_out(config: TrainConfig) -> list[Held]:
    """``evaluate_clips`` of each kind, of the world's test split."""
    vae = config.vae
    ours = config.world
    world = WorldConfig(size=ours.size, frames=ours.frames, tasks=ours.tasks, view=ours.view, split="test")
    kinds = {
        "clips": (world.frames, False),
        "conditions": (world.frames, True),
        "pictures": (1, False),
        "picture_conditions": (1, True),
    }
    return [
        Held(name, torch.stack([draw_clip(world, i, frames, condition) for i in range(vae.evaluate_clips)]))
        for name, (frames, condition) in kinds.items()
    ]


def latent_statistics(vae: WanVAE, world: WorldConfig, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel ``[z]`` of ``vae``'s latents of ``count`` real clips, float64."""
    total = torch.zeros(2, vae.latent_channels, dtype=torch.float64)
    values = 0
    for i in range(count):
        clip = draw_clip(world, i, world.frames, condition=False)[None].to(vae.device)
        latents = vae.encode(clip)[0].flatten(1).cpu().double()
        total += torch.stack([latents.sum(1), latents.square().sum(1)])
        values += latents.shape[1]
    mean, square = total / values
    return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def settle(vae: WanVAE, mean: Tensor, std: Tensor) -> None:
    """Change ``vae`` so that latents that had ``mean`` and ``std`` (``[z]`` each) have 0 and 1, pixels unchanged.

    The change goes into the two 1x1x1 convolutions around the latents, not into ``latents_mean`` and ``latents_std``:
    these stay the published ones, which is what readers of checkpoints without a config assume.
    """
    if not math.isfinite(float(std.sum())) or float(std.min()) <= 0:
        raise ConfigError("a channel of the latents is constant: train longer, or with a lower vae.kl")
    published = torch.tensor([vae.model.config.latents_mean, vae.model.config.latents_std], dtype=torch.float64)
    # normalised = (raw - m) / s; raw' = s ((raw - m) / s - mean) / std + m = gain raw + shift
    m, s = published
    gain = 1 / std
    shift = m - (m + s * mean) * gain
    into, out_of = vae.model.quant_conv, vae.model.post_quant_conv
    weight, bias = (p.detach().cpu().double() for p in (into.weight, into.bias))
    gains = torch.cat([gain, torch.ones_like(gain)])
    # The second half are logarithms of variances.
    shifts = torch.cat([shift, 2 * gain.log()])
    into.weight.copy_(weight * gains.view(-1, 1, 1, 1, 1))
    into.bias.copy_(bias * gains + shifts)
    weight, bias = (p.detach().cpu().double() for p in (out_of.weight, out_of.bias))
    weight = weight / gain.view(1, -1, 1, 1, 1)
    out_of.weight.copy_(weight)
    out_of.bias.copy_(bias - weight.flatten(1) @ shift)
