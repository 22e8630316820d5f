"""What every entry script does around its work: connect the processes, say an error once, end all of them alike."""

import logging
import sys
import traceback
from collections.abc import Callable

from vdot.errors import VdotError, one_line
from vdot.parallel.launch import connected
from vdot.parallel.state import Ranks, end_together
from vdot.runtime import setup_logging


def enter(run: Callable[[Ranks], int]) -> int:
    """Exit code of ``run``; 2 (or the error's own) with one sentence on stderr, 130 for Ctrl-C, on all processes."""
    setup_logging()
    ranks = Ranks()
    try:
        with connected() as ranks:
            if ranks.rank:
                setup_logging(logging.CRITICAL)  # one process speaks; what goes wrong on another is said on stderr
            return run(ranks)
    except VdotError as error:
        return _stop(ranks, error, f"error: {one_line(error)}", error.exit_code)
    except KeyboardInterrupt as error:
        return _stop(ranks, error, "interrupted: nothing half-written is left", 130)
    except Exception as error:
        if ranks.world == 1:
            raise
        text = f"{traceback.format_exc()}error: rank {ranks.rank}: unexpected {type(error).__name__}: {one_line(error)}"
        return _stop(ranks, error, text, 1)


def _stop(ranks: Ranks, error: BaseException, message: str, code: int) -> int:
    """Say once, whatever the number of processes, why nothing comes of this; ends the other processes too."""
    if ranks.world > 1:
        end_together(ranks, error, message, code)
    sys.stderr.write(f"{message}\n")
    return code
