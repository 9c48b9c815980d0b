"""Jobs put into Redis by the scripts alone: no Celery, no HTTP. What is stored can be seen whole, and made older.

`Jobs` runs the operations with short arguments and shows the whole keyspace. `Known` is a job together with the
attempt, fence and runner that are right for it; every script is called with a `Known`, right or bent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from uuid import uuid4

import pytest

from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.keys import Keys
from async_endpoints_celery.operations import Claimed, Operations, Refused
from async_endpoints_celery.scripting import Call, Command, Publication, Query, Script
from async_endpoints_celery.servers import MemoryServer, RedisServer, Server
from async_endpoints_celery.store import SyncStore

R = TypeVar("R")

#: The stores that run the scripts; the same tests hold for both.
STORES = ("memory", "valkey")

LEASE_MS = 30_000
TIMEOUT_MS = 1_800_000
GRACE_MS = 5_000
RETENTION_MS = 86_400_000
DISPATCH_AFTER_MS = 30_000
LOST = '{"code":"WORKER_LOST","message":"lost"}'
OVERDUE = '{"code":"JOB_TIMEOUT","message":"overdue"}'
FAILURE = '{"code":"VALUEERROR","message":"no"}'

#: One Celery message, as kombu hands it over.
MESSAGE: Publication = (Command("lpush", "celery", ("message",)),)


@dataclass(frozen=True, slots=True)
class Known:
    """A job, and what must be shown to move it."""

    id: str
    attempt: int = 1
    fence: str = "0"
    runner: str = ""
    #: The number of the job's last message among those of its attempt.
    copy: int = 0

    def but(self, **changes: Any) -> Known:
        return dataclasses.replace(self, **changes)


class Jobs:
    """The operations on one server, and everything that they left there."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.store = SyncStore(server)
        self.client = self.store.client
        self.keys = Keys()
        self.operations = Operations(self.keys)

    def run(self, step: Call[R] | Query[R]) -> R:
        return self.store.run(step)

    def reply(self, call: Call[Any]) -> list[Any]:
        """What the script itself answers, before Python reads it."""
        return list(self.store.run(dataclasses.replace(call, read=lambda reply: reply)))

    # Calls with short arguments.

    def submit(self, job_id: str, publication: Publication = MESSAGE, **changes: Any) -> Call[Any]:
        arguments: dict[str, Any] = {
            "name": "Report",
            "owner": None,
            "fingerprint": "payload",
            "nonce": uuid4().hex,
            "max_retries": 5,
            "retention_ms": RETENTION_MS,
            "queue_limit": None,
            "request": "{}",
            "delay_ms": 0,
            "dispatch_after_ms": DISPATCH_AFTER_MS,
        }
        return self.operations.submit(job_id, publication=publication, **{**arguments, **changes})

    def claim(self, job: Known, **changes: Any) -> Call[Claimed | Refused]:
        arguments: dict[str, Any] = {
            "attempt": job.attempt,
            "copy": job.copy,
            "runner": job.runner or uuid4().hex,
            "worker": "worker@host",
            "lease_ms": LEASE_MS,
            "timeout_ms": TIMEOUT_MS,
            "grace_ms": GRACE_MS,
            "max_retries": None,
            "retention_ms": None,
        }
        return self.operations.claim(job.id, **{**arguments, **changes})

    def recover(self, job: Known, publication: Publication = MESSAGE, *, limit: int = 3) -> Call[str]:
        """By the worker that saw the runner's process die; `job.runner` empty: by the sweep."""
        return self.operations.recover(
            job.id,
            runner=job.runner,
            returns=not publication,
            recovery_limit=limit,
            lost_failure=LOST,
            overdue_failure=OVERDUE,
            dispatch_after_ms=DISPATCH_AFTER_MS,
            publication=publication,
        )

    def reschedule(self, job: Known, publication: Publication = MESSAGE) -> Call[bool]:
        return self.operations.reschedule(
            job.id,
            fence=job.fence,
            failure=FAILURE,
            delay_ms=2_000,
            dispatch_after_ms=DISPATCH_AFTER_MS,
            publication=publication,
        )

    def release(self, job: Known) -> Call[bool]:
        return self.operations.release(job.id, runner=job.runner, dispatch_after_ms=DISPATCH_AFTER_MS)

    def retry(self, job: Known, publication: Publication = MESSAGE, nonce: str = "") -> Call[None]:
        return self.operations.retry(
            job.id,
            attempt=job.attempt,
            nonce=nonce or uuid4().hex,
            dispatch_after_ms=DISPATCH_AFTER_MS,
            publication=publication,
        )

    def redispatch(self, job: Known, publication: Publication = MESSAGE) -> Call[bool]:
        """The message number `job.copy` of this attempt."""
        return self.operations.redispatch(
            job.id,
            attempt=job.attempt,
            copy=job.copy,
            dispatch_after_ms=DISPATCH_AFTER_MS,
            publication=publication,
        )

    def judge(self, *jobs: Known) -> Call[list[str]]:
        return self.operations.judge([job.id for job in jobs], dispatch_after_ms=DISPATCH_AFTER_MS)

    def renew(self, *jobs: Known) -> Call[list[str]]:
        return self.operations.renew([(job.id, job.runner) for job in jobs], lease_ms=LEASE_MS, grace_ms=GRACE_MS)

    # Whole stretches of a life.

    def queued(self, **changes: Any) -> Known:
        job = Known(str(uuid4()))
        assert self.reply(self.submit(job.id, **changes))[0] == "SUBMITTED"
        return job

    def claimed(self, job: Known, **changes: Any) -> Known:
        """The job in the hands of a new runner."""
        job = job.but(runner=uuid4().hex)
        claimed = self.run(self.claim(job, **changes))
        assert isinstance(claimed, Claimed)
        return job.but(fence=claimed.fence, copy=0)

    def running(self, **changes: Any) -> Known:
        return self.claimed(self.queued(**changes))

    def seasoned(self, status: JobStatus) -> Known:
        """A job in this state that has had an attempt before: what is right for it is above "1" everywhere."""
        job = self.running()
        assert self.run(self.reschedule(job))
        job = self.claimed(job.but(attempt=2))
        operations = self.operations
        match status:
            case JobStatus.QUEUED:
                assert self.run(self.release(job))
                job = job.but(fence="3")
            case JobStatus.SCHEDULED:
                assert self.run(self.reschedule(job))
                job = job.but(attempt=3)
            case JobStatus.COMPLETED:
                assert self.run(operations.complete(job.id, fence=job.fence, result="42"))
            case JobStatus.FAILED:
                assert self.run(operations.fail(job.id, fence=job.fence, failure=FAILURE))
            case JobStatus.CANCELED:
                assert self.run(operations.canceled(job.id, fence=job.fence))
        self.client.delete("celery")
        return job

    # What is stored.

    def record(self, job: Known) -> Job:
        found = self.run(self.operations.get(job.id))
        assert found is not None, f"no record of {job.id}"
        return found

    def status(self, job: Known) -> JobStatus:
        return self.record(job).status

    def fields(self, job: Known) -> dict[str, str]:
        return cast(dict[str, str], self.client.hgetall(self.keys.job(job.id)))

    def messages(self, queue: str = "celery") -> int:
        return self.client.llen(queue)

    def now(self) -> int:
        """Milliseconds since the epoch by the clock of Redis."""
        seconds, microseconds = self.client.time()
        return seconds * 1000 + microseconds // 1000

    def ttl(self, key: str) -> int:
        """Milliseconds left; -1 for no end, -2 for no such key."""
        return self.client.pttl(key)

    def due(self, batch: int = 100) -> tuple[set[str], set[str]]:
        """Ids of waiting and of running jobs that the sweep would find now."""
        found = self.run(self.operations.due(batch))
        return set(found.waiting), set(found.running)

    def score(self, index: str, job: Known) -> float | None:
        return self.client.zscore(index, job.id)

    def dump(self) -> dict[str, Any]:
        """Every key with its value and the moment it expires: equal dumps mean that nothing was written."""
        return {key: self._value(key) for key in sorted(cast(list[str], self.client.keys("*")))}

    def _value(self, key: str) -> Any:
        commands: dict[str, tuple[str | int, ...]] = {
            "hash": ("HGETALL", key),
            "string": ("GET", key),
            "zset": ("ZRANGE", key, 0, -1, "WITHSCORES"),
            "list": ("LRANGE", key, 0, -1),
            "set": ("SMEMBERS", key),
        }
        kind = cast(str, self.client.type(key))
        return kind, self.client.execute_command("PEXPIRETIME", key), self.client.execute_command(*commands[kind])

    # Time that passed.

    def end_lease(self, job: Known) -> None:
        self.client.zadd(self.keys.running, {job.id: self.now() - 1}, xx=True)

    def make_due(self, job: Known) -> None:
        self.client.zadd(self.keys.waiting, {job.id: self.now() - 1}, xx=True)

    def forget_message(self, job: Known) -> None:
        """The job is due, and nobody has confirmed that its message went out."""
        self.client.hset(self.keys.job(job.id), "dispatched", "")
        self.make_due(job)

    def make_overdue(self, job: Known) -> None:
        self.client.hset(self.keys.job(job.id), "deadline", str(self.now() - 1))
        self.end_lease(job)

    def check(self, job: Known) -> None:
        """The indices, the ends of life and the fields of the record all tell the same state."""
        status, keys, fields = self.status(job), self.keys, self.fields(job)
        assert (self.score(keys.waiting, job) is not None) == status.is_waiting
        assert (self.score(keys.running, job) is not None) == (status is JobStatus.IN_PROGRESS)
        assert (self.score(keys.ended, job) is not None) == status.is_over
        assert self.score(keys.jobs, job) == int(fields["created"])
        assert (self.ttl(keys.job(job.id)) > 0) == status.is_over
        request = self.ttl(keys.request(job.id))
        assert request == -2 if status is JobStatus.COMPLETED else (request > 0) == status.is_over
        assert ("completed" in fields) == status.is_over
        for field in ("worker", "deadline"):
            assert (field in fields) == (status is JobStatus.IN_PROGRESS), field
        assert "cancel" not in fields or status is JobStatus.IN_PROGRESS
        for field in ("copies", "dispatched"):
            assert (field in fields) == status.is_waiting, field
        assert status is not JobStatus.COMPLETED or "error" not in fields


