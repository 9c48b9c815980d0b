"""From what a caller hands in, over HTTP or from Python, to a `Submission`: checked, captured, fingerprinted."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode
from uuid import UUID, uuid4

from pydantic import TypeAdapter
from pydantic_core import from_json, to_jsonable_python
from starlette.datastructures import Headers, QueryParams

from async_endpoints_celery.codec import CapturedRequest, canonical_json, fingerprint
from async_endpoints_celery.errors import HeadersTooLarge, PayloadTooLarge
from async_endpoints_celery.handlers import HandlerRegistry, check_name
from async_endpoints_celery.settings import Settings
from async_endpoints_celery.submission import Submission

HeadersLike: TypeAlias = Headers | Mapping[str, str] | Sequence[tuple[str, str]]
QueryLike: TypeAlias = QueryParams | Mapping[str, str] | Sequence[tuple[str, str]] | str

#: What pydantic writes in place of a secret.
_MASK = "**********"


@dataclass(frozen=True, slots=True)
class HttpSubmission:
    """What a route has read and validated."""

    name: str
    #: The request model and the validated body; None for a job without one.
    model: Any
    body: Any
    #: The body as it was sent. It travels unchanged: the worker's own model validates it again.
    body_text: str | None
    headers: Sequence[tuple[str, str]]
    route_params: Mapping[str, Any]
    query: str
    job_id: UUID | None
    owner: str | None


class Intake:
    """Builds the submissions of one registry."""

    def __init__(self, registry: HandlerRegistry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings

    def from_http(self, request: HttpSubmission) -> Submission:
        """Raises HeadersTooLarge, and ValueError for a body that cannot be written as JSON again."""
        captured = CapturedRequest(
            payload=request.body_text,
            headers=self._kept(request.headers),
            route_params=dict(request.route_params),
            query=request.query,
        )
        payload = _canonical(request.model, request.body, request.body_text)
        return self._build(request.name, captured, payload, request.job_id, request.owner)

    def from_python(
        self,
        name: str,
        request: Any = None,
        *,
        headers: HeadersLike | None = None,
        route_params: Mapping[str, Any] | None = None,
        query_params: QueryLike | None = None,
        job_id: UUID | str | None = None,
        owner: str | None = None,
        delay_seconds: float | None = None,
    ) -> Submission:
        """The arguments are those of `AsyncEndpoints.submit`.

        Raises:
            pydantic.ValidationError: `request` does not fit the handler's model.
            ValueError: an argument that cannot be.
            PayloadTooLarge, HeadersTooLarge: more than the settings allow.
        """
        has_payload, payload = self._payload(check_name(name), request)
        text = canonical_json(payload) if has_payload else None
        size, limit = len((text or "").encode()), self._settings.max_payload_bytes
        if size > limit:
            raise PayloadTooLarge(f"the payload of {name} has {size} bytes, max_payload_bytes is {limit}")
        items = headers.items() if isinstance(headers, (Headers, Mapping)) else headers or ()
        captured = CapturedRequest(
            payload=text,
            headers=self._kept([(str(key), str(value)) for key, value in items]),
            route_params=to_jsonable_python(dict(route_params or {}), fallback=str),
            query=_query_string(query_params),
            by_name=True,
        )
        delay = float(delay_seconds or 0.0)
        if not 0 <= delay < math.inf:
            raise ValueError(f"delay_seconds={delay_seconds!r}: give seconds from now, 0 or more")
        return self._build(name, captured, payload, None if job_id is None else as_uuid(job_id), owner, delay)

    def _kept(self, headers: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """The headers that are captured: all but the dropped ones."""
        dropped, limit = self._settings.dropped_headers, self._settings.max_header_bytes
        kept = tuple((name, value) for name, value in headers if name.lower() not in dropped)
        size = sum(len(name) + len(value) for name, value in kept)
        if size > limit:
            raise HeadersTooLarge(f"the headers have {size} bytes, max_header_bytes is {limit}")
        return kept

    def _payload(self, name: str, request: Any) -> tuple[bool, Any]:
        """Whether there is a payload, and the request as a JSON value, spelt by field names or aliases."""
        handler = self._registry.get(name)
        adapter = handler.request_adapter if handler else None
        if adapter is None:
            if handler is not None and request is not None:
                raise ValueError(f"handler {name!r} takes no request: annotate its context AsyncContext[Model]")
            return request is not None, to_jsonable_python(request, by_alias=False)
        validated = adapter.validate_python(request, by_alias=True, by_name=True)
        if isinstance(request, (dict, list, str, int, float, bool, type(None))):
            return True, to_jsonable_python(request)  # JSON already, and all of it
        payload = adapter.dump_python(validated, mode="json", by_alias=False, round_trip=True)
        if _MASK in canonical_json(payload):
            raise ValueError(
                f"the request of {name!r} holds a secret, which pydantic does not write: submit a dict with its value"
            )
        return True, payload

    def _build(
        self,
        name: str,
        captured: CapturedRequest,
        payload: Any,
        job_id: UUID | None,
        owner: str | None,
        delay: float = 0.0,
    ) -> Submission:
        handler, settings = self._registry.get(name), self._settings
        query = parse_qsl(captured.query, keep_blank_values=True)
        return Submission(
            job_id=job_id or uuid4(),
            name=name,
            request=captured,
            fingerprint=fingerprint(payload, captured.route_params, query),
            owner=owner,
            max_retries=handler.retry.max_retries if handler else settings.default_max_retries,
            retention_seconds=handler.retention_seconds if handler else settings.retention_seconds,
            delay_seconds=delay,
        )


def as_uuid(job_id: UUID | str) -> UUID:
    """Raises ValueError when it is no UUID."""
    return job_id if isinstance(job_id, UUID) else UUID(job_id)


def _canonical(model: Any, body: Any, body_text: str | None) -> Any:
    """What makes two bodies the same: the validated value, so that white space and left-out defaults do not count."""
    if model is None:
        return None
    try:
        if _is_lossy(model):
            return from_json(body_text or "null")
        return _adapter(model).dump_python(body, mode="json", by_alias=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@functools.lru_cache(maxsize=256)
def _is_lossy(model: Any) -> bool:
    """Whether a dump of the model leaves something out or varies (excluded fields, secrets, sets); then what was sent
    must tell two bodies apart."""
    schema = str(_adapter(model).core_schema)
    return any(sign in schema for sign in ("serialization_exclude", "Secret", "'set'", "'frozenset'"))


@functools.lru_cache(maxsize=256)
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _query_string(query: QueryLike | None) -> str:
    if query is None or isinstance(query, str):
        return query or ""
    if isinstance(query, QueryParams):
        return urlencode(query.multi_items())
    return urlencode(query, doseq=True) if isinstance(query, Mapping) else urlencode(list(query))
