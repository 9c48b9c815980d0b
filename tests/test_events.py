"""Server-Sent Events: each change once, in order, without a poll of Redis; and what happens when somebody goes away."""

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
import redis
from fastapi import Header

from async_endpoints_celery import waiting
from tests.deployment import Deployment
from tests.processes import wait_until
from tests.servers import ValkeyServer, valkey_server
from tests.streaming import (
    Event,
    calls,
    channel,
    event_stream,
    listeners,
    many,
    read_events,
    served,
    subscriptions,
    tell,
)
from tests.web import BODY, assert_problem, assert_record, new_endpoints, request_id, shop

STREAMS = 200


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("events"), server.url) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "4")
        yield deployed


def names(events: list[Event]) -> list[str]:
    return [event.name for event in events]


def running(deployed: Deployment) -> str:
    """A job that waits for orders."""
    job_id = deployed.submit("Instructed")
    deployed.wait(job_id, "InProgress")
    return job_id


class TestStream:
    def test_one_event_for_each_change(self, deployed: Deployment) -> None:
        job_id = running(deployed)
        with event_stream(deployed.http, job_id) as stream:
            events = [next(stream)]
            for percent in (10, 50):
                tell(deployed.redis, job_id, progress=[percent, f"at {percent}"])
                events.append(next(stream))
            tell(deployed.redis, job_id, result={"answer": 42})
            events += stream  # the server closes
        assert names(events) == ["InProgress", "progress", "progress", "Completed"]
        for event in events:
            assert event.record is not None
            assert_record(dict(event.record), id=job_id, name="Instructed")
        progress = [event.record and event.record["progress"] for event in events]
        at_50 = {"percent": 50, "message": "at 50"}
        assert progress == [None, {"percent": 10, "message": "at 10"}, at_50, at_50]
        assert events[-1].record == deployed.job(job_id)
        ids = [event.id for event in events]
        assert ids == list(range(ids[0], ids[0] + 4))

    def test_from_the_queue_on(self, deployed: Deployment) -> None:
        job_id = deployed.submit("Parked")
        with event_stream(deployed.http, job_id) as stream:
            assert next(stream).name == "Queued"
            assert deployed.http.delete(f"/jobs/{job_id}").status_code == 200
            assert names(list(stream)) == ["Canceled"]

    def test_a_failure_and_its_retry(self, deployed: Deployment) -> None:
        job_id = deployed.submit("Flaky", failures=1)
        with event_stream(deployed.http, job_id) as stream:
            events = list(stream)
        assert names(events)[-1] == "Completed"
        assert events[-1].record is not None
        assert events[-1].record["retryCount"] == 1
        assert set(names(events)) <= {"Queued", "InProgress", "Scheduled", "Completed"}
        assert [event.id for event in events] == sorted({event.id for event in events})

    def test_a_failure(self, deployed: Deployment) -> None:
        job_id = running(deployed)
        with event_stream(deployed.http, job_id) as stream:
            next(stream)
            tell(deployed.redis, job_id, failure=["PRINTER", "on <fire>\nand smoking"])
            [last] = stream
        assert last.name == "Failed"
        assert last.record is not None
        assert last.record["error"]["message"] == "on <fire>\nand smoking"

    def test_a_running_job_that_is_canceled(self, deployed: Deployment) -> None:
        job_id = running(deployed)
        with event_stream(deployed.http, job_id) as stream:
            assert next(stream).name == "InProgress"
            assert deployed.http.delete(f"/jobs/{job_id}").status_code == 202
            assert names(list(stream))[-1] == "Canceled"

    def test_a_job_that_is_over_gives_one_event_and_closes(self, deployed: Deployment) -> None:
        record = deployed.finish("Echo")
        with event_stream(deployed.http, record["id"]) as stream:
            [event] = stream
        assert (event.name, event.record) == ("Completed", record)

    def test_its_headers(self, deployed: Deployment) -> None:
        response = deployed.http.get(f"/jobs/{deployed.finish('Echo')['id']}/events")
        assert response.headers["content-type"].split(";")[0] == "text/event-stream"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"

    def test_all_see_the_same(self, deployed: Deployment) -> None:
        job_id = running(deployed)
        with event_stream(deployed.http, job_id) as one, event_stream(deployed.http, job_id) as other:
            assert next(one) == next(other)
            tell(deployed.redis, job_id, progress=[30])
            assert next(one) == next(other)
            assert listeners(deployed.redis, job_id) == 1
            tell(deployed.redis, job_id, result=None)
            assert list(one) == list(other)

    @pytest.mark.parametrize("job_id", ["01234567-89ab-4cde-8f01-23456789abcd", "no-uuid"])
    def test_an_unknown_job(self, deployed: Deployment, job_id: str) -> None:
        assert_problem(deployed.http.get(f"/jobs/{job_id}/events"), 404, code="JOB_NOT_FOUND")


