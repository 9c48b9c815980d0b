"""Leases between real workers: a stopped one loses its job, a live one keeps it whatever Redis does."""

import time
from collections.abc import Callable, Iterator

import pytest

from tests.deployment import Deployment
from tests.nodes import WorkerNode
from tests.processes import wait_until
from tests.servers import ValkeyServer, valkey_server

LEASE = 2.0
SETTINGS = {
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": str(LEASE),
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
}
REFUSED = "was no longer this worker's"


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="module")
def deployed(server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A web process, and a worker that sweeps every second."""
    with Deployment(tmp_path_factory.mktemp("leases"), server.url, env=SETTINGS) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "2", "-B", "-s", str(deployed.directory / "beat"))
        yield deployed


@pytest.fixture
def start_parked(deployed: Deployment) -> Iterator[Callable[..., WorkerNode]]:
    """Starts workers for a queue of their own; they end with the test."""
    nodes: list[WorkerNode] = []

    def start(pool: str, concurrency: int = 1) -> WorkerNode:
        nodes.append(deployed.start_worker("-P", pool, "-c", str(concurrency), "-Q", "parked"))
        return nodes[-1]

    yield start
    for node in nodes:
        node.teardown()
    deployed.redis.delete("parked", "unacked", "unacked_index")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_stood_still_has_lost_its_job_and_can_write_nothing(
    deployed: Deployment, start_parked: Callable[..., WorkerNode], pool: str
) -> None:
    frozen = start_parked(pool)
    job_id = deployed.submit("Turns")
    deployed.wait(job_id, "InProgress")
    frozen.container.process.pause()
    assert deployed.wait(job_id, "Queued")["error"]["code"] == "WORKER_LOST"
    start_parked("solo")
    wait_until(lambda: len(deployed.runs(job_id)) == 2)

    # Its handler reports progress and returns, while the heir still runs.
    taken = deployed.record(job_id)
    assert (taken["status"], taken["retries"]) == ("InProgress", "1")
    frozen.container.process.resume()
    deployed.open_gate(f"{job_id}:0")
    wait_until(lambda: f"job {job_id} {REFUSED}" in frozen.logs())
    assert deployed.record(job_id) == taken

    deployed.open_gate(f"{job_id}:1")
    record = deployed.wait(job_id)
    assert (record["status"], record["result"], record["retryCount"]) == ("Completed", 1, 1)
    assert len(deployed.runs(job_id)) == 2
    assert f"{job_id}] succeeded" not in frozen.logs()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_outage_of_redis_costs_a_live_worker_nothing(
    deployed: Deployment, server: ValkeyServer, start_parked: Callable[..., WorkerNode], pool: str
) -> None:
    """Every lease ends meanwhile, and the sweeps come back together with the worker."""
    worker = start_parked(pool)
    job_id = deployed.submit("Turns")
    deployed.wait(job_id, "InProgress")
    server.pause()
    time.sleep(2 * LEASE)  # the outage itself
    server.resume()
    for _ in range(3):
        before = deployed.redis.hget("ae:sweep", "last_run")
        wait_until(lambda: deployed.redis.hget("ae:sweep", "last_run") != before)  # noqa: B023
    record = deployed.job(job_id)
    assert (record["status"], record["retryCount"]) == ("InProgress", 0)
    deployed.open_gate(f"{job_id}:0")
    record = deployed.wait(job_id)
    assert (record["status"], record["result"], record["error"]) == ("Completed", 0, None)
    assert len(deployed.runs(job_id)) == 1
    assert worker.container.status == "running"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_one_call_renews_all_leases_of_a_worker(
    deployed: Deployment, server: ValkeyServer, start_parked: Callable[..., WorkerNode], pool: str
) -> None:
    start_parked(pool, 4)
    ids = [deployed.submit("Turns") for _ in range(4)]
    for job_id in ids:
        deployed.wait(job_id, "InProgress")
    renewed = [deployed.redis.zscore("ae:running", job_id) for job_id in ids]
    wait_until(lambda: all(deployed.redis.zscore("ae:running", job_id) not in renewed for job_id in ids))

    renewals: list[set[str]] = []
    with server.client(socket_timeout=5) as client, client.monitor() as monitor:
        began = time.monotonic()
        while len(renewals) < 3:
            words = monitor.next_command()["command"].split(" ")
            if words[0] == "EVALSHA" and words[3] == "ae:running":
                renewals.append({word.removeprefix("ae:job:") for word in words if word.startswith("ae:job:")})
            assert time.monotonic() - began < 5
    assert time.monotonic() - began > 0.8  # rounds, not one call for each job
    assert renewals == [set(ids)] * 3
    for job_id in ids:
        deployed.open_gate(f"{job_id}:0")
        assert deployed.wait(job_id)["retryCount"] == 0
