"""Variables of the environment that a cluster's YAML sets: names that are possible, and values that may be seen by others."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECRET = re.compile(r"(^|_)(TOKEN|SECRETS?|PASS(WORD|WD|PHRASE)|CREDENTIALS?|APIKEY|KEY(_ID)?)($|_)", re.IGNORECASE)
"""Whole words only: TOKENIZERS_PARALLELISM is no secret."""
_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


def check_name(name: str, set_by: Mapping[str, str]) -> None:
    """Refuse what is no name, or a name that is not the user's to set.

    Args:
        name: of a variable.
        set_by: prefix of names -> who sets these.

    Raises:
        ValueError: with the fix.
    """
    if not _NAME.match(name):
        raise ValueError(f"{name!r} is no name of a variable; names have letters, digits and `_`")
    for prefix, who in set_by.items():
        if name.startswith(prefix):
            raise ValueError(f"{name} is set by {who} itself; leave it out")


def check_value(name: str, text: str, seen_in: str, instead: str) -> None:
    """Refuse a value that looks like a secret by its name, or that no variable can hold.

    Args:
        name: of the variable.
        text: its value.
        seen_in: where others may see it, as "this file's values are written into the script".
        instead: what to do with a secret.

    Raises:
        ValueError: with the fix.
    """
    if _SECRET.search(name):
        raise ValueError(f"{name} looks like a secret, and {seen_in}; {instead}")
    if "\0" in text:
        raise ValueError(f"the value of {name} has a NUL character, which no variable can hold")
