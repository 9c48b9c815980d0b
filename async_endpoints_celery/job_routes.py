"""The routes that serve jobs: status, events, cancel, and for operators list and retry."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

from fastapi import Path, Query
from starlette.requests import Request
from starlette.responses import Response

from async_endpoints_celery.edge import Edge, endpoint_of, keyword, owner_parameter, wanted_wait
from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.locations import status_route_name
from async_endpoints_celery.responses import (
    SCOPE_KEY,
    RequestRefused,
    answer,
    event_stream,
    job_json,
    record_response,
)
from async_endpoints_celery.servers import SubscriptionRefused

if TYPE_CHECKING:
    from async_endpoints_celery.app import AsyncEndpoints


def status_endpoint(endpoints: AsyncEndpoints, any_owner: bool = False) -> Callable[..., Any]:
    async def get_job(request: Request, job_id: str, owner: str | None = None, **_: Any) -> Response:
        job = await _own_job(endpoints, job_id, owner, any_owner)
        wait = wanted_wait(endpoints, request)
        if job is not None and wait is not None:
            request.scope[SCOPE_KEY].waited = wait
            if not job.status.is_over:
                with suppress(SubscriptionRefused):
                    job = await endpoints.waiter.until_over(job.id, wait)
        return await answer(endpoints.responses.job_status, job, request)

    endpoint = _job_endpoint(endpoints, get_job, any_owner)
    endpoint.route_name = status_route_name(endpoints, any_owner)  # type: ignore[attr-defined]
    return endpoint


def events_endpoint(endpoints: AsyncEndpoints, any_owner: bool) -> Callable[..., Any]:
    async def job_events(request: Request, job_id: str, owner: str | None = None, **_: Any) -> Response:
        job = await _own_job(endpoints, job_id, owner, any_owner)
        if job is None:
            return await answer(endpoints.responses.job_status, None, request)
        if job.status.is_over and job.version == _last_event(request):
            # Nothing will ever come: 204 tells an EventSource not to come again.
            return Response(status_code=204, headers={"Cache-Control": "no-store"})
        return event_stream(endpoints.waiter.events(job.id, _last_event(request)), request)

    return _job_endpoint(endpoints, job_events, any_owner)


def cancel_endpoint(endpoints: AsyncEndpoints, any_owner: bool) -> Callable[..., Any]:
    async def cancel_job(request: Request, job_id: str, owner: str | None = None, **_: Any) -> Response:
        job = await _own_job(endpoints, job_id, owner, any_owner)
        if job is None:
            return await answer(endpoints.responses.job_status, None, request)
        job = await endpoints.cancel_job(job.id)
        return record_response(job, request, 200 if job.status is JobStatus.CANCELED else 202)

    return _job_endpoint(endpoints, cancel_job, any_owner)


def retry_endpoint(endpoints: AsyncEndpoints, any_owner: bool) -> Callable[..., Any]:
    async def retry_job(request: Request, job_id: str, owner: str | None = None, **_: Any) -> Response:
        job = await _own_job(endpoints, job_id, owner, any_owner)
        if job is None:
            return await answer(endpoints.responses.job_status, None, request)
        return record_response(await endpoints.retry_job(job.id), request, 202)

    return _job_endpoint(endpoints, retry_job, any_owner)


def list_endpoint(endpoints: AsyncEndpoints, any_owner: bool) -> Callable[..., Any]:
    async def list_jobs(
        request: Request,
        status: str | None = None,
        name: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        owner: str | None = None,
        **_: Any,
    ) -> Response:
        try:
            page = await endpoints.list_own_jobs(
                status=status, name=name, limit=limit, cursor=cursor, owner=None if any_owner else owner
            )
        except ValueError as error:
            raise RequestRefused(422, "CURSOR_INVALID", str(error)) from None
        traces = endpoints.settings.include_stack_traces
        items = b",".join(job_json(job, traces) for job in page.items)
        cursor_json = f'"{page.next_cursor}"' if page.next_cursor else "null"
        content = b'{"items":[' + items + b'],"nextCursor":' + cursor_json.encode() + b"}"
        return Response(content, 200, {"Cache-Control": "no-store"}, "application/json")

    parameters = [
        keyword("request", Request),
        keyword("status", Annotated[str | None, Query(description="a status, as records spell it")], None),
        keyword("name", Annotated[str | None, Query(description="a job name")], None),
        keyword("limit", Annotated[int, Query(ge=1, le=500)], 50),
        keyword("cursor", Annotated[str | None, Query(description="nextCursor of the page before")], None),
    ]
    if not any_owner:
        parameters += owner_parameter(endpoints)
    return endpoint_of(list_jobs, parameters, Edge(endpoints))


def _job_endpoint(endpoints: AsyncEndpoints, function: Callable[..., Any], any_owner: bool) -> Callable[..., Any]:
    # Any text is let in: what is no UUID is no job, 404.
    parameters = [keyword("request", Request), keyword("job_id", Annotated[str, Path(description="the job's id")])]
    if not any_owner:
        parameters += owner_parameter(endpoints)
    return endpoint_of(function, parameters, Edge(endpoints))


async def _own_job(endpoints: AsyncEndpoints, job_id: str, owner: str | None, any_owner: bool) -> Job | None:
    """The job, if it exists and this caller may know of it."""
    try:
        wanted = UUID(job_id)
    except ValueError:
        return None
    job = await endpoints.get_job(wanted)
    if job is None or (endpoints.owner is not None and not any_owner and job.owner != owner):
        return None
    return job


def _last_event(request: Request) -> int | None:
    text = request.headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None
