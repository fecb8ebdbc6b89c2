"""The exception for errors that the user can correct, the keys that it names, and the detection of a full disk."""

import errno
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

DISK_FULL = "the disk is full. Everything saved before is intact; free some space, and run the same command to resume"


class InputError(Exception):
    """Error for an invalid configuration or input; `kd-train` prints it without a traceback and exits with 2.

    A class that a configuration instantiates does not know the key of its node. It names the argument, as in
    `InputError("tau=0 must be positive", "tau")`, and whoever instantiates it puts the key of the node in front; see
    `prefix_error_keys`. A key that does not start with an argument of the class is absolute and stays as it is: `student.heads`
    in an error of a method about the student.

    Args:
        message: the invalid value, and the allowed ones.
        key: the argument, or the configuration key to change. None if there is none; in a class that a configuration
            instantiates, for the class itself.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message, key)
        self.message = message
        self.key = key

    def __str__(self) -> str:
        return self.message if self.key is None else f"{self.message}\n  change: {self.key}"


QUOTED = r"""(?<!\w)'(?:[^'\\]|\\.|'(?=\w))*'(?!\w)|(?<!\w)"(?:[^"\\]|\\.)*"(?!\w)"""
"""Text in quotes; an apostrophe inside a word is not a quote."""


@contextmanager
def prefix_error_keys(prefix: str, names: Collection[str]) -> Iterator[None]:
    """Put the key of a node before the arguments that errors of its class name.

    In the message these are an argument before an equals sign, and the error's key at the beginning. Text in quotes stays as
    it is, because it may be the user's; but an argument before `=[` or `={` is an override that is quoted for the shell. An
    error without a key gets the key of the node.

    Args:
        prefix: key of the node.
        names: arguments of the class. A key that does not start with one of them stays as it is.

    Raises:
        InputError: in place of one that names an argument.

    >>> with prefix_error_keys("method", ["tau", "steps"]):
    ...     raise InputError("tau=0 needs steps=1", "tau")
    Traceback (most recent call last):
    kd.errors.InputError: method.tau=0 needs method.steps=1
      change: method.tau
    """
    try:
        yield
    except InputError as error:
        key = error.key
        if key is not None and key.partition(".")[0] not in names:
            raise
        message = with_keys(error.message, prefix, names, key)
        raise InputError(message, prefix if key is None else f"{prefix}.{key}") from error


def with_keys(text: str, prefix: str, names: Collection[str], begin: str | None = None) -> str:
    """Return a text with the key of a node before the arguments that it names; see `prefix_error_keys`.

    Args:
        text: text about an object that a configuration instantiates.
        prefix: key of its node.
        names: arguments of its class.
        begin: a key that the text may begin with; None if it does not.

    >>> with_keys("padding=reference averages over padding", "method", ["padding"])
    'method.padding=reference averages over padding'
    """
    start = "(?!)" if begin is None else rf"^{re.escape(begin)}(?!\w)"
    arguments = "|".join(map(re.escape, names)) or "(?!)"

    def prefixed(found: re.Match[str]) -> str:
        if not found["quoted"]:
            return f"{prefix}.{found[0]}"
        return re.sub(rf"^(['\"])(?=(?:{arguments})=[\[{{])", rf"\g<1>{prefix}.", found[0])

    return re.sub(rf"(?P<quoted>{QUOTED})|{start}|(?<![\w.])(?:{arguments})(?==)", prefixed, text)


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
