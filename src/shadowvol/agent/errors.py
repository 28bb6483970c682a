"""How a verb ends when it does not end well: the exit codes of DESIGN 12, and the error that carries one.

Imports nothing of ours but the standard library: every command line loads it, and should be quick.
"""

import re

BAD_INPUT, REFUSED, NO_SUCH_VOLUME, FAILED, TIMED_OUT, UNREACHABLE = 2, 3, 4, 1, 5, 6
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}")


class VerbError(Exception):
    """A verb that ends with another exit code than 0. `text` is for the operator: one or two lines."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def check_name(name: str) -> str:
    """The name itself. Raises VerbError."""
    if not NAME.fullmatch(name):
        raise VerbError(
            BAD_INPUT,
            f"{name!r} is not a volume name: 1 to 48 of a-z 0-9 . _ -, the first one a letter or a digit",
        )
    return name


def no_such_volume(name: str) -> VerbError:
    return VerbError(NO_SUCH_VOLUME, f"there is no volume {name}; shadowvol status lists them")
