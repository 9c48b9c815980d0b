"""What the tests of the HTTP side share: small applications, and how answers are judged."""

import re
import warnings
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote
from uuid import UUID, uuid4

from celery import Celery
from fastapi import APIRouter, FastAPI
from pydantic import AliasChoices, BaseModel, Field

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter, Settings
from tests.processes import wait_until

with warnings.catch_warnings():
    # Starlette's newest wants another client, its oldest an older anyio: neither is about this package.
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient as TestClient

RECORD_KEYS = [
    *("id", "name", "status", "retryCount", "maxRetries"),
    *("createdAt", "startedAt", "completedAt", "lastUpdatedAt"),
    *("result", "error", "progress"),
]
OVER = {"Completed", "Failed", "Canceled"}
BODY = {"data": "hello"}
_WIRE_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


class DataRequest(BaseModel):
    data: str
    processing_priority: int = Field(
        default=1, validation_alias=AliasChoices("processing_priority", "processingPriority")
    )


class ProcessResult(BaseModel):
    processed_data: str
    character_count: int


def new_celery(broker: str = "memory://", **configuration: Any) -> Celery:
    return Celery("tests", broker=broker, set_as_current=False, changes=configuration)


def new_endpoints(
    url: str = "memory://", *, owner: Any = None, responses: Any = None, **settings: Any
) -> AsyncEndpoints:
    """Broker and store at one URL: a Redis, or this process's memory."""
    store = url if url.startswith("memory:") else None
    return AsyncEndpoints(new_celery(url), store=store, owner=owner, responses=responses, settings=Settings(**settings))


def add_process_data(endpoints: AsyncEndpoints) -> Any:
    @endpoints.handler("ProcessData")
    async def process_data(context: AsyncContext[DataRequest]) -> ProcessResult:
        text = context.request.data
        return ProcessResult(processed_data=f"Processed: {text.upper()}", character_count=len(text))

    return process_data


def add_seen(endpoints: AsyncEndpoints, name: str = "Seen") -> Any:
    """A handler without a body whose result is everything that its context shows."""

    @endpoints.handler(name)
    def seen(context: AsyncContext) -> Any:
        return {
            "route": context.route_params,
            "types": {key: type(value).__name__ for key, value in context.route_params.items()},
            "query": context.query_params.multi_items(),
            "headers": context.headers.items(),
            "owner": context.owner,
            "id": str(context.job_id),
            "name": context.job_name,
            "retries": [context.retry_count, context.max_retries],
        }

    return seen


def app_with(*routers: APIRouter, **arguments: Any) -> FastAPI:
    app = FastAPI(**arguments)
    for router in routers:
        app.include_router(router)
    return app


def shop(endpoints: AsyncEndpoints, **async_jobs: Any) -> FastAPI:
    """POST /process and the job routes, with no worker."""
    router = AsyncRouter(endpoints)
    router.async_post("/process", add_process_data(endpoints))
    router.async_jobs(**async_jobs)
    return app_with(router, lifespan=endpoints.lifespan)


def serving(endpoints: AsyncEndpoints, *routers: APIRouter, **client: Any) -> TestClient:
    """A client (to be entered) of an application that has its worker inside."""
    return TestClient(app_with(*routers, lifespan=endpoints.lifespan(embedded_worker=True)), **client)


def wait_for_status(client: Any, path: str, statuses: Iterable[str], **request: Any) -> dict[str, Any]:
    """The record, once its status is one of these."""
    wanted, last = set(statuses), {}

    def seen() -> bool:
        last.update(client.get(path, **request).raise_for_status().json())
        return last["status"] in wanted

    try:
        wait_until(seen, timeout=20)
    except TimeoutError:
        raise AssertionError(f"not {wanted}: {last}") from None
    return last


def finished(client: Any, accepted: Any, **request: Any) -> dict[str, Any]:
    """The record of the job that this 202 announced, once it is over."""
    assert accepted.status_code == 202, accepted.text
    return wait_for_status(client, accepted.headers["location"], OVER, **request)


def assert_record(record: dict[str, Any], **expected: Any) -> None:
    """The keys exactly, their order included; times in UTC with milliseconds; and the values given."""
    assert list(record) == RECORD_KEYS
    assert str(UUID(record["id"])) == record["id"]
    for key in ("createdAt", "lastUpdatedAt"):
        assert _WIRE_TIME.fullmatch(record[key]), record[key]
    for key in ("startedAt", "completedAt"):
        assert record[key] is None or _WIRE_TIME.fullmatch(record[key]), record[key]
    assert {key: record[key] for key in expected} == expected


def assert_problem(response: Any, status: int, **expected: Any) -> dict[str, Any]:
    """RFC 9457, complete; and the members given."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert set(problem) <= {"type", "title", "status", "detail", "instance", "code", "jobId", "errors"}
    assert re.match(r"[a-z][a-z0-9+.-]*:\S+", problem["type"])
    assert problem["title"]
    assert problem["status"] == status
    assert problem["detail"]
    assert unquote(problem["instance"]) == response.request.url.path
    assert {key: problem[key] for key in expected} == expected
    return problem


def assert_no_jobs(endpoints: AsyncEndpoints) -> None:
    assert list(endpoints.sync.list_jobs()) == []


def request_id() -> str:
    return str(uuid4())
