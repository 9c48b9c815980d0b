"""The HTTP edge: routes that submit jobs, and routes that serve their records."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID, uuid4

from fastapi import APIRouter, Depends, HTTPException, Path, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from async_endpoints_celery import openapi
from async_endpoints_celery.bodies import JobRequest, body_dependency, receive_json, share_body
from async_endpoints_celery.errors import AsyncEndpointsError, ConfigurationError, JobConflict
from async_endpoints_celery.handlers import RegisteredHandler, check_name
from async_endpoints_celery.intake import HttpSubmission
from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.locations import StatusRoute, find_status_route, status_route_name
from async_endpoints_celery.preferences import derived_id, idempotency_key, preferred_wait
from async_endpoints_celery.responses import (
    SCOPE_KEY,
    RequestRefused,
    Told,
    answer,
    event_stream,
    job_json,
    record_response,
    submission_error,
)
from async_endpoints_celery.submission import Accepted

if TYPE_CHECKING:
    from async_endpoints_celery.app import AsyncEndpoints

logger = logging.getLogger("async_endpoints_celery")

DEFAULT_TAG = "AsyncEndpoint"
REQUEST_ID_HEADER = "x-async-request-id"


class AsyncRouter(APIRouter):
    """A `fastapi.APIRouter` whose async routes submit jobs and whose job routes serve their records.

    Args:
        endpoints: where the jobs go.
        arguments: `APIRouter`'s own.
    """

    def __init__(self, endpoints: AsyncEndpoints, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.endpoints = endpoints

    def async_post(
        self,
        path: str,
        handler: Any,
        *,
        body: Any = None,
        validate: Callable[..., Any] | None = None,
        **route_arguments: Any,
    ) -> None:
        """Map POST `path` to a job.

        Args:
            path: as in `APIRouter.post`.
            handler: a registered handler, or the name of one that other code registers.
            body: with a name, the request model; omitted, the job has no body.
            validate: a dependency that may answer in place of the job: it returns None to go on or a `Response`, or
                raises `HTTPException`. It may declare the body model, headers and dependencies.
            route_arguments: FastAPI's (`tags`, `dependencies`, `summary`, …).

        Raises:
            ConfigurationError: the handler is not registered, or `body` contradicts it.
        """
        self._map("POST", path, handler, body, validate, route_arguments)

    def async_put(
        self,
        path: str,
        handler: Any,
        *,
        body: Any = None,
        validate: Callable[..., Any] | None = None,
        **route_arguments: Any,
    ) -> None:
        """Map PUT `path` to a job: see `async_post`."""
        self._map("PUT", path, handler, body, validate, route_arguments)

    def async_patch(
        self,
        path: str,
        handler: Any,
        *,
        body: Any = None,
        validate: Callable[..., Any] | None = None,
        **route_arguments: Any,
    ) -> None:
        """Map PATCH `path` to a job: see `async_post`."""
        self._map("PATCH", path, handler, body, validate, route_arguments)

    def async_delete(
        self,
        path: str,
        handler: Any,
        *,
        body: Any = None,
        validate: Callable[..., Any] | None = None,
        **route_arguments: Any,
    ) -> None:
        """Map DELETE `path` to a job: see `async_post`."""
        self._map("DELETE", path, handler, body, validate, route_arguments)

    def _map(
        self,
        method: str,
        path: str,
        handler: Any,
        body: Any,
        validate: Callable[..., Any] | None,
        route_arguments: dict[str, Any],
    ) -> None:
        name, model, registered = self._job_of(handler, body)
        endpoint = _submitting_endpoint(self.endpoints, name, model, validate, self.prefix + path)
        arguments = {
            "name": name,
            "summary": f"Submit {name}",
            "description": _description(registered),
            "tags": [DEFAULT_TAG],
            "status_code": 202,
            "responses": openapi.submission_responses(with_body=model is not None),
            "response_model": openapi.record_model(registered.result_type if registered else Any),
            **route_arguments,
        }
        if "responses" in route_arguments:
            arguments["responses"] = {
                **openapi.submission_responses(with_body=model is not None),
                **route_arguments["responses"],
            }
        self.add_api_route(path, endpoint, methods=[method], route_class_override=JobRoute, **arguments)

    def _job_of(self, handler: Any, body: Any) -> tuple[str, Any, RegisteredHandler | None]:
        """The job's name, its request model and, where it is known, its handler."""
        registry = self.endpoints.registry
        if isinstance(handler, str):
            registered = registry.get(handler)
            if registered is None:
                return check_name(handler), body, None
        else:
            registered = registry.find(handler)
        if body is not None and body != registered.request_type:
            raise ConfigurationError(
                f"body={body!r} is not what handler {registered.name!r} takes ({registered.request_type!r}): leave it"
                " out, the handler's annotation says it"
            )
        return registered.name, registered.request_type, registered

    def async_get_job_details(self, path: str = "/jobs/{job_id}", **route_arguments: Any) -> None:
        """Map GET `path` to the record of a job. The path must have the parameter `job_id`.

        Raises:
            ConfigurationError: it has not.
        """
        self._add_job_route("GET", path, _status_endpoint(self.endpoints), route_arguments)

    def async_jobs(
        self, prefix: str = "/jobs", *, admin: bool = False, any_owner: bool = False, **route_arguments: Any
    ) -> None:
        """Map the routes of jobs under `prefix`: status, cancel and events.

        Args:
            prefix: "/jobs" gives GET and DELETE /jobs/{job_id}, and GET /jobs/{job_id}/events.
            admin: also GET /jobs, the list, and POST /jobs/{job_id}/retry.
            any_owner: show everybody's jobs. Give such a router `dependencies` that let operators only pass.
        """
        one = f"{prefix}/{{job_id}}"
        endpoints = self.endpoints
        self._add_job_route("GET", one, _status_endpoint(endpoints, any_owner), route_arguments)
        self._add_job_route("GET", f"{one}/events", _events_endpoint(endpoints, any_owner), route_arguments)
        self._add_job_route("DELETE", one, _cancel_endpoint(endpoints, any_owner), route_arguments)
        if admin:
            self._add_job_route("GET", prefix, _list_endpoint(endpoints, any_owner), route_arguments)
            self._add_job_route("POST", f"{one}/retry", _retry_endpoint(endpoints, any_owner), route_arguments)

    def _add_job_route(
        self, method: str, path: str, endpoint: Callable[..., Any], route_arguments: dict[str, Any]
    ) -> None:
        is_one = endpoint.__name__ != "list_jobs"
        if is_one and "job_id" not in compile_path(path)[2]:
            raise ConfigurationError(f"the path {path!r} needs the parameter {{job_id}}")
        arguments = {
            "tags": [DEFAULT_TAG],
            "responses": openapi.job_responses(endpoint.__name__),
            "response_model": _answer_model(endpoint.__name__),
            "status_code": 202 if endpoint.__name__ == "retry_job" else 200,
            "response_class": Response if endpoint.__name__ == "job_events" else JSONResponse,
            **route_arguments,
            # Location finds the status route by this name.
            "name": endpoint.route_name,  # type: ignore[attr-defined]
        }
        signature: inspect.Signature = endpoint.__signature__  # type: ignore[attr-defined]
        known = dict(signature.parameters)
        more = _path_parameters(self.prefix + path, known)
        endpoint.__signature__ = signature.replace(parameters=[*known.values(), *more])  # type: ignore[attr-defined]
        self.add_api_route(path, endpoint, methods=[method], route_class_override=JobRoute, **arguments)


