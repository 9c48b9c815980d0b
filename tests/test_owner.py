"""The `owner` dependency: whose a job is, and what everybody else gets to see of it."""

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import Header, HTTPException
from fastapi.responses import PlainTextResponse

from async_endpoints_celery import AsyncEndpoints, AsyncRouter
from tests.web import (
    BODY,
    DataRequest,
    TestClient,
    add_process_data,
    add_seen,
    app_with,
    assert_no_jobs,
    assert_problem,
    finished,
    new_endpoints,
    request_id,
    serving,
)

ANN, BOB = {"X-User": "ann"}, {"X-User": "bob"}


async def user(x_user: Annotated[str | None, Header()] = None) -> str | None:
    if x_user == "banned":
        raise HTTPException(403, "banned")
    return x_user


@pytest.fixture
def endpoints(redis_url: str) -> AsyncEndpoints:
    return new_endpoints(redis_url, owner=user)


def validate(request: DataRequest) -> Any:
    return PlainTextResponse("stop", 403) if request.data == "stop" else None


@pytest.fixture
def client(endpoints: AsyncEndpoints) -> Iterator[TestClient]:
    router = AsyncRouter(endpoints)
    router.async_post("/process", add_process_data(endpoints), validate=validate)
    router.async_jobs(admin=True)
    operators = AsyncRouter(endpoints, prefix="/operators")
    operators.async_jobs(admin=True, any_owner=True)
    with TestClient(app_with(router, operators, lifespan=endpoints.lifespan)) as client:
        yield client


@pytest.mark.parametrize("body", [BODY, {"data": "stop"}, {"data": 5}], ids=["good", "stopped", "invalid"])
def test_nobody_may_submit_nothing(client: TestClient, endpoints: AsyncEndpoints, body: Any) -> None:
    """Whatever the body: neither `validate=` nor the model answers somebody who may not ask."""
    refused = client.post("/process", json=body)
    assert_problem(refused, 401)
    assert refused.headers["www-authenticate"]
    assert_no_jobs(endpoints)


def routes_of(location: str) -> list[tuple[str, str]]:
    return [("GET", location), ("DELETE", location), ("POST", f"{location}/retry")]


def test_nobody_may_read_nothing(client: TestClient) -> None:
    location = client.post("/process", json=BODY, headers=ANN).headers["location"]
    for method, path in [*routes_of(location), ("GET", "/jobs")]:
        assert_problem(client.request(method, path), 401)


def test_the_dependency_may_refuse_by_itself(client: TestClient) -> None:
    refused = client.post("/process", json=BODY, headers={"X-User": "banned"})
    assert (refused.status_code, refused.json()) == (403, {"detail": "banned"})


def test_a_job_is_not_there_for_others(client: TestClient) -> None:
    location = client.post("/process", json=BODY, headers=ANN).headers["location"]
    before = client.get(location, headers=ANN).json()
    unknown = client.get(f"/jobs/{request_id()}", headers=BOB).json()
    for method, path in routes_of(location):
        problem = assert_problem(client.request(method, path, headers=BOB), 404)
        assert {**problem, "instance": ""} == {**unknown, "instance": ""}  # not even that it exists
    assert client.get(location, headers=ANN).json() == before
    assert client.get("/jobs", headers=BOB).json() == {"items": [], "nextCursor": None}
    assert client.get("/jobs", headers=ANN).json()["items"] == [before]


def test_ones_own_job_can_be_canceled_and_retried(client: TestClient) -> None:
    location = client.post("/process", json=BODY, headers=ANN).headers["location"]
    assert client.delete(location, headers=ANN).json()["status"] == "Canceled"
    retried = client.post(f"{location}/retry", headers=ANN)
    assert (retried.status_code, retried.json()["status"]) == (202, "Queued")


def test_the_owner_is_in_no_response(client: TestClient) -> None:
    who = {"X-User": "0wn3r"}
    accepted = client.post("/process", json=BODY, headers=who)
    location = accepted.headers["location"]
    for response in (
        accepted,
        *(client.get(path, headers=who) for path in (location, "/jobs", "/operators/jobs")),
        *(client.request(method, path, headers=who) for method, path in routes_of(location)),
    ):
        assert "0wn3r" not in response.text + repr(response.headers)


def test_operators_see_everybodys_jobs(client: TestClient) -> None:
    ids = [client.post("/process", json=BODY, headers=who).json()["id"] for who in (ANN, BOB)]
    assert [job["id"] for job in client.get("/operators/jobs").json()["items"]] == ids[::-1]
    for job_id in ids:
        path = f"/operators/jobs/{job_id}"
        assert client.get(path).status_code == 200
        assert client.delete(path).json()["status"] == "Canceled"
        assert client.post(f"{path}/retry").json()["status"] == "Queued"


def test_a_request_id_of_somebody_else_is_a_conflict(client: TestClient) -> None:
    headers = {"X-Async-Request-Id": request_id()}
    assert client.post("/process", json=BODY, headers={**headers, **ANN}).status_code == 202
    assert_problem(client.post("/process", json=BODY, headers={**headers, **BOB}), 409)
    assert client.post("/process", json=BODY, headers={**headers, **ANN}).status_code == 202


def test_the_handler_knows_the_owner(endpoints: AsyncEndpoints) -> None:
    router = AsyncRouter(endpoints)
    router.async_post("/seen/{owner}", add_seen(endpoints))
    router.async_jobs()
    with serving(endpoints, router, headers=ANN) as client:
        record = finished(client, client.post("/seen/somebody"))
    assert record["result"]["owner"] == "ann"
    assert record["result"]["route"] == {"owner": "somebody"}
    job = endpoints.sync.get_job(record["id"])
    assert job is not None
    assert job.owner == "ann"


def test_the_owner_may_be_a_plain_function_with_any_name_for_its_parameters(redis_url: str) -> None:
    def of(owner: Annotated[str, Header()]) -> str:
        return owner

    endpoints = new_endpoints(redis_url, owner=of)
    router = AsyncRouter(endpoints)
    router.async_post("/job", "Elsewhere")
    with TestClient(app_with(router)) as client:
        accepted = client.post("/job", headers={"Owner": "ann"})
    job = endpoints.sync.get_job(accepted.json()["id"])
    assert job is not None
    assert job.owner == "ann"
