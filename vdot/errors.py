"""What a user can get wrong, as types. Each message is one sentence: what is wrong and what to do.

Entry scripts print the message without a traceback and exit with :attr:`VdotError.exit_code`.
"""


class VdotError(Exception):
    """Base of every error that is the caller's to fix; everything else is a bug of ours."""

    exit_code = 2


class InputError(VdotError, ValueError):
    """A prompt, video, mask, image, size, number or table that cannot be used as given."""


class ConfigError(VdotError, ValueError):
    """An unknown key, a wrong type or an impossible combination in YAML or on the command line."""


class CheckpointError(VdotError, ValueError):
    """A checkpoint that is missing, incomplete, unsafe to unpickle or of another model."""


class OutputError(VdotError, OSError):
    """A result that could not be written (permission, full disk); nothing half-written is left.

    ``reason`` is the system's own word for it, without the file's name.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class TrainingError(VdotError, ArithmeticError):
    """A training run that cannot go on: its numbers are no longer finite. Says which, since when, and what to try."""

    exit_code = 1


class ServiceError(VdotError):
    """A language model that was asked, here or over the network, and gave no usable answer."""


class MissingDependencyError(VdotError, ImportError):
    """An optional package that was asked for by name and is not installed; names the command that installs it."""


def one_line(error: BaseException) -> str:
    """The message on one line: a list of tensors or a library's report may come on several."""
    return " ".join(str(error).split())
