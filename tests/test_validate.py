"""`validate=`: what it may declare, what it may answer, and that the body stays one body."""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import Body, Depends, FastAPI, Header, HTTPException, Path, Query
from fastapi.responses import JSONResponse, PlainTextResponse

from async_endpoints_celery import AsyncEndpoints, AsyncRouter
from tests.web import (
    BODY,
    DataRequest,
    TestClient,
    add_process_data,
    app_with,
    assert_no_jobs,
    assert_problem,
    new_endpoints,
    shop,
)

SEEN: list[Any] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


def judge(request: DataRequest) -> Any:
    assert isinstance(request, DataRequest)
    SEEN.append(request.data)
    if request.data == "raise":
        raise HTTPException(418, "no coffee")
    return PlainTextResponse("stop", 403) if request.data == "stop" else None


def sync(request: DataRequest) -> Any:
    return judge(request)


async def asynchronous(payload: DataRequest) -> Any:
    return judge(payload)


def another_name(verdict: DataRequest) -> Any:
    return judge(verdict)


def named_body(body: DataRequest) -> Any:
    return judge(body)


def annotated(request: Annotated[DataRequest, Body()]) -> Any:
    return judge(request)


def annotated_not_embedded(request: Annotated[DataRequest, Body(embed=False)]) -> Any:
    return judge(request)


def nested(verdict: Annotated[Any, Depends(asynchronous)]) -> Any:
    return verdict


def nested_by_default(verdict: Any = Depends(sync)) -> Any:
    return verdict


def nested_twice(
    one: Annotated[Any, Depends(nested)], other: DataRequest, two: Annotated[Any, Depends(another_name)]
) -> Any:
    assert one is two or (one.body, one.status_code) == (two.body, two.status_code)
    return judge(other)


class Judge:
    def __call__(self, request: DataRequest) -> Any:
        return judge(request)

    async def method(self, request: DataRequest) -> Any:
        return judge(request)


class Strict:
    def __init__(self, request: DataRequest) -> None:
        self.verdict = judge(request)


def through_a_class(strict: Annotated[Strict, Depends()]) -> Any:
    return strict.verdict


def with_an_option(request: DataRequest, option: int) -> Any:
    assert option == 1
    return judge(request)


async def cleaning_up(request: DataRequest) -> Any:
    yield judge(request)


VALIDATORS = [
    *(sync, asynchronous, another_name, named_body, annotated, annotated_not_embedded, nested, nested_by_default),
    *(nested_twice, Judge(), Judge().method, through_a_class, cleaning_up),
    functools.partial(with_an_option, option=1),
]


def validated_app(endpoints: AsyncEndpoints, validate: Callable[..., Any]) -> FastAPI:
    router = AsyncRouter(endpoints)
    router.async_post("/process", add_process_data(endpoints), validate=validate)
    return app_with(router)


def label(validate: Any) -> str:
    return getattr(validate, "__qualname__", type(validate).__name__)


