"""Submitting over HTTP: the four verbs, the 202, what the handler gets to see, and replays."""

import base64
import re
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
import redis
from pydantic import BaseModel

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter, JobStatus
from tests.servers import ValkeyServer
from tests.web import (
    BODY,
    DataRequest,
    TestClient,
    add_process_data,
    add_seen,
    app_with,
    assert_no_jobs,
    assert_problem,
    assert_record,
    finished,
    new_endpoints,
    request_id,
    serving,
    shop,
)

VERBS = ["post", "put", "patch", "delete"]


def map_all(router: AsyncRouter, path: str, handler: Any, **options: Any) -> None:
    for verb in VERBS:
        getattr(router, f"async_{verb}")(path, handler, **options)


@pytest.fixture
def endpoints(redis_url: str) -> AsyncEndpoints:
    return new_endpoints(redis_url)


@pytest.fixture
def client(endpoints: AsyncEndpoints) -> Iterator[TestClient]:
    """Everything mapped, and no worker."""
    router = AsyncRouter(endpoints)
    map_all(router, "/process", add_process_data(endpoints))
    map_all(router, "/seen", add_seen(endpoints))
    map_all(router, "/by-name", "Elsewhere", body=DataRequest)
    map_all(router, "/by-name-without-body", "Bodiless")
    router.async_jobs()
    with TestClient(app_with(router, lifespan=endpoints.lifespan)) as client:
        yield client


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("path", "name", "body"),
    [
        *(("/process", "ProcessData", BODY), ("/seen", "Seen", None)),
        *(("/by-name", "Elsewhere", BODY), ("/by-name-without-body", "Bodiless", None)),
    ],
)
def test_a_submission_is_accepted(client: TestClient, verb: str, path: str, name: str, body: Any) -> None:
    response = client.request(verb.upper(), path, json=body)
    assert response.status_code == 202
    record = response.json()
    assert_record(
        record,
        name=name,
        status="Queued",
        retryCount=0,
        maxRetries=3,
        startedAt=None,
        completedAt=None,
        result=None,
        error=None,
        progress=None,
    )
    assert record["createdAt"] == record["lastUpdatedAt"]
    headers = response.headers
    assert headers["content-type"] == "application/json"
    assert headers["location"] == f"/jobs/{record['id']}"
    assert headers["async-job-id"] == record["id"]
    assert headers["cache-control"] == "no-store"
    assert int(headers["retry-after"]) >= 1
    assert "idempotent-replayed" not in headers
    assert client.get(headers["location"]).json() == record


def test_a_handler_runs_with_its_model(endpoints: AsyncEndpoints) -> None:
    router = AsyncRouter(endpoints)
    router.async_post("/process", add_process_data(endpoints))
    router.async_jobs()
    with serving(endpoints, router) as client:
        record = finished(client, client.post("/process", json={"data": "abc", "processingPriority": 2}))
    assert_record(
        record,
        status="Completed",
        error=None,
        result={"processed_data": "Processed: ABC", "character_count": 3},
    )
    assert record["startedAt"]
    assert record["completedAt"]


def test_the_handler_sees_the_request_as_it_was_sent(endpoints: AsyncEndpoints) -> None:
    router = AsyncRouter(endpoints, prefix="/shops/{shop}")
    path = "/{text}/{whole:int}/{real:float}/{key:uuid}/{rest:path}"
    router.async_post(path, add_seen(endpoints), summary="Everything")
    jobs = AsyncRouter(endpoints)
    jobs.async_jobs()
    key = request_id()
    headers = [("X-Repeated", "one"), ("x-repeated", "two"), ("X-Empty", "")]
    with serving(endpoints, router, jobs) as client:
        url = f"/shops/berlin/a%20b/7/1.5/{key}/x/y/z?b=2&a=1&b=3&empty=&sp=a+b&p=%C3%A9"
        result = finished(client, client.post(url, headers=headers))["result"]
    assert result["route"] == {"shop": "berlin", "text": "a b", "whole": 7, "real": 1.5, "key": key, "rest": "x/y/z"}
    assert (result["types"]["whole"], result["types"]["real"]) == ("int", "float")
    assert result["query"] == [["b", "2"], ["a", "1"], ["b", "3"], ["empty", ""], ["sp", "a b"], ["p", "\xe9"]]
    sent = [pair for pair in result["headers"] if pair[0].startswith("x-")]
    assert sent == [["x-repeated", "one"], ["x-repeated", "two"], ["x-empty", ""]]
    assert result["name"] == "Seen"
    assert result["retries"] == [0, 3]
    assert str(UUID(result["id"])) == result["id"]


