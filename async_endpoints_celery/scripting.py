"""Calls to Redis without any I/O: scripts, plain commands, and how to read their replies.

A script names its arguments in its header ("-- ARGS …"); what the header says is what is sent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Generic, TypeVar

from async_endpoints_celery.errors import AsyncEndpointsError

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a publication, as kombu hands it over: ("lpush", queue, message)."""

    name: str
    key: str
    args: tuple[str | bytes | int, ...]


#: The commands that put one Celery message into the broker; empty when the broker is not the store's Redis.
Publication = tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, its SHA-1 and, for those that move one job, the names of its arguments."""

    name: str
    source: str
    sha: str
    arguments: tuple[str, ...]

    @staticmethod
    @cache
    def load(name: str) -> Script:
        folder = files("async_endpoints_celery") / "scripts"
        body = (folder / f"{name}.lua").read_text(encoding="utf-8")
        header = re.search(r"^-- ARGS(.*)$", body, re.MULTILINE)
        arguments = tuple(header[1].split()) if header else ()
        if header:
            body = (folder / "prelude.lua").read_text(encoding="utf-8") + _bind(arguments) + body
        return Script(name, body, hashlib.sha1(body.encode()).hexdigest(), arguments)


def _bind(arguments: tuple[str, ...]) -> str:
    values = ", ".join(f"ARGV[{n}]" for n in range(3, len(arguments) + 3))
    names = f"local {', '.join(arguments)} = {values}\n" if arguments else ""
    return f"{names}local FIRST_COMMAND = {len(arguments) + 3}\n"


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One round trip: run `script` and read its reply."""

    script: Script
    keys: Sequence[str]
    args: Sequence[str | bytes | int]
    read: Callable[[Any], R]


@dataclass(frozen=True, slots=True)
class Query(Generic[R]):
    """One round trip: plain commands, sent together, and how to read their replies."""

    commands: Sequence[tuple[str | int, ...]]
    read: Callable[[list[Any]], R]


def pairs(fields: Sequence[str] | Mapping[str, str]) -> Mapping[str, str]:
    """HGETALL as a mapping: a script hands on the flat list of RESP2, a client may have made a dict of it."""
    if isinstance(fields, Mapping):
        return fields
    return dict(zip(fields[::2], fields[1::2], strict=True))


def scored(reply: Sequence[Any]) -> list[tuple[str, str]]:
    """ZRANGE … WITHSCORES, flat as RESP2 has it or in pairs as RESP3 does."""
    flat = [value for entry in reply for value in (entry if isinstance(entry, (list, tuple)) else (entry,))]
    return [(member, f"{float(score):.0f}") for member, score in zip(flat[::2], flat[1::2], strict=True)]


def unexpected(script: str, reply: Any) -> AsyncEndpointsError:
    return AsyncEndpointsError(f"script {script}.lua gave an unexpected reply: {reply!r}")
