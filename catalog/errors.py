"""The one error type that means: the user's call or set-up is wrong. The command line prints it as one line."""

from __future__ import annotations


class SetupError(Exception):
    """The call, the configuration or the machine's set-up is wrong (exit code 2).

    The message names dataset, key or file, and what to do about it.
    """
