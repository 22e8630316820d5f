"""Sizes of the networks, under Wan2.1's own names (the keys of a published ``config.json``)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class DitConfig:
    """Shape of a :class:`vdot.models.vace.VaceDiT`."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    vace_layers: tuple[int, ...]  # main blocks that receive a hint; one VACE block each
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    vace_in_dim: int = 96
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "vace_layers", tuple(self.vace_layers))
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} does not split into {self.num_heads} heads of an even width")
        if not self.vace_layers or self.vace_layers[0] != 0:
            raise ValueError(f"vace_layers must start with block 0, got {self.vace_layers}")
        if list(self.vace_layers) != sorted(set(self.vace_layers)) or self.vace_layers[-1] >= self.num_layers:
            raise ValueError(f"vace_layers {self.vace_layers} are not increasing block numbers below {self.num_layers}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def grid(self, latent: Sequence[int]) -> tuple[int, int, int]:
        """Tokens along frames, height and width of latents ``[..., F, H, W]`` of that shape.

        Raises:
            ValueError: the patches do not tile it.
        """
        sizes, patch = tuple(latent[-3:]), self.patch_size
        if any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents of {' x '.join(map(str, sizes))} are not whole patches of {patch}")
        f, h, w = (size // p for size, p in zip(sizes, patch, strict=True))
        return f, h, w

    def tokens(self, latent: Sequence[int]) -> int:
        """How many those are."""
        return prod(self.grid(latent))


@dataclass(frozen=True)
class T5Config:
    """Shape of a UMT5 encoder, under transformers' names."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64


@dataclass(frozen=True)
class Preset:
    """The three networks that belong together, and the discriminator's taps (zero-based, after these blocks)."""

    dit: DitConfig
    text: T5Config
    vae_base_dim: int
    taps: tuple[int, int, int]


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        dit=DitConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6, vace_layers=(0, 2, 4), text_dim=128),
        text=T5Config(vocab_size=1024, d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4),
        vae_base_dim=16,
        taps=(2, 4, 5),
    ),
    "1.3B": Preset(
        dit=DitConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, vace_layers=tuple(range(0, 30, 2))),
        text=T5Config(),
        vae_base_dim=96,
        taps=(17, 23, 29),
    ),
    "14B": Preset(
        dit=DitConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, vace_layers=tuple(range(0, 40, 5))),
        text=T5Config(),
        vae_base_dim=96,
        taps=(23, 31, 39),
    ),
}
