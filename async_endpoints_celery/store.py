"""The drivers that run operations on Redis: one for event loops, one for threads.

No client crosses a fork or an event loop: each process has its own for threads, each loop its own.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis.exceptions import (
    NoScriptError,
)

from async_endpoints_celery.errors import StoreUnavailable
from async_endpoints_celery.scripting import Call, Query
from async_endpoints_celery.servers import ANSWER_WITHIN, Server, unavailable

R = TypeVar("R")


class SyncStore:
    """Runs operations from threads."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._client: redis.Redis | None = None
        self._pid = 0

    @property
    def client(self) -> redis.Redis:
        if self._client is None or self._pid != os.getpid():
            self._client, self._pid = self.server.client(), os.getpid()
        return self._client

    def run(self, step: Call[R] | Query[R], *, patience: float = 0.0) -> R:
        """The answer of one operation.

        Args:
            patience: seconds to go on trying while Redis is away. A worker has some: its handler's result is
                worth waiting for; a web client has none.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        give_up = time.monotonic() + patience
        pause = 0.05
        while True:
            try:
                with unavailable():
                    reply = self._send(step)
                break
            except StoreUnavailable:
                if time.monotonic() + pause > give_up:
                    raise
                time.sleep(pause)
                pause = min(pause * 2, 1.0)
        return step.read(reply)

    def _send(self, step: Call[Any] | Query[Any]) -> Any:
        if isinstance(step, Query):
            with self.client.pipeline(transaction=False) as pipe:
                for command in step.commands:
                    pipe.execute_command(*command)
                return pipe.execute()
        keys_and_args = (len(step.keys), *step.keys, *step.args)
        try:
            return self.client.execute_command("EVALSHA", step.script.sha, *keys_and_args)
        except NoScriptError:
            return self.client.execute_command("EVAL", step.script.source, *keys_and_args)

    def close(self) -> None:
        if self._client is not None and self._pid == os.getpid():
            self._client.close()
        self._client = None


class AsyncStore:
    """Runs operations from event loops."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopClient] = weakref.WeakKeyDictionary()

    @property
    def client(self) -> redis.asyncio.Redis:
        loop = asyncio.get_running_loop()
        held = self._clients.get(loop)
        if held is None or held.pid != os.getpid():
            held = self._clients[loop] = _LoopClient(self.server.async_client())
        return held.client

    async def run(self, step: Call[R] | Query[R]) -> R:
        """The answer of one operation, within `ANSWER_WITHIN` seconds.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        try:
            with unavailable():
                async with asyncio.timeout(ANSWER_WITHIN):
                    reply = await self._send(step)
        except TimeoutError as error:
            raise StoreUnavailable(f"Redis did not answer within {ANSWER_WITHIN} s") from error
        return step.read(reply)

    async def _send(self, step: Call[Any] | Query[Any]) -> Any:
        if isinstance(step, Query):
            if len(step.commands) == 1:
                return [await self.client.execute_command(*step.commands[0])]
            async with self.client.pipeline(transaction=False) as pipe:
                for command in step.commands:
                    pipe.execute_command(*command)
                return await pipe.execute()
        keys_and_args = (len(step.keys), *step.keys, *step.args)
        try:
            return await self.client.execute_command("EVALSHA", step.script.sha, *keys_and_args)
        except NoScriptError:
            return await self.client.execute_command("EVAL", step.script.source, *keys_and_args)

    async def close(self) -> None:
        """Closes the running loop's connections."""
        held = self._clients.pop(asyncio.get_running_loop(), None)
        if held is not None and held.pid == os.getpid():
            await held.client.aclose(close_connection_pool=True)


@dataclass(frozen=True, slots=True)
class _LoopClient:
    client: redis.asyncio.Redis
    pid: int = field(default_factory=os.getpid)
