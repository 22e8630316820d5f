"""Optimal transport as YAML sees it."""

from dataclasses import dataclass


@dataclass
class OTConfig:
    """Every choice of :func:`vdot.transport.transport_latents`; the defaults are the release's problem, solved.

    Plain types only, so that ``vdot.config`` can check a YAML file against it.
    """

    eps: float = 0.1  # entropic strength, in units of the cost (absolute) or of the mean cost (relative)
    eps_mode: str = "absolute"  # "absolute" | "relative"
    p: int = 2  # cost |x - y|^p: 2 squared Euclidean, 1 Euclidean
    reach: float | None = None  # None: hard marginals; otherwise KL-relaxed with rho = reach ** p
    gradient: str = "closed"  # "closed": the plan held fixed | "unrolled": through the iterations, the release's
    debias: bool = False  # subtract the self-transport of the fake cloud (Sinkhorn divergence)
    pooling: int = 2  # average-pool latents by this before making points; 1 keeps every latent pixel
    clouds: str = "frame"  # "frame": one cloud per latent frame | "clip": all frames of a clip in one cloud
    max_iters: int = 60
    tol: float = 1e-2  # stop at this relative L1 marginal error; 0 spends max_iters plain iterations
    relaxation: float | None = None  # None: 1.6 and adapted where tol > 0, else 1 (plain)
    eps_scaling: float | None = None  # in (0, 1): start at the mean cost and multiply down to eps
    engine: str = "auto"  # "auto" | "cached" | "streamed" | "compiled" | "triton"
    memory_mb: int | None = None  # budget for kernel blocks; None: 16 on a CPU, 256 on an accelerator
