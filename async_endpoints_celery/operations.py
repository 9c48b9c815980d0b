"""What can be done to jobs in Redis: each operation as a call of one script, without any I/O.

An operation is a `Call` (scripting.py): script, keys, arguments and how to read the reply. The two drivers in store.py
run the same calls, one from an event loop, one from a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from async_endpoints_celery.codec import decode_record
from async_endpoints_celery.errors import JobConflict, JobNotFound, QueueFull
from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.keys import Keys
from async_endpoints_celery.scripting import Call, Publication, Query, Script, pairs, scored, unexpected

R = TypeVar("R")

#: Seconds between two rounds of the lease keeper, at most (leases.py): a cancel shall be heard within a second. A job
#: younger than this costs it nothing.
ROUND_SECONDS = 0.5
#: Copies of a waiting job's message never come later than this after each other, in milliseconds.
MAX_REDISPATCH_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Submitted:
    """A stored job; `replayed` when it was there already."""

    created_ms: str
    job: Job | None

    @property
    def replayed(self) -> bool:
        return self.job is not None


@dataclass(frozen=True, slots=True)
class Claimed:
    """The right to run one attempt. The fence must be shown with every write."""

    fence: str
    retries: int
    max_retries: int
    owner: str | None


@dataclass(frozen=True, slots=True)
class Refused:
    """The job is not waiting for this attempt; its status, or None where there is no such job."""

    status: JobStatus | None


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """What is needed to publish the message of a job again."""

    id: str
    name: str
    status: JobStatus
    attempt: int
    retries: int
    #: The number that the next message of this attempt has among them: 0 for the first.
    next_copy: int
    #: "" when it was deleted by hand: the worker then fails the job with PAYLOAD_INVALID.
    request: str


@dataclass(frozen=True, slots=True)
class Due:
    """What the sweep finds: ids of waiting jobs to look at, and of running jobs whose lease has ended."""

    waiting: list[str]
    running: list[str]
    last_sweep_ms_ago: int


@dataclass(frozen=True, slots=True)
class Page:
    """A page of jobs, newest first, and where the next one begins."""

    jobs: list[Job]
    next_cursor: str | None


class Operations:
    """Builds the calls for one key prefix."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def _call(
        self,
        name: str,
        job_id: str,
        read: Callable[[Any], R],
        publication: Publication = (),
        /,
        **arguments: str | int,
    ) -> Call[R]:
        script = Script.load(name)
        keys = self.keys.of_job(job_id)
        args: list[str | bytes | int] = [job_id, self.keys.changes(job_id)]
        args += [arguments[argument] for argument in script.arguments]
        for command in publication:
            keys.append(command.key)
            args += [command.name, len(command.args), *command.args]
        return Call(script, keys, args, read)

    def submit(
        self,
        job_id: str,
        *,
        name: str,
        owner: str | None,
        fingerprint: str,
        nonce: str,
        max_retries: int,
        retention_ms: int,
        queue_limit: int | None,
        request: str,
        delay_ms: int,
        dispatch_after_ms: int,
        publication: Publication = (),
    ) -> Call[Submitted]:
        """Raises JobConflict (another job has this id) and QueueFull when it is read."""

        def read(reply: Any) -> Submitted:
            match reply:
                case ["SUBMITTED", created]:
                    return Submitted(str(created), None)
                case ["REPLAYED", fields]:
                    job = decode_record(job_id, pairs(fields))
                    return Submitted("", job)
                case ["CONFLICT"]:
                    raise JobConflict(
                        f"job {job_id} exists already, with another name, payload or owner", job_id=job_id
                    )
                case ["FULL", waiting]:
                    raise QueueFull(
                        f"{waiting} jobs are waiting and maximum_queue_size is {queue_limit}: try again later,"
                        " or raise the setting (ASYNC_ENDPOINTS_MAXIMUM_QUEUE_SIZE)"
                    )
            raise unexpected("submit", reply)

        return self._call(
            "submit",
            job_id,
            read,
            publication,
            name=name,
            owner=owner or "",
            fingerprint=fingerprint,
            nonce=nonce,
            max_retries=max_retries,
            retention_ms=retention_ms,
            queue_limit="" if queue_limit is None else queue_limit,
            request=request,
            delay_ms=delay_ms,
            dispatch_after_ms=dispatch_after_ms,
        )

    def dispatched(self, job_id: str, *, attempt: int, delay_ms: int, dispatch_after_ms: int) -> Call[bool]:
        return self._call(
            "dispatched",
            job_id,
            _accepted,
            attempt=attempt,
            delay_ms=delay_ms,
            dispatch_after_ms=dispatch_after_ms,
        )

    def claim(
        self,
        job_id: str,
        *,
        attempt: int,
        copy: int,
        runner: str,
        worker: str,
        lease_ms: int,
        timeout_ms: int,
        grace_ms: int,
        max_retries: int | None,
        retention_ms: int | None,
    ) -> Call[Claimed | Refused]:
        """Refused for a duplicate, a late message or a canceled job."""

        def read(reply: Any) -> Claimed | Refused:
            match reply:
                case ["CLAIMED", fence, retries, limit, owner]:
                    return Claimed(fence, int(retries), int(limit), owner or None)
                case ["NOT_WAITING", status]:
                    return Refused(JobStatus.parse(status))
                case ["NOT_FOUND"]:
                    return Refused(None)
            raise unexpected("claim", reply)

        return self._call(
            "claim",
            job_id,
            read,
            attempt=attempt,
            copy=copy,
            runner=runner,
            worker=worker,
            lease_ms=lease_ms,
            timeout_ms=timeout_ms,
            grace_ms=grace_ms,
            max_retries="" if max_retries is None else max_retries,
            retention_ms="" if retention_ms is None else retention_ms,
        )

    def renew(self, runners: Sequence[tuple[str, str]], *, lease_ms: int, grace_ms: int) -> Call[list[str]]:
        """Extends the leases of (job id, runner) pairs; RENEWED, CANCELING, LOST or UNCLAIMED for each."""
        keys = [self.keys.running, *(self.keys.job(job_id) for job_id, _ in runners)]
        args: list[str | bytes | int] = [lease_ms, grace_ms]
        for pair in runners:
            args += pair
        return Call(Script.load("renew"), keys, args, list)

    def progress(self, job_id: str, *, fence: str, progress: str) -> Call[bool | None]:
        """Whether a cancel was asked for; None when the job is no longer this runner's."""

        def read(reply: Any) -> bool | None:
            return reply[1] == "1" if reply[0] == "OK" else None

        return self._call("progress", job_id, read, fence=fence, progress=progress)

    # Reading.

    def get(self, job_id: str) -> Query[Job | None]:
        def read(replies: list[Any]) -> Job | None:
            fields = pairs(replies[0])
            return decode_record(job_id, fields) if fields else None

        return Query([("HGETALL", self.keys.job(job_id))], read)

    def stored_requests(self, job_ids: Sequence[str]) -> Query[dict[str, StoredRequest | None]]:
        """What the messages of these jobs are made of; None for a job that is not stored."""
        fields = ("name", "status", "attempt", "retries", "copies", "dispatched")
        commands: list[tuple[str | int, ...]] = []
        for job_id in job_ids:
            commands.append(("HMGET", self.keys.job(job_id), *fields))
            commands.append(("GET", self.keys.request(job_id)))

        def read(replies: list[Any]) -> dict[str, StoredRequest | None]:
            records = zip(job_ids, replies[::2], replies[1::2], strict=True)
            return {job_id: _stored_request(job_id, record, request) for job_id, record, request in records}

        return Query(commands, read)

    def get_many(self, job_ids: Sequence[str]) -> Query[list[Job | None]]:
        def read(replies: list[Any]) -> list[Job | None]:
            records = [pairs(reply) for reply in replies]
            return [
                decode_record(job_id, fields) if fields else None
                for job_id, fields in zip(job_ids, records, strict=True)
            ]

        return Query([("HGETALL", self.keys.job(job_id)) for job_id in job_ids], read)

    def newest(self, before: str, skip: int, count: int) -> Query[list[tuple[str, str]]]:
        """(id, creation) of up to `count` jobs created at `before` (a score, "+inf" for now) or earlier."""

        return Query(
            [("ZREVRANGEBYSCORE", self.keys.jobs, before, "-inf", "WITHSCORES", "LIMIT", skip, count)],
            lambda replies: scored(replies[0]),
        )

    def is_unwanted(self, attempts: Sequence[tuple[str, str]]) -> Query[list[bool]]:
        """For (job id, fence) pairs: whether the attempt shall stop, canceled or no longer its runner's."""

        def read(replies: list[Any]) -> list[bool]:
            return [
                status != str(JobStatus.IN_PROGRESS) or current != fence or canceling == "1"
                for (status, current, canceling), (_, fence) in zip(replies, attempts, strict=True)
            ]

        commands: list[tuple[str | int, ...]] = [
            ("HMGET", self.keys.job(job_id), "status", "fence", "cancel") for job_id, _ in attempts
        ]
        return Query(commands, read)

    def secret(self, proposed: str) -> Query[str]:
        """The deployment's secret: the proposed one if there was none."""
        return Query(
            [("SET", self.keys.secret, proposed, "NX"), ("GET", self.keys.secret)], lambda replies: str(replies[1])
        )

    def last_sweep(self) -> Query[int | None]:
        """When the sweep last ran, in milliseconds since the epoch."""
        return Query([("HGET", self.keys.sweep, "last_run")], lambda replies: int(replies[0]) if replies[0] else None)

    # The writes that end an attempt: False means that the job is no longer this runner's, and nothing was written.

    def complete(self, job_id: str, *, fence: str, result: str) -> Call[bool]:
        return self._call("complete", job_id, _accepted, fence=fence, result=result)

    def fail(self, job_id: str, *, fence: str, failure: str) -> Call[bool]:
        return self._call("fail", job_id, _accepted, fence=fence, failure=failure)

    def reschedule(
        self,
        job_id: str,
        *,
        fence: str,
        failure: str,
        delay_ms: int,
        dispatch_after_ms: int,
        publication: Publication = (),
    ) -> Call[bool]:
        return self._call(
            "reschedule",
            job_id,
            _accepted,
            publication,
            fence=fence,
            failure=failure,
            delay_ms=delay_ms,
            dispatch_after_ms=dispatch_after_ms,
        )

    def release(self, job_id: str, *, runner: str, dispatch_after_ms: int) -> Call[bool]:
        """By the worker's main process, which knows the runner and not its fence."""
        return self._call("release", job_id, _accepted, runner=runner, dispatch_after_ms=dispatch_after_ms)

    def canceled(self, job_id: str, *, fence: str) -> Call[bool]:
        return self._call("canceled", job_id, _accepted, fence=fence)

    # What people and the sweep do.

    def cancel(self, job_id: str, *, nonce: str) -> Call[bool]:
        """True: canceled at once; False: the runner is told. Raises JobNotFound and JobConflict when it is read."""

        def read(reply: Any) -> bool:
            match reply:
                case ["CANCELED"]:
                    return True
                case ["CANCELING"]:
                    return False
                case ["OVER", status]:
                    raise JobConflict(f"job {job_id} is {status} already: too late to cancel it", job_id=job_id)
                case ["NOT_FOUND"]:
                    raise JobNotFound(f"no job {job_id}")
            raise unexpected("cancel", reply)

        return self._call("cancel", job_id, read, nonce=nonce)

    def retry(
        self,
        job_id: str,
        *,
        attempt: int,
        nonce: str,
        dispatch_after_ms: int,
        publication: Publication = (),
    ) -> Call[None]:
        """Raises JobNotFound and JobConflict when it is read."""

        def read(reply: Any) -> None:
            match reply:
                case ["OK"]:
                    return
                case ["NOT_OVER", status]:
                    raise not_retryable(job_id, status)
                case ["GONE"]:
                    raise JobConflict(f"the request of job {job_id} is no longer stored", job_id=job_id)
                case ["NOT_FOUND"]:
                    raise JobNotFound(f"no job {job_id}")
            raise unexpected("retry", reply)

        return self._call(
            "retry", job_id, read, publication, attempt=attempt, nonce=nonce, dispatch_after_ms=dispatch_after_ms
        )

    def judge(self, job_ids: Sequence[str], *, dispatch_after_ms: int) -> Call[list[str]]:
        """DISPATCH, POSTPONED or GONE for each of these waiting jobs that are due."""
        keys = [self.keys.waiting, self.keys.claimed, *map(self.keys.job, job_ids)]
        bounds = [dispatch_after_ms, max(MAX_REDISPATCH_MS, dispatch_after_ms)]
        return Call(Script.load("judge"), keys, [*bounds, *job_ids], list)

    def postpone(self, job_id: str, *, delay_ms: int) -> Call[int]:
        """Have the sweep look at a waiting job again later: its message could not be built."""
        return Call(Script.load("postpone"), [self.keys.waiting], [job_id, delay_ms], int)

    def redispatch(
        self, job_id: str, *, attempt: int, copy: int, dispatch_after_ms: int, publication: Publication = ()
    ) -> Call[bool]:
        return self._call(
            "redispatch",
            job_id,
            _accepted,
            publication,
            attempt=attempt,
            copy=copy,
            dispatch_after_ms=dispatch_after_ms,
            max_after_ms=max(MAX_REDISPATCH_MS, dispatch_after_ms),
        )

    def recover(
        self,
        job_id: str,
        *,
        runner: str,
        returns: bool,
        recovery_limit: int,
        lost_failure: str,
        overdue_failure: str,
        dispatch_after_ms: int,
        publication: Publication = (),
    ) -> Call[str]:
        """QUEUED, FAILED, CANCELED, or NOT_LOST / NOT_FOUND when there was nothing to recover."""
        return self._call(
            "recover",
            job_id,
            lambda reply: str(reply[0]),
            publication,
            runner=runner,
            returns=int(returns),
            recovery_limit=recovery_limit,
            lost_failure=lost_failure,
            overdue_failure=overdue_failure,
            dispatch_after_ms=dispatch_after_ms,
        )

    def due(self, batch: int) -> Call[Due]:
        return Call(
            Script.load("due"),
            [self.keys.waiting, self.keys.running, self.keys.sweep],
            [batch],
            lambda reply: Due(list(reply[0]), list(reply[1]), int(reply[2])),
        )

    def prune(self, batch: int) -> Call[int]:
        return Call(Script.load("prune"), [self.keys.ended, self.keys.jobs, self.keys.sweep], [batch], int)


def _stored_request(job_id: str, record: Sequence[str | None], request: str | None) -> StoredRequest | None:
    name, status, attempt, retries, copies, dispatched = record
    if name is None or status is None or attempt is None or retries is None:
        return None
    next_copy = int(copies or 0) + (1 if dispatched else 0)
    return StoredRequest(job_id, name, JobStatus.parse(status), int(attempt), int(retries), next_copy, request or "")


def not_retryable(job_id: str, status: str) -> JobConflict:
    return JobConflict(f"job {job_id} is {status}: only Failed and Canceled jobs can be retried", job_id=job_id)


def _accepted(reply: Any) -> bool:
    return bool(reply[0] == "OK")