def _answer_model(endpoint: str) -> Any:
    if endpoint == "job_events":
        return None
    return openapi.page_model() if endpoint == "list_jobs" else openapi.record_model(Any)


class JobRoute(APIRoute):
    """Reads the body within its limit before FastAPI does, and answers every error as a problem."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        edge: Edge = self.endpoint.edge  # type: ignore[attr-defined]

        async def handle_job_request(request: Request) -> Response:
            request = JobRequest(request.scope, request.receive)
            factories = edge.endpoints.responses
            try:
                await edge.receive(request)
                return await handle(request)
            except (AsyncEndpointsError, RequestValidationError) as error:
                # The factory is for submissions; what goes wrong with the jobs' own routes is a plain problem.
                factory = factories.submission_error if edge.submits else submission_error
                return await answer(factory, error, request)
            except HTTPException:
                raise  # a dependency's own word
            except Exception as error:
                logger.exception("%s %s failed", request.method, request.url.path)
                return await answer(factories.exception, error, request)

        return handle_job_request


class Edge:
    """What a route knows of its endpoints: bound to the endpoint function, so that it survives `include_router`."""

    def __init__(self, endpoints: AsyncEndpoints, *, submits: bool = False, has_body: bool = False) -> None:
        self.endpoints = endpoints
        self.submits = submits
        self.has_body = has_body
        self._status_routes: dict[int, StatusRoute] = {}

    async def receive(self, request: JobRequest) -> None:
        settings = self.endpoints.settings
        request.scope[SCOPE_KEY] = Told(include_stack_traces=settings.include_stack_traces)
        if self.has_body:
            await receive_json(request, settings.max_payload_bytes)

    def tell(self, request: Request, job: Job, *, replayed: bool, waited: int | None) -> None:
        known: Told = request.scope[SCOPE_KEY]
        known.replayed = replayed
        known.waited = waited
        known.location = self.location(request, job.id)

    def location(self, request: Request, job_id: UUID) -> str | None:
        """The path of the job's status route, whichever router or sub-application has it; None where none has."""
        root = request.scope.get("app_root_path", request.scope.get("root_path", ""))
        router = request.scope["router"]
        found = self._status_routes.get(id(router))
        if found is None:
            found = find_status_route(router, self.endpoints, request.path_params)
            if found is None:
                return None
            self._status_routes[id(router)] = found
        return str(root).rstrip("/") + found.path(job_id, request.path_params)


