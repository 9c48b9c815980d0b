"""The sweep's part in getting messages out: what is due, which of it needs a message, and how copies back off."""

from collections.abc import Iterator

import pytest

from async_endpoints_celery.jobs import JobStatus
from tests.jobs_in_redis import DISPATCH_AFTER_MS, STORES, Jobs, Known, jobs_in

QUEUED, SCHEDULED = JobStatus.QUEUED, JobStatus.SCHEDULED
NAME = "Report"


@pytest.fixture(params=STORES)
def jobs(request: pytest.FixtureRequest) -> Iterator[Jobs]:
    with jobs_in(request.param, request) as found:
        yield found


def wait_left(jobs: Jobs, job: Known) -> int:
    """Whole seconds until the sweep looks at this job again."""
    score = jobs.score(jobs.keys.waiting, job)
    assert score is not None
    return round((score - jobs.now()) / 1000)


def quiet_for(jobs: Jobs, seconds: int) -> None:
    """Nothing of this name was claimed for so long."""
    jobs.client.hset(jobs.keys.claimed, f"{NAME}|at", str(jobs.now() - seconds * 1000))


def probed(jobs: Jobs, times: int, seconds_ago: int) -> None:
    at = str(jobs.now() - seconds_ago * 1000)
    jobs.client.hset(jobs.keys.claimed, mapping={f"{NAME}|probes": str(times), f"{NAME}|probed": at})


class TestDue:
    def test_waiting_jobs_and_ended_leases_a_batch_of_each(self, jobs: Jobs) -> None:
        waiting, running = [jobs.queued() for _ in range(3)], [jobs.running() for _ in range(3)]
        assert jobs.due() == (set(), set())
        for job in (*waiting[:2], *running[:2]):
            jobs.make_due(job)
            jobs.end_lease(job)
        assert jobs.due() == ({job.id for job in waiting[:2]}, {job.id for job in running[:2]})
        assert [len(found) for found in jobs.due(1)] == [1, 1]

    def test_and_how_long_ago_the_sweep_ran(self, jobs: Jobs) -> None:
        never = jobs.run(jobs.operations.due(10)).last_sweep_ms_ago
        assert abs(never - jobs.now()) < 10_000, "as if at the beginning of time"
        jobs.client.hset(jobs.keys.sweep, "last_run", str(jobs.now() - 60_000))
        assert 60_000 <= jobs.run(jobs.operations.due(10)).last_sweep_ms_ago < 70_000
        jobs.run(jobs.operations.prune(10))
        assert jobs.run(jobs.operations.due(10)).last_sweep_ms_ago < 10_000


class TestJudge:
    def test_a_job_whose_message_never_went_out(self, jobs: Jobs) -> None:
        unconfirmed, delayed = jobs.queued(publication=()), jobs.queued(publication=(), delay_ms=60_000)
        assert jobs.run(jobs.judge(unconfirmed, delayed)) == ["DISPATCH", "DISPATCH"]

    def test_an_overtaken_job(self, jobs: Jobs) -> None:
        earlier, later = jobs.queued(), jobs.queued()
        jobs.client.hset(jobs.keys.job(earlier.id), "dispatched", "1000")
        jobs.claimed(later)
        assert jobs.run(jobs.judge(earlier)) == ["DISPATCH"]

    def test_one_whose_turn_has_not_come_is_put_off(self, jobs: Jobs) -> None:
        earlier, later = jobs.queued(), jobs.queued()
        jobs.claimed(earlier)
        jobs.client.hset(jobs.keys.job(later.id), "dispatched", str(jobs.now() + 1))
        jobs.make_due(later)
        assert jobs.run(jobs.judge(later)) == ["POSTPONED"]
        assert wait_left(jobs, later) == DISPATCH_AFTER_MS // 1000
        assert jobs.due() == (set(), set())

    def test_an_old_copy_tells_nothing_of_the_queue(self, jobs: Jobs) -> None:
        """The claim came by the first message, and the newest one's time is all that is known."""
        copied, other = jobs.queued(), jobs.queued()
        jobs.client.hset(jobs.keys.job(copied.id), mapping={"copies": "1", "dispatched": str(jobs.now() + 60_000)})
        jobs.claimed(copied)
        assert jobs.run(jobs.judge(other)) == ["POSTPONED"]

    def test_another_name_has_another_queue(self, jobs: Jobs) -> None:
        earlier, later = jobs.queued(name="Other"), jobs.queued()
        jobs.client.hset(jobs.keys.job(earlier.id), "dispatched", "1000")
        jobs.client.hset(jobs.keys.claimed, "Other|at", str(jobs.now()))
        jobs.claimed(later)
        assert jobs.run(jobs.judge(earlier)) == ["POSTPONED"]

    def test_one_probe_when_the_queue_is_quiet(self, jobs: Jobs) -> None:
        waiting = [jobs.queued() for _ in range(5)]
        quiet_for(jobs, 31)
        verdicts = jobs.run(jobs.judge(*waiting))
        assert sorted(verdicts) == ["DISPATCH", *["POSTPONED"] * 4]
        assert jobs.run(jobs.judge(*waiting)) == ["POSTPONED"] * 5

    def test_none_while_it_moves(self, jobs: Jobs) -> None:
        waiting = jobs.queued()
        quiet_for(jobs, 25)
        assert jobs.run(jobs.judge(waiting)) == ["POSTPONED"]

    @pytest.mark.parametrize(
        ("probes", "seconds"), [(0, 30), (1, 60), (2, 120), (5, 960), (11, 61_440), (12, 86_400), (500, 86_400)]
    )
    def test_probes_back_off_doubling_up_to_a_day(self, jobs: Jobs, probes: int, seconds: int) -> None:
        job = jobs.queued()
        quiet_for(jobs, 1_000_000)
        for silence, verdict in ((seconds - 5, "POSTPONED"), (seconds + 5, "DISPATCH")):
            probed(jobs, probes, silence)
            assert jobs.run(jobs.judge(job)) == [verdict]
        assert jobs.client.hget(jobs.keys.claimed, f"{NAME}|probes") == str(probes + 1)

    def test_probes_start_anew_when_the_queue_has_moved(self, jobs: Jobs) -> None:
        job = jobs.queued()
        probed(jobs, 9, 60)
        quiet_for(jobs, 35)
        assert jobs.run(jobs.judge(job)) == ["DISPATCH"]
        assert jobs.client.hget(jobs.keys.claimed, f"{NAME}|probes") == "1"

    def test_a_record_that_was_deleted_by_hand(self, jobs: Jobs) -> None:
        job = jobs.queued()
        jobs.client.delete(jobs.keys.job(job.id))
        assert jobs.run(jobs.judge(job)) == ["GONE"]
        assert jobs.score(jobs.keys.waiting, job) is None

    @pytest.mark.parametrize("status", [s for s in JobStatus if not s.is_waiting], ids=str)
    def test_a_job_that_was_claimed_since_it_was_found_due(self, jobs: Jobs, status: JobStatus) -> None:
        """The sweep reads what is due and judges it in two steps; workers and clients do not wait for it."""
        job = jobs.seasoned(status)
        before = jobs.dump()
        assert jobs.run(jobs.judge(job, job)) in (["POSTPONED"] * 2, ["GONE"] * 2)
        assert jobs.dump() == before


