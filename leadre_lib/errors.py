"""The errors that a user is meant to read. Knows nothing of what raises them."""

from __future__ import annotations


class LeadreError(Exception):
    """Something that the user can mend; the message names it and the mend."""


class NothingToDo(LeadreError):
    """The work does not apply to this day or source; the message is the reason. Not a failure."""
