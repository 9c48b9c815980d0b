"""What a submission is refused with, row by row of the contract's table, and that nothing was stored then."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter
from tests.processes import wait_until
from tests.servers import ValkeyServer, valkey_server
from tests.web import (
    BODY,
    TestClient,
    add_process_data,
    app_with,
    assert_no_jobs,
    assert_problem,
    finished,
    new_endpoints,
    request_id,
    serving,
    shop,
)

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def endpoints(redis_url: str) -> AsyncEndpoints:
    return new_endpoints(redis_url, max_payload_bytes=1000)


@pytest.fixture
def client(endpoints: AsyncEndpoints) -> Iterator[TestClient]:
    with TestClient(shop(endpoints)) as client:
        yield client


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"nonsense", b'{"data": "x",}', b"{'data': 'x'}", b'{"data": "x"} x', b"  "),
        *(b'{"data": NaN}', b'{"data": "\xff"}', b'{"data": "x", "more": "\xed\xa0\x80"}', b"[" * 900),
    ],
)
def test_a_body_that_is_missing_or_not_json(client: TestClient, endpoints: AsyncEndpoints, content: bytes) -> None:
    assert_problem(client.post("/process", content=content, headers=JSON), 400)
    assert_no_jobs(endpoints)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_body_in_another_encoding_than_utf_8(client: TestClient, endpoints: AsyncEndpoints, encoding: str) -> None:
    content = json.dumps(BODY).encode(encoding)  # RFC 8259, 8.1
    assert_problem(client.post("/process", content=content, headers=JSON), 400)
    assert_no_jobs(endpoints)


def test_a_byte_order_mark_is_refused_or_ignored(endpoints: AsyncEndpoints) -> None:
    router = AsyncRouter(endpoints)
    router.async_post("/process", add_process_data(endpoints))
    router.async_jobs()
    with serving(endpoints, router) as client:
        response = client.post("/process", content=json.dumps(BODY).encode("utf-8-sig"), headers=JSON)
        if response.status_code != 400:
            assert finished(client, response)["status"] == "Completed"


def test_no_body_at_all(client: TestClient) -> None:
    assert_problem(client.post("/process"), 400)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "text/json", "json"])
def test_a_body_of_another_content_type(client: TestClient, endpoints: AsyncEndpoints, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    assert_problem(client.post("/process", content=json.dumps(BODY), headers=headers), 415)
    assert_no_jobs(endpoints)


def test_a_body_without_content_type(client: TestClient) -> None:
    request = client.build_request("POST", "/process", content=json.dumps(BODY).encode())
    assert "content-type" not in request.headers
    assert_problem(client.send(request), 415)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"])
def test_a_content_type_that_is_json(client: TestClient, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    assert client.post("/process", content=json.dumps(BODY), headers=headers).status_code == 202


@pytest.mark.parametrize(
    "body", [{}, {"data": 5}, {"data": None}, [], "text", 5, None, {"data": "x", "processingPriority": "y"}]
)
def test_json_that_the_model_refuses(client: TestClient, endpoints: AsyncEndpoints, body: Any) -> None:
    # Not `json=body`: clients take None for "no body".
    response = client.post("/process", content=json.dumps(body), headers=JSON)
    errors = assert_problem(response, 422)["errors"]
    assert errors
    for error in errors:
        assert error["loc"][0] == "body"
        assert error["msg"]
        assert error["type"]
    assert_no_jobs(endpoints)


def test_json_null_where_the_model_allows_it(endpoints: AsyncEndpoints) -> None:
    @endpoints.handler()
    def maybe(context: AsyncContext[int | None]) -> bool:
        return context.request is None

    router = AsyncRouter(endpoints)
    router.async_post("/maybe", maybe)
    router.async_jobs()
    with serving(endpoints, router) as client:
        assert finished(client, client.post("/maybe", content=b"null", headers=JSON))["result"] is True


class Anything(BaseModel):
    anything: Any


@pytest.mark.parametrize("depth", [50, 200, 300, 600, 900])
def test_deep_json_is_accepted_or_refused_but_no_internal_error(endpoints: AsyncEndpoints, depth: int) -> None:
    router = AsyncRouter(endpoints)
    router.async_post("/anything", "Elsewhere", body=Anything)
    content = '{"anything": ' + "[" * depth + "]" * depth + "}"
    with TestClient(app_with(router)) as client:
        response = client.post("/anything", content=content, headers=JSON)
    assert response.status_code in ({202} if depth < 100 else {202, 400, 413, 422})


# Size.


def test_a_body_that_says_it_is_too_large(client: TestClient, endpoints: AsyncEndpoints) -> None:
    assert_problem(client.post("/process", json={"data": "x" * 1000}), 413)
    exact = json.dumps({"data": ""})
    content = json.dumps({"data": "x" * (1000 - len(exact))})
    assert client.post("/process", content=content, headers=JSON).status_code == 202
    assert_problem(client.post("/process", content=content + " ", headers=JSON), 413)


async def test_a_body_of_unknown_length_is_counted_while_it_is_read(endpoints: AsyncEndpoints) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 10_000_000:
            sent += 100
            yield b" " * 100

    transport = httpx.ASGITransport(shop(endpoints))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/process", content=endless(), headers=JSON)
    assert_problem(response, 413)
    assert sent <= 1200


def test_a_length_that_is_a_lie(client: TestClient) -> None:
    headers = {**JSON, "Content-Length": "10"}
    assert_problem(client.post("/process", content=b" " * 2000, headers=headers), 413)


def test_headers_that_are_too_large(redis_url: str) -> None:
    endpoints = new_endpoints(redis_url, max_header_bytes=2000)
    with TestClient(shop(endpoints)) as client:
        assert_problem(client.post("/process", json=BODY, headers={"X-Long": "x" * 2001}), 431)
        assert_no_jobs(endpoints)
        assert client.post("/process", json=BODY, headers={"X-Long": "x" * 1000}).status_code == 202
        # What is not kept does not count.
        assert client.post("/process", json=BODY, headers={"Cookie": "x" * 2001}).status_code == 202


# The queue.


def test_a_full_queue(redis_url: str) -> None:
    endpoints = new_endpoints(redis_url, maximum_queue_size=2)
    with TestClient(shop(endpoints)) as client:
        first = client.post("/process", json=BODY)
        assert client.post("/process", json=BODY).status_code == 202
        refused = client.post("/process", json=BODY)
        problem = assert_problem(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        assert "2" in problem["detail"]
        assert "maximum_queue_size" in problem["detail"]
        assert len(endpoints.sync.list_jobs()) == 2
        client.delete(first.headers["location"])
        assert client.post("/process", json=BODY).status_code == 202


def test_no_queue_limit(redis_url: str) -> None:
    with TestClient(shop(new_endpoints(redis_url, maximum_queue_size=None))) as client:
        assert {client.post("/process", json=BODY).status_code for _ in range(60)} == {202}


# Redis away.


@pytest.fixture
def own_valkey() -> Iterator[ValkeyServer]:
    with valkey_server() as server:
        yield server


async def timed_post(client: httpx.AsyncClient, **request: Any) -> tuple[float, httpx.Response]:
    began = time.perf_counter()
    response = await client.post("/process", json=BODY, **request)
    return time.perf_counter() - began, response


def web_client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("how", ["pause", "kill"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_redis_away_under_load(own_valkey: ValkeyServer, how: str, warm: bool) -> None:
    endpoints = new_endpoints(own_valkey.url, maximum_queue_size=None)
    app = shop(endpoints)
    async with endpoints.lifespan()(app), web_client(app) as client:
        if warm:
            await asyncio.gather(*(timed_post(client) for _ in range(50)))
        getattr(own_valkey, how)()
        answers = await asyncio.gather(*(timed_post(client) for _ in range(50)))
        assert max(seconds for seconds, _ in answers) < 2.0
        for _, response in answers:
            assert_problem(response, 503)
            assert int(response.headers["retry-after"]) >= 1
        assert len({response.json()["jobId"] for _, response in answers}) == 50
        if how == "pause":
            own_valkey.resume()
        else:
            own_valkey.start()
        # It recovers by itself, and repeating is safe.
        job_id = answers[0][1].json()["jobId"]
        recovered = await until_accepted(client, job_id)
        assert recovered.json()["id"] == job_id
        assert_every_job_has_its_message(own_valkey)


async def until_accepted(client: httpx.AsyncClient, job_id: str) -> httpx.Response:
    async with asyncio.timeout(20):
        while True:
            _, response = await timed_post(client, headers={"X-Async-Request-Id": job_id})
            if response.status_code == 202:
                return response


def assert_every_job_has_its_message(server: ValkeyServer) -> None:
    with server.client() as client:
        queued = {json.loads(text)["headers"]["id"] for text in client.lrange("celery", 0, -1)}
        assert queued == {key.removeprefix("ae:job:") for key in client.keys("ae:job:*")}


def test_reading_while_redis_is_away(own_valkey: ValkeyServer) -> None:
    with TestClient(shop(new_endpoints(own_valkey.url), admin=True)) as client:
        location = client.post("/process", json=BODY).headers["location"]
        own_valkey.pause()
        for method, path in (("GET", location), ("DELETE", location), ("POST", f"{location}/retry"), ("GET", "/jobs")):
            began = time.perf_counter()
            response = client.request(method, path)
            assert time.perf_counter() - began < 2.0
            assert_problem(response, 503)
            assert int(response.headers["retry-after"]) >= 1
        own_valkey.resume()
        wait_until(lambda: client.get(location).status_code == 200)


# Bugs.


def test_a_broken_record_shows_no_internals(client: TestClient, valkey: ValkeyServer) -> None:
    job_id = request_id()
    with valkey.client() as redis_client:
        redis_client.set(f"ae:job:{job_id}", "s3cret nonsense")
    for response in (
        client.get(f"/jobs/{job_id}"),
        client.post("/process", json=BODY, headers={"X-Async-Request-Id": job_id}),
    ):
        problem = assert_problem(response, 500)
        for inside in ("WRONGTYPE", "s3cret", "Redis", "Traceback", ".lua", "script"):
            assert inside not in json.dumps(problem)


def explode() -> str:
    raise RuntimeError("s3cret")


@pytest.mark.parametrize("place", ["owner", "validate", "verdict"])
def test_a_broken_dependency_shows_no_internals(redis_url: str, place: str) -> None:
    endpoints = new_endpoints(redis_url, owner=explode if place == "owner" else None)
    router = AsyncRouter(endpoints)
    validate: Any = {"validate": explode, "verdict": lambda: "s3cret"}.get(place)
    router.async_post("/job", "Elsewhere", validate=validate)
    with TestClient(app_with(router)) as client:
        response = client.post("/job")
    assert_problem(response, 500)
    assert "s3cret" not in response.text
    assert_no_jobs(endpoints)
