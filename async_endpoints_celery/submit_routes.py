"""The routes that submit jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from async_endpoints_celery.bodies import JobRequest, bind_body
from async_endpoints_celery.edge import Edge, endpoint_of, keyword, owner_parameter, path_parameters, wanted_wait
from async_endpoints_celery.errors import JobConflict, StoreUnavailable
from async_endpoints_celery.intake import HttpSubmission
from async_endpoints_celery.preferences import derived_id, idempotency_key
from async_endpoints_celery.responses import (
    RequestRefused,
    answer,
)
from async_endpoints_celery.servers import SubscriptionRefused
from async_endpoints_celery.submission import Accepted

if TYPE_CHECKING:
    from async_endpoints_celery.app import AsyncEndpoints

REQUEST_ID_HEADER = "x-async-request-id"


def submitting_endpoint(
    endpoints: AsyncEndpoints,
    name: str,
    model: Any,
    validate: Callable[..., Any] | None,
    path: str,
) -> Callable[..., Any]:
    edge = Edge(endpoints, submits=True, has_body=model is not None)

    async def submit_job(**given: Any) -> Response:
        # What is not asked for here are the path's parameters: the handler gets what the router matched.
        request: JobRequest = given[_REQUEST]
        verdict, owner = given.get(_VERDICT), given.get(_OWNER)
        if verdict is not None:
            if not isinstance(verdict, Response):
                raise TypeError(f"validate= of {path} returned {verdict!r}: return None to go on, or a Response")
            return verdict
        key = _idempotency_key(request)
        wait = wanted_wait(endpoints, request)
        submission = HttpSubmission(
            name=name,
            model=model,
            body=given.get(_BODY),
            body_text=request.text,
            headers=request.headers.items(),
            route_params=request.path_params,
            query=request.scope.get("query_string", b"").decode("latin-1"),
            job_id=await _job_id(endpoints, request, owner, key),
            owner=owner,
        )
        try:
            accepted = await _submit(endpoints, submission, wait)
        except JobConflict as error:
            error.same_key = key is not None and REQUEST_ID_HEADER not in request.headers
            raise
        edge.tell(request, accepted.job, replayed=accepted.replayed, waited=wait)
        if wait is not None and accepted.job.status.is_over:
            return await answer(endpoints.responses.job_status, accepted.job, request)
        return await answer(endpoints.responses.job_submitted, accepted.job, request)

    # The owner comes first: who is nobody hears nothing of the body, nor of what validate= thinks of it.
    parameters = [keyword(_REQUEST, Request), *owner_parameter(endpoints, _OWNER)]
    if model is not None:
        validate, validated_body = bind_body(validate, model)
        parameters.append(keyword(_BODY, Any, Depends(validated_body)))
    if validate is not None:
        parameters.append(keyword(_VERDICT, Any, Depends(validate)))
    parameters += path_parameters(path)
    return endpoint_of(submit_job, parameters, edge)


#: The submitting endpoint's own parameters, by names that no path has.
_REQUEST, _BODY, _VERDICT, _OWNER = (f"async_endpoints_{name}" for name in ("request", "body", "verdict", "owner"))


async def _submit(endpoints: AsyncEndpoints, submission: HttpSubmission, wait: int | None) -> Accepted:
    """Submit the job and, if the client prefers so, wait for its end: listening before there is anything to miss."""
    if wait is None:
        return await endpoints.submit_request(submission)
    job_id = submission.job_id or uuid4()
    submission = dataclasses.replace(submission, job_id=job_id)
    async with AsyncExitStack() as stack:
        try:
            watch = await stack.enter_async_context(endpoints.changes.watching(str(job_id)))
        except SubscriptionRefused:
            return await endpoints.submit_request(submission)
        except StoreUnavailable as error:
            error.job_id = str(job_id)  # nothing was stored; there is no time left to try it without waiting
            raise
        accepted = await endpoints.submit_request(submission)
        try:
            job = await endpoints.waiter.until_over(job_id, wait, watch)
        except StoreUnavailable:
            job = None  # it is accepted all the same
    return Accepted(job or accepted.job, accepted.replayed)


def _idempotency_key(request: Request) -> str | None:
    try:
        return idempotency_key(request.headers.getlist("idempotency-key"))
    except ValueError as error:
        raise RequestRefused(400, "IDEMPOTENCY_KEY_INVALID", str(error)) from None


async def _job_id(endpoints: AsyncEndpoints, request: Request, owner: str | None, key: str | None) -> UUID | None:
    """The id that the client chose, by X-Async-Request-Id or, failing that, by its Idempotency-Key."""
    text = request.headers.get(REQUEST_ID_HEADER)
    if text is None:
        if key is None:
            return None
        return derived_id(await endpoints.secret(), owner, request.method, request.url.path, key)
    try:
        return UUID(text.strip())
    except ValueError:
        raise RequestRefused(400, "REQUEST_ID_INVALID", f"X-Async-Request-Id {text[:80]!r} is not a UUID") from None
