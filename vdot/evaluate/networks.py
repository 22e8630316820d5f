"""What needs a trained network of somebody else's, from a folder on this machine; nothing is fetched.

CLIP says how well frames fit the prompt, DINO how alike frames and reference pictures are. Both are cosines of
features, -1..1, higher is better, means over frames spread over the clip.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vdot.errors import CheckpointError, InputError

FRAMES = 8  # of a clip that are looked at


def spread(frames: np.ndarray, count: int = FRAMES) -> list[np.ndarray]:
    """At most ``count`` frames from the first to the last."""
    picked = np.unique(np.rint(np.linspace(0, len(frames) - 1, min(count, len(frames)))).astype(int))
    return [np.ascontiguousarray(frames[i]) for i in picked]


class ClipText:
    """Prompt against frames, by a CLIP in ``folder`` (transformers' layout)."""

    def __init__(self, folder: Path | str, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.device = device
        self.model = _load(CLIPModel, folder).to(device).eval()
        self.tokenizer = _load(AutoTokenizer, folder)
        self.processor = _processor(folder)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, prompt: str) -> float:
        longest = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer([prompt], return_tensors="pt", truncation=True, max_length=longest)
        pixels = self.processor(images=spread(frames), return_tensors="pt")["pixel_values"]
        known = {k: v.to(self.device) for k, v in words.items() if k in ("input_ids", "attention_mask")}
        out = self.model(pixel_values=pixels.to(self.device), **known)
        return float(F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float()).mean())


class DinoIdentity:
    """Reference pictures against frames, by a DINO (or any vision transformer) in ``folder``: of its class token."""

    def __init__(self, folder: Path | str, device: torch.device) -> None:
        from transformers import AutoModel

        self.device = device
        self.model = _load(AutoModel, folder).to(device).eval()
        self.processor = _processor(folder)

    @torch.no_grad()
    def _features(self, pictures: list[np.ndarray]) -> Tensor:
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        found = self.model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0]
        return F.normalize(found.float(), dim=-1)  # [n, D]

    def __call__(self, frames: np.ndarray, references: tuple[np.ndarray, ...]) -> float | None:
        """Mean over references and frames; ``None`` without references."""
        if not references:
            return None
        each = torch.cat([self._features([picture]) for picture in references])
        return float((each @ self._features(spread(frames)).T).mean())


def weight_files(folder: Path | str) -> list[Path]:
    """``InputError`` if the folder holds no model."""
    files = sorted(p for p in Path(folder).glob("*") if p.suffix in (".safetensors", ".bin"))
    if not files:
        raise InputError(
            f"{folder} holds no model: give a folder with config.json and its weights, already on this disk"
        )
    return files


def _processor(folder: Path | str) -> Any:
    from transformers import AutoImageProcessor

    return _load(AutoImageProcessor, folder)


def _load(kind: Any, folder: Path | str) -> Any:
    weight_files(folder)
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a model that {kind.__name__} can read: {error}") from error
