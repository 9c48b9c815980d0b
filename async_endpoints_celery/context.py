"""What a handler receives: the request, the HTTP context it came with, and the job it runs for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast
from uuid import UUID, uuid4

from starlette.datastructures import Headers, QueryParams

T = TypeVar("T")


class JobCanceled(asyncio.CancelledError):
    """Raised in a handler by `raise_if_canceled()`. Let it pass: the job then ends Canceled."""


class Attempt(Protocol):
    """What a context asks of the attempt it runs in."""

    def report_progress(self, percent: float, message: str | None) -> Awaitable[None]: ...

    def cancellation_requested(self) -> bool: ...


class _NoAttempt:
    """For a context made by hand, in a unit test."""

    def report_progress(self, percent: float, message: str | None) -> Awaitable[None]:
        return DONE

    def cancellation_requested(self) -> bool:
        return False


class _Done(Awaitable[None]):
    """An awaitable that is over: what a sync handler ignores and an async one may await."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


DONE = _Done()


class AsyncContext(Generic[T]):
    """The one argument of a handler: `AsyncContext[RequestModel]`, or `AsyncContext` for a job without a body.

    In a unit test make one by hand; every argument is optional:

        result = await process_data(AsyncContext(DataRequest(data="hello")))
    """

    def __init__(
        self,
        request: T | None = None,
        *,
        headers: Headers | Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
        route_params: Mapping[str, Any] | None = None,
        query_params: QueryParams | Mapping[str, str] | Sequence[tuple[str, str]] | str | None = None,
        job_id: UUID | None = None,
        job_name: str = "",
        retry_count: int = 0,
        max_retries: int = 0,
        owner: str | None = None,
        attempt: Attempt | None = None,
    ) -> None:
        #: The validated request model; None for a handler without a body.
        self.request: T = cast(T, request)
        #: The original headers, whatever the case they are asked for in; `.getlist` for repeated ones.
        self.headers: Headers = as_headers(headers)
        #: The route's path parameters, converted as the route says (a uuid arrives as text).
        self.route_params: dict[str, Any] = dict(route_params or {})
        #: The query parameters in order; `.getlist` for repeated ones.
        self.query_params: QueryParams = as_query_params(query_params)
        self.job_id: UUID = job_id or uuid4()
        self.job_name: str = job_name
        #: Retries before this attempt: 0 at first.
        self.retry_count: int = retry_count
        self.max_retries: int = max_retries
        #: The identity that the `owner` dependency gave for the submitting request.
        self.owner: str | None = owner
        self._attempt: Attempt = attempt or _NoAttempt()

    def report_progress(self, percent: float, message: str | None = None) -> Awaitable[None]:
        """Show how far the job is, at its status URL. Call it in a sync handler, await it in an async one.

        Args:
            percent: 0 to 100; values outside are clipped.
            message: a short text for people.

        Raises:
            ValueError: `percent` is not a number.
        """
        value = float(percent)
        if value != value:
            raise ValueError("percent is not a number")
        return self._attempt.report_progress(min(max(value, 0.0), 100.0), message)

    @property
    def cancellation_requested(self) -> bool:
        """Whether somebody asked for the job to be canceled. Cheap enough to ask in a loop."""
        return self._attempt.cancellation_requested()

    def raise_if_canceled(self) -> None:
        """Stop here if somebody asked for the job to be canceled.

        Raises:
            JobCanceled: let it pass, after cleaning up.
        """
        if self.cancellation_requested:
            raise JobCanceled(f"job {self.job_id} was canceled")


def as_query_params(
    query: QueryParams | Mapping[str, str] | Sequence[tuple[str, str]] | str | None,
) -> QueryParams:
    """Starlette's `QueryParams`, order and repeated names kept."""
    if isinstance(query, (QueryParams, Mapping, str)):
        return QueryParams(query)
    return QueryParams(list(query or ()))


def as_headers(headers: Headers | Mapping[str, str] | Sequence[tuple[str, str]] | None) -> Headers:
    """Starlette's `Headers`, repeated names kept."""
    if isinstance(headers, Headers):
        return headers
    items: Any = headers.items() if isinstance(headers, Mapping) else headers or ()
    raw = [(name.lower().encode("latin-1"), _latin(value)) for name, value in items]
    return Headers(raw=raw)


def _latin(value: str) -> bytes:
    # A programmatic caller may pass any text; over HTTP header values are latin-1.
    return value.encode("latin-1", "backslashreplace")


Handler = Callable[[AsyncContext[Any]], Any]