class TestRedispatch:
    def test_the_first_message_of_a_delayed_job(self, jobs: Jobs) -> None:
        job = jobs.queued(publication=(), delay_ms=60_000)
        jobs.make_due(job)
        before = jobs.now()
        assert jobs.run(jobs.redispatch(job))
        assert (jobs.status(job), jobs.messages()) == (QUEUED, 1)
        assert int(jobs.fields(job)["dispatched"]) >= before
        assert wait_left(jobs, job) == 30
        jobs.check(job)

    def test_a_first_message_that_another_broker_gets_stays_in_the_outbox(self, jobs: Jobs) -> None:
        job = jobs.queued(publication=())
        jobs.make_due(job)
        assert jobs.run(jobs.redispatch(job, publication=()))
        assert (jobs.fields(job)["dispatched"], jobs.fields(job)["copies"]) == ("", "0")

    def test_copies_back_off_doubling_up_to_a_day(self, jobs: Jobs) -> None:
        job = jobs.queued()
        waits = []
        for copy in range(1, 15):
            jobs.make_due(job)
            assert jobs.run(jobs.redispatch(job.but(copy=copy)))
            waits.append(wait_left(jobs, job))
        assert waits[:4] == [60, 120, 240, 480]
        assert waits[-1] == 24 * 3600
        assert jobs.messages() == 15
        jobs.check(job)

    @pytest.mark.parametrize("copy", [0, 2])
    def test_the_number_of_the_message_is_a_compare_and_set(self, jobs: Jobs, copy: int) -> None:
        """Two sweepers at once send one copy."""
        job = jobs.queued()
        jobs.make_due(job)
        before = jobs.dump()
        assert jobs.reply(jobs.redispatch(job.but(copy=copy))) == ["NOT_DUE"]
        assert jobs.dump() == before

    def test_not_before_it_is_due(self, jobs: Jobs) -> None:
        job = jobs.queued()
        before = jobs.dump()
        assert jobs.reply(jobs.redispatch(job.but(copy=1))) == ["NOT_DUE"]
        assert jobs.dump() == before

    def test_any_message_of_the_attempt_claims_the_job_once(self, jobs: Jobs) -> None:
        job = jobs.queued()
        jobs.make_due(job)
        jobs.run(jobs.redispatch(job.but(copy=1)))
        assert jobs.reply(jobs.claim(job.but(copy=0)))[0] == "CLAIMED"
        assert jobs.reply(jobs.claim(job.but(copy=1))) == ["NOT_WAITING", "InProgress"]


class TestDispatched:
    """The broker confirmed the message: its outbox entry is cleared."""

    @pytest.mark.parametrize("delay_ms", [0, 60_000])
    def test_is_doubted_later(self, jobs: Jobs, delay_ms: int) -> None:
        job = jobs.queued(publication=(), delay_ms=delay_ms, dispatch_after_ms=5_000)
        confirm = jobs.operations.dispatched(job.id, attempt=1, delay_ms=delay_ms, dispatch_after_ms=DISPATCH_AFTER_MS)
        before = jobs.now() + delay_ms
        assert jobs.run(confirm)
        assert before <= int(jobs.fields(job)["dispatched"]) <= jobs.now() + delay_ms
        assert wait_left(jobs, job) == (delay_ms + DISPATCH_AFTER_MS) // 1000
        jobs.check(job)

    def test_once(self, jobs: Jobs) -> None:
        job = jobs.queued()
        before = jobs.dump()
        confirm = jobs.operations.dispatched(job.id, attempt=1, delay_ms=0, dispatch_after_ms=1)
        assert not jobs.run(confirm)
        assert jobs.dump() == before
