"""The exception for errors that the user can correct, and the detection of a full disk."""

import errno

DISK_FULL = "the disk is full. Everything saved before is intact; free some space, and run the same command to resume"


class InputError(Exception):
    """Error for an invalid configuration or input; `kd-train` prints it without a traceback and exits with 2.

    Args:
        message: the invalid value, and the allowed ones.
        key: the configuration key to change, if there is one.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message, key)
        self.message = message
        self.key = key

    def __str__(self) -> str:
        return self.message if self.key is None else f"{self.message}\n  change: {self.key}"


def one_of(value: object, allowed: list[str] | tuple[str, ...], key: str) -> InputError:
    """Return the error for a value that is not one of the allowed words."""
    import difflib

    close = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return InputError(f"'{value}' is not one of {', '.join(allowed)}.{hint}", key)


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes means that a disk or a quota is full.

    Writers report it differently: the system by error number, torch by a failed check while the system's error is handled,
    safetensors and tokenizers by message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "os error 28" in str(error) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