class TestResuming:
    def test_what_was_seen_is_not_sent_again(self, deployed: Deployment) -> None:
        job_id = running(deployed)
        tell(deployed.redis, job_id, progress=[10])
        wait_until(lambda: deployed.job(job_id)["progress"])
        with event_stream(deployed.http, job_id) as stream:
            seen = next(stream)
        with event_stream(deployed.http, job_id, **{"Last-Event-ID": str(seen.id)}) as stream:
            wait_until(lambda: listeners(deployed.redis, job_id))
            tell(deployed.redis, job_id, progress=[20])
            event = next(stream)
            assert event.id == seen.id + 1
            assert event.record is not None
            assert event.record["progress"]["percent"] == 20
            tell(deployed.redis, job_id, result=1)
            assert names(list(stream)) == ["Completed"]

    def test_what_was_missed_is_made_up_for_at_once(self, deployed: Deployment) -> None:
        job_id = running(deployed)
        with event_stream(deployed.http, job_id) as stream:
            seen = next(stream)
        for percent in (10, 20):
            tell(deployed.redis, job_id, progress=[percent])
        wait_until(lambda: (deployed.job(job_id)["progress"] or {}).get("percent") == 20)
        with event_stream(deployed.http, job_id, **{"Last-Event-ID": str(seen.id)}) as stream:
            event = next(stream)
            assert event.id == seen.id + 2
            assert event.record is not None
            assert event.record["progress"]["percent"] == 20
            tell(deployed.redis, job_id, result=1)
            assert names(list(stream)) == ["Completed"]

    def test_a_job_that_ended_meanwhile(self, deployed: Deployment) -> None:
        job_id = deployed.finish("Echo")["id"]
        with event_stream(deployed.http, job_id) as stream:
            [seen] = stream
        with event_stream(deployed.http, job_id, **{"Last-Event-ID": str(seen.id - 1)}) as stream:
            assert list(stream) == [seen]
        # 204 is what an EventSource does not come back after.
        response = deployed.http.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": str(seen.id)})
        assert (response.status_code, response.content) == (204, b"")

    @pytest.mark.parametrize("last", ["", "x", "-1", "1.5", "9" * 40, "0"])
    def test_an_id_that_is_none_of_ours_starts_anew(self, deployed: Deployment, last: str) -> None:
        job_id = deployed.finish("Echo")["id"]
        with event_stream(deployed.http, job_id, **{"Last-Event-ID": last}) as stream:
            assert names(list(stream)) == ["Completed"]


class TestOwners:
    def test_a_stream_is_for_the_owner_only(self, redis_url: str) -> None:
        async def user(x_user: Annotated[str | None, Header()] = None) -> str | None:
            return x_user

        endpoints = new_endpoints(redis_url, owner=user)
        ann, bob = {"X-User": "ann"}, {"X-User": "bob"}
        with served(shop(endpoints)) as url, httpx.Client(base_url=url, timeout=10) as http:
            job_id = http.post("/process", json=BODY, headers=ann).json()["id"]
            assert_problem(http.get(f"/jobs/{job_id}/events", headers=bob), 404, code="JOB_NOT_FOUND")
            assert_problem(http.get(f"/jobs/{job_id}/events"), 401)
            with event_stream(http, job_id, **ann) as stream:
                assert next(stream).name == "Queued"
                assert http.delete(f"/jobs/{job_id}", headers=ann).status_code == 200
                assert names(list(stream)) == ["Canceled"]


