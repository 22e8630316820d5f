"""A thing found by words: its box by Grounding DINO, or its pixels by CLIPSeg."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vdot.annotate.hub import load, load_model

SURE = 0.25  # of a box, and of the words that it answers to
INSIDE = 0.4  # of a pixel

Find = Callable[[np.ndarray, str, Any], np.ndarray]


def grounding_dino(place: str) -> Find:
    """uint8 ``[H, W, 3]``, words and the tools (which fill the box) -> bool ``[H, W]``, empty when nothing is found."""
    from transformers import AutoProcessor, GroundingDinoForObjectDetection

    model, device = load_model(GroundingDinoForObjectDetection, place)
    processor = load(AutoProcessor, place)

    @torch.inference_mode()
    def find(image: np.ndarray, text: str, tools: Any) -> np.ndarray:
        height, width = image.shape[:2]
        asked = text.strip().lower().rstrip(".") + "."
        inputs = processor(images=image, text=asked, return_tensors="pt").to(device)
        found = processor.post_process_grounded_object_detection(
            model(**inputs), inputs.input_ids, threshold=SURE, text_threshold=SURE, target_sizes=[(height, width)]
        )[0]
        if not len(found["scores"]):
            return np.zeros((height, width), bool)
        left, top, right, bottom = found["boxes"][int(found["scores"].argmax())].cpu().round().int().tolist()
        box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
        if box[2] <= box[0] or box[3] <= box[1]:
            return np.zeros((height, width), bool)
        return tools("segment")(image, box)

    return find


def clipseg(place: str) -> Find:
    """uint8 ``[H, W, 3]`` and words -> bool ``[H, W]``, rough at the edges."""
    from transformers import AutoProcessor, CLIPSegForImageSegmentation

    model, device = load_model(CLIPSegForImageSegmentation, place)
    processor = load(AutoProcessor, place)

    @torch.inference_mode()
    def find(image: np.ndarray, text: str, tools: Any) -> np.ndarray:
        inputs = processor(text=[text], images=[image], return_tensors="pt", padding=True).to(device)
        logits = model(**inputs).logits.float().reshape(1, 1, *model(**inputs).logits.shape[-2:])
        scaled = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
        return (scaled[0, 0].sigmoid() > INSIDE).cpu().numpy()

    return find
