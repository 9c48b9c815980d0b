"""What the Celery tasks of one `AsyncEndpoints` do, in whatever process they run: attempts, recovery, the sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from async_endpoints_celery.context import AsyncContext, JobCanceled
from async_endpoints_celery.drivers import SyncDriver
from async_endpoints_celery.errors import JobConflict, JobFailed, JobNotFound, StoreUnavailable
from async_endpoints_celery.execution import (
    Delivery,
    Ending,
    Executor,
    JobTimedOut,
    Outcome,
    timed_out,
)
from async_endpoints_celery.handlers import HandlerRegistry, RegisteredHandler
from async_endpoints_celery.leases import LeaseKeeper
from async_endpoints_celery.operations import Claimed, Operations, Refused
from async_endpoints_celery.recovery import Sweeper, lost_failure, overdue_failure
from async_endpoints_celery.settings import Settings
from async_endpoints_celery.worker import (
    SOFT_LIMIT_GRACE,
    CancelWatch,
    EventLoopThread,
    RunningAttempt,
    call_handler,
)

logger = logging.getLogger("async_endpoints_celery")


class WorkerRuntime:
    """What the tasks of one `AsyncEndpoints` work with, in whatever process they run."""

    def __init__(
        self,
        celery: Celery,
        settings: Settings,
        registry: HandlerRegistry,
        operations: Operations,
        open_driver: Callable[[], SyncDriver],
    ) -> None:
        self.celery = celery
        self.settings = settings
        self.registry = registry
        self.operations = operations
        self._open_driver = open_driver
        self.loop = EventLoopThread()

    # Made when a worker first needs them: a web process registers the same tasks and runs none.

    @cached_property
    def driver(self) -> SyncDriver:
        return self._open_driver()

    @cached_property
    def impatient_driver(self) -> SyncDriver:
        """For the worker's main process, which must not wait for Redis: what fails is left to the sweep."""
        return SyncDriver(self.driver.store, self.driver.dispatcher)

    @cached_property
    def executor(self) -> Executor:
        return Executor(self.operations, self.driver.dispatcher, self.settings)

    @cached_property
    def sweeper(self) -> Sweeper:
        return Sweeper(self.operations, self.driver.dispatcher, self.settings)

    @cached_property
    def keeper(self) -> LeaseKeeper:
        return LeaseKeeper(self.driver.store, self.operations, self.settings.job_claim_timeout_seconds)

    @cached_property
    def watch(self) -> CancelWatch:
        return CancelWatch(self.driver.store, self.operations)

    def prepare(self) -> None:
        """Make all of it now. Pool processes are forked at any time, and one that inherits a half-made part (with the
        lock of whoever was making it) would wait for ever."""
        _ = self.impatient_driver, self.executor, self.sweeper, self.keeper, self.watch

    # One attempt, in the pool.

    def run(self, delivery: Delivery, *, keep_lease: bool) -> tuple[Outcome, Ending] | Refused:
        """What became of the attempt, or why there was none.

        Args:
            keep_lease: renew it from here, for there is no worker's main process that would.
        """
        handler = self.registry.get(delivery.name)
        claimed = self.driver.run(self.executor.claim(delivery, handler))
        if isinstance(claimed, Refused):
            return claimed
        if not keep_lease:
            return self._attempt(delivery, claimed, handler)
        self.keeper.start()
        self.keeper.hold(delivery.job_id, delivery.runner)
        try:
            return self._attempt(delivery, claimed, handler)
        finally:
            self.keeper.drop(delivery.job_id, delivery.runner)

    def _attempt(
        self, delivery: Delivery, claimed: Claimed, handler: RegisteredHandler | None
    ) -> tuple[Outcome, Ending]:
        is_async = handler is not None and handler.is_async
        attempt = RunningAttempt(
            self.driver.store,
            self.operations,
            delivery.job_id,
            claimed.fence,
            watch=self.watch if is_async else None,
        )
        call = call_handler(self.loop, attempt, self.watch)

        def interruptible(handler: RegisteredHandler, context: AsyncContext[Any]) -> Any:
            try:
                return call(handler, context)
            except SoftTimeLimitExceeded as error:
                # The same signal tells of the deadline and of a cancel that was not heeded.
                if attempt.cancellation_requested():
                    raise JobCanceled from error
                raise JobTimedOut from error
            except SystemExit as error:
                if self.keeper.is_here:
                    # Threads, solo, gevent: there is no process of its own to end.
                    raise JobFailed("SYSTEMEXIT", f"{handler.name} called sys.exit({error.code!r})") from error
                raise

        with self._deadline(delivery, claimed, handler):
            outcome = self.executor.run(delivery, claimed, handler, attempt, interruptible)
        while True:
            try:
                return outcome, self.driver.run(self.executor.finish(delivery, claimed, handler, outcome))
            except SoftTimeLimitExceeded:
                # The handler is done; only the writing takes long, for Redis is away. Written twice is written once.
                continue

    @contextmanager
    def _deadline(self, delivery: Delivery, claimed: Claimed, handler: RegisteredHandler | None) -> Iterator[None]:
        """End the record on time where the pool cannot interrupt the handler; its late result is then refused."""
        if handler is None or not self.keeper.is_here:
            yield
            return

        def overdue() -> None:
            logger.warning("job %s (%s) is past its deadline and cannot be interrupted", delivery.job_id, handler.name)
            if handler.is_async:
                self.loop.abandon()  # it is blocked: other handlers shall not wait for it
            outcome = timed_out(handler, JobTimedOut())
            self.impatient_driver.run(self.executor.finish(delivery, claimed, handler, outcome))

        # An async handler is canceled by its loop, unless it blocks that.
        grace = SOFT_LIMIT_GRACE if handler.is_async else 0.0
        self.keeper.limit(delivery.runner, handler.timeout_seconds + grace, overdue)
        try:
            yield
        finally:
            self.keeper.unlimit(delivery.runner)

    # In the worker's main process.

    def lost(self, job_id: str, name: str, runner: str, *, requeued: bool) -> None:
        """The pool process that ran this job is gone: its lease ends now, and that costs a retry.

        Args:
            requeued: the message goes back to its queue by itself; otherwise the next sweep dispatches the job.
        """
        after = self.driver.dispatcher.redispatch_ms if requeued else 0
        try:
            outcome = self.driver.store.run(
                self.operations.recover(
                    job_id,
                    runner=runner,
                    returns=requeued,
                    recovery_limit=self.settings.recovery_maximum_retries,
                    lost_failure=lost_failure(name),
                    overdue_failure=overdue_failure(name),
                    dispatch_after_ms=after,
                )
            )
        except StoreUnavailable as error:
            logger.warning("job %s (%s) lost its process; the sweep recovers it: %s", job_id, name, error)
        else:
            logger.warning("job %s (%s) lost its process: %s", job_id, name, outcome)

    def give_back(self, job_id: str, name: str, runner: str) -> None:
        """This worker stops before the job is done. The message goes back to its queue, and it costs no retry."""
        try:
            given = self.driver.store.run(
                self.operations.release(job_id, runner=runner, dispatch_after_ms=self.driver.dispatcher.redispatch_ms)
            )
        except StoreUnavailable as error:
            logger.warning("job %s (%s) not given back; the sweep recovers it: %s", job_id, name, error)
        else:
            logger.info("job %s (%s) given back: %s", job_id, name, given)

    def unknown(self, job_id: str, name: str, args: list[Any], worker: str) -> None:
        """A job for which no handler is registered here: claim it and fail it."""
        attempt, request, copy = args
        delivery = Delivery(job_id, name, attempt, request, copy, uuid4().hex, worker)
        try:
            claimed = self.impatient_driver.run(self.executor.claim(delivery, None))
            if isinstance(claimed, Claimed):
                outcome = self.executor.run(delivery, claimed, None)
                self.impatient_driver.run(self.executor.finish(delivery, claimed, None, outcome))
        except StoreUnavailable as error:
            logger.warning("job %s has no handler; the sweep will try it again: %s", job_id, error)

    def revoked(self, job_id: str, name: str, runner: str) -> None:
        """Somebody revoked the Celery task, in Flower for instance: the job is canceled."""
        store, operations = self.driver.store, self.operations
        try:
            with suppress(JobConflict, JobNotFound):  # it is over
                if not store.run(operations.cancel(job_id, nonce=runner)):
                    # Its process was killed, or will be: nobody is left to acknowledge.
                    store.run(operations.release(job_id, runner=runner, dispatch_after_ms=0))
        except StoreUnavailable as error:
            logger.warning("job %s (%s) was revoked and could not be canceled: %s", job_id, name, error)

    def sweep(self) -> dict[str, int]:
        swept = self.driver.run(self.sweeper.sweep())
        return {
            "dispatched": swept.dispatched,
            "recovered": swept.recovered,
            "pruned": swept.pruned,
        }
