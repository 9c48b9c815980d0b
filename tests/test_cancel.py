"""Cancel, wherever a job is: waiting, scheduled, running in each kind of handler, over."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery

from async_endpoints_celery import AsyncEndpoints
from tests.deployment import Deployment
from tests.nodes import WorkerNode
from tests.processes import free_port, wait_until
from tests.servers import valkey_server

SETTINGS = {
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": "2",
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
}
SECRET = "nobody-else-may-read-this"


@pytest.fixture(scope="module", params=["prefork", "threads"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def deployed(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("cancel"), server.url, env=SETTINGS) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", pool, "-c", "2", "-B", "-s", str(deployed.directory / "beat"))
        yield deployed


@pytest.fixture
def start_parked(deployed: Deployment) -> Iterator[Callable[[], WorkerNode]]:
    """Starts workers for a queue of their own; they end with the test."""
    nodes: list[WorkerNode] = []

    def start() -> WorkerNode:
        nodes.append(deployed.start_worker("-P", "solo", "-Q", "parked"))
        return nodes[-1]

    yield start
    for node in nodes:
        node.teardown()


def cancel(deployed: Deployment, job_id: str) -> httpx.Response:
    return deployed.http.delete(f"/jobs/{job_id}")


def stopped(deployed: Deployment, job_id: str) -> list[float]:
    """When the handlers of this job heard of it."""
    found: Any = deployed.redis.lrange(f"test:stopped:{job_id}", 0, -1)
    return [float(moment) for moment in found]


def assert_canceled(deployed: Deployment, response: httpx.Response, job_id: str) -> None:
    assert (response.status_code, response.json()["status"]) == (200, "Canceled")
    record = deployed.record(job_id)
    assert (record["status"], record["retries"]) == ("Canceled", "0")
    assert record["completed"]
    assert deployed.redis.zscore("ae:waiting", job_id) is None
    assert deployed.redis.zscore("ae:running", job_id) is None


class TestWaiting:
    def test_queued_and_no_worker_is_there(self, deployed: Deployment, start_parked: Callable[[], WorkerNode]) -> None:
        """It holds when they come back."""
        job_id = deployed.submit("Parked")
        assert_canceled(deployed, cancel(deployed, job_id), job_id)
        record = deployed.record(job_id)
        node = start_parked()
        wait_until(lambda: f"job {job_id} is Canceled, not waiting" in node.logs())
        assert deployed.finish("Parked")["status"] == "Completed"
        assert deployed.record(job_id) == record
        assert deployed.runs(job_id) == []

    @pytest.mark.parametrize("delay", [1.0, 3600.0], ids=["in-a-message", "in-redis"])
    def test_scheduled(self, deployed: Deployment, delay: float) -> None:
        with Celery("outside", broker=deployed.broker, set_as_current=False) as celery:
            endpoints = AsyncEndpoints(celery)
            job_id = str(endpoints.sync.submit("EchoSync", {"text": ""}, delay_seconds=delay).id)
            endpoints.close()
        assert deployed.job(job_id)["status"] == "Scheduled"
        assert_canceled(deployed, cancel(deployed, job_id), job_id)
        record = deployed.record(job_id)
        if delay == 1.0:
            due = time.time() + delay + 0.5
            wait_until(lambda: time.time() > due)
        assert deployed.record(job_id) == record
        assert deployed.runs(job_id) == []

    def test_between_two_attempts(self, deployed: Deployment) -> None:
        job_id = deployed.submit("Failing")
        deployed.wait(job_id, "Scheduled")
        assert cancel(deployed, job_id).status_code == 200
        record = deployed.record(job_id)
        assert record["status"] == "Canceled"
        due = time.time() + 2.5
        wait_until(lambda: time.time() > due)
        assert deployed.record(job_id) == record
        assert len(deployed.runs(job_id)) == 1


class TestRunning:
    def run_and_cancel(self, deployed: Deployment, name: str) -> tuple[str, float]:
        job_id = deployed.submit(name)
        deployed.wait(job_id, "InProgress")
        wait_until(lambda: deployed.runs(job_id))
        asked = time.time()
        response = cancel(deployed, job_id)
        assert response.status_code == 202
        assert response.json()["status"] == "InProgress"
        return job_id, asked

    @pytest.mark.parametrize("name", ["Cancelable", "Attentive"])
    def test_a_handler_that_listens_hears_within_a_second(self, deployed: Deployment, name: str) -> None:
        job_id, asked = self.run_and_cancel(deployed, name)
        record = deployed.wait(job_id)
        assert (record["status"], record["result"], record["retryCount"]) == ("Canceled", None, 0)
        (heard,) = stopped(deployed, job_id)
        assert heard - asked < 1.0
        assert len(deployed.runs(job_id)) == 1

    def test_a_deaf_one_is_interrupted(self, deployed: Deployment, pool: str) -> None:
        if pool == "threads":
            pytest.skip("a thread cannot be interrupted")
        job_id, asked = self.run_and_cancel(deployed, "DeafSync")
        record = deployed.wait(job_id, timeout=10)
        assert record["status"] == "Canceled"
        (heard,) = stopped(deployed, job_id)
        assert 4 < heard - asked < 9  # it had its grace
        (pid,) = deployed.runs(job_id)
        assert deployed.finish("Echo")["status"] == "Completed"
        assert pid in {child.pid for node in deployed._nodes for child in node.container.children()}

    def test_again_does_no_harm(self, deployed: Deployment) -> None:
        job_id, _ = self.run_and_cancel(deployed, "Cancelable")
        again = cancel(deployed, job_id)
        assert again.status_code in (200, 202, 409)
        assert deployed.wait(job_id)["status"] == "Canceled"

    def test_a_handler_that_ends_all_the_same_has_completed(self, deployed: Deployment) -> None:
        job_id, _ = self.run_and_cancel(deployed, "Gate")
        deployed.open_gate(job_id)
        record = deployed.wait(job_id)
        assert (record["status"], record["result"]) == ("Completed", 0)


class TestOver:
    @pytest.mark.parametrize(
        ("name", "payload", "status"),
        [("Echo", {}, "Completed"), ("Outcome", {"kind": "failure"}, "Failed")],
    )
    def test_stays_as_it_is(self, deployed: Deployment, name: str, payload: dict[str, Any], status: str) -> None:
        record = deployed.finish(name, **payload)
        assert record["status"] == status
        stored = deployed.record(record["id"])
        assert cancel(deployed, record["id"]).status_code == 409
        assert deployed.record(record["id"]) == stored

    def test_a_canceled_job_stays_canceled(self, deployed: Deployment, start_parked: Callable[[], WorkerNode]) -> None:
        """The messages of a job that is over come late."""
        job_id = deployed.submit("Parked")
        (message,) = deployed.redis.lrange("parked", 0, -1)
        assert cancel(deployed, job_id).status_code == 200
        record = deployed.record(job_id)
        for _ in range(3):
            deployed.redis.lpush("parked", message)
        start_parked()
        assert deployed.finish("Parked")["status"] == "Completed"
        assert deployed.record(job_id) == record
        assert deployed.runs(job_id) == []


class TestRetryByHand:
    def retry(self, deployed: Deployment, job_id: str) -> None:
        assert deployed.http.post(f"/jobs/{job_id}/retry").status_code == 202

    def test_of_a_job_that_never_ran(self, deployed: Deployment, start_parked: Callable[[], WorkerNode]) -> None:
        job_id = deployed.submit("Parked")
        assert cancel(deployed, job_id).status_code == 200
        self.retry(deployed, job_id)
        assert deployed.job(job_id)["status"] == "Queued"
        start_parked()
        record = deployed.wait(job_id)
        assert (record["status"], record["retryCount"], record["error"]) == ("Completed", 0, None)
        assert len(deployed.runs(job_id)) == 1

    def test_of_a_job_that_ran(self, deployed: Deployment) -> None:
        """The very worker that it was canceled in runs it."""
        job_id = deployed.submit("Cancelable")
        wait_until(lambda: deployed.runs(job_id))
        cancel(deployed, job_id)
        assert deployed.wait(job_id)["status"] == "Canceled"
        deployed.open_gate(job_id)
        self.retry(deployed, job_id)
        assert deployed.wait(job_id)["status"] == "Completed"
        assert len(deployed.runs(job_id)) == 2
        revoked = deployed.celery.control.inspect(timeout=0.5).revoked()
        assert [ids for ids in revoked.values() if ids] == []


class Flower:
    """Flower's HTTP API."""

    def __init__(self, deployed: Deployment) -> None:
        port = free_port()
        self.process = deployed.run(
            *("celery", "-A", "tests.worker_app:celery_app", "flower", "--address=127.0.0.1", f"--port={port}"),
            env={"FLOWER_UNAUTHENTICATED_API": "true"},
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5)

    def task(self, job_id: str) -> dict[str, Any]:
        response = self.http.get(f"/api/task/info/{job_id}")
        found: dict[str, Any] = response.json() if response.status_code == 200 else {}
        return found

    def wait(self, job_id: str, state: str) -> dict[str, Any]:
        wait_until(lambda: self.task(job_id).get("state") == state, 8, f"{job_id}: {self.task(job_id)}, not {state}")
        return self.task(job_id)


