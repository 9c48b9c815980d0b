"""From jobs and errors to HTTP: the record's JSON, problem details (RFC 9457) and the four response factories."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote

from fastapi.exceptions import RequestValidationError
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import Request
from starlette.responses import Response

from async_endpoints_celery.errors import (
    AsyncEndpointsError,
    HeadersTooLarge,
    JobConflict,
    JobNotFound,
    PayloadTooLarge,
    QueueFull,
    StoreUnavailable,
)
from async_endpoints_celery.jobs import Job
from async_endpoints_celery.page import page_response, wants_page

PROBLEM_JSON = "application/problem+json"
#: Seconds after which a client should look again, or try again.
RETRY_AFTER = "1"
#: Where a route tells the factories what they cannot see in job and request (see `Told`).
SCOPE_KEY = "async_endpoints"


@dataclass(slots=True)
class Told:
    """What the route knows besides the job: kept in `request.scope` for the default factories."""

    location: str | None = None
    replayed: bool = False
    #: Seconds of the client's `Prefer: wait=N` that were honoured, None if it did not ask.
    waited: int | None = None
    include_stack_traces: bool = False


def told(request: Request) -> Told:
    return request.scope.setdefault(SCOPE_KEY, Told())  # type: ignore[no-any-return]


class RequestRefused(AsyncEndpointsError):
    """The HTTP request itself cannot be taken; nothing was stored."""

    def __init__(self, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


# The record.


def job_json(job: Job, include_stack_traces: bool = False) -> bytes:
    """The record as clients see it. Never in it: payload, captured headers, worker, owner."""
    if job.error is not None and not include_stack_traces:
        job = job.model_copy(update={"error": job.error.without_stack_traces()})
    return job.model_dump_json(by_alias=True).encode()


def entity_tag(job: Job) -> str:
    """A strong validator (RFC 9110, 8.8.3): it changes with every change of the record."""
    return f'"{int(job.created_at.timestamp() * 1000):x}-{job.version:x}"'


def record_response(job: Job, request: Request, status: int, **headers: str) -> Response:
    """A record with the headers that every record has."""
    known = told(request)
    all_headers = {"Cache-Control": "no-store", "Async-Job-Id": str(job.id), **headers}
    if known.location is not None:
        all_headers["Location"] = known.location
    if known.replayed:
        all_headers["Idempotent-Replayed"] = "true"
    if known.waited is not None:
        all_headers["Preference-Applied"] = f"wait={known.waited}"
    if not job.status.is_over:
        all_headers["Retry-After"] = RETRY_AFTER
    return Response(job_json(job, told(request).include_stack_traces), status, all_headers, "application/json")


def event_stream(events: AsyncIterator[Job | None], request: Request) -> Response:
    """Server-Sent Events: `event` is the status, or `progress` where that is all that changed; `id` the version."""
    traces = told(request).include_stack_traces

    async def encoded() -> AsyncIterator[bytes]:
        status = None
        try:
            async for job in events:
                if job is None:
                    yield b": keep-alive\n\n"
                    continue
                name = "progress" if job.status is status else str(job.status)
                status = job.status
                yield format_sse_event(data_str=job_json(job, traces).decode(), event=name, id=str(job.version))
        except StoreUnavailable:
            return  # the client comes again, with the id of the last event it has seen

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventSourceResponse(encoded(), headers=headers)


# Problems.

_TITLES = {
    "BODY_MISSING": "Request body missing",
    "BODY_NOT_JSON": "Request body is not JSON",
    "CONTENT_TYPE_NOT_JSON": "Content type is not JSON",
    "BODY_INVALID": "Request is not valid",
    "PAYLOAD_TOO_LARGE": "Request body too large",
    "HEADERS_TOO_LARGE": "Request headers too large",
    "REQUEST_ID_INVALID": "X-Async-Request-Id is not a UUID",
    "QUEUE_FULL": "Queue is full",
    "UNAVAILABLE": "Service temporarily unavailable",
    "IDEMPOTENCY_KEY_INVALID": "Idempotency-Key is malformed",
    "JOB_CONFLICT": "Job conflict",
    "JOB_NOT_FOUND": "Job not found",
    "UNAUTHENTICATED": "Authentication required",
    "CURSOR_INVALID": "Query is not valid",
    "INTERNAL_ERROR": "Internal error",
}

#: The shape of every problem, for the OpenAPI document.
PROBLEM_SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "Problem details, RFC 9457",
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string", "format": "uri-reference"},
        "code": {"type": "string"},
        "jobId": {"type": "string", "format": "uuid"},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    job_id: str | None = None,
    errors: Sequence[Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An RFC 9457 answer. `code` is the last part of its `type`, which is a stable name and leads nowhere."""
    body: dict[str, Any] = {
        "type": f"urn:async-endpoints:problem:{code.lower().replace('_', '-')}",
        "title": _TITLES[code],
        "status": status,
        "detail": detail,
        "instance": quote(request.url.path, safe="/:@!$&'()*+,;=~"),
        "code": code,
    }
    if job_id is not None:
        body["jobId"] = job_id
    if errors is not None:
        body["errors"] = errors
    all_headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(json.dumps(body, default=str).encode(), status, all_headers, PROBLEM_JSON)


