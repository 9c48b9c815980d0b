"""Use cases are generators that ask for their I/O; the two drivers here answer, from an event loop or from a thread.

So each use case is written once, touches no socket itself, and a test can play its driver.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from async_endpoints_celery.dispatch import Capture, Dispatcher, Publish
from async_endpoints_celery.scripting import Call, Query
from async_endpoints_celery.store import AsyncStore, SyncStore

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Wait:
    """Let some seconds pass."""

    seconds: float


Step: TypeAlias = Call[Any] | Query[Any] | Capture | Publish | Wait
#: Yields steps, is sent their answers, returns R.
Flow: TypeAlias = Generator[Step, Any, R]


class AsyncDriver:
    """Runs use cases on the running event loop."""

    def __init__(self, store: AsyncStore, dispatcher: Dispatcher) -> None:
        self.store = store
        self.dispatcher = dispatcher

    async def run(self, flow: Flow[R]) -> R:
        try:
            step = next(flow)
            while True:
                try:
                    answer = await self._perform(step)
                except Exception as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def _perform(self, step: Step) -> Any:
        match step:
            case Capture(message):
                return await self.dispatcher.capture_async(message)
            case Publish(message):
                return await self.dispatcher.publish_async(message)
            case Wait(seconds):
                return await asyncio.sleep(seconds)
            case _:
                return await self.store.run(step)


class SyncDriver:
    """Runs use cases in the calling thread.

    Args:
        patience: seconds each step may wait for Redis to come back.
    """

    def __init__(self, store: SyncStore, dispatcher: Dispatcher, *, patience: float = 0.0) -> None:
        self.store = store
        self.dispatcher = dispatcher
        self.patience = patience

    def run(self, flow: Flow[R]) -> R:
        try:
            step = next(flow)
            while True:
                try:
                    answer = self._perform(step)
                except Exception as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _perform(self, step: Step) -> Any:
        match step:
            case Capture(message):
                return self.dispatcher.capture(message)
            case Publish(message):
                return self.dispatcher.publish(message)
            case Wait(seconds):
                return time.sleep(seconds)
            case _:
                return self.store.run(step, patience=self.patience)
