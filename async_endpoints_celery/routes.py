"""The HTTP edge: routes that submit jobs, and routes that serve their records."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from async_endpoints_celery import openapi
from async_endpoints_celery.errors import ConfigurationError
from async_endpoints_celery.handlers import RegisteredHandler, check_name

if TYPE_CHECKING:
    from async_endpoints_celery.app import AsyncEndpoints

from async_endpoints_celery.edge import JobRoute, path_parameters
from async_endpoints_celery.job_routes import (
    cancel_endpoint,
    events_endpoint,
    list_endpoint,
    retry_endpoint,
    status_endpoint,
)
from async_endpoints_celery.submit_routes import submitting_endpoint

logger = logging.getLogger("async_endpoints_celery")

DEFAULT_TAG = "AsyncEndpoint"


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
        endpoint = submitting_endpoint(self.endpoints, name, model, validate, self.prefix + path)
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
        self._add_job_route("GET", path, status_endpoint(self.endpoints), route_arguments)

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
        self._add_job_route("GET", one, status_endpoint(endpoints, any_owner), route_arguments)
        self._add_job_route("GET", f"{one}/events", events_endpoint(endpoints, any_owner), route_arguments)
        self._add_job_route("DELETE", one, cancel_endpoint(endpoints, any_owner), route_arguments)
        if admin:
            self._add_job_route("GET", prefix, list_endpoint(endpoints, any_owner), route_arguments)
            self._add_job_route("POST", f"{one}/retry", retry_endpoint(endpoints, any_owner), route_arguments)

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
        more = path_parameters(self.prefix + path, known)
        endpoint.__signature__ = signature.replace(parameters=[*known.values(), *more])  # type: ignore[attr-defined]
        self.add_api_route(path, endpoint, methods=[method], route_class_override=JobRoute, **arguments)


def _answer_model(endpoint: str) -> Any:
    if endpoint == "job_events":
        return None
    return openapi.page_model() if endpoint == "list_jobs" else openapi.record_model(Any)


def _description(handler: RegisteredHandler | None) -> str:
    return inspect.getdoc(handler.target) or "" if handler else ""