# The four factories, as they are by default.


def job_submitted(job: Job, request: Request) -> Response:
    """202 Accepted with the record, where to read it and when to look."""
    # A job that is over already (eager mode, a replay) leaves nothing to wait for, but a 202 always says.
    return record_response(job, request, 202, **{"Retry-After": RETRY_AFTER})


def job_status(job: Job | None, request: Request) -> Response:
    """200 with the record in every state, 304 when the client has it already, 404 for a job that is not there."""
    if job is None:
        return problem(
            request,
            404,
            "JOB_NOT_FOUND",
            "no such job: it never existed, its record has expired, or it is somebody else's",
        )
    tag = entity_tag(job)
    if request.method == "GET" and wants_page(request):
        return page_response(job, tag)
    if request.method == "GET" and matches_tag(request.headers.get("if-none-match"), tag):
        headers = {"ETag": tag, "Cache-Control": "no-store", "Vary": "Accept"}
        return Response(
            status_code=304, headers=headers if job.status.is_over else {**headers, "Retry-After": RETRY_AFTER}
        )
    return record_response(job, request, 200, ETag=tag, Vary="Accept")


def submission_error(error: Exception, request: Request) -> Response:
    """The problem of a submission that stored nothing, or may not have."""
    match error:
        case RequestRefused():
            return problem(request, error.status, error.code, str(error), headers=error.headers)
        case RequestValidationError():
            errors = _without_inputs(error.errors())
            if _is_about_missing_body(errors):
                return problem(request, 400, "BODY_MISSING", "this job needs a JSON body", errors=errors)
            detail = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors[:3])
            return problem(request, 422, "BODY_INVALID", detail, errors=errors)
        case JobConflict(same_key=True):
            return problem(request, 422, "JOB_CONFLICT", str(error), job_id=error.job_id)
        case JobConflict():
            return problem(request, 409, "JOB_CONFLICT", str(error), job_id=error.job_id)
        case JobNotFound():
            return problem(request, 404, "JOB_NOT_FOUND", str(error))
        case HeadersTooLarge():
            return problem(request, 431, "HEADERS_TOO_LARGE", str(error))
        case PayloadTooLarge():
            return problem(request, 413, "PAYLOAD_TOO_LARGE", str(error))
        case QueueFull():
            return problem(request, 503, "QUEUE_FULL", str(error), headers={"Retry-After": RETRY_AFTER})
        case StoreUnavailable():
            detail = "the job store or the broker did not answer; try again"
            if error.job_id:
                detail += ", with X-Async-Request-Id or the same Idempotency-Key so that nothing runs twice"
            return problem(
                request,
                503,
                "UNAVAILABLE",
                detail,
                job_id=error.job_id,
                headers={"Retry-After": RETRY_AFTER},
            )
    return exception(error, request)


def exception(exc: Exception, request: Request) -> Response:
    """500, without a word of what went wrong inside; the log has it."""
    return problem(request, 500, "INTERNAL_ERROR", "the request could not be handled")


def matches_tag(header: str | None, tag: str) -> bool:
    """If-None-Match (RFC 9110, 13.1.2), compared weakly."""
    if header is None:
        return False
    tags = [entry.strip().removeprefix("W/") for entry in header.split(",")]
    return "*" in tags or tag in tags


def _without_inputs(errors: Sequence[Any]) -> list[dict[str, Any]]:
    """FastAPI's field errors, less what was sent: it may be a secret, and the client knows it."""
    return [{key: e[key] for key in ("type", "loc", "msg") if key in e} for e in errors]


def _is_about_missing_body(errors: Sequence[Mapping[str, Any]]) -> bool:
    return any(e["type"] == "missing" and list(e["loc"]) == ["body"] for e in errors)


Answer: TypeAlias = Response | Awaitable[Response]


@dataclass(frozen=True, slots=True)
class ResponseFactories:
    """Your own answers in place of the default ones; each a function or a coroutine function, all optional."""

    #: A job was accepted, or its replay found.
    job_submitted: Callable[[Job, Request], Answer] | None = None
    #: A job was read; None for one that is not there.
    job_status: Callable[[Job | None, Request], Answer] | None = None
    #: A request was refused: see `submission_error` for the exceptions that come.
    submission_error: Callable[[Exception, Request], Answer] | None = None
    #: Something unforeseen went wrong.
    exception: Callable[[Exception, Request], Answer] | None = None

    def completed(self) -> ResponseFactories:
        """The same, with the defaults for what was left out."""
        return ResponseFactories(
            job_submitted=self.job_submitted or job_submitted,
            job_status=self.job_status or job_status,
            submission_error=self.submission_error or submission_error,
            exception=self.exception or exception,
        )


async def answer(factory: Callable[..., Answer] | None, *args: Any) -> Response:
    """Call a factory, sync or async."""
    assert factory is not None  # ResponseFactories.completed
    response = factory(*args)
    return await response if inspect.isawaitable(response) else response
