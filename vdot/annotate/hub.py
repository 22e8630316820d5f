"""Models of the Hub, from a folder or by id, through transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vdot.errors import CheckpointError, MissingDependencyError, one_line
from vdot.runtime import pick_device


def load(kind: Any, place: str, **options: Any) -> Any:
    """``kind.from_pretrained(place)``; ``kind`` is a class of transformers, ``place`` a folder or a Hub id.

    Raises:
        CheckpointError: the folder does not hold such a model, or not all of its weights.
        MissingDependencyError: the Hub cannot be reached or does not have it.
    """
    local = Path(place).is_dir()
    with _quiet():
        try:
            return kind.from_pretrained(place, local_files_only=local, **options)
        except Exception as error:  # whatever a foreign folder makes the library stumble over
            reason = one_line(error).split(". ")[0][:200]
            if local:
                raise CheckpointError(f"{place} does not hold what {kind.__name__} loads: {reason}") from error
            raise MissingDependencyError(
                f"{place} could not be fetched from the Hub: {reason}; download it elsewhere and give its folder, "
                "--backend NAME:FOLDER"
            ) from error


def load_model(kind: Any, place: str) -> tuple[Any, torch.device]:
    """A model ready to be asked, and where it is. ``CheckpointError`` also when weights are missing from the files."""
    model, facts = load(kind, place, output_loading_info=True)
    missing = sorted(facts.get("missing_keys", []))
    if missing:
        raise CheckpointError(
            f"{place} lacks {len(missing)} weights of {type(model).__name__}, the first is {missing[0]}"
        )
    device = pick_device()
    return model.eval().to(device), device


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its remarks about what else could be installed."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
