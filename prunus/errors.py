"""Floor 0: the one exception that means 'the user can mend this'. The command line prints it and exits with code 2."""

from __future__ import annotations


class UserError(ValueError):
    """The rule, what was given, and what to do, in one sentence or two; never a bug of ours."""