# The endpoints.


def _submitting_endpoint(
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
        wait = _wanted_wait(endpoints, request)
        submission = HttpSubmission(
            name=name,
            model=model,
            body=given.get(_BODY),
            body_text=request._job_body.decode() if model is not None else None,
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
    parameters = [_keyword(_REQUEST, Request), *_owner_parameter(endpoints, _OWNER)]
    if model is not None:
        dependency = body_dependency(model)
        parameters.append(_keyword(_BODY, Any, Depends(dependency)))
        validate = share_body(validate, model, dependency) if validate is not None else None
    if validate is not None:
        parameters.append(_keyword(_VERDICT, Any, Depends(validate)))
    parameters += _path_parameters(path)
    return _endpoint(submit_job, parameters, edge)


#: The submitting endpoint's own parameters, by names that no path has.
_REQUEST, _BODY, _VERDICT, _OWNER = (f"async_endpoints_{name}" for name in ("request", "body", "verdict", "owner"))

_PATH_TYPES: dict[str, Any] = {"IntegerConvertor": int, "FloatConvertor": float, "UUIDConvertor": UUID}


def _path_parameters(path: str, known: Collection[str] = ()) -> list[inspect.Parameter]:
    """The parameters of a path, declared for the OpenAPI document."""
    return [
        _keyword(name, Annotated[_PATH_TYPES.get(type(convertor).__name__, str), Path()])
        for name, convertor in compile_path(path)[2].items()
        if name not in known
    ]


def _status_endpoint(endpoints: AsyncEndpoints, any_owner: bool = False) -> Callable[..., Any]:
    async def get_job(request: Request, job_id: str, owner: str | None = None, **_: Any) -> Response:
        job = await _own_job(endpoints, job_id, owner, any_owner)
        wait = _wanted_wait(endpoints, request)
        if job is not None and wait is not None:
            request.scope[SCOPE_KEY].waited = wait
            if not job.status.is_over:
                job = await endpoints.waiter.until_over(job.id, wait)
        return await answer(endpoints.responses.job_status, job, request)

    endpoint = _job_endpoint(endpoints, get_job, any_owner)
    endpoint.route_name = status_route_name(endpoints, any_owner)  # type: ignore[attr-defined]
    return endpoint


def _events_endpoint(endpoints: AsyncEndpoints, any_owner: bool) -> Callable[..., Any]:
    async def job_events(request: Request, job_id: str, owner: str | None = None, **_: Any) -> Response:
        job = await _own_job(endpoints, job_id, owner, any_owner)
        if job is None:
            return await answer(endpoints.responses.job_status, None, request)
        return event_stream(endpoints.waiter.events(job.id, _last_event(request)), request)

    return _job_endpoint(endpoints, job_events, any_owner)


def _cancel_endpoint(endpoints: AsyncEndpoints, any_owner: bool) -> Callable[..., Any]:
    async def cancel_job(request: Request, job_id: str, owner: str | None = None, **_: Any) -> Response:
        job = await _own_job(endpoints, job_id, owner, any_owner)
        if job is None:
            return await answer(endpoints.responses.job_status, None, request)
        job = await endpoints.cancel_job(job.id)
        return record_response(job, request, 200 if job.status is JobStatus.CANCELED else 202)

    return _job_endpoint(endpoints, cancel_job, any_owner)


def _retry_endpoint(endpoints: AsyncEndpoints, any_owner: bool) -> Callable[..., Any]:
    async def retry_job(request: Request, job_id: str, owner: str | None = None, **_: Any) -> Response:
        job = await _own_job(endpoints, job_id, owner, any_owner)
        if job is None:
            return await answer(endpoints.responses.job_status, None, request)
        return record_response(await endpoints.retry_job(job.id), request, 202)

    return _job_endpoint(endpoints, retry_job, any_owner)


def _list_endpoint(endpoints: AsyncEndpoints, any_owner: bool) -> Callable[..., Any]:
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
        _keyword("request", Request),
        _keyword("status", Annotated[str | None, Query(description="a status, as records spell it")], None),
        _keyword("name", Annotated[str | None, Query(description="a job name")], None),
        _keyword("limit", Annotated[int, Query(ge=1, le=500)], 50),
        _keyword("cursor", Annotated[str | None, Query(description="nextCursor of the page before")], None),
    ]
    if not any_owner:
        parameters += _owner_parameter(endpoints)
    return _endpoint(list_jobs, parameters, Edge(endpoints))


def _job_endpoint(endpoints: AsyncEndpoints, function: Callable[..., Any], any_owner: bool) -> Callable[..., Any]:
    # Any text is let in: what is no UUID is no job, 404.
    parameters = [_keyword("request", Request), _keyword("job_id", Annotated[str, Path(description="the job's id")])]
    if not any_owner:
        parameters += _owner_parameter(endpoints)
    return _endpoint(function, parameters, Edge(endpoints))


def _endpoint(function: Callable[..., Any], parameters: list[inspect.Parameter], edge: Edge) -> Callable[..., Any]:
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.edge = edge  # type: ignore[attr-defined]
    function.route_name = function.__name__  # type: ignore[attr-defined]
    return function


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _owner_parameter(endpoints: AsyncEndpoints, name: str = "owner") -> list[inspect.Parameter]:
    """The caller's identity, where there is an `owner` dependency; without an identity no further: 401."""
    if endpoints.owner is None:
        return []

    def known_owner(owner: Any) -> Any:
        if owner:
            return owner
        # RFC 9110, 15.5.2 wants a challenge; what the application's own scheme is, its dependency knows.
        challenge = {"WWW-Authenticate": "Bearer"}
        raise RequestRefused(401, "UNAUTHENTICATED", "say who you are: jobs have owners here", headers=challenge)

    known_owner.__annotations__ = {"owner": Annotated[Any, Depends(endpoints.owner)]}
    return [_keyword(name, Any, Depends(known_owner))]


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


async def _submit(endpoints: AsyncEndpoints, submission: HttpSubmission, wait: int | None) -> Accepted:
    """Submit the job and, if the client prefers so, wait for its end: listening before there is anything to miss."""
    if wait is None:
        return await endpoints.submit_request(submission)
    job_id = submission.job_id or uuid4()
    submission = dataclasses.replace(submission, job_id=job_id)
    async with endpoints.changes.watching(str(job_id)) as watch:
        accepted = await endpoints.submit_request(submission)
        job = await endpoints.waiter.until_over(job_id, wait, watch)
    return Accepted(job or accepted.job, accepted.replayed)


def _wanted_wait(endpoints: AsyncEndpoints, request: Request) -> int | None:
    seconds = preferred_wait(request.headers.getlist("prefer"))
    return None if seconds is None else min(seconds, int(endpoints.settings.max_wait_seconds))


def _last_event(request: Request) -> int | None:
    text = request.headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


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


def _description(handler: RegisteredHandler | None) -> str:
    return inspect.getdoc(handler.target) or "" if handler else ""
