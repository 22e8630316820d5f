"""Bodies by ViTPose, which is given where people are: OpenCV finds them, then the last frame's body says where to look.

Body points only, no face and no hands.
"""

from collections.abc import Callable

import numpy as np
import torch

from vdot.annotate.hub import load, load_model
from vdot.annotate.skeleton import SEEN, Person, with_neck
from vdot.annotate.with_opencv import people

# COCO's 17 as the body's points without a neck: nose, right arm, left arm, right leg, left leg, eyes, ears.
BODY = (0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
ROOM = 0.2  # around the last frame's body


def pose(place: str) -> Callable[[np.ndarray], list[list[Person]]]:
    """uint8 ``[T, H, W, 3]`` -> the people of each frame."""
    from transformers import AutoImageProcessor, VitPoseForPoseEstimation

    model, device = load_model(VitPoseForPoseEstimation, place)
    processor = load(AutoImageProcessor, place)
    experts = getattr(model.config.backbone_config, "num_experts", 1)

    @torch.inference_mode()
    def bodies(frame: np.ndarray, boxes: np.ndarray) -> list[Person]:
        wide = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(float).tolist()
        inputs = processor(frame, boxes=[wide], return_tensors="pt").to(device)
        if experts > 1:
            inputs["dataset_index"] = torch.zeros(len(wide), dtype=torch.int64, device=device)
        found = processor.post_process_pose_estimation(model(**inputs), boxes=[wide])[0]
        points = [torch.cat([one["keypoints"], one["scores"][:, None]], 1).float().cpu().numpy() for one in found]
        return [Person(with_neck(each[list(BODY)])) for each in points]

    def follow(frames: np.ndarray) -> list[list[Person]]:
        out: list[list[Person]] = []
        for frame in frames:
            before = [_box(person, frame) for person in out[-1]] if out else []
            boxes = people(frame)
            if not len(boxes):
                boxes = np.array([box for box in before if box is not None] or [(0, 0, frame.shape[1], frame.shape[0])])
            out.append(bodies(frame, boxes))
        return out

    return follow


def _box(person: Person, frame: np.ndarray) -> tuple[int, int, int, int] | None:
    """Around the points that were seen, with room to move."""
    seen = person.body[person.body[:, 2] > SEEN, :2]
    if len(seen) < 3:
        return None
    (left, top), (right, bottom) = seen.min(0), seen.max(0)
    room = ROOM * max(right - left, bottom - top)
    height, width = frame.shape[:2]
    box = (
        max(int(left - room), 0),
        max(int(top - room), 0),
        min(int(right + room), width),
        min(int(bottom + room), height),
    )
    return box if box[2] > box[0] and box[3] > box[1] else None
