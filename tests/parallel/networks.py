"""Small networks and inputs, equal in every process that builds them."""

import math

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE
from vdot.parallel.mesh import Mesh, make_mesh

MESHES: dict[tuple[int, int], Mesh] = {}


def mesh(ulysses: int, ring: int = 1) -> Mesh:
    """One per layout and process, as groups are never freed; of this process alone for 1 x 1."""
    if ulysses * ring == 1:
        return Mesh()
    if (ulysses, ring) not in MESHES:
        MESHES[ulysses, ring] = make_mesh("cpu", ulysses, ring)
    return MESHES[ulysses, ring]


def small_dit(heads: int = 6, dtype: torch.dtype = torch.float32) -> VaceDiT:
    """Three blocks and two hint blocks of 16-wide heads, weights of the scale of trained ones, nothing zero."""
    config = DitConfig(
        dim=16 * heads, ffn_dim=64, num_heads=heads, num_layers=3, vace_layers=(0, 2), text_dim=24, text_len=40
    )
    dit = VaceDiT(config).eval()
    generator = torch.Generator().manual_seed(heads)
    for name, p in dit.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 1 / math.sqrt(p[0].numel()) if p.ndim >= 2 and "modulation" not in name else 0.1
        island = any(fragment in name for fragment in VaceDiT.FLOAT32_ISLANDS)
        p.data = (scale * noise + (1.0 if "norm" in name else 0.0)).to(torch.float32 if island else dtype)
    return dit


def inputs(frames: int = 3, rows: int = 6, columns: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """``x``, ``t``, ``text`` and ``vace_context``; 45 tokens by default, which no rank count divides."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(1, 16, frames, rows, columns, generator=g),
        "t": torch.tensor([700.0]),
        "text": torch.randn(1, 9, 24, generator=g),
        "vace_context": torch.randn(1, 96, frames, rows, columns, generator=g),
    }


def small_vae() -> WanVAE:
    """The autoencoder with six channels, no weight zero."""
    model = AutoencoderKLWan(base_dim=6)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1 + 0.1 * noise if name.endswith("gamma") else noise / math.sqrt(max(1, p[0].numel()))
    return WanVAE(model).requires_grad_(False)
