"""Leases and lost workers: the clock of Redis judges, each loss costs a retry, and every job comes to an end."""

import time
from collections.abc import Iterator
from uuid import uuid4

import pytest

from async_endpoints_celery.jobs import JobStatus
from async_endpoints_celery.operations import Claimed
from tests.jobs_in_redis import ACTIONS, GRACE_MS, LEASE_MS, LOST, OVERDUE, STORES, Jobs, Known, jobs_in

QUEUED, IN_PROGRESS, FAILED, CANCELED = (
    JobStatus.QUEUED,
    JobStatus.IN_PROGRESS,
    JobStatus.FAILED,
    JobStatus.CANCELED,
)


@pytest.fixture(params=STORES)
def jobs(request: pytest.FixtureRequest) -> Iterator[Jobs]:
    with jobs_in(request.param, request) as found:
        yield found


def swept(job: Known) -> Known:
    """What the sweep knows: no runner."""
    return job.but(runner="")


class TestTheClock:
    def test_a_lease_holds_until_redis_says_otherwise(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.client.zadd(jobs.keys.running, {job.id: jobs.now() + 60_000})
        before = jobs.dump()
        assert jobs.run(jobs.recover(swept(job))) == "NOT_LOST"
        assert jobs.due() == (set(), set())
        assert jobs.dump() == before

        jobs.client.zadd(jobs.keys.running, {job.id: jobs.now()})
        assert jobs.due() == (set(), {job.id})
        assert jobs.run(jobs.recover(swept(job))) == "QUEUED"

    @pytest.mark.parametrize("script", ACTIONS)
    def test_no_caller_brings_a_time_of_its_own(self, jobs: Jobs, script: str) -> None:
        call = ACTIONS[script](jobs, Known("0e3f4bc1-6d71-4f5c-8f62-6f1dbb8d3d1c", 1, "1", "runner"))
        numbers = [float(arg) for arg in call.args if str(arg).isdigit()]
        year = 365 * 24 * 3600
        assert not [n for n in numbers if min(abs(n - time.time()), abs(n / 1000 - time.time())) < 10 * year]

    def test_renewing_keeps_the_lease(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.end_lease(job)
        before = jobs.now()
        assert jobs.run(jobs.renew(job)) == ["RENEWED"]
        assert (jobs.score(jobs.keys.running, job) or 0) >= before + LEASE_MS
        assert jobs.run(jobs.recover(swept(job))) == "NOT_LOST"

    def test_nothing_is_kept_past_its_deadline(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.make_overdue(job)
        deadline = int(jobs.fields(job)["deadline"])
        assert jobs.run(jobs.renew(job)) == ["RENEWED"]
        assert jobs.score(jobs.keys.running, job) == deadline + GRACE_MS

    def test_one_call_renews_all_jobs_of_a_worker(self, jobs: Jobs) -> None:
        kept, canceling, waiting, stolen, over = jobs.running(), jobs.running(), *(jobs.running() for _ in "123")
        jobs.run(jobs.operations.cancel(canceling.id, nonce=uuid4().hex))
        jobs.run(jobs.release(waiting))
        jobs.run(jobs.release(stolen))
        jobs.claimed(stolen)
        jobs.run(jobs.operations.complete(over.id, fence=over.fence, result="1"))
        scores = jobs.client.zrange(jobs.keys.running, 0, -1, withscores=True)
        replies = jobs.run(jobs.renew(kept, canceling, waiting, stolen, over))
        assert replies == ["RENEWED", "CANCELING", "UNCLAIMED", "LOST", "LOST"]
        assert len(jobs.client.zrange(jobs.keys.running, 0, -1)) == len(scores) == 3
        assert jobs.run(jobs.operations.renew([], lease_ms=1, grace_ms=1)) == []


class TestALostWorker:
    @pytest.mark.parametrize("seen_by", ["sweep", "its own worker"])
    def test_costs_a_retry_and_waits_again(self, jobs: Jobs, seen_by: str) -> None:
        job = jobs.running()
        if seen_by == "sweep":
            jobs.end_lease(job)
        assert jobs.run(jobs.recover(swept(job) if seen_by == "sweep" else job)) == "QUEUED"
        record = jobs.record(job)
        assert (record.status, record.retry_count) == (QUEUED, 1)
        assert record.error is not None
        assert record.error.code == "WORKER_LOST"
        assert jobs.messages() == 2
        jobs.check(job)

    @pytest.mark.parametrize("left", ["recover", "release"])
    @pytest.mark.parametrize("script", ["progress", "complete", "fail", "reschedule", "release", "canceled"])
    def test_cannot_write_a_thing_any_more(self, jobs: Jobs, script: str, left: str) -> None:
        job = jobs.running()
        jobs.run(ACTIONS[left](jobs, job))
        assert jobs.fields(job)["fence"] != job.fence
        for _ in ("the job waits", "somebody else runs it"):
            before = jobs.dump()
            assert jobs.reply(ACTIONS[script](jobs, job))[0] == "NOT_YOURS"
            assert jobs.dump() == before
            if jobs.status(job) is QUEUED:
                jobs.claimed(job)
        assert jobs.run(jobs.renew(job)) == ["LOST"]

    def test_the_message_that_comes_back_runs_the_next_attempt(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.run(jobs.recover(job))
        again = jobs.run(jobs.claim(job.but(runner="next")))
        assert isinstance(again, Claimed)
        assert (again.retries, int(again.fence)) == (1, 3)

    @pytest.mark.parametrize(("max_retries", "limit", "lives"), [(5, 3, 3), (2, 3, 2), (0, 3, 0), (5, 0, 0), (1, 1, 1)])
    def test_ends_failed_after_its_retries(self, jobs: Jobs, max_retries: int, limit: int, lives: int) -> None:
        job = jobs.queued(max_retries=max_retries)
        outcomes = []
        while jobs.status(job) is QUEUED:
            outcomes.append(jobs.run(jobs.recover(jobs.claimed(job), limit=limit)))
        assert outcomes == ["QUEUED"] * lives + ["FAILED"]
        record = jobs.record(job)
        assert (record.status, record.retry_count) == (FAILED, lives)
        assert jobs.fields(job)["error"] == LOST
        assert jobs.messages() == 1 + lives
        jobs.check(job)

    def test_whose_message_goes_back_by_itself(self, jobs: Jobs) -> None:
        job = jobs.running()
        before = jobs.now()
        assert jobs.run(jobs.recover(job, publication=())) == "QUEUED"
        assert jobs.messages() == 1
        assert int(jobs.fields(job)["dispatched"]) >= before, "so the sweep does not take it for unpublished"

    def test_retries_of_any_kind_count(self, jobs: Jobs) -> None:
        job = jobs.running(max_retries=1)
        jobs.run(jobs.reschedule(job))
        job = jobs.claimed(job.but(attempt=2))
        assert jobs.run(jobs.recover(job)) == "FAILED"

    def test_of_an_overdue_job(self, jobs: Jobs) -> None:
        job = jobs.running(max_retries=1)
        jobs.make_overdue(job)
        assert jobs.run(jobs.recover(swept(job))) == "QUEUED"
        assert jobs.fields(job)["error"] == OVERDUE
        job = jobs.claimed(job)
        jobs.make_overdue(job)
        assert jobs.run(jobs.recover(swept(job))) == "FAILED"
        assert jobs.fields(job)["error"] == OVERDUE
        jobs.check(job)

    def test_of_a_job_that_was_to_be_canceled(self, jobs: Jobs) -> None:
        job = jobs.running(max_retries=0)
        jobs.run(jobs.operations.cancel(job.id, nonce=uuid4().hex))
        jobs.end_lease(job)
        assert jobs.run(jobs.recover(swept(job))) == "CANCELED"
        assert jobs.status(job) is CANCELED
        assert jobs.messages() == 1
        assert not jobs.run(jobs.operations.canceled(job.id, fence=job.fence)), "a runner that lost its lease"
        jobs.check(job)

    def test_a_cancel_does_not_outlive_the_attempt(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.run(jobs.operations.cancel(job.id, nonce=uuid4().hex))
        jobs.run(jobs.operations.canceled(job.id, fence=job.fence))
        jobs.run(jobs.retry(job))
        job = jobs.claimed(job.but(attempt=2))
        assert jobs.run(jobs.renew(job)) == ["RENEWED"]
        assert jobs.run(ACTIONS["progress"](jobs, job)) is False


def test_a_runner_that_lost_its_job_is_unwanted_before_another_has_it(jobs: Jobs) -> None:
    """The lease keeper cannot know yet (it hears UNCLAIMED, as before a first claim); the handler's watch does."""
    job = jobs.running()
    assert jobs.run(jobs.operations.is_unwanted([(job.id, job.fence)])) == [False]
    jobs.run(jobs.recover(job))
    assert jobs.run(jobs.renew(job)) == ["UNCLAIMED"]
    assert jobs.run(jobs.operations.is_unwanted([(job.id, job.fence)])) == [True]
