"""User errors and the exceptions that end a process; a command prints each in one line."""

import signal


class UserError(Exception):
    """An error that the user can fix; a command prints it in one line and exits with code 2."""


class ConfigError(UserError):
    """An invalid config or flag."""


class DataError(UserError):
    """Missing or invalid data."""


class CheckpointError(UserError):
    """A run directory or checkpoint that cannot be read or written."""


class Diverged(Exception):
    """Training diverged; a command prints it in one line and exits with code 3."""


class Interrupted(KeyboardInterrupt):
    """The process was interrupted by a signal; a command prints the message and exits with 128 + the signal's number.

    Args:
      number: number of the signal.
      message: message for the user.
    """

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.number = number

    @classmethod
    def after(cls, error: KeyboardInterrupt, message: str) -> "Interrupted":
        """Returns Interrupted for the signal of an earlier interrupt, with a message."""
        return cls(error.number if isinstance(error, Interrupted) else signal.SIGINT, message)
