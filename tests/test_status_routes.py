"""The routes that show and change jobs: status, cancel, list, retry."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter, JobFailed, JobStatus
from tests.processes import wait_until
from tests.web import (
    BODY,
    TestClient,
    add_process_data,
    app_with,
    assert_problem,
    assert_record,
    finished,
    new_endpoints,
    serving,
    shop,
    wait_for_status,
)


@pytest.fixture
def endpoints(redis_url: str) -> AsyncEndpoints:
    return new_endpoints(redis_url)


@pytest.fixture
def client(endpoints: AsyncEndpoints) -> Iterator[TestClient]:
    """No worker."""
    with TestClient(shop(endpoints, admin=True)) as client:
        yield client


@pytest.fixture
def go() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def working(endpoints: AsyncEndpoints, go: threading.Event) -> Iterator[TestClient]:
    """A worker, and handlers that wait, fail and stop."""

    @endpoints.handler()
    def waits(context: AsyncContext) -> str:
        context.report_progress(25, "a quarter")
        while not go.wait(0.02):
            context.raise_if_canceled()
        return "went"

    @endpoints.handler(max_retries=0)
    def fails(context: AsyncContext) -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    @endpoints.handler(max_retries=1)
    def scheduled(context: AsyncContext) -> None:
        raise JobFailed("LATER", "not yet", retryable=True, retry_after=3600)

    router = AsyncRouter(endpoints)
    for handler in (waits, fails, scheduled):
        router.async_post(f"/{handler.__name__}", handler)
    router.async_post("/process", add_process_data(endpoints))
    router.async_jobs(admin=True)
    with serving(endpoints, router) as client:
        yield client


def test_every_state_is_a_200(working: TestClient, go: threading.Event) -> None:
    running = working.post("/waits").headers["location"]
    record = wait_for_status(working, running, {"InProgress"})
    wait_until(lambda: working.get(running).json()["progress"])
    record = working.get(running).json()
    assert_record(
        record,
        status="InProgress",
        completedAt=None,
        result=None,
        error=None,
        progress={"percent": 25.0, "message": "a quarter"},
    )
    assert record["startedAt"]
    assert "retry-after" in working.get(running).headers
    go.set()
    record = wait_for_status(working, running, {"Completed"})
    # The last progress stays.
    assert_record(record, result="went", error=None, progress={"percent": 25.0, "message": "a quarter"})
    assert record["completedAt"] == record["lastUpdatedAt"]
    assert "retry-after" not in working.get(running).headers

    failed = finished(working, working.post("/fails"))
    assert_record(failed, status="Failed", result=None, retryCount=0, maxRetries=0)
    location = working.post("/scheduled").headers["location"]
    scheduled = wait_for_status(working, location, {"Scheduled"})
    assert_record(scheduled, retryCount=1, maxRetries=1, completedAt=None, result=None)
    assert (scheduled["error"]["code"], scheduled["error"]["message"]) == ("LATER", "not yet")
    assert "retry-after" in working.get(location).headers


def test_a_queued_and_a_canceled_job(client: TestClient) -> None:
    location = client.post("/process", json=BODY).headers["location"]
    response = client.get(location)
    assert response.status_code == 200
    assert_record(response.json(), status="Queued")
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["content-type"] == "application/json"
    client.delete(location)
    response = client.get(location)
    assert response.status_code == 200
    assert_record(response.json(), status="Canceled", startedAt=None, result=None)
    assert response.json()["completedAt"]
    assert "retry-after" not in response.headers


def test_etag(client: TestClient) -> None:
    location = client.post("/process", json=BODY).headers["location"]
    tag = client.get(location).headers["etag"]
    assert tag.startswith('"')
    for condition in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        unchanged = client.get(location, headers={"If-None-Match": condition})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == tag
        assert int(unchanged.headers["retry-after"]) >= 1  # a client that polls with ETags needs it most
    assert client.get(location, headers={"If-None-Match": '"other"'}).status_code == 200
    client.delete(location)
    changed = client.get(location, headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


@pytest.mark.parametrize("job_id", ["00000000-0000-4000-8000-000000000000", "5", "not-a-uuid", "%20", "a" * 300])
def test_a_job_that_is_not_there(client: TestClient, job_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/retry")):
        assert_problem(client.request(method, f"/jobs/{job_id}{path}"), 404)


# Cancel.


def test_cancel_of_a_waiting_job(client: TestClient, endpoints: AsyncEndpoints) -> None:
    for job in (endpoints.sync.submit("Any"), endpoints.sync.submit("Any", delay_seconds=60)):
        response = client.delete(f"/jobs/{job.id}")
        assert response.status_code == 200
        assert_record(response.json(), id=str(job.id), status="Canceled")
        assert "Canceled" in assert_problem(client.delete(f"/jobs/{job.id}"), 409)["detail"]


def test_cancel_of_a_running_job(working: TestClient) -> None:
    location = working.post("/waits").headers["location"]
    wait_for_status(working, location, {"InProgress"})
    response = working.delete(location)
    assert response.status_code == 202
    assert_record(response.json(), status="InProgress")
    record = wait_for_status(working, location, {"Canceled"})
    assert_record(record, result=None)
    assert record["completedAt"]


def test_cancel_of_a_job_that_is_over(working: TestClient) -> None:
    for path, body, status in (("/process", BODY, "Completed"), ("/fails", None, "Failed")):
        accepted = working.post(path, json=body)
        before = finished(working, accepted)
        assert before["status"] == status
        problem = assert_problem(working.delete(accepted.headers["location"]), 409)
        assert status in problem["detail"]
        assert working.get(accepted.headers["location"]).json() == before


# Retry.


def test_retry_of_a_failed_job(working: TestClient) -> None:
    accepted = working.post("/fails")
    failed = finished(working, accepted)
    location = accepted.headers["location"]
    response = working.post(f"{location}/retry")
    assert response.status_code == 202
    record = response.json()
    assert record["status"] in ("Queued", "InProgress")  # a worker may have it already
    assert_record(
        record,
        id=failed["id"],
        retryCount=0,
        completedAt=None,
        error=None,
        result=None,
        progress=None,
    )
    again = wait_for_status(working, location, {"Failed"})
    assert again["startedAt"] > failed["startedAt"]


def test_a_canceled_job_that_is_retried_runs(working: TestClient, go: threading.Event) -> None:
    location = working.post("/waits").headers["location"]
    wait_for_status(working, location, {"InProgress"})
    working.delete(location)
    wait_for_status(working, location, {"Canceled"})
    go.set()
    assert working.post(f"{location}/retry").status_code == 202
    assert wait_for_status(working, location, {"Completed"})["result"] == "went"


def test_retry_of_a_job_in_another_state(working: TestClient, go: threading.Event) -> None:
    location = working.post("/waits").headers["location"]
    wait_for_status(working, location, {"InProgress"})
    assert "InProgress" in assert_problem(working.post(f"{location}/retry"), 409)["detail"]
    go.set()
    wait_for_status(working, location, {"Completed"})
    assert "Completed" in assert_problem(working.post(f"{location}/retry"), 409)["detail"]


# List.


def test_list_newest_first_in_pages(client: TestClient, endpoints: AsyncEndpoints) -> None:
    jobs = [endpoints.sync.submit(name) for name in ("A", "B", "A", "B", "A")]
    records = [client.get(f"/jobs/{job.id}").json() for job in jobs]
    everything = client.get("/jobs").json()
    assert set(everything) == {"items", "nextCursor"}
    assert everything["nextCursor"] is None
    assert sorted(map(str, everything["items"])) == sorted(map(str, records))
    created = [record["createdAt"] for record in everything["items"]]
    assert created == sorted(created, reverse=True)
    seen: list[Any] = []
    cursor: str | None = None
    while True:
        page = client.get("/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        assert len(page["items"]) <= 2
        seen += page["items"]
        if (cursor := page["nextCursor"]) is None:
            break
    assert seen == everything["items"]
    assert {record["name"] for record in client.get("/jobs?name=A").json()["items"]} == {"A"}
    endpoints.sync.cancel_job(jobs[1].id)
    canceled = client.get("/jobs", params={"status": str(JobStatus.CANCELED)}).json()["items"]
    assert [record["id"] for record in canceled] == [str(jobs[1].id)]
    assert len(client.get("/jobs?status=Queued&name=A&limit=10").json()["items"]) == 3
    assert client.get("/jobs?status=InProgress").json() == {"items": [], "nextCursor": None}


@pytest.mark.parametrize("query", ["status=Nonsense", "limit=0", "limit=x", "cursor=nonsense", "cursor="])
def test_a_list_that_cannot_be(client: TestClient, query: str) -> None:
    assert_problem(client.get(f"/jobs?{query}"), 422)


# What is mapped.


def test_admin_routes_are_off_by_default(endpoints: AsyncEndpoints) -> None:
    with TestClient(shop(endpoints)) as client:
        location = client.post("/process", json=BODY).headers["location"]
        client.delete(location)
        assert client.get("/jobs").status_code == 404
        assert client.post(f"{location}/retry").status_code == 404
        assert client.get(location).json()["status"] == "Canceled"


def test_the_status_route_alone_cancels_nothing(endpoints: AsyncEndpoints) -> None:
    router = AsyncRouter(endpoints)
    router.async_post("/job", "Elsewhere")
    router.async_get_job_details()
    with TestClient(app_with(router)) as client:
        location = client.post("/job").headers["location"]
        assert client.delete(location).status_code == 405
        assert client.get(location).json()["status"] == "Queued"


# Stack traces.


@pytest.mark.parametrize("shown", [False, True])
def test_stack_traces(redis_url: str, shown: bool) -> None:
    endpoints = new_endpoints(redis_url, include_stack_traces=shown)

    @endpoints.handler(max_retries=0)
    def fails(context: AsyncContext) -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    router = AsyncRouter(endpoints)
    router.async_post("/fails", fails)
    router.async_jobs(admin=True)
    with serving(endpoints, router) as client:
        record = finished(client, client.post("/fails"))
        (listed,) = client.get("/jobs").json()["items"]
    assert listed == record
    error = record["error"]
    assert (error["code"], error["message"]) == ("VALUEERROR", "outer")
    outer = error["exception"]
    inner = outer["innerException"]
    for exception, kind in ((outer, "ValueError"), (inner, "KeyError")):
        assert set(exception) == {"type", "message", "stackTrace", "innerException"}
        assert exception["type"] == kind
        assert ("test_status_routes" in (exception["stackTrace"] or "")) is shown
    job = endpoints.sync.get_job(record["id"])  # the record keeps them either way
    assert job is not None
    assert job.error is not None
    assert "test_status_routes" in job.error.model_dump_json()
