"""Tracking a mask, and filling a box, by Segment Anything 2 or 3 for video.

Frames go to the model by its own recipe here (squeezed to its square, normalised): transformers' processor for it
needs torchvision.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vdot.annotate.hub import load_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BOX_CORNERS = (2, 3)  # labels of a box's corners among points


class Sam:
    """A video model and how its frames are made."""

    def __init__(self, place: str, kind: Any, session: Any, colours: tuple[Any, Any]) -> None:
        self.model, self.device = load_model(kind, place)
        self.new_session, self.colours = session, colours
        size = self.model.config.image_size
        self.side = int(size[0] if isinstance(size, list | tuple) else size)

    def frames(self, clip: np.ndarray) -> Tensor:
        """uint8 ``[T, H, W, 3]`` -> float32 ``[T, 3, side, side]``."""
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in self.colours)
        out = torch.empty(len(clip), 3, self.side, self.side)
        for frame, target in zip(clip, out, strict=True):
            pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 255
            scaled = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
            target[:] = (scaled[0] - mean) / deviation
        return out

    def session(self, clip: np.ndarray) -> Any:
        height, width = clip.shape[1:3]
        dtype = next(self.model.parameters()).dtype
        session = self.new_session(
            video=self.frames(clip), video_height=height, video_width=width, inference_device=self.device, dtype=dtype
        )
        session.obj_id_to_idx(1)
        session.obj_with_new_inputs = [1]
        return session

    def read(self, logits: Tensor, height: int, width: int) -> np.ndarray:
        """The mask of the one thing, bool ``[H, W]``."""
        scaled = F.interpolate(logits[:1, :1].float(), (height, width), mode="bilinear", align_corners=False)
        return (scaled[0, 0] > 0).cpu().numpy()

    @torch.inference_mode()
    def track(self, clip: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """uint8 ``[T, H, W, 3]`` and the first frame's bool ``[H, W]`` -> bool ``[T, H, W]``."""
        session = self.session(clip)
        given = torch.from_numpy(mask)[None, None].float()
        given = F.interpolate(given, (self.side, self.side), mode="bilinear", antialias=True)
        session.add_mask_inputs(0, 0, (given >= 0.5).float())
        out = np.zeros(clip.shape[:3], bool)
        for found in self.model.propagate_in_video_iterator(session, start_frame_idx=0):
            out[found.frame_idx] = self.read(found.pred_masks, *clip.shape[1:3])
        out[0] = mask
        return out

    @torch.inference_mode()
    def segment(self, image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        """uint8 ``[H, W, 3]`` and a box -> bool ``[H, W]``."""
        height, width = image.shape[:2]
        session = self.session(image[None])
        scale = torch.tensor([self.side / width, self.side / height])
        corners = torch.tensor(box, dtype=torch.float32).view(1, 1, 2, 2) * scale
        labels = torch.tensor(BOX_CORNERS, dtype=torch.int32).view(1, 1, 2)
        session.add_point_inputs(0, 0, {"point_coords": corners, "point_labels": labels})
        return self.read(self.model(session, frame_idx=0).pred_masks, height, width)


def sam2(place: str) -> Sam:
    from transformers import Sam2VideoModel
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    return Sam(place, Sam2VideoModel, Sam2VideoInferenceSession, IMAGENET)


def sam3(place: str) -> Sam:
    from transformers import Sam3TrackerVideoModel
    from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession

    return Sam(place, Sam3TrackerVideoModel, Sam3TrackerVideoInferenceSession, HALF)


def sam2_track(place: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return sam2(place).track


def sam2_segment(place: str) -> Callable[[np.ndarray, tuple[int, int, int, int]], np.ndarray]:
    return sam2(place).segment


def sam3_track(place: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return sam3(place).track


def sam3_segment(place: str) -> Callable[[np.ndarray, tuple[int, int, int, int]], np.ndarray]:
    return sam3(place).segment
