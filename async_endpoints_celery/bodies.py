"""The request body on its way in: read within its limit, parsed strictly, and shared with `validate=`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from email.message import Message
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastapi import Body, Depends
from fastapi.params import Depends as DependsParam
from pydantic_core import from_json
from starlette.requests import Request

from async_endpoints_celery.errors import PayloadTooLarge
from async_endpoints_celery.responses import RequestRefused


class JobRequest(Request):
    """A request whose body was read and parsed by `receive_json`."""

    _job_body: bytes | None = None
    _job_json: Any = None

    async def body(self) -> bytes:
        return await super().body() if self._job_body is None else self._job_body

    async def json(self) -> Any:
        return await super().json() if self._job_body is None else self._job_json

    @property
    def text(self) -> str | None:
        """The body as it was sent; None for a job without one."""
        return None if self._job_body is None else self._job_body.decode()


async def receive_json(request: JobRequest, limit: int) -> None:
    """Read the body, at most `limit` bytes of it, and parse it as RFC 8259 says.

    Raises:
        PayloadTooLarge: as soon as the limit is passed, whatever Content-Length claimed.
        RequestRefused: 415 for another content type, 400 for a missing body or one that is not JSON.
    """
    body = await _read(request, limit)
    content_type = request.headers.get("content-type")
    if not is_json(content_type) and (body or content_type):
        raise RequestRefused(
            415,
            "CONTENT_TYPE_NOT_JSON",
            f"send the body as application/json, not as {content_type or 'nothing in particular'}",
            headers={"Accept": "application/json"},
        )
    if not body:
        raise RequestRefused(400, "BODY_MISSING", "this job needs a JSON body")
    request._job_body, request._job_json = body, parse_json(body)


async def _read(request: Request, limit: int) -> bytes:
    too_large = f"the body is larger than max_payload_bytes, {limit} bytes"
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > limit:
        raise PayloadTooLarge(too_large)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise PayloadTooLarge(too_large)
        chunks.append(chunk)
    return b"".join(chunks)


def is_json(content_type: str | None) -> bool:
    if not content_type:
        return False
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def parse_json(body: bytes) -> Any:
    """The JSON value of the body, parsed as the worker will parse it: UTF-8, no NaN, nested 200 deep at most.

    Raises RequestRefused (400) for anything else.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestRefused(400, "BODY_NOT_JSON", f"the body is not JSON: {str(error)[:200]}") from None


# The body in the signatures of FastAPI's dependencies.


def bind_body(validate: Callable[..., Any] | None, model: Any) -> tuple[Callable[..., Any] | None, Callable[..., Any]]:
    """`validate` and a dependency that is the validated body, sharing one body parameter that is never embedded.

    FastAPI counts body parameters by name. Where `validate` and its sub-dependencies use one name, ours takes it too
    and they stay as they are (and can be overridden); where they use several, all are bound to ours.
    """
    names = _body_names(validate, model, set()) if validate is not None else set()
    dependency = _body_dependency(model, min(names, default="body"))
    if validate is not None and len(names) > 1:
        validate = share_body(validate, model, dependency)
    return validate, dependency


def _body_dependency(model: Any, name: str) -> Callable[..., Any]:
    def validated_body(**body: Any) -> Any:
        return body[name]

    annotation = Annotated[model, Body(embed=False)]
    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    validated_body.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    return validated_body


def _body_names(call: Callable[..., Any], model: Any, seen: set[Any]) -> set[str]:
    """What the body is called by this dependency and those below it."""
    if call in seen:
        return set()
    seen.add(call)
    names = set()
    for parameter in _declared(call):
        plain, found = _plain_and_depends(parameter)
        if found is None and plain == model:
            names.add(parameter.name)
        target = (found.dependency or plain) if found is not None else None
        if callable(target):
            names |= _body_names(target, model, seen)
    return names


def _declared(call: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        return []
    hints = _hints(call)
    return [p.replace(annotation=hints.get(name, p.annotation)) for name, p in signature.parameters.items()]


def _plain_and_depends(parameter: inspect.Parameter) -> tuple[Any, DependsParam | None]:
    """The type of a parameter without its metadata, and the dependency that it is, if it is one."""
    plain, found = parameter.annotation, None
    if get_origin(plain) is Annotated:
        plain, *extras = get_args(plain)
        found = next((extra for extra in extras if isinstance(extra, DependsParam)), None)
    if isinstance(parameter.default, DependsParam):
        found = parameter.default
    return plain, found


def share_body(
    call: Callable[..., Any],
    model: Any,
    dependency: Callable[..., Any],
    seen: dict[Any, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """`call` with every parameter that declares the body model, here or in a sub-dependency, bound to `dependency`.

    FastAPI takes two body parameters of different names for an embedded body; here they are the same one.
    """
    seen = {} if seen is None else seen
    if call in seen:
        return seen[call]
    declared = _declared(call)
    parameters = [_shared(parameter, model, dependency, seen) for parameter in declared]
    if parameters == declared:
        seen[call] = call
        return call

    @functools.wraps(call)
    def shared(**arguments: Any) -> Any:
        return call(**arguments)

    # FastAPI calls by name, and keyword-only parameters may have their defaults in any order.
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    shared.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    seen[call] = shared
    return shared


def _shared(
    parameter: inspect.Parameter, model: Any, dependency: Callable[..., Any], seen: dict[Any, Callable[..., Any]]
) -> inspect.Parameter:
    plain, found = _plain_and_depends(parameter)
    if found is None:
        if plain != model:
            return parameter
        return parameter.replace(default=Depends(dependency), annotation=Any)
    target = found.dependency or plain
    if not callable(target):
        return parameter
    replaced = share_body(target, model, dependency, seen)
    if replaced is target:
        return parameter
    return parameter.replace(default=dataclasses.replace(found, dependency=replaced), annotation=plain)


def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    target = inspect.unwrap(call)
    if inspect.isclass(target):
        target = target.__init__
    elif not inspect.isroutine(target):
        target = getattr(type(target), "__call__", target)  # noqa: B004
    try:
        return get_type_hints(target, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}  # FastAPI resolves, or complains, as it does for any dependency
