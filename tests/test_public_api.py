"""The public names, their signatures and defaults, and what they are on their own."""

import inspect
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, get_type_hints
from uuid import UUID, uuid4

import pytest
from celery import Celery
from pydantic import BaseModel

import async_endpoints_celery
from async_endpoints_celery import (
    AsyncContext,
    AsyncEndpointError,
    AsyncEndpoints,
    AsyncEndpointsError,
    AsyncRouter,
    ConfigurationError,
    Job,
    JobConflict,
    JobFailed,
    JobNotFound,
    JobStatus,
    MethodResult,
    PayloadTooLarge,
    QueueFull,
    ResponseFactories,
    StoreUnavailable,
)

NAMES = {
    *("AsyncEndpoints", "AsyncRouter", "AsyncContext", "MethodResult", "AsyncEndpointError", "JobFailed", "Job"),
    *("JobStatus", "Settings", "ResponseFactories", "AsyncEndpointsError", "ConfigurationError", "JobNotFound"),
    *("JobConflict", "QueueFull", "StoreUnavailable", "PayloadTooLarge"),
}
HANDLER_OPTIONS = {
    **dict.fromkeys(("max_retries", "retry_delay_base_seconds", "retry_delay_max_seconds", "retry_jitter")),
    "retry_on": (Exception,),
    "do_not_retry_on": (),
    **dict.fromkeys(("timeout_seconds", "queue", "priority", "retention_seconds")),
}
REQUIRED = inspect.Parameter.empty


def test_the_public_names_are_these_and_no_others() -> None:
    assert set(async_endpoints_celery.__all__) == NAMES
    starred: dict[str, Any] = {}
    exec("from async_endpoints_celery import *", starred)
    assert set(starred) - {"__builtins__"} == NAMES


def parameters(function: Any) -> tuple[dict[str, Any], set[str]]:
    """Name → default, `self` left out; and the names that may be given by position."""
    found = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return {p.name: p.default for p in found}, {p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD}


def test_signature_of_the_constructor() -> None:
    expected = {"celery": REQUIRED, "store": None, "settings": None, "responses": None, "owner": None}
    assert parameters(AsyncEndpoints) == (expected, {"celery"})


def test_signatures_of_handler_and_add_handler() -> None:
    assert parameters(AsyncEndpoints.handler) == ({"name": None, **HANDLER_OPTIONS}, {"name"})
    defaults, positional = parameters(AsyncEndpoints.add_handler)
    assert positional == {"name", "handler"}
    assert (defaults["name"], defaults["handler"]) == (REQUIRED, REQUIRED)


@pytest.mark.parametrize("twin", [False, True], ids=["async", "sync"])
def test_signatures_of_the_operations(twin: bool) -> None:
    endpoints = AsyncEndpoints(Celery("tests", broker="memory://", set_as_current=False), store="memory://")
    owner: Any = endpoints.sync if twin else endpoints
    submit = {
        "name": REQUIRED,
        "request": None,
        **dict.fromkeys(("headers", "route_params", "query_params", "job_id", "owner", "delay_seconds")),
    }
    assert parameters(owner.submit) == (submit, {"name", "request"})
    for name in ("get_job", "cancel_job", "retry_job"):
        assert parameters(getattr(owner, name)) == ({"job_id": REQUIRED}, {"job_id"})
    listing = {"status": None, "name": None, "limit": 50, "cursor": None}
    assert parameters(owner.list_jobs) == (listing, set(listing))
    for name in ("submit", "get_job", "cancel_job", "retry_job"):
        assert inspect.iscoroutinefunction(getattr(owner, name)) is not twin


@pytest.mark.parametrize("method", ["async_post", "async_put", "async_patch", "async_delete"])
def test_signatures_of_the_submitting_routes(method: str) -> None:
    expected = {"path": REQUIRED, "handler": REQUIRED, "body": None, "validate": None, "route_arguments": REQUIRED}
    assert parameters(getattr(AsyncRouter, method)) == (expected, {"path", "handler"})


def test_signatures_of_the_job_routes() -> None:
    defaults, positional = parameters(AsyncRouter.async_get_job_details)
    assert defaults["path"] == "/jobs/{job_id}"
    assert positional == {"path"}
    defaults, positional = parameters(AsyncRouter.async_jobs)
    assert {name: defaults[name] for name in ("prefix", "admin", "any_owner")} == {
        "prefix": "/jobs",
        "admin": False,
        "any_owner": False,
    }
    assert positional == {"prefix"}


def test_statuses_have_the_numbers_and_words_of_the_wire() -> None:
    assert issubclass(JobStatus, IntEnum)
    assert {status.name: (int(status), str(status)) for status in JobStatus} == {
        "QUEUED": (100, "Queued"),
        "SCHEDULED": (200, "Scheduled"),
        "IN_PROGRESS": (300, "InProgress"),
        "COMPLETED": (400, "Completed"),
        "FAILED": (500, "Failed"),
        "CANCELED": (600, "Canceled"),
    }


