"""The outbox: the broker is not the store, so the record comes first and its message follows, at last by the sweep."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.deployment import Deployment, Proxy
from tests.processes import wait_until
from tests.servers import RabbitMQServer, ValkeyServer, valkey_server

SETTINGS = {
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": "2",
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
}


@dataclass
class Broker:
    """A broker that is not the store."""

    url: str
    port: int
    leave: Callable[[], None]
    come_back: Callable[[], None]
    #: What a request that publishes EchoSync contains.
    publication: bytes
    env: dict[str, str]


@pytest.fixture(scope="module", params=["classic", "quorum", "redis"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    with ExitStack() as stack:
        if request.param == "redis":
            server: ValkeyServer = stack.enter_context(valkey_server(appendonly=True))
            yield Broker(server.url, server.port, server.stop, server.start, b"LPUSH", {})
            return
        rabbitmq: RabbitMQServer = request.getfixturevalue("rabbitmq")
        url, publication = rabbitmq.add_vhost(), b"async_endpoints.EchoSync"
        if request.param == "classic":
            # It hangs: connections stay, and what was sent meanwhile may still arrive.
            yield Broker(url, rabbitmq.port, rabbitmq.pause, rabbitmq.resume, publication, {})
        else:

            def stop() -> None:
                rabbitmq.ctl("stop_app")

            def start() -> None:
                rabbitmq.ctl("start_app")

            yield Broker(url, rabbitmq.port, stop, start, publication, {"TEST_QUORUM": "1"})


@pytest.fixture(scope="module")
def deployed(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Web process and a worker around one broker and one store."""
    with (
        valkey_server() as store,
        Deployment(
            tmp_path_factory.mktemp("outbox"), broker.url, store.url, env={**SETTINGS, **broker.env}
        ) as deployed,
    ):
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "2")
        yield deployed


@pytest.fixture
def another_web(deployed: Deployment) -> Iterator[None]:
    """Whatever web process a test starts is its own."""
    web, http = deployed.web, deployed.http
    yield
    deployed.web, deployed.http = web, http


def assert_ran_once(deployed: Deployment, job_id: str) -> None:
    record = deployed.wait(job_id)
    assert (record["status"], record["retryCount"]) == ("Completed", 0)
    # Whatever copies there are come before this one.
    assert deployed.finish("Echo")["status"] == "Completed"
    assert len(deployed.runs(job_id)) == 1


def assert_in_outbox(deployed: Deployment, job_id: str) -> None:
    record = deployed.record(job_id)
    assert (record["status"], record["dispatched"]) == ("Queued", "")
    due = deployed.dispatch_due(job_id)
    assert due is not None
    assert 0 < due - int(record["created"]) <= 10_000  # the sweep will see to it


@pytest.mark.parametrize("name", ["Echo", "EchoSync"])
def test_a_job_runs(deployed: Deployment, name: str) -> None:
    job_id = deployed.submit(name, {"X-Echo": "through another broker"}, text="hello")
    assert deployed.wait(job_id)["result"]["header"] == "through another broker"
    assert_ran_once(deployed, job_id)


def test_retries_come_through_the_broker(deployed: Deployment) -> None:
    job_id = deployed.submit("Flaky", failures=2)
    record = deployed.wait(job_id)
    assert (record["status"], record["retryCount"]) == ("Completed", 2)
    assert len(deployed.runs(job_id)) == 3


def test_the_outbox_entry_is_cleared_when_the_broker_confirmed(deployed: Deployment) -> None:
    job_id = deployed.submit("Parked")
    wait_until(lambda: deployed.record(job_id)["dispatched"] != "")
    deployed.http.delete(f"/jobs/{job_id}").raise_for_status()


def test_a_duplicate_publication_runs_once(deployed: Deployment) -> None:
    job_id = deployed.submit("Gate")
    deployed.wait(job_id, "InProgress")
    request = deployed.redis.get(f"ae:request:{job_id}")
    for _ in range(3):
        deployed.celery.send_task("async_endpoints.Gate", [1, request], task_id=job_id)
    deployed.open_gate(job_id)
    assert_ran_once(deployed, job_id)


