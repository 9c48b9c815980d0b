"""How a pool process calls a handler: on the event loop of its own, told of cancels, within its deadline."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from async_endpoints_celery.codec import encode_progress
from async_endpoints_celery.context import DONE, AsyncContext, JobCanceled
from async_endpoints_celery.errors import JobFailed, StoreUnavailable
from async_endpoints_celery.execution import JobTimedOut
from async_endpoints_celery.handlers import RegisteredHandler
from async_endpoints_celery.operations import Operations
from async_endpoints_celery.store import SyncStore

logger = logging.getLogger("async_endpoints_celery")

R = TypeVar("R")

#: Seconds between two looks at whether a running job shall be canceled.
CANCEL_CHECK_SECONDS = 0.5
#: Seconds past the handler's own deadline that Celery's limits wait: the handler's comes first where it can.
SOFT_LIMIT_GRACE = 2.0
HARD_LIMIT_GRACE = 10.0


class EventLoopThread:
    """The one event loop of a process, on which all its `async def` handlers run.

    It lives as long as the process, so that handlers can keep clients and connection pools.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._pid = os.getpid()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, name="async-endpoints-loop", daemon=True)
                self._thread.start()
            return self._loop

    def _run(self) -> None:
        loop = self._loop
        assert loop is not None
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """The coroutine's result. Interrupting the waiting thread cancels the coroutine."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def abandon(self) -> None:
        """Leave a loop that a handler blocks to itself; the next handler gets a new one."""
        with self._lock:
            self._loop = self._thread = None

    def stop(self) -> None:
        """End the loop and its threads; the next handler gets a new one."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None and self._pid == os.getpid():
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=5)


class RunningAttempt:
    """The attempt that a handler's context speaks for: its progress, and whether it shall stop."""

    def __init__(
        self,
        store: SyncStore,
        operations: Operations,
        job_id: str,
        fence: str,
        watch: CancelWatch | None = None,
    ) -> None:
        self.job_id = job_id
        self.fence = fence
        self._store = store
        self._operations = operations
        self._watch = watch
        self._canceled = threading.Event()
        self._next_look = 0.0

    def report_progress(self, percent: float, message: str | None) -> Awaitable[None]:
        if self._watch is None:
            # A sync handler. (Under gevent there seems to be a running loop: that of another greenlet.)
            self._write_progress(percent, message)
            return DONE
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a thread of the handler's own
            self._write_progress(percent, message)
            return DONE
        return loop.run_in_executor(None, self._write_progress, percent, message)

    def _write_progress(self, percent: float, message: str | None) -> None:
        try:
            canceling = self._store.run(
                self._operations.progress(self.job_id, fence=self.fence, progress=encode_progress(percent, message))
            )
        except StoreUnavailable as error:
            logger.warning("progress of job %s not stored: %s", self.job_id, error)
            return
        if canceling is not False:  # asked to stop, or no longer ours
            self._canceled.set()

    def cancellation_requested(self) -> bool:
        if self._canceled.is_set() or self._watch is not None:
            return self._canceled.is_set()
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + CANCEL_CHECK_SECONDS
            try:
                if self._store.run(self._operations.is_unwanted([(self.job_id, self.fence)]))[0]:
                    self._canceled.set()
            except StoreUnavailable:
                pass  # not knowing is no reason to stop
        return self._canceled.is_set()

    def cancel(self) -> None:
        self._canceled.set()


class CancelWatch:
    """Tells `async def` handlers to stop: one look at Redis per interval for all that run on the loop."""

    def __init__(self, store: SyncStore, operations: Operations) -> None:
        self._store = store
        self._operations = operations
        self._running: dict[RunningAttempt, asyncio.Task[Any]] = {}
        self._watching: asyncio.Task[None] | None = None

    def add(self, attempt: RunningAttempt, task: asyncio.Task[Any]) -> None:
        """Called on the loop, as everything here."""
        loop = asyncio.get_running_loop()
        if self._watching is not None and self._watching.get_loop() is not loop:
            self._running, self._watching = {}, None  # the loop before was abandoned
        self._running[attempt] = task
        if self._watching is None or self._watching.done():
            self._watching = loop.create_task(self._watch())

    def remove(self, attempt: RunningAttempt) -> None:
        self._running.pop(attempt, None)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while self._running:
            await asyncio.sleep(CANCEL_CHECK_SECONDS)
            attempts = list(self._running)
            query = self._operations.is_unwanted([(a.job_id, a.fence) for a in attempts])
            try:
                unwanted = await loop.run_in_executor(None, self._store.run, query)
            except StoreUnavailable:
                continue  # not knowing is no reason to stop
            except Exception:
                logger.exception("cannot look for canceled jobs, trying again")
                continue
            for attempt, stop in zip(attempts, unwanted, strict=True):
                # Once: a second CancelledError would fall into the handler's cleaning up.
                task = self._running.pop(attempt, None) if stop else None
                if task is not None:
                    attempt.cancel()
                    task.cancel()


class HandlerStopped(Exception):
    """An `async def` handler ended by cancellation: carried over the thread boundary, where CancelledError is not."""


class HandlerExited(Exception):
    """An `async def` handler raised SystemExit, which as it is would end the loop."""

    def __init__(self, exit_: SystemExit | KeyboardInterrupt) -> None:
        super().__init__(exit_)
        self.exit = exit_


async def run_async_handler(
    handler: RegisteredHandler,
    context: AsyncContext[Any],
    attempt: RunningAttempt,
    watch: CancelWatch,
) -> Any:
    """The handler's result.

    Raises:
        JobTimedOut: its deadline came.
        HandlerStopped: it was canceled because somebody wanted that.
    """
    task = asyncio.current_task()
    assert task is not None
    watch.add(attempt, task)
    try:
        async with asyncio.timeout(handler.timeout_seconds) as scope:
            result = await handler.call(context)
        if scope.expired():
            raise JobTimedOut  # it did not heed its cancellation
        return result
    except (SystemExit, KeyboardInterrupt) as error:
        raise HandlerExited(error) from error
    except TimeoutError as error:
        if scope.expired():
            raise JobTimedOut from error
        raise
    except asyncio.CancelledError as error:
        if isinstance(error, JobCanceled) or attempt.cancellation_requested():
            raise HandlerStopped from error
        raise
    finally:
        watch.remove(attempt)


def call_handler(
    loop: EventLoopThread, attempt: RunningAttempt, watch: CancelWatch
) -> Callable[[RegisteredHandler, AsyncContext[Any]], Any]:
    """How an attempt calls its handler: a sync one here and now, an async one on the process's loop."""

    def call(handler: RegisteredHandler, context: AsyncContext[Any]) -> Any:
        if not handler.is_async:
            return handler.call(context)
        try:
            return loop.run(run_async_handler(handler, context, attempt, watch))
        except HandlerStopped as error:
            raise JobCanceled from error
        except HandlerExited as error:
            raise error.exit from None
        except concurrent.futures.CancelledError:
            raise JobFailed(
                "CANCELLEDERROR", f"{handler.name} ended with an asyncio.CancelledError of its own", retryable=True
            ) from None

    return call


class HiddenBodies(logging.Filter):
    """Celery logs the body of a message whose task it does not know; a job's body holds the client's data."""

    def __init__(self, task_prefix: str) -> None:
        super().__init__()
        self._task_prefix = task_prefix

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if (
            isinstance(args, tuple)
            and len(args) == 4
            and isinstance(args[2], dict)
            and str(args[2].get("task", "")).startswith(self._task_prefix)
        ):
            record.args = (args[0], "<hidden>", args[2], args[3])
        return True
