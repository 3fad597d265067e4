"""The one error a user is meant to see, and the search for the name they meant."""

import difflib
from collections.abc import Iterable


class BadInput(ValueError):
    """Something the user can put right: the message names value, limit and remedy in one sentence.

    The entry points print the message alone and leave with exit code 2; every other exception is a defect of the
    program and keeps its traceback.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of `names`, or an empty string when none is close."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.55)
    return f" Did you mean '{found[0]}'?" if found else ""
