"""The sweep: on the beat schedule and at worker start; what it mends, and what needs no mending."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from async_endpoints_celery import AsyncEndpoints, Settings
from tests.deployment import Deployment
from tests.nodes import WorkerNode
from tests.processes import wait_until
from tests.servers import ValkeyServer, valkey_server

LEASE = 1.0
SETTINGS = {
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": str(LEASE),
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
}
ENTRY = "async-endpoints-sweep"


class TestTheSchedule:
    @pytest.fixture
    def celery(self, valkey: ValkeyServer) -> Iterator[Celery]:
        app = Celery("schedule", broker=valkey.url, set_as_current=False)
        yield app
        app.close()

    def schedule(self, celery: Celery) -> dict[str, Any]:
        celery.finalize()
        return dict(celery.conf.beat_schedule)

    mine = {"mine": {"task": "mine", "schedule": 60.0}}  # noqa: RUF012

    def test_has_the_sweep(self, celery: Celery) -> None:
        AsyncEndpoints(celery, settings=Settings(recovery_check_interval_seconds=7))
        entry = self.schedule(celery)[ENTRY]
        assert (entry["task"], entry["schedule"]) == ("async_endpoints.sweep", 7)
        assert entry["options"]["expires"] > 0
        assert entry["task"] in celery.tasks

    def test_keeps_entries_from_before(self, celery: Celery) -> None:
        celery.conf.beat_schedule = self.mine
        AsyncEndpoints(celery)
        assert self.schedule(celery).keys() == {"mine", ENTRY}

    def test_keeps_entries_from_after(self, celery: Celery) -> None:
        AsyncEndpoints(celery)
        celery.conf.beat_schedule = self.mine
        assert self.schedule(celery).keys() == {"mine", ENTRY}

    def test_keeps_entries_of_a_configuration_object(self, celery: Celery) -> None:
        AsyncEndpoints(celery)
        celery.config_from_object({"beat_schedule": self.mine})
        assert self.schedule(celery).keys() == {"mine", ENTRY}

    def test_keeps_entries_added_when_configured(self, celery: Celery) -> None:
        AsyncEndpoints(celery)

        @celery.task(name="mine")
        def mine() -> None:
            pass

        @celery.on_after_finalize.connect
        def add(sender: Celery, **_: Any) -> None:
            sender.add_periodic_task(60.0, mine.s(), name="mine")

        assert self.schedule(celery).keys() == {"mine", ENTRY}

    def test_a_sweep_of_the_users_own_stays(self, celery: Celery) -> None:
        own = {ENTRY: {"task": "async_endpoints.sweep", "schedule": 3.0}}
        celery.conf.beat_schedule = own
        AsyncEndpoints(celery)
        assert self.schedule(celery)[ENTRY]["schedule"] == 3.0

    def test_an_app_that_is_finalized_already(self, celery: Celery) -> None:
        celery.finalize()
        AsyncEndpoints(celery)
        assert ENTRY in celery.conf.beat_schedule

    def test_other_apps_are_left_alone(self, celery: Celery, valkey: ValkeyServer) -> None:
        AsyncEndpoints(celery)
        self.schedule(celery)
        other = Celery("other", broker=valkey.url, set_as_current=False)
        assert self.schedule(other) == {}
        other.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with (
        valkey_server() as server,
        Deployment(tmp_path_factory.mktemp("recovery"), server.url, env=SETTINGS) as deployed,
    ):
        deployed.start_web()
        yield deployed


@pytest.fixture(scope="module")
def worker(shared: Deployment) -> WorkerNode:
    """A prefork worker with beat, which sweeps every second."""
    return shared.start_worker("-P", "prefork", "-c", "2", "-B", "-s", str(shared.directory / "beat"))


@pytest.fixture
def deployed(shared: Deployment, worker: WorkerNode) -> Deployment:
    return shared


@pytest.fixture
def start_parked(deployed: Deployment) -> Iterator[Callable[[str], WorkerNode]]:
    """Starts workers for the queue that the others leave alone; they end with the test."""
    nodes: list[WorkerNode] = []

    def start(pool: str) -> WorkerNode:
        nodes.append(deployed.start_worker("-P", pool, "-c", "1", "-Q", "parked"))
        return nodes[-1]

    yield start
    for node in nodes:
        node.teardown()
    deployed.redis.delete("parked")


def last_sweep(deployed: Deployment) -> int:
    found: Any = deployed.redis.hget("ae:sweep", "last_run")
    return int(found or 0)


def sweeps_again(deployed: Deployment, times: int = 2) -> bool:
    for _ in range(times):
        before = last_sweep(deployed)
        wait_until(lambda: last_sweep(deployed) > before, 15)  # noqa: B023
    return True


def test_a_worker_with_beat_sweeps(deployed: Deployment) -> None:
    assert sweeps_again(deployed)


class TestLostMessages:
    def test_of_a_purged_queue(self, deployed: Deployment, start_parked: Callable[[str], WorkerNode]) -> None:
        job_id = deployed.submit("Parked")
        assert deployed.redis.delete("parked") == 1
        deployed.make_due(job_id)
        wait_until(lambda: deployed.messages("parked"), 5)
        (message,) = deployed.messages("parked")
        assert message["headers"]["id"] == job_id
        start_parked("solo")
        assert deployed.wait(job_id)["status"] == "Completed"
        assert len(deployed.runs(job_id)) == 1

    def test_many_sweeps_at_once_do_no_harm(
        self, deployed: Deployment, start_parked: Callable[[str], WorkerNode]
    ) -> None:
        """Each finds the same forty jobs due."""
        ids = [deployed.submit("Parked") for _ in range(40)]
        deployed.redis.delete("parked", "ae:claimed")
        # A message of this name that went out later was claimed: these are lost.
        for job_id in ids:
            deployed.redis.zadd("ae:waiting", {job_id: 1}, xx=True)
        deployed.redis.hset("ae:claimed", "Parked", 10**15)
        for _ in range(12):
            deployed.sweep()
        wait_until(lambda: len(deployed.messages("parked")) >= len(ids), 5)
        assert sweeps_again(deployed)
        found = [message["headers"]["id"] for message in deployed.messages("parked")]
        assert sorted(found) == sorted(ids)
        start_parked("threads")
        for job_id in ids:
            assert deployed.wait(job_id)["status"] == "Completed"
            assert len(deployed.runs(job_id)) == 1


class TestDeadWorkers:
    def test_a_killed_worker(self, deployed: Deployment, start_parked: Callable[[str], WorkerNode]) -> None:
        """Its lease ends, a sweep gives the job to another worker, and that costs a retry."""
        victim = start_parked("prefork")
        job_id = deployed.submit("ParkedGate")
        deployed.wait(job_id, "InProgress")
        began = time.monotonic()
        victim.teardown()  # SIGKILL for all of it
        record = deployed.wait(job_id, "Queued")
        assert time.monotonic() - began < LEASE + 4
        assert (record["retryCount"], record["error"]["code"]) == (1, "WORKER_LOST")
        start_parked("solo")
        deployed.wait(job_id, "InProgress")
        deployed.open_gate(job_id)
        record = deployed.wait(job_id)
        assert (record["status"], record["result"], record["error"]) == ("Completed", 1, None)
        assert len(deployed.runs(job_id)) == 2

    def test_a_killed_main_process(self, deployed: Deployment, start_parked: Callable[[str], WorkerNode]) -> None:
        """Its orphaned pool process goes on, and cannot write a thing any more."""
        victim = start_parked("prefork")
        job_id = deployed.submit("ParkedGate")
        deployed.wait(job_id, "InProgress")
        victim.kill()
        assert deployed.wait(job_id, "Queued")["retryCount"] == 1
        start_parked("solo")
        wait_until(lambda: len(deployed.runs(job_id)) == 2)
        deployed.open_gate(job_id)  # for both
        record = deployed.wait(job_id)
        assert (record["status"], record["result"]) == ("Completed", 1)  # the heir's
        victim.teardown()
        assert deployed.job(job_id) == record

    def test_a_handler_that_kills_its_process_every_time(self, deployed: Deployment, worker: WorkerNode) -> None:
        began = time.monotonic()
        job_id = deployed.submit("Exit")
        record = deployed.wait(job_id, timeout=15)
        assert (record["status"], record["error"]["code"]) == ("Failed", "WORKER_LOST")
        assert record["retryCount"] == record["maxRetries"] == 1
        runs = deployed.runs(job_id)
        assert len(runs) == 2
        assert len(set(runs)) == 2
        assert worker.container.status == "running"
        assert deployed.finish("Echo")["status"] == "Completed"
        assert time.monotonic() - began < 15

    def test_a_handler_that_is_killed_once(self, deployed: Deployment) -> None:
        job_id = deployed.submit("ExitOnce")
        record = deployed.wait(job_id, timeout=15)
        assert (record["status"], record["result"], record["error"]) == ("Completed", 1, None)
        assert len(deployed.runs(job_id)) == 2

    def test_a_pool_process_that_is_killed_from_outside(self, deployed: Deployment) -> None:
        job_id = deployed.submit("Gate")
        deployed.wait(job_id, "InProgress")
        (pid,) = deployed.runs(job_id)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(deployed.runs(job_id)) == 2, 15)
        deployed.open_gate(job_id)
        record = deployed.wait(job_id)
        assert (record["status"], record["retryCount"]) == ("Completed", 1)


class TestLiveWorkers:
    """Sweeps every second, and nothing is recovered."""

    def test_keep_a_job_whose_handler_holds_the_interpreter_lock(self, deployed: Deployment) -> None:
        ids = [deployed.submit(name, seconds=3 * LEASE) for name in ("HoldGil", "Backtrack")]
        for job_id in ids:
            record = deployed.wait(job_id, timeout=15)
            assert (record["status"], record["retryCount"]) == ("Completed", 0)
            assert len(deployed.runs(job_id)) == 1

    def test_keep_a_job_that_is_long(self, deployed: Deployment) -> None:
        ids = [deployed.submit(name) for name in ("Gate", "GateAsync")]
        for job_id in ids:
            deployed.wait(job_id, "InProgress")
        deployed.start_worker("-P", "solo").teardown()  # sweeps at its start
        wait_until(
            lambda: all(
                int(deployed.redis.zscore("ae:running", job_id) or 0)
                > int(deployed.record(job_id)["started"]) + 3000 * LEASE
                for job_id in ids
            )
        )
        for job_id in ids:
            deployed.open_gate(job_id)
            record = deployed.wait(job_id)
            assert (record["status"], record["retryCount"]) == ("Completed", 0)
            assert len(deployed.runs(job_id)) == 1

    @pytest.mark.parametrize("pool", ["prefork", "threads"])
    def test_keep_a_job_while_they_shut_down(
        self, deployed: Deployment, start_parked: Callable[[str], WorkerNode], pool: str
    ) -> None:
        """SIGTERM lets it finish, and that may take longer than a lease."""
        node = start_parked(pool)
        job_id = deployed.submit("ParkedGate")
        deployed.wait(job_id, "InProgress")
        node.kill(signal.SIGTERM)
        node.container.process.wait_for("Warm shutdown")
        assert sweeps_again(deployed, 4)
        assert deployed.job(job_id)["status"] == "InProgress"
        deployed.open_gate(job_id)
        record = deployed.wait(job_id)
        assert (record["status"], record["retryCount"]) == ("Completed", 0)
        assert len(deployed.runs(job_id)) == 1
        assert node.container.process.wait() == 0


def test_beat_and_worker_apart(valkey: ValkeyServer, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Deployment(tmp_path_factory.mktemp("apart"), redis_url, env=SETTINGS) as deployed:
        deployed.start_web()
        lost = deployed.submit("Echo")
        assert deployed.redis.delete("celery") == 1
        deployed.make_due(lost)
        worker = deployed.start_worker("-P", "threads", "-c", "2")
        # At its start, without any beat.
        assert deployed.wait(lost)["status"] == "Completed"
        before = last_sweep(deployed)
        beats = [deployed.start_beat() for _ in range(2)]
        assert sweeps_again(deployed)
        for beat in beats:
            beat.kill()
        worker.teardown()
        # A stopped worker finds no pile of sweeps that matters.
        assert last_sweep(deployed) > before
