"""Between Python and what Redis and the message hold: the record's hash and the captured request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, StrictBool, StrictStr
from pydantic_core import from_json

from async_endpoints_celery.errors import AsyncEndpointError, readable
from async_endpoints_celery.jobs import Job, JobStatus, Progress


@dataclass(frozen=True, slots=True)
class CapturedRequest:
    """What the handler gets to see of the original HTTP request.

    It travels as one opaque JSON string: Celery's serializer never looks inside, so a payload that resembles one of
    kombu's type markers stays what the client sent.
    """

    #: The body as JSON text, or None for a job without one.
    payload: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    route_params: Mapping[str, Any] = field(default_factory=dict)
    #: The raw query string: order and repeated names survive.
    query: str = ""
    #: The payload was dumped from a model by field names, not sent by a client with its aliases.
    by_name: bool = False

    def encode(self) -> str:
        return json.dumps(
            {
                "payload": self.payload,
                "headers": self.headers,
                "routeParams": dict(self.route_params),
                "query": self.query,
                "byName": self.by_name,
            },
            default=str,
            separators=(",", ":"),
        )

    @classmethod
    def decode(cls, text: str) -> CapturedRequest:
        """Raises ValueError when `text` is not what `encode` makes."""
        try:
            fields = _Captured.model_validate(json.loads(text))
        except (TypeError, ValueError, RecursionError):
            # Without its reasons: they quote what the client sent.
            raise ValueError("the captured request is not readable") from None
        return cls(fields.payload, tuple(fields.headers), fields.routeParams, fields.query, fields.byName)


class _Captured(BaseModel):
    """The JSON of a captured request."""

    payload: StrictStr | None
    headers: list[tuple[StrictStr, StrictStr]]
    routeParams: dict[str, Any]
    query: StrictStr
    byName: StrictBool


def canonical_json(value: Any) -> str:
    """One text for equal JSON values: sorted keys, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def fingerprint(payload: Any, route_params: Mapping[str, Any], query: Sequence[tuple[str, str]]) -> str:
    """What makes two submissions the same: validated body, route parameters and query parameters."""
    text = canonical_json([payload, dict(route_params), [list(pair) for pair in query]])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def moment(text: str | None) -> datetime | None:
    return datetime.fromtimestamp(int(text) / 1000, UTC) if text else None


def decode_record(job_id: str, fields: Mapping[str, str]) -> Job:
    """The `Job` of a record's hash.

    `model_construct` skips validation: the scripts wrote these fields, and reading a status is a hot path.
    """
    error = fields.get("error")
    result = fields.get("result")
    progress = fields.get("progress")
    return Job.model_construct(
        id=UUID(job_id),
        name=fields["name"],
        status=JobStatus.parse(fields["status"]),
        retry_count=int(fields["retries"]),
        max_retries=int(fields["max_retries"]),
        created_at=moment(fields["created"]),
        started_at=moment(fields.get("started")),
        completed_at=moment(fields.get("completed")),
        last_updated_at=moment(fields["updated"]),
        result=from_json(result) if result else None,
        error=AsyncEndpointError.model_validate_json(error) if error else None,
        progress=Progress.model_validate_json(progress) if progress else None,
        owner=fields.get("owner"),
        version=int(fields["version"]),
    )


def encode_error(error: AsyncEndpointError) -> str:
    return error.model_dump_json(by_alias=True)


def encode_progress(percent: float, message: str | None) -> str:
    clean = None if message is None else readable(message)
    return json.dumps({"percent": float(percent), "message": clean}, separators=(",", ":"))
