"""Bugs that a review found on the worker's side: each was there once."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from async_endpoints_celery import AsyncEndpoints, Settings
from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.servers import RedisServer
from tests.deployment import Deployment
from tests.jobs_in_redis import Jobs, Known
from tests.nodes import WorkerNode
from tests.processes import wait_until
from tests.servers import ValkeyServer, valkey_server
from tests.test_execution import Events
from tests.web import new_celery

SECRET = "nobody-else-may-read-this"
LEASE_SECONDS = 2


class Bench:
    """Submits jobs to workers of tests/review_app.py, and reads their records; there is no web process."""

    def __init__(self, deployed: Deployment, start: Callable[..., WorkerNode], store: str | None = None) -> None:
        self.deployed = deployed
        self.redis = deployed.redis
        self.endpoints = AsyncEndpoints(new_celery(deployed.broker), store=store, settings=Settings())
        self._start = start

    def worker(self, pool: str, *arguments: str, concurrency: int = 1, **config: Any) -> WorkerNode:
        env = {**self.deployed.env, "TEST_CELERY_CONFIG": json.dumps(config)}
        options = ("-P", pool, "-c", str(concurrency), "--without-gossip", *arguments)
        return self._start("tests.review_app:celery_app", *options, env=env)

    def submit(self, name: str, **payload: Any) -> str:
        return str(self.endpoints.sync.submit(name, payload).id)

    def job(self, job_id: str) -> Job:
        job = self.endpoints.sync.get_job(job_id)
        assert job is not None
        return job

    def end(self, job_id: str, timeout: float = 10) -> Job:
        """The record, once the job is over."""
        wait_until(lambda: self.job(job_id).status.is_over, timeout, f"{job_id} is not over")
        return self.job(job_id)

    def started(self, job_id: str) -> None:
        wait_until(lambda: self.deployed.runs(job_id))


@pytest.fixture
def deployed(redis_url: str, tmp_path: Path) -> Iterator[Deployment]:
    env = {"ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": str(LEASE_SECONDS)}
    with Deployment(tmp_path, redis_url, env=env) as deployed:
        yield deployed


@pytest.fixture
def bench(deployed: Deployment, start_worker: Callable[..., WorkerNode]) -> Iterator[Bench]:
    bench = Bench(deployed, start_worker)
    yield bench
    bench.endpoints.close()


class TestAJobWithoutARoute:
    """Its message cannot be built where the sweep runs."""

    @pytest.fixture
    def tried(self) -> list[str]:
        """What the router was asked for in vain."""
        return []

    @pytest.fixture
    def sweep(self, redis_url: str, tried: list[str]) -> Iterator[Callable[[], dict[str, int]]]:
        def route(name: str, *_: Any, **__: Any) -> None:
            if name == "async_endpoints.Bad":
                tried.append(name)
                raise LookupError("no route")

        celery = new_celery(redis_url, task_routes=(route,))
        endpoints = AsyncEndpoints(celery, settings=Settings())
        sweep: Callable[[], dict[str, int]] = celery.tasks["async_endpoints.sweep"]
        sweep()  # Redis was there a moment ago: what ends now has lost its worker
        yield sweep
        endpoints.close()

    @pytest.fixture
    def jobs(self, redis_url: str) -> Iterator[Jobs]:
        jobs = Jobs(RedisServer.from_url(redis_url))
        yield jobs
        jobs.store.close()

    def lost(self, jobs: Jobs, name: str, seconds: int) -> Known:
        """A running job whose lease ended some time ago."""
        job = jobs.running(name=name)
        jobs.client.zadd(jobs.keys.running, {job.id: jobs.now() - 1000 * seconds}, xx=True)
        return job

    def due(self, jobs: Jobs, name: str, seconds: int) -> Known:
        """A job that should have had its message some time ago."""
        job = jobs.queued(name=name)
        jobs.forget_message(job)
        jobs.client.zadd(jobs.keys.waiting, {job.id: jobs.now() - 1000 * seconds}, xx=True)
        return job

    def test_does_not_stop_the_sweep_for_the_others(self, jobs: Jobs, sweep: Callable[[], dict[str, int]]) -> None:
        bad = [self.lost(jobs, "Bad", 2), self.due(jobs, "Bad", 2)]
        good = [self.lost(jobs, "Good", 1), self.due(jobs, "Good", 1)]
        jobs.client.delete("celery")
        assert sweep() == {"dispatched": 1, "recovered": 2, "pruned": 0}
        entries: Any = jobs.client.lrange("celery", 0, -1)
        assert {json.loads(entry)["headers"]["id"] for entry in entries} == {job.id for job in good}
        for job in (*bad, *good):
            assert jobs.status(job) == JobStatus.QUEUED
            assert (jobs.score("ae:waiting", job) or 0) > jobs.now()

    def test_is_tried_once_in_a_sweep_however_long_it_waits(
        self, jobs: Jobs, sweep: Callable[[], dict[str, int]], tried: list[str]
    ) -> None:
        job = self.due(jobs, "Bad", 3600)
        assert sweep() == {"dispatched": 0, "recovered": 0, "pruned": 0}
        assert (jobs.score("ae:waiting", job) or 0) > jobs.now()
        assert len(tried) == 1


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_an_exception_that_nobody_catches_fails_the_job_only(bench: Bench, pool: str) -> None:
    node = bench.worker(pool)
    for kind in ("custom", "cancelled"):
        job_id = bench.submit("Unnatural", kind=kind)
        job = bench.end(job_id)
        assert (job.status, job.retry_count) == (JobStatus.FAILED, 1)
        assert job.error is not None
        assert "alien" in job.error.message
        assert len(bench.deployed.runs(job_id)) == 2
    assert bench.end(bench.submit("Echo")).status == JobStatus.COMPLETED
    assert node.container.status == "running"


def test_who_revokes_the_task_cancels_the_job(bench: Bench) -> None:
    node = bench.worker("prefork")
    control = bench.deployed.celery.control
    for signal in ("SIGTERM", "SIGKILL"):
        running = bench.submit("Gate")
        bench.started(running)
        queued = bench.submit("Gate")
        control.revoke(queued)
        node.container.process.wait_for(f"flagged as revoked: {queued}")
        assert bench.job(running).status == JobStatus.IN_PROGRESS
        control.revoke(running, terminate=True, signal=signal)
        for job_id, runs in ((running, 1), (queued, 0)):
            job = bench.end(job_id)
            assert (job.status, job.retry_count, job.error) == (JobStatus.CANCELED, 0, None)
            assert len(bench.deployed.runs(job_id)) == runs
    assert bench.redis.zcard("ae:running") == bench.redis.zcard("ae:waiting") == 0
    assert bench.end(bench.submit("EchoSync")).status == JobStatus.COMPLETED


def test_a_lease_is_kept_when_messages_are_acknowledged_early(bench: Bench) -> None:
    bench.worker("prefork", concurrency=2, task_annotations={"*": {"acks_late": False}})
    job_id = bench.submit("Gate")
    bench.started(job_id)

    def lease() -> float:
        bench.deployed.sweep()
        return float(bench.redis.zscore("ae:running", job_id) or 0)

    end = lease()
    assert end > 0
    # The job goes on for longer than its first lease, and a worker sweeps all the time.
    wait_until(lambda: lease() > end + 1000 * LEASE_SECONDS, interval=0.2)
    bench.deployed.open_gate(job_id)
    job = bench.end(job_id)
    assert (job.status, job.retry_count) == (JobStatus.COMPLETED, 0)
    assert len(bench.deployed.runs(job_id)) == 1


def test_no_event_shows_the_payload_of_a_job_that_killed_its_process(bench: Bench) -> None:
    config = {"task_retry_on_worker_lost": True, "task_send_sent_event": True}
    bench.worker("prefork", "-E", **config)
    with Events(bench.deployed) as events:
        job_id = bench.submit("Exit", text=SECRET)
        job = bench.end(job_id)
        assert (job.status, job.retry_count) == (JobStatus.FAILED, 1)
        assert job.error is not None
        assert job.error.code == "WORKER_LOST"
        done = bench.submit("EchoSync", text=SECRET)
        bench.end(done)
        wait_until(lambda: "task-succeeded" in events.types(done))
    assert len(bench.deployed.runs(job_id)) == 2
    assert events.types(job_id).count("task-received") >= 2
    assert SECRET not in repr(events.seen)


def test_a_handler_that_blocks_the_event_loop_ends_in_time_and_the_next_one_runs(bench: Bench) -> None:
    bench.worker("threads", concurrency=2)
    first = bench.end(bench.submit("WhereAmI"))
    blocking = bench.submit("BlocksTheLoop")
    job = bench.end(blocking)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert job.error.code == "JOB_TIMEOUT"
    # It still blocks.
    second = bench.end(bench.submit("WhereAmI"), timeout=5)
    assert second.status == JobStatus.COMPLETED
    assert second.result["pid"] == first.result["pid"]
    assert second.result["loop"] != first.result["loop"]
    bench.deployed.open_gate(blocking)
    assert bench.end(bench.submit("Echo")).status == JobStatus.COMPLETED
    assert bench.job(blocking) == job


class TestTheStoreIsAway:
    @pytest.fixture
    def store(self) -> Iterator[ValkeyServer]:
        with valkey_server() as server:
            yield server

    def test_a_soft_limit_does_not_lose_a_result_that_is_being_written(
        self, redis_url: str, store: ValkeyServer, tmp_path: Path, start_worker: Callable[..., WorkerNode]
    ) -> None:
        """The broker, where the gate is too, stays."""
        with Deployment(tmp_path, redis_url, store.url, trace=redis_url) as deployed:
            bench = Bench(deployed, start_worker, store.url)
            node = bench.worker("prefork")
            job_id = bench.submit("GateWithLimit")
            bench.started(job_id)
            store.pause()
            deployed.open_gate(job_id)
            node.container.process.wait_for(rf"Soft time limit \(2\.0s\) exceeded for .*{job_id}")
            store.resume()
            job = bench.end(job_id)
            assert (job.status, job.result, job.retry_count) == (JobStatus.COMPLETED, "written late", 0)
            assert len(deployed.runs(job_id)) == 1
            bench.endpoints.close()