def test_headers_and_query_in_the_handler_are_starlettes(endpoints: AsyncEndpoints) -> None:
    @endpoints.handler()
    def look(context: AsyncContext) -> Any:
        return [
            *(context.headers["X-TOKEN"], context.headers.getlist("x-Many"), context.headers.get("authorization")),
            *(context.query_params["q"], context.query_params.getlist("q")),
        ]

    router = AsyncRouter(endpoints)
    router.async_post("/look", look)
    router.async_jobs()
    headers = [("x-token", "t"), ("X-Many", "1"), ("X-Many", "2"), ("Authorization", "Bearer s3cret")]
    with serving(endpoints, router) as client:
        result = finished(client, client.post("/look?q=1&q=2", headers=headers))["result"]
    assert result == ["t", ["1", "2"], None, "2", ["1", "2"]]


@pytest.mark.parametrize("word", ["owner", "body", "verdict", "request", "endpoints", "name", "self", "path"])
def test_a_path_parameter_may_have_any_name(endpoints: AsyncEndpoints, word: str) -> None:
    router = AsyncRouter(endpoints)
    router.async_post(f"/things/{{{word}}}", add_seen(endpoints))
    router.async_jobs()
    app = app_with(router, lifespan=endpoints.lifespan(embedded_worker=True))
    with TestClient(app) as client:
        result = finished(client, client.post("/things/octocat"))["result"]
    assert result["route"] == {word: "octocat"}
    assert result["owner"] is None
    operation = app.openapi()["paths"][f"/things/{{{word}}}"]["post"]
    assert [p["name"] for p in operation["parameters"] if p["in"] == "path"] == [word]


def everything_in(url: str) -> str:
    """Every key and every value of a Redis database as one text; the bodies of Celery's messages unpacked."""
    seen: list[str] = []
    with redis.Redis.from_url(url, decode_responses=True, encoding_errors="replace") as client:
        readers = {
            "string": client.get,
            "hash": client.hgetall,
            "set": client.smembers,
            "list": lambda key: client.lrange(key, 0, -1),
            "zset": lambda key: client.zrange(key, 0, -1),
        }
        for key in client.scan_iter("*", count=1000):
            seen += [key, repr(readers[client.type(key)](key))]
    text = "\n".join(seen)
    packed = re.findall(r'"body": "([^"]+)"', text)
    assert packed  # the queue was seen
    return text + "".join(base64.b64decode(body).decode() for body in packed)


def test_dropped_headers_are_nowhere_in_redis(client: TestClient, redis_url: str) -> None:
    names = ("Authorization", "Proxy-Authorization", "COOKIE", "X-Api-Key")
    headers = {**dict.fromkeys(names, "s3cr3t-value"), "X-Other": "k3pt-value"}
    assert client.post("/process", json=BODY, headers=headers).status_code == 202
    stored = everything_in(redis_url)
    assert stored.count("k3pt-value") >= 2  # in the job and in its message
    assert "s3cr3t-value" not in stored


def test_the_list_of_dropped_headers_is_a_setting(redis_url: str) -> None:
    endpoints = new_endpoints(redis_url, dropped_headers=["X-Token"])
    router = AsyncRouter(endpoints)
    router.async_post("/seen", add_seen(endpoints))
    router.async_jobs()
    with serving(endpoints, router) as client:
        headers = {"X-Token": "a", "Authorization": "b"}
        result = finished(client, client.post("/seen", headers=headers))["result"]
    assert dict(result["headers"])["authorization"] == "b"
    assert "x-token" not in dict(result["headers"])


# X-Async-Request-Id.


def test_the_request_id_becomes_the_job_id_and_can_be_replayed(client: TestClient, valkey: ValkeyServer) -> None:
    headers = {"X-Async-Request-Id": request_id()}
    first = client.post("/process?q=1", json=BODY, headers=headers)
    assert first.json()["id"] == headers["X-Async-Request-Id"]
    with valkey.client() as redis_client:
        assert redis_client.llen("celery") == 1
        # White space, defaults and other headers make no other submission.
        same = {"processing_priority": 1, "data": "hello"}
        again = client.post("/process?q=1", json=same, headers={**headers, "X-Other": "1"})
        assert redis_client.llen("celery") == 1
    assert again.status_code == 202
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert again.json() == first.json()


