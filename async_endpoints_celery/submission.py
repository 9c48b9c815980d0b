"""Use case: submit a job, and what people do with jobs afterwards: read, list, cancel, retry."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from async_endpoints_celery.codec import CapturedRequest, milliseconds, moment
from async_endpoints_celery.dispatch import Capture, Dispatcher, Message, Mode
from async_endpoints_celery.drivers import Flow
from async_endpoints_celery.errors import JobNotFound, StoreUnavailable
from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.operations import Operations, Page, not_retryable
from async_endpoints_celery.outbox import hand_over

logger = logging.getLogger("async_endpoints_celery")

#: Records looked at for one page of a list, at most: a rare filter gives a short page with a cursor, not a long wait.
MAX_SCANNED = 1_000
_BATCH = 100


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to be. Times in seconds."""

    job_id: UUID
    name: str
    request: CapturedRequest
    fingerprint: str
    owner: str | None
    max_retries: int
    retention_seconds: float
    delay_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The job's record; `replayed` when an earlier submission had made it."""

    job: Job
    replayed: bool = False


class Submitter:
    """The use cases around one store and one dispatcher; each method is a flow for a driver."""

    def __init__(self, operations: Operations, dispatcher: Dispatcher, queue_limit: int | None) -> None:
        self._operations = operations
        self._dispatcher = dispatcher
        self._queue_limit = queue_limit

    def submit(self, submission: Submission) -> Flow[Accepted]:
        """Store the job together with its message.

        Raises:
            JobConflict: another job has this id.
            QueueFull: too many jobs wait.
            StoreUnavailable: no answer; carries the job's id, with which repeating is safe.
        """
        job_id, text = str(submission.job_id), submission.request.encode()
        delay = submission.delay_seconds
        message = Message(job_id, submission.name, text, countdown=delay or None)
        try:
            publication = yield Capture(message)
            submitted = yield self._operations.submit(
                job_id,
                name=submission.name,
                owner=submission.owner,
                fingerprint=submission.fingerprint,
                nonce=_nonce(),
                max_retries=submission.max_retries,
                retention_ms=milliseconds(submission.retention_seconds),
                queue_limit=self._queue_limit,
                request=text,
                delay_ms=milliseconds(delay),
                dispatch_after_ms=self._dispatcher.dispatch_after_ms(delay),
                publication=publication,
            )
        except StoreUnavailable as error:
            error.job_id = job_id
            raise
        about = {"job_id": job_id, "job_name": submission.name}
        if submitted.replayed:
            logger.info("job %s (%s) was submitted before", job_id, submission.name, extra=about)
            return Accepted(submitted.job, replayed=True)
        logger.info("job %s (%s) submitted", job_id, submission.name, extra=about)
        yield from hand_over(self._operations, self._dispatcher, message)
        if self._dispatcher.mode is Mode.EAGER:
            job = yield self._operations.get(job_id)
            return Accepted(job)
        return Accepted(_new_job(submission, submitted.created_ms))

    def get(self, job_id: UUID) -> Flow[Job | None]:
        job: Job | None = yield self._operations.get(str(job_id))
        return job

    def cancel(self, job_id: UUID) -> Flow[Job]:
        """Cancel a waiting job at once; tell the runner of a running one.

        Raises:
            JobNotFound: no such job.
            JobConflict: it is over already.
        """
        yield self._operations.cancel(str(job_id), nonce=_nonce())
        return (yield from self._existing(job_id))

    def retry(self, job_id: UUID) -> Flow[Job]:
        """Run a Failed or Canceled job again, with all its retries.

        Raises:
            JobNotFound: no such job.
            JobConflict: it is in another state, or its request is no longer stored.
        """
        found = yield self._operations.stored_requests([str(job_id)])
        stored = found[str(job_id)]
        if stored is None or stored.status not in (JobStatus.FAILED, JobStatus.CANCELED):
            job = yield from self._existing(job_id)
            raise not_retryable(str(job_id), str(job.status))
        message = Message(stored.id, stored.name, stored.request, attempt=stored.attempt + 1)
        publication = yield Capture(message)
        yield self._operations.retry(
            str(job_id),
            attempt=stored.attempt,
            nonce=_nonce(),
            dispatch_after_ms=self._dispatcher.dispatch_after_ms(),
            publication=publication,
        )
        yield from hand_over(self._operations, self._dispatcher, message)
        return (yield from self._existing(job_id))

    def _existing(self, job_id: UUID) -> Flow[Job]:
        job: Job | None = yield self._operations.get(str(job_id))
        if job is None:
            raise JobNotFound(f"no job {job_id}: it never existed, or its record has expired")
        return job

    def page(self, matches: Callable[[Job], bool], limit: int, cursor: str | None) -> Flow[Page]:
        """Up to `limit` matching jobs, newest first, from `cursor` on.

        The cursor is the place of the last job seen, so that jobs which come and go move nothing.

        Raises:
            ValueError: the cursor is not one of ours.
        """
        place = _parse_cursor(cursor)
        jobs: list[Job] = []
        scanned, skip = 0, 0
        while scanned < MAX_SCANNED:
            entries = yield self._operations.newest(place[0] if place else "+inf", skip, _BATCH)
            # Several jobs may share a millisecond: those at or before the cursor were seen.
            fresh = [e for e in entries if not place or (int(e[1]), e[0]) < (int(place[0]), place[1])]
            if not entries:
                return Page(jobs, None)
            skip = 0 if fresh else skip + len(entries)
            records = yield self._operations.get_many([job_id for job_id, _ in fresh])
            for (job_id, created), job in zip(fresh, records, strict=True):
                place = (created, job_id)
                scanned += 1
                if job is not None and matches(job):
                    jobs.append(job)
                    if len(jobs) == limit:
                        return Page(jobs, f"{created}-{job_id}")
        return Page(jobs, f"{place[0]}-{place[1]}" if place else None)


def _parse_cursor(cursor: str | None) -> tuple[str, str] | None:
    if cursor is None:
        return None
    created, _, job_id = cursor.partition("-")
    if not (created.isascii() and created.isdigit() and len(created) < 20 and job_id):
        raise ValueError(f"{cursor!r} is no cursor: take the one of the page before")
    return created, job_id


def _nonce() -> str:
    """Tells one request from another, where the client library sends it twice. Unique among those to one job."""
    return secrets.token_hex(6)


def _new_job(submission: Submission, created_ms: str) -> Job:
    created = moment(created_ms)
    return Job.model_construct(
        id=submission.job_id,
        name=submission.name,
        status=JobStatus.SCHEDULED if submission.delay_seconds > 0 else JobStatus.QUEUED,
        retry_count=0,
        max_retries=submission.max_retries,
        created_at=created,
        started_at=None,
        completed_at=None,
        last_updated_at=created,
        result=None,
        error=None,
        progress=None,
        owner=submission.owner,
        version=1,
    )