@pytest.mark.parametrize("status", list(JobStatus))
def test_a_status_in_an_f_string_is_the_same_word(status: JobStatus) -> None:
    assert f"{status}" == str(status)


def new_job(**fields: Any) -> Job:
    now = datetime.now(UTC)
    values = {"name": "N", "status": JobStatus.QUEUED, "created_at": now, "last_updated_at": now, **fields}
    return Job(id=uuid4(), **values)


@pytest.mark.parametrize(
    "field",
    [
        *("id", "name", "status", "retry_count", "max_retries", "created_at", "started_at", "completed_at"),
        *("last_updated_at", "result", "error", "progress", "owner"),
    ],
)
def test_a_job_is_immutable(field: str) -> None:
    job = new_job()
    before = getattr(job, field)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        setattr(job, field, None)
    assert getattr(job, field) is before


def test_a_job_that_was_submitted_is_typed() -> None:
    endpoints = AsyncEndpoints(Celery("tests", broker="memory://", set_as_current=False), store="memory://")
    job = endpoints.sync.submit("Elsewhere", owner="ann")
    assert (type(job.id), job.name, job.status, job.owner) == (UUID, "Elsewhere", JobStatus.QUEUED, "ann")
    assert job.created_at.tzinfo is not None
    assert job.last_updated_at.tzinfo is not None
    assert [job.started_at, job.completed_at, job.result, job.error, job.progress] == [None] * 5
    assert (job.retry_count, job.max_retries) == (0, 3)
    assert endpoints.sync.get_job(job.id) == job


def test_method_result_holds_a_value_or_a_failure() -> None:
    assert MethodResult.success(None) != MethodResult.failure("no")
    for result, code, message in (
        (MethodResult.failure("it broke"), "UNKNOWN", "it broke"),
        (MethodResult.failure(ValueError("bad")), "VALUEERROR", "bad"),
        (MethodResult.failure(JobFailed("MINE", "so")), "MINE", "so"),
        (MethodResult.failure(AsyncEndpointError(code="C", message="m")), "C", "m"),
    ):
        assert result.error is not None
        assert (result.error.code, result.error.message) == (code, message)


def test_method_result_is_generic() -> None:
    def handler() -> MethodResult[int]:
        return MethodResult.success(1)

    assert get_type_hints(handler)["return"] == MethodResult[int]


def test_an_error_tells_the_whole_chain_of_causes() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("outer") from error
    except RuntimeError as error:
        stored = MethodResult.failure(error).error
    assert isinstance(stored, AsyncEndpointError)
    wire = stored.model_dump(by_alias=True, mode="json")
    assert set(wire) == {"code", "message", "exception"}
    assert (wire["code"], wire["message"]) == ("RUNTIMEERROR", "outer")
    outer = wire["exception"]
    assert set(outer) == {"type", "message", "stackTrace", "innerException"}
    assert (outer["type"], outer["message"]) == ("RuntimeError", "outer")
    assert "test_an_error_tells" in outer["stackTrace"]
    assert (outer["innerException"]["type"], outer["innerException"]["innerException"]) == ("KeyError", None)


def test_job_failed_is_an_exception_of_the_users() -> None:
    expected = {"code": REQUIRED, "message": REQUIRED, "retryable": False, "retry_after": None}
    assert parameters(JobFailed) == (expected, {"code", "message"})
    failure = JobFailed("CODE", "what happened", retryable=True, retry_after=7)
    assert isinstance(failure, Exception)
    assert not isinstance(failure, AsyncEndpointsError)
    assert (failure.code, failure.message, failure.retryable, failure.retry_after) == (
        *("CODE", "what happened", True, 7),
    )


@pytest.mark.parametrize(
    "error", [ConfigurationError, JobNotFound, JobConflict, QueueFull, StoreUnavailable, PayloadTooLarge]
)
def test_the_errors_have_one_base(error: type[Exception]) -> None:
    assert issubclass(error, AsyncEndpointsError)
    assert issubclass(AsyncEndpointsError, Exception)


def test_response_factories_are_all_optional() -> None:
    names = ("job_submitted", "job_status", "submission_error", "exception")
    assert parameters(ResponseFactories)[0] == dict.fromkeys(names)


class Model(BaseModel):
    x: int


async def test_a_decorated_function_stays_callable() -> None:
    endpoints = AsyncEndpoints(Celery("tests", broker="memory://", set_as_current=False), store="memory://")

    @endpoints.handler()
    async def double(context: AsyncContext[Model]) -> int:
        return 2 * context.request.x

    @endpoints.handler("Triple", max_retries=0)
    def triple(context: AsyncContext[Model]) -> int:
        return 3 * context.request.x

    assert await double(AsyncContext(Model(x=2))) == 4
    assert triple(AsyncContext(Model(x=2))) == 6
    assert {"async_endpoints.double", "async_endpoints.Triple"} <= set(endpoints.celery.tasks)