@pytest.mark.parametrize("validate", VALIDATORS, ids=label)
def test_validate_is_a_dependency_that_sees_the_body(redis_url: str, validate: Any) -> None:
    endpoints = new_endpoints(redis_url)
    app = validated_app(endpoints, validate)
    with TestClient(app) as client:
        stopped = client.post("/process", json={"data": "stop"})
        assert (stopped.status_code, stopped.text) == (403, "stop")
        raised = client.post("/process", json={"data": "raise"})
        assert (raised.status_code, raised.json()) == (418, {"detail": "no coffee"})
        # The body is not embedded under the parameter's name.
        assert_problem(client.post("/process", json={"request": BODY, "payload": BODY}), 422)
        assert_no_jobs(endpoints)
        assert client.post("/process", json=BODY).status_code == 202
    assert {"stop", "raise", "hello"} == set(SEEN)
    assert len(endpoints.sync.list_jobs()) == 1
    schema = app.openapi()["paths"]["/process"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("/DataRequest")


def everything(
    shop: str,
    payload: DataRequest,
    number: Annotated[int, Query()],
    item: Annotated[int, Path()],
    x_token: Annotated[str, Header()],
) -> Any:
    return JSONResponse([shop, payload.data, number, item, x_token], 299)


def test_validate_may_ask_for_anything_a_dependency_may(redis_url: str) -> None:
    endpoints = new_endpoints(redis_url)
    router = AsyncRouter(endpoints, prefix="/{shop}")
    router.async_put("/{item:int}", add_process_data(endpoints), validate=everything)
    with TestClient(app_with(router)) as client:
        answer = client.put("/berlin/7?number=3", json=BODY, headers={"X-Token": "t"})
        assert (answer.status_code, answer.json()) == (299, ["berlin", "hello", 3, 7, "t"])
        problem = assert_problem(client.put("/berlin/7?number=x", json=BODY), 422)
    assert {tuple(error["loc"]) for error in problem["errors"]} == {("query", "number"), ("header", "x-token")}


def test_validate_without_a_body(redis_url: str) -> None:
    endpoints = new_endpoints(redis_url)

    async def check(x_go: Annotated[str | None, Header()] = None) -> Any:
        return None if x_go else PlainTextResponse("stop", 403)

    router = AsyncRouter(endpoints)
    router.async_delete("/job", "Elsewhere", validate=check)
    with TestClient(app_with(router)) as client:
        assert client.delete("/job").status_code == 403
        assert_no_jobs(endpoints)
        assert client.delete("/job", headers={"X-Go": "1"}).status_code == 202


def test_an_invalid_body_does_not_reach_validate(redis_url: str) -> None:
    with TestClient(validated_app(new_endpoints(redis_url), sync)) as client:
        assert_problem(client.post("/process", json={}), 422)
        assert_problem(client.post("/process"), 400)
    assert SEEN == []


def test_dependencies_of_the_host_compose(redis_url: str) -> None:
    """The router's, the route's and include_router's: any of them can refuse, and nothing is queued."""
    endpoints = new_endpoints(redis_url)

    def needs(name: str) -> Any:
        def check(key: Annotated[list[str], Query(default_factory=list)]) -> None:
            if name not in key:
                raise HTTPException(401, name, {"WWW-Authenticate": "Bearer"})

        return Depends(check)

    router = AsyncRouter(endpoints, dependencies=[needs("router")])
    router.async_post("/process", add_process_data(endpoints), dependencies=[needs("route")])
    router.async_jobs()
    app = FastAPI()
    app.include_router(router, dependencies=[needs("include")])
    keys = ["router", "route", "include"]
    with TestClient(app) as client:
        for missing in keys:
            refused = client.post("/process", json=BODY, params={"key": [key for key in keys if key != missing]})
            assert (refused.status_code, refused.json()) == (401, {"detail": missing})
            assert refused.headers["www-authenticate"] == "Bearer"
        assert_no_jobs(endpoints)
        accepted = client.post("/process", json=BODY, params={"key": keys})
        assert accepted.status_code == 202
        assert client.get(accepted.headers["location"]).status_code == 401
        assert client.get(accepted.headers["location"], params={"key": keys}).status_code == 200


def test_dependency_overrides_work(redis_url: str) -> None:
    """FastAPI's own way to replace a dependency in a test."""
    endpoints = new_endpoints(redis_url, owner=owner_of_tests)
    app = shop(endpoints)
    app.dependency_overrides[owner_of_tests] = lambda: "ann"
    with TestClient(app) as client:
        location = client.post("/process", json=BODY).headers["location"]
        assert client.get(location).status_code == 200
    job_id = location.rpartition("/")[2]
    job = endpoints.sync.get_job(job_id)
    assert job is not None
    assert job.owner == "ann"


def owner_of_tests() -> str:
    raise AssertionError("not overridden")
