"""From a job to its Celery message in the broker.

Celery and kombu route, serialise, sign and send their signals, as for any task; only the last write differs:

* the broker is the store's own Redis: kombu's `Producer.batch()` hands over the final commands of the publication
  instead of sending them, and the script that stores the job runs them. Record and message are one atomic step.
* any other broker: the job is stored first, its place among the waiting jobs being its outbox entry; then the message
  is published under a deadline. What was not confirmed is published again by the sweep.
* eager mode: there is no message, the task is applied in place.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from celery import Celery

from async_endpoints_celery.broker import PUBLISH_WITHIN, Publisher, Sendable, broker_server
from async_endpoints_celery.codec import milliseconds
from async_endpoints_celery.errors import ConfigurationError, StoreUnavailable
from async_endpoints_celery.operations import StoredRequest
from async_endpoints_celery.scripting import Publication
from async_endpoints_celery.servers import Server
from async_endpoints_celery.settings import Settings

R = TypeVar("R")

#: Seconds an event loop waits for a thread to build or publish a message, queueing included.
WAIT_FOR_THREAD = PUBLISH_WITHIN + 0.4
#: Seconds before the sweep publishes what was not confirmed; well above PUBLISH_WITHIN.
OUTBOX_SECONDS = 5.0
#: Seconds before the sweep first doubts the message of a waiting job, at least.
MIN_REDISPATCH_SECONDS = 10.0
#: kombu's default visibility timeout in seconds: a message held longer than this is delivered again.
DEFAULT_VISIBILITY_TIMEOUT = 3600.0


class Mode(Enum):
    """How messages reach the broker."""

    ATOMIC = "atomic"
    OUTBOX = "outbox"
    EAGER = "eager"


@dataclass(frozen=True, slots=True)
class Message:
    """One attempt of a job, as it is published. `countdown` is in seconds."""

    job_id: str
    name: str
    request: str
    attempt: int = 1
    retries: int = 0
    countdown: float | None = None
    #: The number of this message among those of its attempt.
    copy: int = 0

    @classmethod
    def again(cls, stored: StoredRequest) -> Message:
        """Another message of the attempt that a stored job waits for."""
        return cls(stored.id, stored.name, stored.request, stored.attempt, stored.retries, copy=stored.next_copy)


# What a use case asks the dispatcher for (see drivers.py).


@dataclass(frozen=True, slots=True)
class Capture:
    """Build the message and hand over its commands: a `Publication`, empty where the mode has none."""

    message: Message


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish what the store did not: True when the broker confirmed it."""

    message: Message


