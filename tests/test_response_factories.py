"""Your own answers in place of the default ones."""

from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from async_endpoints_celery import (
    AsyncRouter,
    Job,
    PayloadTooLarge,
    QueueFull,
    ResponseFactories,
)
from tests.web import (
    BODY,
    TestClient,
    add_process_data,
    app_with,
    assert_problem,
    assert_record,
    new_endpoints,
    request_id,
)


def submitted(job: Job, request: Request) -> Response:
    return JSONResponse({"submitted": str(job.id), "path": request.url.path}, 299, {"X-Mine": "1"})


def status(job: Job | None, request: Request) -> Response:
    assert request.method == "GET"
    return JSONResponse({"job": None if job is None else str(job.status)}, 298)


def submission_error(error: Exception, request: Request) -> Response:
    assert isinstance(request, Request)
    return JSONResponse({"refused": type(error).__name__, "queue": isinstance(error, QueueFull)}, 297)


def exception(exc: Exception, request: Request) -> Response:
    assert isinstance(request, Request)
    return JSONResponse({"broken": str(exc)}, 296)


def in_a_coroutine(factory: Any) -> Any:
    async def answer(first: Any, request: Request) -> Response:
        response: Response = factory(first, request)
        return response

    return answer


FACTORIES = {
    "job_submitted": submitted,
    "job_status": status,
    "submission_error": submission_error,
    "exception": exception,
}


def explode() -> None:
    raise RuntimeError("bang")


def client_with(redis_url: str, **factories: Any) -> TestClient:
    responses = ResponseFactories(**factories)
    endpoints = new_endpoints(redis_url, responses=responses, maximum_queue_size=1, max_payload_bytes=100)
    router = AsyncRouter(endpoints)
    router.async_post("/process", add_process_data(endpoints))
    router.async_post("/broken", "Elsewhere", validate=explode)
    router.async_jobs()
    return TestClient(app_with(router, lifespan=endpoints.lifespan))


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_all_four(redis_url: str, is_async: bool) -> None:
    factories = {name: in_a_coroutine(factory) if is_async else factory for name, factory in FACTORIES.items()}
    with client_with(redis_url, **factories) as client:
        accepted = client.post("/process", json=BODY)
        assert accepted.status_code == 299
        assert accepted.headers["x-mine"] == "1"
        job_id = accepted.json()["submitted"]
        assert accepted.json()["path"] == "/process"
        read = client.get(f"/jobs/{job_id}")
        assert (read.status_code, read.json()) == (298, {"job": "Queued"})
        for unknown in (request_id(), "no-uuid"):
            absent = client.get(f"/jobs/{unknown}")
            assert (absent.status_code, absent.json()) == (298, {"job": None})
        full = client.post("/process", json=BODY)
        assert (full.status_code, full.json()) == (297, {"refused": QueueFull.__name__, "queue": True})
        large = client.post("/process", json={"data": "x" * 200})
        assert (large.status_code, large.json()["refused"]) == (297, PayloadTooLarge.__name__)
        bodies: list[Any] = [{}, [], {"data": 5}]
        for body in bodies:
            assert client.post("/process", json=body).status_code == 297
        assert client.post("/process", content=b"{", headers={"Content-Type": "application/json"}).status_code == 297
        assert client.post("/process", json=BODY, headers={"X-Async-Request-Id": "x"}).status_code == 297
        broken = client.post("/broken")
        assert (broken.status_code, broken.json()) == (296, {"broken": "bang"})


@pytest.mark.parametrize("name", FACTORIES)
def test_one_alone_leaves_the_others_as_they_are(redis_url: str, name: str) -> None:
    with client_with(redis_url, **{name: FACTORIES[name]}) as client:
        accepted = client.post("/process", json=BODY)
        location = f"/jobs/{accepted.json().get('submitted') or accepted.json()['id']}"
        found = {
            "job_submitted": accepted,
            "job_status": client.get(location),
            "submission_error": client.post("/process", json={}),
            "exception": client.post("/broken"),
        }
    statuses = {"job_submitted": 202, "job_status": 200, "submission_error": 422, "exception": 500}
    mine = {"job_submitted": 299, "job_status": 298, "submission_error": 297, "exception": 296}
    assert {key: response.status_code for key, response in found.items()} == {**statuses, name: mine[name]}
    for key in {"job_submitted", "job_status"} - {name}:
        assert_record(found[key].json())
    for key in {"submission_error", "exception"} - {name}:
        assert_problem(found[key], statuses[key])


def test_a_factory_that_breaks_is_an_internal_error(redis_url: str) -> None:
    def broken(job: Any, request: Any) -> Response:
        raise RuntimeError("s3cret")

    with client_with(redis_url, job_submitted=broken, job_status=broken) as client:
        for response in (client.post("/process", json=BODY), client.get(f"/jobs/{request_id()}")):
            assert "s3cret" not in str(assert_problem(response, 500))
