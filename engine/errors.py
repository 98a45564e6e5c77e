"""Errors that the command line prints as one line, without a stack trace."""

from __future__ import annotations


class UserError(Exception):
    """An error of the user: the command line prints it as one line and exits with status 2."""

    everywhere = False
    """Whether every process of the run raised at this place."""


class RankError(UserError):
    """A UserError that occurs in only one of several processes; its message names the process."""


class PeerFailed(Exception):
    """Raised if another process of the run has failed, which prints the reason; this process exits with status 1.

    The optional text describes how this process noticed.
    """

    everywhere = False
    """Whether every process of the run raised at this place."""
