"""Errors that the command line prints as one line, without a stack trace."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user: the command line prints it as one line and exits with status 2."""

    everywhere = False
    """Whether every process of the run raised at this place."""


class RankError(UserError):
    """A mistake that only one process of several has met; its message names the process."""


class PeerFailed(Exception):
    """Another process of the run has failed and prints why; this one exits with status 1.

    The text, if any, says how this one noticed.
    """

    everywhere = False
    """Whether every process of the run raised at this place."""
