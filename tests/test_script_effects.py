"""What the scripts write: stamps, errors, ends of life, events, and the Celery message in the same step."""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import redis

from async_endpoints_celery.jobs import JobStatus
from async_endpoints_celery.operations import Claimed
from async_endpoints_celery.scripting import Command
from tests.jobs_in_redis import (
    ACTIONS,
    FAILURE,
    GRACE_MS,
    LEASE_MS,
    RETENTION_MS,
    STORES,
    TIMEOUT_MS,
    Jobs,
    Known,
    jobs_in,
)

QUEUED, SCHEDULED, IN_PROGRESS = JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.IN_PROGRESS
COMPLETED, FAILED, CANCELED = JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELED
ENDS = (COMPLETED, FAILED, CANCELED)


@pytest.fixture(params=STORES)
def jobs(request: pytest.FixtureRequest) -> Iterator[Jobs]:
    with jobs_in(request.param, request) as found:
        yield found


def age(jobs: Jobs, job: Known) -> None:
    """All stamps of the record become an hour old."""
    past = str(jobs.now() - 3_600_000)
    for field in ("created", "started", "updated", "completed"):
        if field in jobs.fields(job):
            jobs.client.hset(jobs.keys.job(job.id), field, past)


def stamped_now(jobs: Jobs, job: Known) -> set[str]:
    return {
        field
        for field in ("created", "started", "updated", "completed")
        if int(jobs.fields(job).get(field, 0)) > jobs.now() - 60_000
    }


class TestStamps:
    def test_a_claim_stamps_started_anew(self, jobs: Jobs) -> None:
        job = jobs.seasoned(QUEUED)
        age(jobs, job)
        jobs.claimed(job)
        assert stamped_now(jobs, job) == {"started", "updated"}

    @pytest.mark.parametrize("script", ["complete", "fail", "canceled"])
    def test_an_end_stamps_completed(self, jobs: Jobs, script: str) -> None:
        job = jobs.running()
        age(jobs, job)
        jobs.run(ACTIONS[script](jobs, job))
        assert stamped_now(jobs, job) == {"completed", "updated"}

    @pytest.mark.parametrize("status", [QUEUED, SCHEDULED], ids=str)
    def test_a_cancel_of_a_waiting_job_is_an_end(self, jobs: Jobs, status: JobStatus) -> None:
        job = jobs.seasoned(status)
        age(jobs, job)
        assert jobs.run(jobs.operations.cancel(job.id, nonce=uuid4().hex))
        assert stamped_now(jobs, job) == {"completed", "updated"}

    @pytest.mark.parametrize("script", ["progress", "reschedule", "release", "cancel", "recover"])
    def test_every_other_change_stamps_updated_only(self, jobs: Jobs, script: str) -> None:
        job = jobs.running()
        age(jobs, job)
        jobs.run(ACTIONS[script](jobs, job))
        assert stamped_now(jobs, job) == {"updated"}

    def test_a_due_scheduled_job_becomes_queued(self, jobs: Jobs) -> None:
        job = jobs.seasoned(SCHEDULED)
        age(jobs, job)
        jobs.forget_message(job)
        assert jobs.run(jobs.redispatch(job))
        assert (stamped_now(jobs, job), jobs.status(job)) == ({"updated"}, QUEUED)

    def test_the_record_shows_them(self, jobs: Jobs) -> None:
        record = jobs.record(jobs.seasoned(COMPLETED))
        assert record.started_at is not None
        assert record.completed_at is not None
        assert record.created_at <= record.started_at <= record.completed_at == record.last_updated_at
        assert record.completed_at.utcoffset() is not None