class TestIdleStream:
    def test_comments_keep_it_alive(self, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(waiting, "KEEP_ALIVE_SECONDS", 0.1)
        with (
            redis.Redis.from_url(redis_url, decode_responses=True) as store,
            served(shop(new_endpoints(redis_url))) as url,
            httpx.Client(base_url=url, timeout=5) as http,
        ):
            job_id = http.post("/process", json=BODY).json()["id"]
            with event_stream(http, job_id) as stream:
                assert next(stream).name == "Queued"
                store.config_resetstat()
                comments = list(itertools.islice(stream, 5))
                assert all(comment.comment and not comment.name for comment in comments), comments
                # Nothing has changed, and nobody asked.
                assert calls(store, "hgetall") == 0
                http.delete(f"/jobs/{job_id}")
                rest = list(stream)
            assert names([event for event in rest if not event.comment]) == ["Canceled"]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A web process and no worker."""
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("streams"), server.url) as deployed:
        deployed.start_web()
        yield deployed


class TestCost:
    async def test_many_streams_share_one_connection(self, web: Deployment) -> None:
        jobs = [web.submit("Parked") for _ in range(20)]
        web.redis.config_resetstat()
        async with many(web.http.base_url, STREAMS) as http, AsyncExitStack() as stack, asyncio.timeout(60):
            opening = [
                stack.enter_async_context(http.stream("GET", f"/jobs/{jobs[n % len(jobs)]}/events"))
                for n in range(STREAMS)
            ]
            responses = [await stream for stream in opening]
            lines = [response.aiter_lines() for response in responses]
            for first in await asyncio.gather(*(anext(line) for line in lines)):
                assert first == "event: Queued"
            assert len(subscriptions(web.redis)) == 1
            assert {count for _, count in web.redis.pubsub_numsub(*map(channel, jobs))} == {1}
            # Each has read the record twice; who was there before the connection was, once more.
            assert calls(web.redis, "hgetall") <= 3 * STREAMS
            assert len(list(web.redis.client_list())) < 60
            for job_id in jobs:
                assert (await asyncio.to_thread(web.http.delete, f"/jobs/{job_id}")).status_code == 200

            async def rest(line: Any) -> list[str]:
                return [text async for text in line]

            for ending in await asyncio.gather(*map(rest, lines)):
                assert "event: Canceled" in ending
        wait_until(lambda: {count for _, count in web.redis.pubsub_numsub(*map(channel, jobs))} == {0})
        assert len(subscriptions(web.redis)) == 1

    def test_a_client_that_goes_away_is_listened_for_no_longer(self, web: Deployment) -> None:
        job_id = web.submit("Parked")
        with event_stream(web.http, job_id) as stream:
            assert next(stream).name == "Queued"
            assert listeners(web.redis, job_id) == 1
        wait_until(lambda: listeners(web.redis, job_id) == 0, 5)
        # And another one is welcome.
        with event_stream(web.http, job_id) as stream:
            assert next(stream).name == "Queued"
            wait_until(lambda: listeners(web.redis, job_id) == 1, 5)
        wait_until(lambda: listeners(web.redis, job_id) == 0, 5)
        assert "Traceback" not in web.web.output

    def test_one_of_two_clients_goes_away(self, web: Deployment) -> None:
        job_id = web.submit("Parked")
        with event_stream(web.http, job_id) as stays:
            assert next(stays).name == "Queued"
            with event_stream(web.http, job_id) as goes:
                assert next(goes).name == "Queued"
            web.http.get("/jobs")
            assert listeners(web.redis, job_id) == 1
            assert web.http.delete(f"/jobs/{job_id}").status_code == 200
            assert names(list(stays)) == ["Canceled"]


class TestRedisAway:
    @pytest.fixture
    def server(self) -> Iterator[ValkeyServer]:
        with valkey_server(appendonly=True) as server:
            yield server

    @pytest.fixture
    def web(self, server: ValkeyServer, tmp_path: Path) -> Iterator[Deployment]:
        with Deployment(tmp_path, server.url) as deployed:
            deployed.start_web()
            yield deployed

    @pytest.mark.parametrize("downtime", [0.0, 1.5])
    def test_the_stream_goes_on_or_can_be_resumed(self, server: ValkeyServer, web: Deployment, downtime: float) -> None:
        job_id = web.submit("Parked")
        with ThreadPoolExecutor(1) as threads:
            with event_stream(web.http, job_id) as stream:
                first = next(stream)
                server.stop()
                rest = threads.submit(list, stream)
                with pytest.raises(TimeoutError):
                    wait_until(lambda: False, downtime)
                server.start()
                back = f"not listening again:\n{web.web.tail()}"
                wait_until(lambda: rest.done() or listeners(web.redis, job_id) == 1, 5, back)
                assert web.http.delete(f"/jobs/{job_id}").status_code == 200
                events = rest.result(5)
            assert first.name == "Queued"
            with event_stream(web.http, job_id, **{"Last-Event-ID": str(([first, *events])[-1].id)}) as stream:
                events += stream
        assert [event.name for event in events if not event.comment] == ["Canceled"]

    def test_a_change_during_the_loss_of_the_subscription(self, web: Deployment) -> None:
        job_id = web.submit("Parked")
        with event_stream(web.http, job_id) as stream:
            assert next(stream).name == "Queued"
            with web.redis.pipeline() as pipe:  # one transaction: nobody hears of the change
                pipe.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                pipe.hset(f"ae:job:{job_id}", mapping={"status": "Canceled"})
                pipe.hincrby(f"ae:job:{job_id}", "version", 1)
                pipe.execute()
            assert names([event for event in stream if not event.comment]) == ["Canceled"]

    def test_a_client_that_goes_away_while_redis_hangs(self, server: ValkeyServer, web: Deployment) -> None:
        """It has left before its subscription was confirmed: nothing of it may stay."""
        keeping, leaving = web.submit("Parked"), request_id()
        with event_stream(web.http, keeping) as stream:
            next(stream)
            leaving = web.submit("Parked")
            with closing(httpx.Client(base_url=web.http.base_url, timeout=0.3)) as impatient:
                server.pause()
                for _ in range(3):
                    with pytest.raises(httpx.TimeoutException):
                        list(read_events(impatient.get(f"/jobs/{leaving}/events")))
            server.resume()
        wait_until(lambda: listeners(web.redis, keeping) == listeners(web.redis, leaving) == 0, 5)
