"""Everything between media files and arrays: probe, choose frames, decode, resize, mask, encode, audio, atomic files.

Pixels are uint8 RGB ``[T,H,W,3]`` in 0..255; the model's are float32 ``[3,T,H,W]`` in [-1,1]; masks are float32
``[T,H,W]`` in [0,1] (1, white, generates; 0, black, keeps). What a user can get wrong raises
:class:`vdot.errors.InputError`; what the disk refuses raises :class:`vdot.errors.OutputError`.
"""

from vdot.video.output import atomic_path, contact_sheet, write_gif, write_image, write_video
from vdot.video.pixels import fit_frames, from_model, letterbox, read_image, read_mask, to_model
from vdot.video.plan import CELL, FramePlan, describe, model_frames, original_rule, output_size, plan_frames
from vdot.video.source import VideoInfo, is_image, probe, read_frames

__all__ = [
    "CELL",
    "FramePlan",
    "VideoInfo",
    "atomic_path",
    "contact_sheet",
    "describe",
    "fit_frames",
    "from_model",
    "is_image",
    "letterbox",
    "model_frames",
    "original_rule",
    "output_size",
    "plan_frames",
    "probe",
    "read_frames",
    "read_image",
    "read_mask",
    "to_model",
    "write_gif",
    "write_image",
    "write_video",
]
