"""Workers that are told to stop: what runs is finished or given back, and either way nothing is lost."""

import json
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.deployment import Deployment
from tests.nodes import WorkerNode
from tests.servers import valkey_server

SETTINGS = {
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": "5",
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
}
POOLS = ["prefork", "threads", "solo"]
COLD: dict[str, float] = {}
SOFT = {"worker_soft_shutdown_timeout": 1.0}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with (
        valkey_server() as server,
        Deployment(tmp_path_factory.mktemp("shutdown"), server.url, env=SETTINGS) as deployed,
    ):
        deployed.start_web()
        yield deployed


@pytest.fixture
def start(deployed: Deployment) -> Iterator[Callable[..., WorkerNode]]:
    """Starts workers that end with the test."""
    nodes: list[WorkerNode] = []

    def start(pool: str, concurrency: int = 1, config: dict[str, float] | None = None) -> WorkerNode:
        env = {"TEST_CELERY_CONFIG": json.dumps(config or {})}
        nodes.append(deployed.start_worker("-P", pool, "-c", str(concurrency), env=env))
        return nodes[-1]

    yield start
    for node in nodes:
        node.teardown()
    deployed.clear()


@pytest.mark.parametrize(
    ("pool", "name"), [("prefork", "GateAsync"), ("threads", "GateAsync"), ("solo", "Gate"), ("solo", "GateAsync")]
)
def test_a_warm_shutdown_finishes_what_runs(
    deployed: Deployment, start: Callable[..., WorkerNode], pool: str, name: str
) -> None:
    node = start(pool)
    job_id = deployed.submit(name)
    deployed.wait(job_id, "InProgress")
    waiting = deployed.submit("Echo")
    node.kill(signal.SIGTERM)
    node.container.process.wait_for("Warm shutdown")
    deployed.open_gate(job_id)
    assert node.container.process.wait() == 0
    record = deployed.job(job_id)
    assert (record["status"], record["retryCount"]) == ("Completed", 0)
    assert len(deployed.runs(job_id)) == 1
    assert deployed.job(waiting)["status"] == "Queued"
    assert [message["headers"]["id"] for message in deployed.messages()] == [waiting]


@pytest.mark.parametrize(("config", "name"), [(COLD, "Gate"), (COLD, "GateAsync"), (SOFT, "Gate")])
@pytest.mark.parametrize("pool", POOLS)
def test_a_cold_shutdown_gives_the_job_back(
    deployed: Deployment, start: Callable[..., WorkerNode], pool: str, config: dict[str, float], name: str
) -> None:
    node = start(pool, config=config)
    job_id = deployed.submit(name)
    deployed.wait(job_id, "InProgress")
    node.kill(signal.SIGQUIT)
    record = deployed.wait(job_id, "Queued")
    assert (record["retryCount"], record["error"]) == (0, None)
    assert deployed.redis.zcard("ae:running") == 0
    # Only a pool of processes can end its handler; elsewhere it goes on, for nothing, and the worker waits for it.
    if pool == "prefork":
        node.container.process.wait()
    deployed.open_gate(job_id)
    node.container.process.wait()
    assert deployed.job(job_id)["status"] == "Queued"
    assert [message["headers"]["id"] for message in deployed.messages()] == [job_id]

    start("solo")
    record = deployed.wait(job_id)
    assert (record["status"], record["retryCount"], record["error"]) == ("Completed", 0, None)
    assert len(deployed.runs(job_id)) == 2
    assert deployed.messages() == []


# Celery sleeps in its signal handler meanwhile, so in the solo pool nothing can go on.
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_soft_shutdown_lets_a_short_job_finish(
    deployed: Deployment, start: Callable[..., WorkerNode], pool: str
) -> None:
    node = start(pool, config={"worker_soft_shutdown_timeout": 1.5})
    job_id = deployed.submit("Span", seconds=0.5)
    deployed.wait(job_id, "InProgress")
    node.kill(signal.SIGQUIT)
    record = deployed.wait(job_id)
    assert (record["status"], record["retryCount"]) == ("Completed", 0)
    node.container.process.wait()
    start("solo")  # the message may come back: Celery hears of results no more
    assert deployed.finish("Echo")["status"] == "Completed"
    assert deployed.redis.lrange(f"test:spans:{job_id}", 0, -1) == ["start", "end"]
    assert deployed.job(job_id) == record


def test_restarts_under_load_lose_nothing_and_run_nothing_twice(
    deployed: Deployment, start: Callable[..., WorkerNode]
) -> None:
    nodes = [start("prefork", 2), start("threads", 2)]
    ids: list[str] = []
    for turn in range(4):
        ids += [deployed.submit("Span", seconds=0.05) for _ in range(16)]
        nodes[turn % 2].container.restart()
    for job_id in ids:
        record = deployed.wait(job_id, timeout=20)
        assert (record["status"], record["retryCount"]) == ("Completed", 0)
        assert deployed.redis.lrange(f"test:spans:{job_id}", 0, -1) == ["start", "end"]
    assert all(node.container.status == "running" for node in nodes)
