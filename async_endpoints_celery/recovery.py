"""Use case: the sweep. It publishes due and lost messages, recovers the jobs of dead workers and prunes the indices.

Any number of sweepers at once is harmless, and one that dies mid-way leaves nothing behind: each step is a script that
checks, by the clock of Redis, whether it is still due.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from async_endpoints_celery.codec import encode_error, milliseconds
from async_endpoints_celery.dispatch import Capture, Dispatcher, Message
from async_endpoints_celery.drivers import Flow, Wait
from async_endpoints_celery.errors import JOB_TIMEOUT, WORKER_LOST, AsyncEndpointError, StoreUnavailable
from async_endpoints_celery.operations import ROUND_SECONDS, Due, Operations, StoredRequest
from async_endpoints_celery.outbox import hand_over
from async_endpoints_celery.scripting import Publication
from async_endpoints_celery.settings import Settings

logger = logging.getLogger("async_endpoints_celery")

#: Jobs handled between two looks at what is due.
BATCH = 100
#: Seconds within which a live worker that reaches Redis renews its leases again, with room to spare.
RENEWAL_SECONDS = 4 * ROUND_SECONDS
#: Batches of one sweep: what is left waits for the next one, so that a sweep has an end.
MAX_BATCHES = 50


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did, in jobs."""

    dispatched: int = 0
    recovered: int = 0
    pruned: int = 0


def lost_failure(name: str) -> str:
    """The stored error of a job whose worker died."""
    return encode_error(
        AsyncEndpointError(
            code=WORKER_LOST,
            message=f"the worker that ran {name} was lost: it was killed, or could not reach Redis, for longer than"
            " its lease (job_claim_timeout_seconds)",
        )
    )


def overdue_failure(name: str) -> str:
    """The stored error of a job that took longer than it may."""
    return encode_error(
        AsyncEndpointError(
            code=JOB_TIMEOUT, message=f"{name} took longer than its timeout (timeout_seconds of the handler)"
        )
    )


class Sweeper:
    """The sweep as a flow for a driver."""

    def __init__(self, operations: Operations, dispatcher: Dispatcher, settings: Settings) -> None:
        self._operations = operations
        self._dispatcher = dispatcher
        self._settings = settings

    def sweep(self) -> Flow[Swept]:
        """One pass over everything that is due now."""
        dispatched = recovered = pruned = 0
        certain = None
        for _ in range(MAX_BATCHES):
            due: Due = yield self._operations.due(BATCH)
            running = due.running if self._settings.enable_distributed_job_recovery else []
            if not due.waiting and not running:
                break
            if certain is None:
                certain = self._redis_was_there(due)
            if running and not certain:
                yield Wait(RENEWAL_SECONDS)
                certain = True
            recovered += yield from self._recover_running(running)
            dispatched += yield from self._dispatch_waiting(due.waiting)
        for _ in range(MAX_BATCHES):
            forgotten = yield self._operations.prune(BATCH)
            pruned += forgotten
            if forgotten < BATCH:
                break
        if dispatched or recovered:
            logger.info("sweep: %d jobs dispatched, %d recovered", dispatched, recovered)
        return Swept(dispatched, recovered, pruned)

    def _redis_was_there(self, due: Due) -> bool:
        """Whether a lease that ended shows a dead worker, for Redis was reachable all the time it took to end.

        When Redis was away for that long, the leases of live workers have ended too; they renew them as soon as they
        can. A sweep since the last renewal that a live worker can have made proves that it was not away.
        """
        lease_ms = milliseconds(self._settings.job_claim_timeout_seconds)
        return due.last_sweep_ms_ago < lease_ms - milliseconds(2 * ROUND_SECONDS)

    def _dispatch_waiting(self, due: list[str]) -> Flow[int]:
        after, dispatched = self._dispatcher.redispatch_ms, 0
        if not due:
            return 0
        verdicts = yield self._operations.judge(due, dispatch_after_ms=after)
        needed = [job_id for job_id, verdict in zip(due, verdicts, strict=True) if verdict == "DISPATCH"]
        stored = yield self._operations.stored_requests(needed)
        for job_id in needed:
            dispatched += yield from self._redispatch(job_id, stored[job_id], after)
        return dispatched

    def _redispatch(self, job_id: str, stored: StoredRequest | None, after: int) -> Flow[int]:
        if stored is None:
            return 0  # deleted by hand since it was judged
        message = Message.again(stored)
        publication = yield from self._captured(message)
        if publication is None:
            yield self._operations.postpone(job_id, delay_ms=after)
            return 0
        done = yield self._operations.redispatch(
            job_id,
            attempt=stored.attempt,
            copy=message.copy,
            dispatch_after_ms=after,
            publication=publication,
        )
        if done:
            yield from hand_over(self._operations, self._dispatcher, message)
        return int(done)

    def _captured(self, message: Message) -> Flow[Publication | None]:
        """The message's commands; None if it cannot be built. One job's bad route must not stop the sweep for all."""
        try:
            publication: Publication = yield Capture(message)
        except StoreUnavailable:
            raise
        except Exception:
            logger.exception("the message of job %s (%s) cannot be built", message.job_id, message.name)
            return None
        return publication

    def _recover_running(self, expired: list[str]) -> Flow[int]:
        recovered = 0
        stored = yield self._operations.stored_requests(expired)
        for job_id in expired:
            recovered += yield from self._recover(job_id, stored[job_id])
        return recovered

    def _recover(self, job_id: str, stored: StoredRequest | None) -> Flow[int]:
        name = stored.name if stored else "the job"
        message = Message(job_id, name, stored.request, stored.attempt, retries=stored.retries + 1) if stored else None
        # Without a message it is recovered all the same: it then waits in the outbox.
        publication = ((yield from self._captured(message)) if message else None) or ()
        outcome = yield self._operations.recover(
            job_id,
            runner="",
            returns=False,
            recovery_limit=self._settings.recovery_maximum_retries,
            lost_failure=lost_failure(name),
            overdue_failure=overdue_failure(name),
            dispatch_after_ms=self._dispatcher.dispatch_after_ms(),
            publication=publication,
        )
        if outcome == "QUEUED" and message:
            yield from hand_over(self._operations, self._dispatcher, message)
        if outcome in ("QUEUED", "FAILED"):
            logger.warning("job %s (%s) lost its worker: now %s", job_id, name, outcome.title())
        return int(outcome in ("QUEUED", "FAILED", "CANCELED"))
