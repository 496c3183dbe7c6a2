"""Errors that a person can cause, and the ways in which a process ends; a command turns each into one line."""

import signal


class UserError(Exception):
    """Something that the person at the keyboard can mend; a command prints it as one line and exits with code 2."""


class ConfigError(UserError):
    """A config, or a flag, that cannot be."""


class DataError(UserError):
    """Text that is missing or that cannot be used."""


class CheckpointError(UserError):
    """A run directory or checkpoint that cannot be read or written."""


class Diverged(Exception):
    """Training cannot go on for bad steps; a command prints it as one line and exits with code 3."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to leave; a command prints the message and exits with code 128 + the signal's number.

    Args:
      number: of the signal.
      message: for the person.
    """

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.number = number

    @classmethod
    def after(cls, error: KeyboardInterrupt, message: str) -> "Interrupted":
        """The same signal's, with a message."""
        return cls(error.number if isinstance(error, Interrupted) else signal.SIGINT, message)
