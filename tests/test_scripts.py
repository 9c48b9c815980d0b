"""The table of transitions, script by script, on both stores: who may move a job from which state, and nobody else."""

from collections.abc import Iterator
from typing import Any

import pytest

from async_endpoints_celery.jobs import TRANSITIONS, JobStatus
from tests.jobs_in_redis import ACTIONS, STORES, Jobs, Known, dispatches, jobs_in

QUEUED, SCHEDULED, IN_PROGRESS = JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.IN_PROGRESS
COMPLETED, FAILED, CANCELED = JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELED

#: What each script may do to a stored job, with the right attempt, fence or runner: from → to.
MOVES: dict[str, dict[JobStatus, JobStatus]] = {
    "submit": {},
    "claim": {QUEUED: IN_PROGRESS, SCHEDULED: IN_PROGRESS},
    "progress": {IN_PROGRESS: IN_PROGRESS},
    "complete": {IN_PROGRESS: COMPLETED},
    "fail": {IN_PROGRESS: FAILED},
    "reschedule": {IN_PROGRESS: SCHEDULED},
    "release": {IN_PROGRESS: QUEUED},
    "canceled": {IN_PROGRESS: CANCELED},
    "cancel": {QUEUED: CANCELED, SCHEDULED: CANCELED, IN_PROGRESS: IN_PROGRESS},
    "retry": {FAILED: QUEUED, CANCELED: QUEUED},
    "redispatch": {QUEUED: QUEUED, SCHEDULED: QUEUED},
    "recover": {IN_PROGRESS: QUEUED},
    "renew": {IN_PROGRESS: IN_PROGRESS},
    "dispatched": {QUEUED: QUEUED, SCHEDULED: SCHEDULED},
}
#: What must be shown to each script; the others ask for nothing.
TOKENS = {
    "claim": "attempt",
    "progress": "fence",
    "complete": "fence",
    "fail": "fence",
    "reschedule": "fence",
    "release": "runner",
    "canceled": "fence",
    "retry": "attempt",
    "redispatch": "attempt",
    "recover": "runner",
    "renew": "runner",
    "dispatched": "attempt",
}
#: Where the holder of the last fence hears "OK" again: it is the one who brought the job here.
DONE_ALREADY = {
    ("complete", COMPLETED),
    ("fail", FAILED),
    ("canceled", CANCELED),
    ("reschedule", SCHEDULED),
}
REFUSALS: dict[str, set[str]] = {
    "submit": {"CONFLICT"},
    "claim": {"NOT_WAITING"},
    **{script: {"NOT_YOURS"} for script in ("progress", "complete", "fail", "reschedule", "release", "canceled")},
    "cancel": {"OVER"},
    "retry": {"NOT_OVER"},
    "redispatch": {"NOT_DUE"},
    "recover": {"NOT_LOST"},
    "renew": {"LOST", "UNCLAIMED"},
    "dispatched": {"NOT_WAITING"},
}
#: Of each kind of token, some that are wrong for every seasoned job.
WRONG: dict[str, list[dict[str, Any]]] = {
    "attempt": [{"attempt": 1}, {"attempt": 0}, {"attempt": 9}, {"attempt": ""}],
    "fence": [{"fence": "1"}, {"fence": "0"}, {"fence": "9"}, {"fence": ""}],
    "runner": [{"runner": "an earlier runner"}, {"runner": ""}],
}


@pytest.fixture(params=STORES)
def jobs(request: pytest.FixtureRequest) -> Iterator[Jobs]:
    with jobs_in(request.param, request) as found:
        yield found


def prepared(jobs: Jobs, status: JobStatus) -> Known:
    job = jobs.seasoned(status)
    if status.is_waiting:
        jobs.forget_message(job)
    return job


@pytest.mark.parametrize("status", JobStatus, ids=str)
class TestTheTable:
    @pytest.mark.parametrize("script", MOVES)
    def test_with_the_right_token(self, jobs: Jobs, script: str, status: JobStatus) -> None:
        job = prepared(jobs, status)
        before = jobs.dump()

        reply = jobs.reply(ACTIONS[script](jobs, job))

        after = MOVES[script].get(status)
        if after is None:
            assert jobs.dump() == before
            assert reply[0] in ({"OK"} if (script, status) in DONE_ALREADY else REFUSALS[script])
        else:
            assert jobs.status(job) is after
            assert reply[0] not in REFUSALS[script]
            assert jobs.dump() != before or script == "renew"  # within a millisecond a lease ends when it did
        jobs.check(job)
        assert jobs.messages() == (after is not None and dispatches(script))

    @pytest.mark.parametrize("script", TOKENS)
    def test_with_a_wrong_token(self, jobs: Jobs, script: str, status: JobStatus) -> None:
        for wrong in WRONG[TOKENS[script]]:
            job = prepared(jobs, status)
            before = jobs.dump()

            reply = jobs.reply(ACTIONS[script](jobs, job.but(**wrong)))

            assert jobs.dump() == before, wrong
            assert reply[0] in REFUSALS[script], wrong