class TestTheBrokerIsAway:
    @pytest.fixture
    def submitted(self, deployed: Deployment, broker: Broker) -> str:
        """A job that was accepted meanwhile."""
        broker.leave()
        try:
            began = time.monotonic()
            job_id = deployed.submit("EchoSync", text="into the outbox")
            assert time.monotonic() - began < 2
            assert_in_outbox(deployed, job_id)
        finally:
            broker.come_back()
        return job_id

    def test_the_sweep_publishes(self, deployed: Deployment, submitted: str) -> None:
        # A new worker sweeps at its start.
        deployed.make_due_if_waiting(submitted)
        node = deployed.start_worker("-P", "threads", "-c", "1")
        deployed.sweep_until_over(submitted)
        assert_ran_once(deployed, submitted)
        assert deployed.finish("Echo")["status"] == "Completed"
        node.teardown()

    def test_the_first_job_after_its_return_goes_out_at_once(self, deployed: Deployment, broker: Broker) -> None:
        """The connections that were kept are dead, and nobody has to wait for the sweep because of that."""
        job_id = deployed.submit("Parked")
        wait_until(lambda: deployed.record(job_id)["dispatched"] != "")
        broker.leave()
        broker.come_back()
        deployed.celery.send_task("probe", queue="parked")  # the queue is there again
        again = deployed.submit("Parked")
        wait_until(lambda: deployed.record(again)["dispatched"] != "", 2)
        for parked in (job_id, again):
            deployed.http.delete(f"/jobs/{parked}").raise_for_status()


class TestAWebProcessThatDies:
    @pytest.mark.parametrize("moment", ["before_task_publish", "after_task_publish"])
    def test_between_record_and_confirmation(self, deployed: Deployment, another_web: None, moment: str) -> None:
        web = deployed.start_web(env={"TEST_DIE_AT": moment})
        chosen = str(uuid4())
        with pytest.raises(httpx.TransportError):
            deployed.post("EchoSync", {"X-Async-Request-Id": chosen}, text="last words")
        assert web.wait() == -signal.SIGKILL
        if moment == "before_task_publish":
            assert_in_outbox(deployed, chosen)
            deployed.sweep_until_over(chosen)
        wait_until(lambda: deployed.record(chosen)["status"] == "Completed")
        assert len(deployed.runs(chosen)) == 1

    def test_the_client_comes_again(self, deployed: Deployment, another_web: None) -> None:
        alive = deployed.http
        web = deployed.start_web(env={"TEST_DIE_AT": "before_task_publish"})
        chosen = str(uuid4())
        with pytest.raises(httpx.TransportError):
            deployed.post("EchoSync", {"X-Async-Request-Id": chosen}, text="last words")
        web.wait()
        again = alive.post("/run/EchoSync", json={"text": "last words"}, headers={"X-Async-Request-Id": chosen})
        assert (again.status_code, again.json()["id"]) == (202, chosen)
        deployed.http = alive
        deployed.sweep_until_over(chosen)
        assert_ran_once(deployed, chosen)


def test_the_reply_of_the_publication_is_lost(
    deployed: Deployment, broker: Broker, another_web: None, tmp_path: Path
) -> None:
    alive = deployed.http
    with Proxy(broker.port) as proxy:
        url = broker.url.replace(f":{broker.port}", f":{proxy.port}")
        web = deployed.start_web(env={"TEST_BROKER_URL": url})
        deployed.submit("EchoSync", text="connects")
        proxy.lose_replies(broker.publication)
        began = time.monotonic()
        job_id = deployed.submit("EchoSync", text="published, or not?")
        assert time.monotonic() - began < 2
        assert proxy.lost
        proxy.lose_replies(b"", 0)
        later = deployed.submit("EchoSync", text="the next one")
        web.stop()
    deployed.http = alive
    for submitted in (job_id, later):
        deployed.sweep_until_over(submitted)
        assert_ran_once(deployed, submitted)
