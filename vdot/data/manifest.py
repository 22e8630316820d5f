"""The table of training examples."""

from dataclasses import dataclass, field


@dataclass
class TableConfig:
    """Which table, and how its clips are laid out: as in inference, so that training sees what inference sees."""

    path: str | None = None  # CSV or JSONL, see read_manifest
    root: str | None = None  # folder that relative paths start from; None: the table's own
    size: str | None = None  # "480p", "720p" or "W*H"; with a source clip the area limit. None: the checkpoint's
    frame_num: int | None = None  # frames of every clip. None: the source's own, at most the checkpoint's
    frame_mode: str = "spread"  # spread, trim or resample, as in inference
    fps: float | None = None  # frames taken of each second with resample; None: 16
    negative_prompt: str | None = None  # None: the checkpoint's
    skip_bad_rows: bool = False  # log rows that cannot be used and go on without them
    workers: int = 2  # processes that decode files, and threads that load ahead


@dataclass
class DataConfig(TableConfig):
    """What a training run reads: a table, encoded on the fly, or a folder that ``training/encode.py`` made of one."""

    encoded: str | None = None
    task_weights: dict[str, float] = field(default_factory=dict)  # relative; 1 for a task that is not named
    prefetch: int = 2  # batches loaded ahead
