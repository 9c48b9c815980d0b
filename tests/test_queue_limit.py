"""The queue limit is checked in the step that stores the job: no number of clients gets past it."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from async_endpoints_celery.errors import QueueFull
from async_endpoints_celery.jobs import JobStatus
from async_endpoints_celery.store import AsyncStore, SyncStore
from tests.jobs_in_redis import ACTIONS, STORES, Jobs, Known, jobs_in

LIMIT = 10
CLIENTS = 200


@pytest.fixture(params=STORES)
def jobs(request: pytest.FixtureRequest) -> Iterator[Jobs]:
    with jobs_in(request.param, request) as found:
        yield found


def refused(jobs: Jobs, limit: int) -> bool:
    """Whether one more job is refused; it leaves no trace if it is."""
    before = jobs.dump()
    try:
        jobs.run(jobs.submit(str(uuid4()), queue_limit=limit))
    except QueueFull:
        assert jobs.dump() == before
        return True
    return False


def waiting(jobs: Jobs) -> int:
    return jobs.client.zcard(jobs.keys.waiting)


def test_queued_and_scheduled_count_and_nothing_else(jobs: Jobs) -> None:
    for status in JobStatus:
        jobs.seasoned(status)
    jobs.queued(delay_ms=60_000)
    assert waiting(jobs) == 3
    assert refused(jobs, 3)
    assert not refused(jobs, 4)


def test_the_error_names_the_limit_and_the_setting(jobs: Jobs) -> None:
    jobs.queued()
    with pytest.raises(QueueFull, match=r"1 jobs are waiting.*maximum_queue_size is 1.*MAXIMUM_QUEUE_SIZE"):
        jobs.run(jobs.submit(str(uuid4()), queue_limit=1))


def test_none_means_no_limit(jobs: Jobs) -> None:
    for _ in range(60):
        jobs.queued()
    assert waiting(jobs) == 60


@pytest.mark.parametrize("script", ["claim", "cancel"])
def test_a_job_that_waits_no_longer_makes_room(jobs: Jobs, script: str) -> None:
    job = jobs.queued()
    assert refused(jobs, 1)
    jobs.run(ACTIONS[script](jobs, job))
    assert not refused(jobs, 1)


def test_a_replay_passes_with_a_full_queue(jobs: Jobs) -> None:
    job = Known(str(uuid4()))
    submission = jobs.submit(job.id, queue_limit=1)
    created = jobs.run(submission).created_ms
    assert jobs.run(submission).created_ms == created, "the client library sent it twice"
    assert jobs.run(jobs.submit(job.id, queue_limit=1)).job == jobs.record(job), "the same X-Async-Request-Id"
    assert jobs.messages() == 1


@pytest.mark.parametrize("script", ["reschedule", "release", "recover"])
def test_a_workers_own_return_passes_with_a_full_queue(jobs: Jobs, script: str) -> None:
    job = jobs.running(queue_limit=1)
    jobs.queued(queue_limit=1)
    jobs.run(ACTIONS[script](jobs, job))
    assert waiting(jobs) == 2


def test_racing_clients_never_exceed_it(jobs: Jobs) -> None:
    """Half of them in threads of their own, half on one event loop, all at the same moment."""
    start = threading.Barrier(CLIENTS // 2 + 1)

    def from_a_thread() -> bool:
        store = SyncStore(jobs.server)
        call = jobs.submit(str(uuid4()), queue_limit=LIMIT)
        start.wait()
        try:
            store.run(call)
        except QueueFull:
            return False
        finally:
            store.close()
        return True

    async def from_the_loop(store: AsyncStore) -> bool:
        try:
            await store.run(jobs.submit(str(uuid4()), queue_limit=LIMIT))
        except QueueFull:
            return False
        return True

    async def all_from_one_loop() -> list[bool]:
        store = AsyncStore(jobs.server)
        start.wait()
        try:
            return await asyncio.gather(*(from_the_loop(store) for _ in range(CLIENTS // 2)))
        finally:
            await store.close()

    with ThreadPoolExecutor(CLIENTS // 2) as threads:
        outcomes = [threads.submit(from_a_thread) for _ in range(CLIENTS // 2)]
        accepted = sum(asyncio.run(all_from_one_loop())) + sum(outcome.result() for outcome in outcomes)

    assert accepted == LIMIT == waiting(jobs)
    assert jobs.messages() == LIMIT, "one message for each stored job"
    assert jobs.client.zcard(jobs.keys.jobs) == LIMIT
    assert len(list(jobs.client.scan_iter(jobs.keys.job("*")))) == LIMIT
