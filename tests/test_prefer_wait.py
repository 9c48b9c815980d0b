"""`Prefer: wait=N`: the client waits, and nobody asks Redis meanwhile."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.deployment import Deployment
from tests.processes import wait_until
from tests.servers import ValkeyServer, valkey_server
from tests.streaming import calls, channel, listeners, many, subscriptions
from tests.web import BODY, TestClient, assert_problem, assert_record, new_endpoints, request_id, shop

POLLS = 300


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("wait"), server.url) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "4")
        yield deployed


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def client(redis_url: str) -> Iterator[TestClient]:
    """No worker: its jobs stay Queued."""
    with TestClient(shop(new_endpoints(redis_url, max_wait_seconds=60))) as client:
        yield client


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def wait_for(seconds: float | str) -> dict[str, str]:
    return {"Prefer": f"wait={seconds}"}


class TestSubmission:
    def test_a_job_that_ends_in_time_is_answered_with_its_record(self, deployed: Deployment) -> None:
        response = deployed.post("Echo", wait_for(10), text="hello")
        assert response.status_code == 200
        record = response.json()
        assert_record(record, name="Echo", status="Completed")
        assert record["result"]["text"] == "hello"
        assert response.headers["preference-applied"] == "wait=10"
        assert response.headers["location"] == f"/jobs/{record['id']}"
        assert response.headers["async-job-id"] == record["id"]
        assert response.headers["cache-control"] == "no-store"
        assert "retry-after" not in response.headers
        read = deployed.http.get(response.headers["location"])
        assert read.json() == record
        assert read.headers["etag"] == response.headers["etag"]

    def test_a_job_that_fails_in_time_too(self, deployed: Deployment) -> None:
        response = deployed.post("Outcome", wait_for(10), kind="job-failed")
        assert response.status_code == 200
        assert response.json()["status"] == "Failed"
        assert response.json()["error"]["code"] == "CARD_DECLINED"

    def test_a_job_that_takes_longer_is_answered_as_always(self, deployed: Deployment) -> None:
        started = time.monotonic()
        response = deployed.post("Gate", wait_for(1))
        assert 0.9 < time.monotonic() - started < 5
        job_id = response.json()["id"]
        deployed.open_gate(job_id)
        assert response.status_code == 202
        assert_record(response.json(), status="InProgress")  # as it is now, not as it was
        assert response.headers["preference-applied"] == "wait=1"
        assert response.headers["location"] == f"/jobs/{job_id}"
        assert response.headers["async-job-id"] == job_id
        assert response.headers["retry-after"] == "1"
        assert deployed.wait(job_id)["status"] == "Completed"

    def test_canceled_while_somebody_waits(self, deployed: Deployment, threads: ThreadPoolExecutor) -> None:
        job_id = request_id()
        posting = threads.submit(deployed.post, "Parked", {**wait_for(10), "X-Async-Request-Id": job_id})
        wait_until(lambda: deployed.http.get(f"/jobs/{job_id}").status_code == 200)
        assert deployed.http.delete(f"/jobs/{job_id}").status_code == 200
        response = posting.result(5)
        assert (response.status_code, response.json()["status"]) == (200, "Canceled")

    @pytest.mark.parametrize("header", ["X-Async-Request-Id", "Idempotency-Key"])
    def test_a_replay_waits_too(self, deployed: Deployment, threads: ThreadPoolExecutor, header: str) -> None:
        headers = {header: request_id()}
        job_id = deployed.submit("Gate", headers)
        posting = threads.submit(deployed.post, "Gate", {**headers, **wait_for(10)})
        wait_until(lambda: listeners(deployed.redis, job_id) == 1)
        deployed.open_gate(job_id)
        response = posting.result(5)
        assert response.status_code == 200
        assert_record(response.json(), id=job_id, status="Completed")
        assert response.headers["idempotent-replayed"] == "true"
        # And one that is over already waits for nothing.
        started = time.monotonic()
        assert deployed.post("Gate", {**headers, **wait_for(10)}).status_code == 200
        assert time.monotonic() - started < 3

    def test_what_is_refused_does_not_wait(self, deployed: Deployment) -> None:
        started = time.monotonic()
        response = deployed.http.post("/run/Echo", json={"seconds": "long"}, headers=wait_for(10))
        assert_problem(response, 422)
        assert time.monotonic() - started < 3


class TestReading:
    def test_until_the_job_is_over(self, deployed: Deployment, threads: ThreadPoolExecutor) -> None:
        job_id = deployed.submit("Steps")
        # A change that does not end the job does not end the waiting.
        polls = [threads.submit(deployed.http.get, f"/jobs/{job_id}", headers=wait_for(10)) for _ in range(2)]
        wait_until(lambda: listeners(deployed.redis, job_id) == 1)
        wait_until(lambda: deployed.record(job_id).get("progress"))
        assert not any(poll.done() for poll in polls)
        deployed.open_gate(job_id)
        for poll in polls:
            response = poll.result(5)
            assert response.status_code == 200
            assert_record(response.json(), status="Completed", result="done")
            assert response.headers["preference-applied"] == "wait=10"
            assert "retry-after" not in response.headers
        wait_until(lambda: listeners(deployed.redis, job_id) == 0)

    def test_no_longer_than_asked_for(self, deployed: Deployment) -> None:
        job_id = deployed.submit("Parked")
        started = time.monotonic()
        response = deployed.http.get(f"/jobs/{job_id}", headers=wait_for(1))
        assert 0.9 < time.monotonic() - started < 5
        assert response.status_code == 200
        assert_record(response.json(), status="Queued")
        assert response.headers["preference-applied"] == "wait=1"
        assert response.headers["retry-after"] == "1"
        assert response.headers["etag"]

    def test_a_job_that_is_over_is_answered_at_once(self, deployed: Deployment) -> None:
        record = deployed.finish("Echo")
        started = time.monotonic()
        response = deployed.http.get(f"/jobs/{record['id']}", headers=wait_for(10))
        assert time.monotonic() - started < 3
        assert response.json() == record
        assert response.headers["preference-applied"] == "wait=10"

    @pytest.mark.parametrize("job_id", ["01234567-89ab-4cde-8f01-23456789abcd", "no-uuid"])
    def test_an_unknown_job_is_not_waited_for(self, deployed: Deployment, job_id: str) -> None:
        started = time.monotonic()
        assert_problem(deployed.http.get(f"/jobs/{job_id}", headers=wait_for(10)), 404)
        assert time.monotonic() - started < 3

    def test_together_with_if_none_match(self, client: TestClient) -> None:
        location = client.post("/process", json=BODY).headers["location"]
        tag = client.get(location).headers["etag"]
        unchanged = client.get(location, headers={**wait_for(0), "If-None-Match": tag})
        assert (unchanged.status_code, unchanged.content) == (304, b"")


class TestHeader:
    @pytest.mark.parametrize(
        "value",
        [
            "wait=0",
            "WAIT=0",
            'wait="0"',
            "wait = 0",
            "wait=00",
            "wait=0; until=noon",
            "respond-async, wait=0",
            "wait=0,respond-async",
            "handling=lenient; wait=4, wait=0",
            "wait=0, wait=4",
            'greeting="hello, wait=4", wait=0',
            ", ,wait=0,",
        ],
    )
    def test_understood(self, client: TestClient, value: str) -> None:
        started = time.monotonic()
        submitted = client.post("/process", json=BODY, headers={"Prefer": value})
        assert submitted.status_code == 202
        read = client.get(submitted.headers["location"], headers={"Prefer": value})
        assert read.status_code == 200
        assert time.monotonic() - started < 3
        for response in (submitted, read):
            assert response.headers["preference-applied"].replace("00", "0") == "wait=0"
            assert response.json()["status"] == "Queued"

    @pytest.mark.parametrize(
        "value",
        [
            *("wait", "wait=", "wait=-5", "wait=+5", "wait=5.5", "wait=5s", "wait=abc", "wait=0x5", 'wait="4', "=4"),
            *("waits=5", "respond-async", "respond-async; wait=5", "", "wait:5", "\u0665".encode()),
            "wait=\u0665".encode(),
        ],
    )
    def test_ignored(self, client: TestClient, value: str | bytes) -> None:
        started = time.monotonic()
        headers: Any = {"Prefer": value}
        submitted = client.post("/process", json=BODY, headers=headers)
        assert submitted.status_code == 202
        read = client.get(submitted.headers["location"], headers=headers)
        assert read.status_code == 200
        assert time.monotonic() - started < 3
        for response in (submitted, read):
            assert "preference-applied" not in response.headers

    def test_in_a_second_header_line(self, client: TestClient) -> None:
        headers = [("Prefer", "respond-async"), ("Prefer", "wait=0")]
        response = client.post("/process", json=BODY, headers=headers)
        assert response.headers["preference-applied"] == "wait=0"

    @pytest.mark.parametrize("seconds", ["3600", "999999999", "99999999999999999999"])
    def test_the_server_caps_it(self, redis_url: str, seconds: str) -> None:
        with TestClient(shop(new_endpoints(redis_url, max_wait_seconds=1))) as client:
            started = time.monotonic()
            response = client.post("/process", json=BODY, headers=wait_for(seconds))
            assert 0.9 < time.monotonic() - started < 5
            assert response.status_code == 202
            assert response.headers["preference-applied"] == "wait=1"


class TestRedisIsNotPolled:
    @pytest.mark.parametrize("seconds", [1, 3])
    def test_its_commands_do_not_grow_with_time(self, client: TestClient, store: redis.Redis, seconds: int) -> None:
        location = client.post("/process", json=BODY).headers["location"]
        store.config_resetstat()
        assert client.get(location, headers=wait_for(seconds)).json()["status"] == "Queued"
        reads = calls(store, "hgetall")
        stats: Any = store.info("commandstats")
        others = {"cmdstat_config|resetstat", "cmdstat_info"}
        everything = sum(stat["calls"] for name, stat in stats.items() if name not in others)
        assert reads <= 5
        assert everything <= 15, stats

    async def test_many_long_polls_share_one_connection(self, waiting_web: Deployment) -> None:
        http, store = waiting_web.http, waiting_web.redis
        jobs = [waiting_web.submit("Parked") for _ in range(30)]
        store.config_resetstat()
        async with many(http.base_url, POLLS) as clients, asyncio.timeout(60):
            polls = [
                asyncio.ensure_future(clients.get(f"/jobs/{jobs[n % len(jobs)]}", headers=wait_for(50)))
                for n in range(POLLS)
            ]
            # Each poll reads the record twice: to find it, and once it listens.
            while calls(store, "hgetall") < 2 * POLLS:
                await asyncio.sleep(0.05)
                assert not any(poll.done() for poll in polls)
            assert calls(store, "hgetall") <= 3 * POLLS
            assert len(subscriptions(store)) == 1
            assert {count for _, count in store.pubsub_numsub(*map(channel, jobs))} == {1}
            clients_of_redis: Any = store.client_list()
            assert len(clients_of_redis) < 60
            for job_id in jobs:
                assert (await asyncio.to_thread(http.delete, f"/jobs/{job_id}")).status_code == 200
            responses = await asyncio.gather(*polls)
        assert {r.status_code for r in responses} == {200}
        assert {r.json()["status"] for r in responses} == {"Canceled"}
        wait_until(lambda: {count for _, count in store.pubsub_numsub(*map(channel, jobs))} == {0})


@pytest.fixture(scope="module")
def waiting_web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A web process and no worker: whatever Redis is asked, the web asks it."""
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("polls"), server.url) as deployed:
        deployed.start_web()
        yield deployed


