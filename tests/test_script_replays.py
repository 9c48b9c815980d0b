"""A client library that lost the reply sends a script again: nothing changes then, and the answer is the same.

Redis-py does so on its own when a connection breaks, and a worker goes on trying while Redis is away.
"""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from async_endpoints_celery.jobs import JobStatus
from async_endpoints_celery.operations import Refused
from async_endpoints_celery.scripting import Call
from tests.jobs_in_redis import ACTIONS, STORES, Jobs, Known, jobs_in


@pytest.fixture(params=STORES)
def jobs(request: pytest.FixtureRequest) -> Iterator[Jobs]:
    with jobs_in(request.param, request) as found:
        yield found


def in_state(status: JobStatus, script: str) -> Callable[[Jobs], Call[Any]]:
    def build(jobs: Jobs) -> Call[Any]:
        return ACTIONS[script](jobs, jobs.seasoned(status))

    return build


def canceling(script: str) -> Callable[[Jobs], Call[Any]]:
    def build(jobs: Jobs) -> Call[Any]:
        job = jobs.seasoned(JobStatus.IN_PROGRESS)
        jobs.run(jobs.operations.cancel(job.id, nonce=uuid4().hex))
        return ACTIONS[script](jobs, job)

    return build


#: Everything that somebody waits for an answer of, in each state that it moves a job from.
CALLS: dict[str, Callable[[Jobs], Call[Any]]] = {
    "submit": lambda jobs: jobs.submit(str(uuid4())),
    "submit delayed": lambda jobs: jobs.submit(str(uuid4()), delay_ms=60_000),
    "submit into the last free place": lambda jobs: jobs.submit(str(uuid4()), queue_limit=1),
    "claim Queued": in_state(JobStatus.QUEUED, "claim"),
    "claim Scheduled": in_state(JobStatus.SCHEDULED, "claim"),
    "complete": in_state(JobStatus.IN_PROGRESS, "complete"),
    "complete while canceling": canceling("complete"),
    "fail": in_state(JobStatus.IN_PROGRESS, "fail"),
    "reschedule": in_state(JobStatus.IN_PROGRESS, "reschedule"),
    "canceled": in_state(JobStatus.IN_PROGRESS, "canceled"),
    "cancel Queued": in_state(JobStatus.QUEUED, "cancel"),
    "cancel Scheduled": in_state(JobStatus.SCHEDULED, "cancel"),
    "cancel InProgress": in_state(JobStatus.IN_PROGRESS, "cancel"),
    "retry Failed": in_state(JobStatus.FAILED, "retry"),
    "retry Canceled": in_state(JobStatus.CANCELED, "retry"),
}


@pytest.mark.parametrize("name", CALLS)
def test_sent_twice(jobs: Jobs, name: str) -> None:
    call = CALLS[name](jobs)
    first = jobs.reply(call)
    before = jobs.dump()
    assert jobs.reply(call) == first
    assert jobs.dump() == before


class TestStepsNobodyWaitsFor:
    """The sweep's and a stopping worker's: they may answer that there is nothing left to do; nothing is done twice."""

    def test_recover(self, jobs: Jobs) -> None:
        job = jobs.seasoned(JobStatus.IN_PROGRESS)
        jobs.end_lease(job)
        call = jobs.recover(job.but(runner=""))
        assert jobs.run(call) == "QUEUED"
        before = jobs.dump()
        assert jobs.run(call) == "NOT_LOST"
        assert jobs.dump() == before
        assert (jobs.record(job).retry_count, jobs.messages()) == (2, 1)

    @pytest.mark.parametrize("first", [True, False])
    def test_redispatch(self, jobs: Jobs, first: bool) -> None:
        job = jobs.seasoned(JobStatus.QUEUED)
        jobs.make_due(job)
        if first:
            jobs.forget_message(job)
        call = jobs.redispatch(job.but(copy=0 if first else 1))
        assert jobs.run(call)
        for _ in ("at once", "when it is due again"):
            before = jobs.dump()
            assert not jobs.run(call)
            assert jobs.dump() == before
            jobs.make_due(job)
        assert jobs.messages() == 1

    @pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.CANCELED], ids=str)
    def test_release(self, jobs: Jobs, status: JobStatus) -> None:
        job = jobs.seasoned(JobStatus.IN_PROGRESS)
        if status is JobStatus.CANCELED:
            jobs.run(jobs.operations.cancel(job.id, nonce=uuid4().hex))
        call = jobs.release(job)
        assert jobs.reply(call) == ["OK"]
        before = jobs.dump()
        assert jobs.reply(call) == ["NOT_YOURS", str(status)]
        assert jobs.dump() == before


class TestRepeatable:
    """These say how things are, so that saying it twice changes no more than the time of saying it."""

    def test_progress(self, jobs: Jobs) -> None:
        job = jobs.running()
        call = ACTIONS["progress"](jobs, job)
        first = jobs.reply(call)
        fields = jobs.fields(job)
        assert jobs.reply(call) == first
        changed = {field for field, value in jobs.fields(job).items() if fields[field] != value}
        assert changed <= {"version", "updated"}

    def test_renew(self, jobs: Jobs) -> None:
        job = jobs.seasoned(JobStatus.IN_PROGRESS)
        call = jobs.renew(job)
        first, fields = jobs.reply(call), jobs.fields(job)
        assert jobs.reply(call) == first
        assert jobs.fields(job) == fields
        jobs.check(job)

    def test_dispatched(self, jobs: Jobs) -> None:
        job = jobs.seasoned(JobStatus.QUEUED)
        jobs.forget_message(job)
        call = ACTIONS["dispatched"](jobs, job)
        assert jobs.run(call)
        before = jobs.dump()
        assert not jobs.run(call)
        assert jobs.dump() == before


class TestTheSameWordsOfSomebodyElse:
    """A replay is known by its token; the same wish of another caller is judged by the state."""

    def test_another_claim(self, jobs: Jobs) -> None:
        job = jobs.running()
        assert jobs.run(jobs.claim(job.but(runner="somebody else"))) == Refused(JobStatus.IN_PROGRESS)

    def test_another_retry(self, jobs: Jobs) -> None:
        job = jobs.seasoned(JobStatus.FAILED)
        assert jobs.reply(jobs.retry(job, nonce="mine")) == ["OK"]
        assert jobs.reply(jobs.retry(job, nonce="another's")) == ["NOT_OVER", "Queued"]

    def test_a_submission_replayed_after_the_claim(self, jobs: Jobs) -> None:
        job = Known(str(uuid4()))
        call = jobs.submit(job.id)
        jobs.reply(call)
        jobs.claimed(job)
        before = jobs.dump()
        again = jobs.run(call)
        assert (again.replayed, again.created_ms) == (False, jobs.fields(job)["created"])
        assert jobs.dump() == before

    def test_a_retry_by_hand_replayed_after_the_claim(self, jobs: Jobs) -> None:
        job = jobs.seasoned(JobStatus.FAILED)
        call = jobs.retry(job)
        assert jobs.reply(call) == ["OK"]
        jobs.claimed(job.but(attempt=3))
        before = jobs.dump()
        assert jobs.reply(call) == ["OK"]
        assert jobs.dump() == before
