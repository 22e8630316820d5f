"""Optimal transport between clouds of latents: solver, gradients, divergence (equations: ``sinkhorn.py``)."""

from vdot.transport.clouds import clouds_to_latents, latents_to_clouds
from vdot.transport.config import OTConfig
from vdot.transport.sinkhorn import Transport, ot_gradient, sinkhorn, sinkhorn_divergence, transport_latents

__all__ = [
    "OTConfig",
    "Transport",
    "clouds_to_latents",
    "latents_to_clouds",
    "ot_gradient",
    "sinkhorn",
    "sinkhorn_divergence",
    "transport_latents",
]
