"""What the routes say of themselves in the OpenAPI document."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, PydanticUserError, create_model

from async_endpoints_celery.jobs import Job
from async_endpoints_celery.responses import PROBLEM_JSON, PROBLEM_SCHEMA

_PROBLEMS = {
    400: "The body is missing or not JSON, or a header is malformed",
    401: "The caller is not known",
    404: "No such job, or somebody else's",
    409: "The job's state, or an earlier submission with this id, forbids it",
    413: "The body is larger than `max_payload_bytes`",
    415: "The content type is not JSON",
    422: "The body or a parameter is not valid",
    431: "The headers are larger than `max_header_bytes`",
    500: "Internal error",
    503: "The queue is full, or the job store or the broker did not answer",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds until it is worth asking again", "schema": {"type": "integer"}}}
_JOB_ID = {"Async-Job-Id": {"description": "The job's id", "schema": {"type": "string", "format": "uuid"}}}
_ETAG = {"ETag": {"description": "Changes with the record", "schema": {"type": "string"}}}
_ACCEPTED = {
    **_JOB_ID,
    **_RETRY_AFTER,
    "Location": {
        "description": "Where the job's record is",
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "Idempotent-Replayed": {
        "description": "`true` when the job was there already",
        "schema": {"type": "string", "enum": ["true"]},
    },
}


def submission_responses(*, with_body: bool) -> dict[int | str, dict[str, Any]]:
    statuses = [400, 401, 409, 413, 415, 422, 431, 500, 503] if with_body else [400, 401, 409, 422, 431, 500, 503]
    accepted = {"description": "Accepted: the job's record", "headers": _ACCEPTED}
    ended = {"description": "The record of a job that ended within the seconds of `Prefer: wait=N`", "model": Job}
    ended["headers"] = {**_JOB_ID, **_ETAG}
    return {200: ended, 202: accepted, **_problems(statuses)}


def job_responses(endpoint: str) -> dict[int | str, dict[str, Any]]:
    record = {"description": "The job's record", "headers": {**_JOB_ID, **_RETRY_AFTER}}
    match endpoint:
        case "get_job":
            page = {"text/html": {"schema": {"type": "string", "description": "A live page, for browsers"}}}
            ok = {**record, "content": page, "headers": {**record["headers"], **_ETAG}}  # type: ignore[dict-item]
            unchanged = {"description": "Not modified", "headers": _ETAG}
            return {200: ok, 304: unchanged, **_problems([401, 404, 422, 500, 503])}
        case "job_events":
            event: dict[str, Any] = {"type": "object", "required": ["event", "data", "id"]}
            event["properties"] = {name: {"type": "string"} for name in ("event", "data", "id")}  # as FastAPI has it
            content: dict[str, Any] = {"text/event-stream": {"itemSchema": event}}
            stream = {"description": "The record now, and after each change", "content": content}
            done = {"description": "The job is over, and its last event was seen"}
            return {200: stream, 204: done, **_problems([401, 404, 422, 500, 503])}
        case "cancel_job":
            told = {**record, "description": "The job runs and was told to stop", "model": Job}
            return {200: record, 202: told, **_problems([401, 404, 409, 422, 500, 503])}
        case "retry_job":
            return {202: record, **_problems([401, 404, 409, 422, 500, 503])}
    return {200: {"description": "A page of jobs, newest first"}, **_problems([401, 422, 500, 503])}


def _problems(statuses: list[int]) -> dict[int | str, dict[str, Any]]:
    return {
        status: {
            "description": _PROBLEMS[status],
            "content": {PROBLEM_JSON: {"schema": PROBLEM_SCHEMA}},
            **({"headers": _RETRY_AFTER} if status == 503 else {}),
        }
        for status in statuses
    }


def record_model(result_type: Any) -> type[BaseModel]:
    """The record with its `result` typed, for the document; responses are written without it."""
    if result_type is Any or result_type is None:
        return Job
    try:
        return _typed_record(result_type)
    except (TypeError, PydanticUserError):  # an unhashable annotation, a type without a schema
        return Job


@cache
def _typed_record(result_type: Any) -> type[BaseModel]:
    title = getattr(result_type, "__name__", None) or "Result"
    return create_model(f"JobOf{title}", __base__=Job, result=(result_type | None, None))


@cache
def page_model() -> type[BaseModel]:
    return create_model("JobPage", items=(list[Job], ...), nextCursor=(str | None, None))
