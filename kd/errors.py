"""The one exception for what a user can put right, and how to know a full disk."""

import errno

DISK_FULL = "the disk is full. What was saved before is whole; free some space, and the same command goes on from it"


class InputError(Exception):
    """A configuration or input that cannot work; `kd-train` prints it without a traceback and exits with 2.

    Args:
        message: what was found, and what is allowed.
        key: the configuration key to change, where there is one.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message, key)
        self.message = message
        self.key = key

    def __str__(self) -> str:
        return self.message if self.key is None else f"{self.message}\n  change: {self.key}"


def one_of(value: object, allowed: list[str] | tuple[str, ...], key: str) -> InputError:
    """The error for a word that is not in a closed list."""
    import difflib

    close = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return InputError(f"'{value}' is not one of {', '.join(allowed)}.{hint}", key)


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that a disk or a quota is full.

    Each writer says it in its own way: the system by number, torch by a failed check while the system's error is handled,
    safetensors and tokenizers in words.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "os error 28" in str(error) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
