"""A schema-driven fuzzer against a running application: nothing of what it gets is undocumented, nothing a 5xx."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter
from tests.servers import valkey_server
from tests.streaming import served
from tests.web import BODY, OVER, DataRequest, add_process_data, add_seen, app_with, new_endpoints, wait_for_status

EXAMPLES = 25
OPERATIONS = [
    *(("POST", "/process/{shop}"), ("PUT", "/things/{number}"), ("PATCH", "/by-name"), ("DELETE", "/seen")),
    *(("POST", "/failing"), ("GET", "/jobs/{job_id}"), ("DELETE", "/jobs/{job_id}"), ("GET", "/jobs")),
    *(("GET", "/jobs/{job_id}/events"), ("POST", "/jobs/{job_id}/retry")),
]
#: What a client may say besides the document's parameters.
HEADERS: list[dict[str, str]] = [
    {},
    {"Prefer": "wait=1"},
    {"Prefer": "wait=0, ,;="},
    {"Idempotency-Key": '"key"'},
    {"Idempotency-Key": '"'},
    {"X-Async-Request-Id": "5b7e0e4a-8f8b-4c8a-9f1f-8d8f8e8f8e8f"},
    {"X-Async-Request-Id": "5b7e"},
    {"Content-Type": "text/plain"},
    {"Accept": "text/html"},
    {"If-None-Match": "*"},
    {"Last-Event-ID": "-1"},
    {"X-Large": "x" * 20_000},
]


@pytest.fixture(scope="module")
def endpoints() -> Iterator[AsyncEndpoints]:
    with valkey_server() as server:
        yield new_endpoints(server.url, maximum_queue_size=None, default_max_retries=0)


@pytest.fixture(scope="module")
def url(endpoints: AsyncEndpoints) -> Iterator[str]:
    """The application with its worker inside."""

    @endpoints.handler("Failing")
    def failing(context: AsyncContext[DataRequest]) -> list[int]:
        raise ValueError(context.request.data)

    router = AsyncRouter(endpoints)
    process_data, seen = add_process_data(endpoints), add_seen(endpoints)
    router.async_post("/process/{shop}", process_data)
    router.async_put("/things/{number:int}", process_data)
    router.async_patch("/by-name", "ProcessData", body=DataRequest)
    router.async_delete("/seen", seen)
    router.async_post("/failing", failing)
    router.async_jobs(admin=True)
    with served(app_with(router, lifespan=endpoints.lifespan(embedded_worker=True))) as url:
        yield url


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.fixture(scope="module")
def jobs(url: str) -> list[str]:
    """One that completed, one that failed."""
    found = []
    with httpx.Client(base_url=url) as http:
        for path in ("/process/main", "/failing"):
            location = http.post(path, json=BODY).headers["location"]
            wait_for_status(http, location, OVER)
            found.append(location.rpartition("/")[2])
    return found


def test_the_operations_are_these(document: Any) -> None:
    found = [result.ok() for result in document.get_all_operations()]
    assert sorted((operation.method.upper(), operation.path) for operation in found) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *((method, path, GenerationMode.POSITIVE) for method, path in OPERATIONS),
        # Any text is a job's id, and a request without parameters and body cannot be wrong.
        *(
            (*operation, GenerationMode.NEGATIVE)
            for operation in [*OPERATIONS[:3], ("POST", "/failing"), ("GET", "/jobs")]
        ),
    ],
)
def test_every_answer_is_documented(
    document: Any, jobs: list[str], method: str, path: str, mode: GenerationMode
) -> None:
    operation = document[path][method]

    @given(
        case=operation.as_strategy(generation_mode=mode),
        job_id=st.sampled_from([None, *jobs]),
        headers=st.sampled_from(HEADERS),
    )
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def fuzz(case: Any, job_id: str | None, headers: dict[str, str]) -> None:
        if job_id is not None and "job_id" in case.path_parameters:
            case.path_parameters["job_id"] = job_id
        response = case.call(headers=headers, timeout=10)
        if response.status_code in (404, 405) and response.json() in (
            {"detail": "Not Found"},
            {"detail": "Method Not Allowed"},
        ):
            return  # the application's own routing
        case.validate_response(
            response,
            checks=[
                schemathesis.checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_headers_conformance,
                checks.response_schema_conformance,
            ],
        )

    fuzz()