#: Each script that moves one job, called with what the job's holder knows.
ACTIONS: dict[str, Callable[[Jobs, Known], Call[Any]]] = {
    "submit": lambda jobs, job: jobs.submit(job.id, fingerprint="another payload"),
    "claim": lambda jobs, job: jobs.claim(job.but(runner="new runner")),
    "progress": lambda jobs, job: jobs.operations.progress(job.id, fence=job.fence, progress='{"percent":5}'),
    "complete": lambda jobs, job: jobs.operations.complete(job.id, fence=job.fence, result="42"),
    "fail": lambda jobs, job: jobs.operations.fail(job.id, fence=job.fence, failure=FAILURE),
    "reschedule": lambda jobs, job: jobs.reschedule(job),
    "release": lambda jobs, job: jobs.release(job),
    "canceled": lambda jobs, job: jobs.operations.canceled(job.id, fence=job.fence),
    "cancel": lambda jobs, job: jobs.operations.cancel(job.id, nonce=uuid4().hex),
    "retry": lambda jobs, job: jobs.retry(job),
    "redispatch": lambda jobs, job: jobs.redispatch(job),
    "recover": lambda jobs, job: jobs.recover(job),
    "renew": lambda jobs, job: jobs.renew(job),
    "dispatched": lambda jobs, job: jobs.operations.dispatched(
        job.id, attempt=job.attempt, delay_ms=0, dispatch_after_ms=2 * DISPATCH_AFTER_MS
    ),
}


@contextmanager
def jobs_in(kind: str, request: pytest.FixtureRequest) -> Iterator[Jobs]:
    """An empty store of one of `STORES`."""
    server = MemoryServer() if kind == "memory" else RedisServer.from_url(request.getfixturevalue("redis_url"))
    jobs = Jobs(server)
    try:
        yield jobs
    finally:
        jobs.store.close()


def dispatches(script: str) -> bool:
    """Whether the script's header says that it takes the commands of a Celery message."""
    return "\n-- DISPATCHES\n" in Script.load(script).source