class Dispatcher:
    """Publishes the messages of one Celery app's jobs. Nothing of it survives a fork; it is made anew."""

    def __init__(self, celery: Celery, server: Server, settings: Settings) -> None:
        self.celery = celery
        self.settings = settings
        self._server = server
        self._publisher: Publisher | None = None

    @property
    def mode(self) -> Mode:
        if self.celery.conf.task_always_eager:
            return Mode.EAGER
        return Mode.ATOMIC if self._same_redis() else Mode.OUTBOX

    def _same_redis(self) -> bool:
        broker = broker_server(self.celery)
        return broker is not None and broker.identity == self._server.identity

    @property
    def publisher(self) -> Publisher:
        if self._publisher is None or self._publisher.pid != os.getpid():
            self._publisher = Publisher(self.celery)
        return self._publisher

    def close(self) -> None:
        if self._publisher is not None and self._publisher.pid == os.getpid():
            self._publisher.close()
        self._publisher = None

    def task_name(self, name: str) -> str:
        return f"{self.settings.task_prefix}{name}"

    # How long the sweep keeps its hands off a job that was just made waiting.

    def countdown(self, delay: float) -> float | None:
        """Seconds for Celery's own countdown, or None: run now, or wait in Redis for the sweep."""
        return delay if 0 < delay <= self._longest_countdown() else None

    def dispatch_after_ms(self, delay: float = 0.0) -> int:
        """Milliseconds past the job's due time after which the sweep publishes its message (again)."""
        if delay > 0 and self.countdown(delay) is None:
            return 0
        return milliseconds(OUTBOX_SECONDS) if self.mode is Mode.OUTBOX else self.redispatch_ms

    @property
    def redispatch_ms(self) -> int:
        return milliseconds(max(2 * self.settings.recovery_check_interval_seconds, MIN_REDISPATCH_SECONDS))

    def _longest_countdown(self) -> float:
        options = self.celery.conf.broker_transport_options or {}
        visibility = float(options.get("visibility_timeout", DEFAULT_VISIBILITY_TIMEOUT))
        return min(self.settings.message_countdown_max_seconds, visibility / 2)

    # Performing the two steps, from a thread and from an event loop.

    def capture(self, message: Message) -> Publication:
        self._check_eager(message)
        return self.publisher.capture(self._sendable(message)) if self._is_captured(message) else ()

    async def capture_async(self, message: Message) -> Publication:
        self._check_eager(message)
        if not self._is_captured(message):
            return ()
        publisher, sendable = self.publisher, self._sendable(message)
        publication = publisher.capture_at_once(sendable)
        if publication is not None:
            return publication
        return await _in_thread(publisher.builders, publisher.capture, sendable)

    def publish(self, message: Message) -> bool:
        if self.mode is Mode.EAGER:
            self._apply(message)  # delays do not count here, as they do not for Celery
        elif self.mode is Mode.OUTBOX and not self._stays_in_redis(message):
            return self.publisher.publish(self._confirmable(message))
        return False

    async def publish_async(self, message: Message) -> bool:
        if self.mode is Mode.EAGER:
            await asyncio.to_thread(self._apply, message)
        elif self.mode is Mode.OUTBOX and not self._stays_in_redis(message):
            try:
                return await _in_thread(self.publisher.publishers, self.publisher.publish, self._confirmable(message))
            except StoreUnavailable:
                return False
        return False

    def _is_captured(self, message: Message) -> bool:
        return self.mode is Mode.ATOMIC and not self._stays_in_redis(message)

    def _stays_in_redis(self, message: Message) -> bool:
        return message.countdown is not None and message.countdown > self._longest_countdown()

    def _sendable(self, message: Message) -> Sendable:
        label = f"{message.name} {message.job_id}"
        options: dict[str, Any] = {
            "task_id": message.job_id,
            "retries": message.retries,
            # What logs, events and Flower show; the real arguments hold the client's data.
            "argsrepr": label,
            "kwargsrepr": "{}",
            # The step that stores the job is tried again as a whole, by whoever asked for it.
            "retry": False,
        }
        if message.countdown:
            options["countdown"] = message.countdown
        return Sendable(self.task_name(message.name), (message.attempt, message.request, message.copy), options)

    def _confirmable(self, message: Message) -> Sendable:
        sendable = self._sendable(message)
        sendable.options["confirm_timeout"] = PUBLISH_WITHIN
        return sendable

    def _check_eager(self, message: Message) -> None:
        """Before anything is stored."""
        if self.mode is Mode.EAGER and self.task_name(message.name) not in self.celery.tasks:
            raise ConfigurationError(
                f"task_always_eager runs jobs in this process, and it has no handler {message.name!r}"
            )

    def _apply(self, message: Message) -> None:
        task = self.celery.tasks[self.task_name(message.name)]
        # The record says how the job went; `task_eager_propagates` is about the caller's own tasks.
        task.apply(
            (message.attempt, message.request, message.copy),
            task_id=message.job_id,
            retries=message.retries,
            throw=False,
        )


async def _in_thread(executor: Executor, function: Callable[[Sendable], R], sendable: Sendable) -> R:
    """Raises StoreUnavailable when the thread has not answered in time; it may still finish its work."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(WAIT_FOR_THREAD):
            return await loop.run_in_executor(executor, function, sendable)
    except TimeoutError as error:
        raise StoreUnavailable(f"the broker did not answer within {WAIT_FOR_THREAD} s") from error
