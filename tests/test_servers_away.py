"""A server goes and comes back while jobs run: workers go on by themselves, and every accepted job ends."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deployment import OVER, Deployment
from tests.nodes import WorkerNode
from tests.processes import wait_until
from tests.servers import RabbitMQServer, ValkeyServer, valkey_server

SETTINGS = {
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": "2",
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
}


@pytest.fixture(scope="module")
def trace() -> Iterator[ValkeyServer]:
    """Where handlers leave their traces, whatever happens to the other servers."""
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    """Broker and store: what it confirmed is on disk."""
    with valkey_server(appendonly=True, extra_args=["--appendfsync", "always"]) as server:
        yield server


@pytest.fixture
def deployed(server: ValkeyServer, trace: ValkeyServer, tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path, server.url, trace=trace.url, env=SETTINGS) as deployed:
        deployed.start_web()
        yield deployed


def submit_patiently(deployed: Deployment, seconds: float) -> str:
    """As a good client does it: again until it is accepted."""
    found: list[str] = []

    def accepted() -> bool:
        try:
            response = deployed.post("Span", seconds=seconds)
        except httpx.TransportError:
            return False
        assert response.status_code in (202, 503), response.text
        found.extend([response.json()["id"]] if response.status_code == 202 else [])
        return bool(found)

    wait_until(accepted, interval=0.1)
    return found[0]


def assert_all_end(deployed: Deployment, ids: list[str], timeout: float = 75) -> None:
    """A message that a worker had just popped when the server was killed is lost. The sweep doubts it after 10 s,
    sends a probe once nothing was claimed for 10 s, and whatever else was lost 10 s after that."""

    def over() -> bool:
        return all(deployed.job(job_id)["status"] in OVER for job_id in reversed(ids))

    wait_until(over, timeout, interval=0.2)
    for job_id in ids:
        record = deployed.job(job_id)
        assert (record["status"], record["error"]) == ("Completed", None)
        # One attempt after the other, never two at once.
        spans = deployed.redis.lrange(f"test:spans:{job_id}", 0, -1)
        assert spans == ["start", "end"] * (len(spans) // 2)
        assert len(spans) // 2 == record["retryCount"] + 1


def start_worker(deployed: Deployment, pool: str) -> WorkerNode:
    return deployed.start_worker("-P", pool, "-c", "4", "-B", "-s", str(deployed.directory / "beat"))


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_redis_is_killed_and_started_again(deployed: Deployment, server: ValkeyServer, pool: str) -> None:
    node = start_worker(deployed, pool)
    pid = node.container.pid
    ids = [deployed.submit("Span", seconds=0.1) for _ in range(60)]
    wait_until(lambda: deployed.job(ids[8])["status"] == "Completed")
    server.kill()
    server.start()
    ids += [submit_patiently(deployed, 0.1) for _ in range(40)]
    assert_all_end(deployed, ids)
    assert node.container.status == "running"
    assert node.container.pid == pid
    assert deployed.finish("Echo")["status"] == "Completed"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_redis_answers_nothing_for_a_while(deployed: Deployment, server: ValkeyServer, pool: str) -> None:
    """Longer than a lease, and longer than any socket waits."""
    node = start_worker(deployed, pool)
    ids = [deployed.submit("Span", seconds=0.2) for _ in range(20)]
    wait_until(lambda: deployed.job(ids[3])["status"] == "Completed")
    with server.client() as client:
        client.client_pause(3000)
    time.sleep(3)
    assert_all_end(deployed, ids)
    assert [deployed.job(job_id)["retryCount"] for job_id in ids] == [0] * len(ids)
    assert node.container.status == "running"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_rabbitmq_restarts(
    rabbitmq: RabbitMQServer, trace: ValkeyServer, tmp_path: Path, request: pytest.FixtureRequest, pool: str
) -> None:
    url = request.getfixturevalue("rabbitmq_url")
    # As the README says: with this on, Celery's threads pool at times receives nothing more after the restart.
    env = {**SETTINGS, "TEST_CELERY_CONFIG": json.dumps({"worker_enable_prefetch_count_reduction": False})}
    with (
        valkey_server() as store,
        Deployment(tmp_path, url, store.url, trace=trace.url, env=env) as deployed,
    ):
        deployed.start_web()
        node = start_worker(deployed, pool)
        ids = [deployed.submit("Span", seconds=0.1) for _ in range(40)]
        wait_until(lambda: deployed.job(ids[8])["status"] == "Completed")
        rabbitmq.restart()
        ids += [submit_patiently(deployed, 0.1) for _ in range(10)]
        assert_all_end(deployed, ids)
        assert [deployed.job(job_id)["retryCount"] for job_id in ids] == [0] * len(ids)
        assert node.container.status == "running"
        assert deployed.finish("Echo")["status"] == "Completed"
