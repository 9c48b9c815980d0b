"""What all routes of this package share: how requests are received and errors answered, and their common parameters."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

from fastapi import Depends, Path
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from async_endpoints_celery.bodies import JobRequest, receive_json
from async_endpoints_celery.errors import AsyncEndpointsError, StoreUnavailable
from async_endpoints_celery.jobs import Job
from async_endpoints_celery.locations import StatusRoute, find_status_route
from async_endpoints_celery.preferences import preferred_wait
from async_endpoints_celery.responses import (
    SCOPE_KEY,
    RequestRefused,
    Told,
    answer,
    submission_error,
)

if TYPE_CHECKING:
    from async_endpoints_celery.app import AsyncEndpoints

logger = logging.getLogger("async_endpoints_celery")

_PATH_TYPES: dict[str, Any] = {"IntegerConvertor": int, "FloatConvertor": float, "UUIDConvertor": UUID}


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
                if isinstance(error, StoreUnavailable):
                    logger.warning("%s %s: %s", request.method, request.url.path, error)
                # The factory is for submissions; what goes wrong with the jobs' own routes is a plain problem.
                factory = factories.submission_error if edge.submits else submission_error
                return await answer(factory, error, request)
            except Exception as error:
                if _has_handler(request, error):
                    raise  # a dependency's own word
                logger.exception("%s %s failed", request.method, request.url.path)
                return await answer(factories.exception, error, request)

        return handle_job_request


def _has_handler(request: Request, error: Exception) -> bool:
    """Whether the application says itself what this exception means (`@app.exception_handler`, HTTPException)."""
    if isinstance(error, HTTPException):
        return True
    handlers = getattr(request.scope.get("app"), "exception_handlers", {})
    return any(cls in handlers for cls in type(error).__mro__ if cls is not Exception)


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


def path_parameters(path: str, known: Collection[str] = ()) -> list[inspect.Parameter]:
    """The parameters of a path, declared for the OpenAPI document."""
    return [
        keyword(name, Annotated[_PATH_TYPES.get(type(convertor).__name__, str), Path()])
        for name, convertor in compile_path(path)[2].items()
        if name not in known
    ]


def endpoint_of(function: Callable[..., Any], parameters: list[inspect.Parameter], edge: Edge) -> Callable[..., Any]:
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.edge = edge  # type: ignore[attr-defined]
    function.route_name = function.__name__  # type: ignore[attr-defined]
    return function


def keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def owner_parameter(endpoints: AsyncEndpoints, name: str = "owner") -> list[inspect.Parameter]:
    """The caller's identity, where there is an `owner` dependency; without an identity no further: 401."""
    if endpoints.owner is None:
        return []

    def known_owner(owner: Any) -> str:
        if owner is not None and str(owner):
            return str(owner)
        # RFC 9110, 15.5.2 wants a challenge; what the application's own scheme is, its dependency knows.
        challenge = {"WWW-Authenticate": "Bearer"}
        raise RequestRefused(401, "UNAUTHENTICATED", "say who you are: jobs have owners here", headers=challenge)

    known_owner.__annotations__ = {"owner": Annotated[Any, Depends(endpoints.owner)]}
    return [keyword(name, Any, Depends(known_owner))]


def wanted_wait(endpoints: AsyncEndpoints, request: Request) -> int | None:
    seconds = preferred_wait(request.headers.getlist("prefer"))
    return None if seconds is None else min(seconds, int(endpoints.settings.max_wait_seconds))