@pytest.mark.parametrize("script", MOVES)
def test_a_job_that_is_not_there(jobs: Jobs, script: str) -> None:
    other = jobs.seasoned(QUEUED)
    before = jobs.dump()
    reply = jobs.reply(ACTIONS[script](jobs, Known("0e3f4bc1-6d71-4f5c-8f62-6f1dbb8d3d1c", 1, "1", "runner")))
    if script == "submit":
        assert reply[0] == "SUBMITTED"
    else:
        assert reply[0] == {"renew": "LOST", "dispatched": "NOT_WAITING"}.get(script, "NOT_FOUND")
        assert jobs.dump() == before
    jobs.check(other)


def test_the_scripts_make_all_moves_of_the_table_and_no_other(jobs: Jobs) -> None:
    made = {status: set[JobStatus]() for status in JobStatus}
    for script in MOVES:
        for status in JobStatus:
            job = prepared(jobs, status)
            jobs.reply(ACTIONS[script](jobs, job))
            made[status].add(jobs.status(job))
    # A delayed submission is Queued and Scheduled in one step.
    made[QUEUED].add(jobs.status(jobs.queued(delay_ms=60_000)))
    assert {status: found - {status} for status, found in made.items()} == TRANSITIONS


class TestTheIndicesOfDeletedRecords:
    """A record that somebody deleted by hand leaves its id in an index; the sweep's scripts tidy it away."""

    def test_a_waiting_one(self, jobs: Jobs) -> None:
        job = jobs.queued()
        jobs.client.delete(jobs.keys.job(job.id))
        assert jobs.reply(jobs.redispatch(job)) == ["NOT_FOUND"]
        assert jobs.score(jobs.keys.waiting, job) is None
        assert jobs.messages() == 1

    def test_a_running_one(self, jobs: Jobs) -> None:
        job = jobs.running()
        jobs.client.delete(jobs.keys.job(job.id))
        assert jobs.reply(jobs.recover(job.but(runner=""))) == ["NOT_FOUND"]
        assert jobs.score(jobs.keys.running, job) is None


class TestSubmit:
    def test_stores_what_it_was_given(self, jobs: Jobs) -> None:
        before = jobs.now()
        job = jobs.queued(owner="ada", max_retries=7, request='{"payload":null}')
        record, fields = jobs.record(job), jobs.fields(job)
        assert (record.name, record.owner, record.max_retries, record.retry_count) == ("Report", "ada", 7, 0)
        assert (fields["attempt"], fields["fence"], fields["version"]) == ("1", "0", "1")
        assert before <= int(fields["created"]) == int(fields["updated"]) <= jobs.now()
        assert (record.started_at, record.completed_at, record.error, record.result) == (None,) * 4
        assert jobs.client.get(jobs.keys.request(job.id)) == '{"payload":null}'
        jobs.check(job)

    def test_a_delay_makes_it_scheduled_until_then(self, jobs: Jobs) -> None:
        before = jobs.now()
        job = jobs.queued(delay_ms=60_000, dispatch_after_ms=500)
        due = jobs.score(jobs.keys.waiting, job)
        assert due is not None
        assert before + 60_500 <= due <= jobs.now() + 60_500
        assert jobs.status(job) is SCHEDULED
        jobs.check(job)

    @pytest.mark.parametrize("status", JobStatus, ids=str)
    def test_the_same_again_answers_with_the_record(self, jobs: Jobs, status: JobStatus) -> None:
        job = jobs.seasoned(status)
        before = jobs.dump()
        submitted = jobs.run(jobs.submit(job.id))
        assert submitted.replayed
        assert submitted.job == jobs.record(job)
        assert jobs.dump() == before

    @pytest.mark.parametrize("other", [{"name": "Other"}, {"owner": "eve"}, {"fingerprint": "other"}])
    def test_another_name_owner_or_payload_is_a_conflict(self, jobs: Jobs, other: dict[str, Any]) -> None:
        job = jobs.queued(owner="ada")
        before = jobs.dump()
        assert jobs.reply(jobs.submit(job.id, **{"owner": "ada", **other})) == ["CONFLICT"]
        assert jobs.dump() == before