def test_flower_shows_how_jobs_end(tmp_path: Path) -> None:
    # The retry waits in Redis: a worker that holds its message tells of RECEIVED next.
    env = {**SETTINGS, "ASYNC_ENDPOINTS_MESSAGE_COUNTDOWN_MAX_SECONDS": "1"}
    with valkey_server() as server, Deployment(tmp_path, server.url, env=env) as deployed:
        deployed.start_web()
        flower = Flower(deployed)
        flower.process.wait_for("Connected to redis")
        node = deployed.start_worker("-P", "threads", "-c", "4", "-E")
        with flower.http:
            wait_until(lambda: flower.task(deployed.finish("Echo")["id"]), 15)  # it listens

            def submit(name: str, **payload: Any) -> str:
                return deployed.submit(name, {"X-Secret": SECRET}, text=SECRET, **payload)

            done, failed = submit("Echo"), submit("Outcome", kind="value-error")
            retried, running = submit("Failing"), submit("Cancelable")
            shown = [flower.wait(done, "SUCCESS"), flower.wait(failed, "FAILURE"), flower.wait(retried, "RETRY")]
            assert shown[0]["name"] == "async_endpoints.Echo"
            assert shown[2]["retried"]
            wait_until(lambda: deployed.runs(running))
            assert cancel(deployed, running).status_code == 202
            shown.append(flower.wait(running, "REVOKED"))
            assert SECRET not in json.dumps(shown) + flower.http.get("/api/tasks").text
            assert SECRET not in node.logs() + flower.process.output