def test_a_replay_shows_the_record_in_its_present_state(client: TestClient) -> None:
    headers = {"X-Async-Request-Id": request_id()}
    client.delete(client.post("/process", json=BODY, headers=headers).headers["location"])
    again = client.post("/process", json=BODY, headers=headers)
    assert (again.status_code, again.json()["status"]) == (202, "Canceled")
    assert again.headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/process", {"data": "other"}), ("/by-name", BODY), ("/process?q=1", BODY), ("/seen", None)],
    ids=["payload", "name", "query", "name without body"],
)
def test_a_request_id_of_another_job_is_a_conflict(client: TestClient, path: str, body: Any) -> None:
    headers = {"X-Async-Request-Id": request_id()}
    first = client.post("/process", json=BODY, headers=headers)
    refused = client.post(path, json=body, headers=headers)
    assert_problem(refused, 409, jobId=headers["X-Async-Request-Id"])
    assert client.get(first.headers["location"]).json() == first.json()


def test_route_parameters_are_part_of_the_payload(endpoints: AsyncEndpoints) -> None:
    router = AsyncRouter(endpoints)
    router.async_post("/items/{item}", add_seen(endpoints))
    headers = {"X-Async-Request-Id": request_id()}
    with TestClient(app_with(router)) as client:
        assert client.post("/items/1", headers=headers).status_code == 202
        assert client.post("/items/1", headers=headers).headers["idempotent-replayed"] == "true"
        assert_problem(client.post("/items/2", headers=headers), 409)


@pytest.mark.parametrize("value", ["", "5", "not-a-uuid", "123e4567-e89b-12d3-a456-42661417400g"])
def test_a_request_id_that_is_no_uuid_is_refused(client: TestClient, endpoints: AsyncEndpoints, value: str) -> None:
    assert_problem(client.post("/process", json=BODY, headers={"X-Async-Request-Id": value}), 400)
    assert_no_jobs(endpoints)


def test_a_replay_succeeds_with_a_full_queue(redis_url: str) -> None:
    with TestClient(shop(new_endpoints(redis_url, maximum_queue_size=1))) as client:
        headers = {"X-Async-Request-Id": request_id()}
        assert client.post("/process", json=BODY, headers=headers).status_code == 202
        assert_problem(client.post("/process", json=BODY), 503)
        assert client.post("/process", json=BODY, headers=headers).headers["idempotent-replayed"] == "true"


# Eager mode.


class Number(BaseModel):
    number: int


@pytest.mark.parametrize("in_memory", [True, False])
def test_in_eager_mode_the_answer_is_the_finished_job(redis_url: str, in_memory: bool) -> None:
    endpoints = new_endpoints("memory://" if in_memory else redis_url)
    endpoints.celery.conf.task_always_eager = True
    tries: list[int] = []

    @endpoints.handler()
    async def double(context: AsyncContext[Number]) -> int:
        await context.report_progress(50, "half")
        return context.request.number * 2

    @endpoints.handler(max_retries=2, retry_delay_base_seconds=0)
    def break_down(context: AsyncContext) -> None:
        tries.append(context.retry_count)
        raise ValueError("no")

    router = AsyncRouter(endpoints)
    router.async_post("/double", double)
    router.async_post("/break-down", break_down)
    router.async_jobs()
    with TestClient(app_with(router, lifespan=endpoints.lifespan)) as client:
        done = client.post("/double", json={"number": 4})
        assert done.status_code == 202
        assert_record(done.json(), status="Completed", result=8, progress={"percent": 50.0, "message": "half"})
        assert client.get(done.headers["location"]).json() == done.json()
        failed = client.post("/break-down")
        assert failed.status_code == 202
        assert_record(failed.json(), status="Failed", retryCount=2, result=None)
        assert failed.json()["error"]["code"] == "VALUEERROR"
    assert tries == [0, 1, 2]
    assert endpoints.sync.submit("double", {"number": 5}).status is JobStatus.COMPLETED