class TestErrorsAndResults:
    def test_an_error_stays_until_the_job_completes(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.run(jobs.reschedule(job))
        assert jobs.fields(job)["error"] == FAILURE
        job = jobs.claimed(job.but(attempt=2))
        assert jobs.fields(job)["error"] == FAILURE
        jobs.run(jobs.operations.complete(job.id, fence=job.fence, result='{"n":1}'))
        record = jobs.record(job)
        assert (record.status, record.error, record.result) == (COMPLETED, None, {"n": 1})
        assert record.retry_count == 1

    @pytest.mark.parametrize("script", ["canceled", "release"])
    def test_other_moves_keep_it(self, jobs: Jobs, script: str) -> None:
        job = jobs.running()
        jobs.run(jobs.reschedule(job))
        job = jobs.claimed(job.but(attempt=2))
        jobs.run(ACTIONS[script](jobs, job))
        assert jobs.fields(job)["error"] == FAILURE

    def test_progress_keeps_its_last_value(self, jobs: Jobs) -> None:
        job = jobs.running()
        progress = jobs.operations.progress(job.id, fence=job.fence, progress='{"percent":50,"message":"half"}')
        assert jobs.run(progress) is False
        jobs.run(jobs.operations.complete(job.id, fence=job.fence, result="1"))
        found = jobs.record(job).progress
        assert found is not None
        assert (found.percent, found.message) == (50.0, "half")

    def test_the_runner_hears_of_a_cancel_with_its_progress(self, jobs: Jobs) -> None:
        job = jobs.running()
        assert jobs.run(jobs.operations.cancel(job.id, nonce=uuid4().hex)) is False
        assert jobs.run(ACTIONS["progress"](jobs, job)) is True
        assert jobs.run(jobs.renew(job)) == ["CANCELING"]
        assert jobs.run(jobs.operations.is_unwanted([(job.id, job.fence)])) == [True]

    def test_a_canceling_job_that_is_released_is_canceled(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.run(jobs.operations.cancel(job.id, nonce=uuid4().hex))
        jobs.run(jobs.release(job))
        assert jobs.status(job) is CANCELED
        assert jobs.messages() == 1  # that of the submission
        jobs.check(job)

    def test_a_canceling_job_may_still_complete(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.run(jobs.operations.cancel(job.id, nonce=uuid4().hex))
        assert jobs.run(jobs.operations.complete(job.id, fence=job.fence, result="1"))
        jobs.check(job)


class TestClaim:
    def test_hands_out_what_the_runner_needs(self, jobs: Jobs) -> None:
        job = jobs.queued(owner="ada", max_retries=4)
        claimed = jobs.run(jobs.claim(job))
        assert isinstance(claimed, Claimed)
        assert (claimed.fence, claimed.retries, claimed.max_retries, claimed.owner) == ("1", 0, 4, "ada")

    def test_the_worker_knows_retries_and_retention_better(self, jobs: Jobs) -> None:
        job = jobs.claimed(jobs.queued(), max_retries=9, retention_ms=5_000)
        assert jobs.record(job).max_retries == 9
        jobs.run(jobs.operations.complete(job.id, fence=job.fence, result="1"))
        assert 0 < jobs.ttl(jobs.keys.job(job.id)) <= 5_000

    def test_the_lease_ends_with_the_deadline_at_the_latest(self, jobs: Jobs) -> None:
        before = jobs.now()
        long, short = jobs.running(), jobs.claimed(jobs.queued(), timeout_ms=1_000)
        after = jobs.now()
        for job, lease, timeout in ((long, LEASE_MS, TIMEOUT_MS), (short, 1_000 + GRACE_MS, 1_000)):
            score = jobs.score(jobs.keys.running, job)
            assert score is not None
            assert before + lease <= score <= after + lease
            assert before + timeout <= int(jobs.fields(job)["deadline"]) <= after + timeout


class TestRetryByHand:
    @pytest.mark.parametrize("status", [FAILED, CANCELED], ids=str)
    def test_starts_from_the_beginning(self, jobs: Jobs, status: JobStatus) -> None:
        job = jobs.seasoned(status)
        jobs.client.hset(jobs.keys.job(job.id), mapping={"result": "1", "progress": '{"percent":1}'})
        jobs.run(jobs.retry(job))
        record = jobs.record(job)
        assert (record.status, record.retry_count) == (QUEUED, 0)
        assert (record.completed_at, record.error, record.result, record.progress) == (None,) * 4
        jobs.check(job)
        assert jobs.client.exists(jobs.keys.request(job.id))

    def test_the_fence_keeps_rising(self, jobs: Jobs) -> None:
        job = jobs.seasoned(FAILED)
        jobs.run(jobs.retry(job))
        assert jobs.fields(job)["fence"] == "2"
        again = jobs.claimed(job.but(attempt=3))
        assert again.fence == "3"
        assert not jobs.run(jobs.operations.complete(job.id, fence="2", result="1"))

    def test_a_request_that_is_gone(self, jobs: Jobs) -> None:
        job = jobs.seasoned(FAILED)
        jobs.client.delete(jobs.keys.request(job.id))
        before = jobs.dump()
        assert jobs.reply(jobs.retry(job)) == ["GONE"]
        assert jobs.dump() == before


class TestEndsOfLife:
    @pytest.mark.parametrize("status", ENDS, ids=str)
    def test_the_record_expires_and_leaves_the_indices(self, jobs: Jobs, status: JobStatus) -> None:
        before = jobs.now()
        job = jobs.seasoned(status)
        assert RETENTION_MS - 5_000 < jobs.ttl(jobs.keys.job(job.id)) <= RETENTION_MS
        score = jobs.score(jobs.keys.ended, job)
        assert score is not None
        assert before + RETENTION_MS <= score <= jobs.now() + RETENTION_MS
        assert jobs.run(jobs.operations.prune(10)) == 0
        jobs.client.zadd(jobs.keys.ended, {job.id: jobs.now()})
        assert jobs.run(jobs.operations.prune(10)) == 1
        assert jobs.score(jobs.keys.ended, job) is jobs.score(jobs.keys.jobs, job) is None

    @pytest.mark.parametrize("status", ENDS, ids=str)
    def test_the_request_is_kept_for_a_retry_by_hand_only(self, jobs: Jobs, status: JobStatus) -> None:
        ttl = jobs.ttl(jobs.keys.request(jobs.seasoned(status).id))
        assert ttl == -2 if status is COMPLETED else RETENTION_MS - 5_000 < ttl <= RETENTION_MS

    def test_prune_works_in_batches_and_says_when_the_sweep_ran(self, jobs: Jobs) -> None:
        for _ in range(5):
            jobs.client.zadd(jobs.keys.ended, {jobs.seasoned(COMPLETED).id: 1})
        before = jobs.now()
        assert [jobs.run(jobs.operations.prune(2)) for _ in range(4)] == [2, 2, 1, 0]
        last = jobs.run(jobs.operations.last_sweep())
        assert last is not None
        assert before <= last <= jobs.now()


class TestPublication:
    def test_every_command_reaches_its_key(self, jobs: Jobs) -> None:
        commands = (
            Command("lpush", "priority-6", ("first", "second")),
            Command("sadd", "bindings", ("a", "b", "c")),
            Command("lpush", "celery", ("third",)),
        )
        jobs.run(jobs.submit(Known("0e3f4bc1-6d71-4f5c-8f62-6f1dbb8d3d1c").id, commands))
        assert jobs.client.lrange("priority-6", 0, -1) == ["second", "first"]
        assert jobs.client.smembers("bindings") == {"a", "b", "c"}
        assert jobs.client.lrange("celery", 0, -1) == ["third"]

    def test_none_for_another_broker(self, jobs: Jobs) -> None:
        job = jobs.queued(publication=())
        assert jobs.messages() == 0
        jobs.check(job)

    @pytest.mark.parametrize(
        "refused", [{"fingerprint": "other"}, {"fingerprint": "payload"}], ids=["conflict", "replay"]
    )
    def test_nothing_when_the_job_is_not_stored(self, jobs: Jobs, refused: dict[str, Any]) -> None:
        job = jobs.queued()
        assert jobs.reply(jobs.submit(job.id, **refused))[0] in {"CONFLICT", "REPLAYED"}
        assert jobs.messages() == 1

    @pytest.mark.parametrize(
        ("prepare", "move"),
        [
            (lambda jobs: Known("0e3f4bc1-6d71-4f5c-8f62-6f1dbb8d3d1c"), lambda jobs, job: jobs.submit(job.id)),
            (lambda jobs: jobs.seasoned(IN_PROGRESS), ACTIONS["reschedule"]),
            (lambda jobs: jobs.seasoned(IN_PROGRESS), ACTIONS["recover"]),
            (lambda jobs: jobs.seasoned(FAILED), ACTIONS["retry"]),
        ],
        ids=["submit", "reschedule", "recover", "retry"],
    )
    def test_a_message_that_cannot_be_stored_leaves_no_record_either(
        self, jobs: Jobs, prepare: Callable[[Jobs], Known], move: Callable[[Jobs, Known], Any]
    ) -> None:
        job = prepare(jobs)
        jobs.client.set("celery", "not a list")
        before = jobs.dump()
        with pytest.raises(redis.ResponseError):
            jobs.run(move(jobs, job))
        assert jobs.dump() == before


def test_every_change_is_published_with_its_version(jobs: Jobs) -> None:
    job = jobs.queued()
    with jobs.client.pubsub() as changes:
        changes.subscribe(jobs.keys.changes(job.id))
        assert changes.get_message(timeout=5) is not None  # the subscription itself
        job = jobs.claimed(job)
        for script in ("progress", "cancel", "release", "retry"):
            jobs.run(ACTIONS[script](jobs, job))
        heard = [changes.get_message(timeout=5) for _ in range(5)]
    assert [message and message["data"] for message in heard] == [
        "2 InProgress",
        "3 InProgress",
        "4 InProgress",
        "5 Canceled",
        "6 Queued",
    ]
    assert jobs.record(job).version == 6