class TestRedisAway:
    """Each with a server of its own, whose jobs outlive it."""

    @pytest.fixture
    def server(self) -> Iterator[ValkeyServer]:
        with valkey_server(appendonly=True) as server:
            yield server

    @pytest.fixture
    def web(self, server: ValkeyServer, tmp_path: Path) -> Iterator[Deployment]:
        with Deployment(tmp_path, server.url) as deployed:
            deployed.start_web()
            yield deployed

    def test_the_first_waiting_ever_fails_and_the_next_one_works(self, server: ValkeyServer, web: Deployment) -> None:
        server.stop()
        started = time.monotonic()
        problem = assert_problem(web.post("Parked", wait_for(10)), 503, code="UNAVAILABLE")
        assert time.monotonic() - started < 2.5
        server.start()
        self.assert_waiting_works(web)
        # What http.md promises for every 503 of this kind.
        assert problem["jobId"]

    def test_after_an_outage_longer_than_a_moment(self, server: ValkeyServer, web: Deployment) -> None:
        self.assert_waiting_works(web)
        server.stop()
        # Reconnecting fails, and fails again.
        until = time.monotonic() + 1.5
        wait_until(lambda: time.monotonic() > until)
        server.start()
        self.assert_waiting_works(web)

    def assert_waiting_works(self, web: Deployment) -> None:
        last: list[httpx.Response] = []

        def works() -> bool:
            last[:] = [web.post("Parked", wait_for(0))]
            return last[0].status_code == 202

        try:
            wait_until(works, 5, interval=0.2)
        except TimeoutError:
            raise AssertionError(f"still {last[0].status_code}: {last[0].text}\n{web.web.tail()}") from None
        job_id = last[0].json()["id"]
        with ThreadPoolExecutor(1) as threads, ExitStack() as stack:
            poll = threads.submit(web.http.get, f"/jobs/{job_id}", headers=wait_for(8))
            stack.callback(web.http.delete, f"/jobs/{job_id}")
            wait_until(lambda: listeners(web.redis, job_id) == 1, 5)
            assert web.http.delete(f"/jobs/{job_id}").status_code == 200
            assert poll.result(5).json()["status"] == "Canceled"

    @pytest.mark.parametrize("downtime", [0.0, 1.5])
    def test_in_the_middle_of_a_long_poll(
        self, server: ValkeyServer, web: Deployment, threads: ThreadPoolExecutor, downtime: float
    ) -> None:
        job_id = web.submit("Parked")
        poll = threads.submit(web.http.get, f"/jobs/{job_id}", headers=wait_for(9))
        wait_until(lambda: listeners(web.redis, job_id) == 1)
        server.stop()
        until = time.monotonic() + downtime
        wait_until(lambda: time.monotonic() > until)
        server.start()
        wait_until(lambda: listeners(web.redis, job_id) == 1 or poll.done(), 5, "the subscription is not restored")
        assert web.http.delete(f"/jobs/{job_id}").status_code == 200
        response = poll.result(5)
        assert (response.status_code, response.json()["status"]) == (200, "Canceled")

    def test_a_change_during_the_loss_of_the_subscription(self, web: Deployment, threads: ThreadPoolExecutor) -> None:
        """Nobody was told of it: whoever waits looks again."""
        job_id = web.submit("Parked")
        poll = threads.submit(web.http.get, f"/jobs/{job_id}", headers=wait_for(9))
        wait_until(lambda: listeners(web.redis, job_id) == 1)
        started = time.monotonic()
        with web.redis.pipeline() as pipe:  # one transaction
            pipe.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            pipe.hset(f"ae:job:{job_id}", mapping={"status": "Canceled"})
            pipe.execute()
        assert poll.result(10).json()["status"] == "Canceled"
        assert time.monotonic() - started < 4
