"""Request headers with a grammar of their own: `Prefer: wait=N` (RFC 7240) and `Idempotency-Key`."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from uuid import UUID

#: A structured-field string (RFC 8941, 3.3.3), as the draft has it.
_QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5B\x5D-\x7E]|\\["\\])*)"')
#: What is commonly sent instead.
_BARE = re.compile(r"[\x21\x23-\x2B\x2D-\x7E]+")
MAX_KEY_CHARS = 255
#: One of a comma-separated list whose quoted strings may have commas in them.
_PREFERENCE = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^,])+')
_WAIT = re.compile(r"""\s*wait\s*=\s*(?:([0-9]{1,99})|"([0-9]{1,99})")\s*(?:;|$)""", re.IGNORECASE)


def preferred_wait(values: Sequence[str]) -> int | None:
    """The seconds of `wait=N`, or None. A preference that is not understood is ignored (RFC 7240, 2)."""
    for value in values:
        for preference in _PREFERENCE.findall(value):
            wait = _WAIT.match(preference)
            if wait is not None:
                return int(wait[1] or wait[2])
    return None


def idempotency_key(values: Sequence[str]) -> str | None:
    """The key of the `Idempotency-Key` header.

    Raises:
        ValueError: it is sent twice, or is no string of 1 to 255 printable characters.
    """
    if not values:
        return None
    if len(values) > 1:
        raise ValueError("Idempotency-Key was sent more than once")
    text = values[0].strip()
    quoted = _QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text if _BARE.fullmatch(text) else ""
    if not 0 < len(key) <= MAX_KEY_CHARS:
        raise ValueError(
            f"Idempotency-Key {text[:80]!r} is not a quoted string of 1 to {MAX_KEY_CHARS} printable characters"
        )
    return key


def derived_id(secret: str, owner: str | None, method: str, path: str, key: str) -> UUID:
    """The id of the job that a key stands for, so that two requests with the same key meet at the same record.

    The deployment's secret keeps ids unguessable where keys are not.
    """
    scope = "\0".join(["" if owner is None else f"={owner}", method, path, key])
    digest = hmac.digest(secret.encode(), scope.encode("utf-8", "surrogatepass"), hashlib.sha256)
    return UUID(bytes=digest[:16], version=4)
