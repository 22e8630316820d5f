"""VDOT: four-step unified video creation on Wan2.1-VACE, distilled with optimal transport."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["VdotPipeline", "__version__"]

if TYPE_CHECKING:
    from vdot.pipeline import VdotPipeline


def __getattr__(name: str) -> Any:
    # Lazy: `import vdot` must not cost torch, diffusers and transformers to a user of `vdot.errors`.
    if name == "VdotPipeline":
        return import_module("vdot.pipeline").VdotPipeline
    raise AttributeError(f"module 'vdot' has no attribute {name!r}")
