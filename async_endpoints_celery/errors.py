"""The errors of the package, and the failure that a job's record keeps.

Everything this package raises on purpose descends from `AsyncEndpointsError`, except `JobFailed`, which is
the user's own word: a handler raises it to say how its job failed.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.alias_generators import to_camel

#: What a stored failure may hold at most, in characters: a record is no place for a megabyte of traceback.
MAX_MESSAGE_CHARS = 8_192
MAX_STACK_TRACE_CHARS = 32_768
#: Causes deeper than this are dropped: `raise … from …` in a loop must not fill Redis.
MAX_CAUSES = 8

JOB_TIMEOUT = "JOB_TIMEOUT"
WORKER_LOST = "WORKER_LOST"
HANDLER_NOT_FOUND = "HANDLER_NOT_FOUND"
PAYLOAD_INVALID = "PAYLOAD_INVALID"
RESULT_NOT_SERIALIZABLE = "RESULT_NOT_SERIALIZABLE"
RESULT_TOO_LARGE = "RESULT_TOO_LARGE"
UNKNOWN = "UNKNOWN"


class AsyncEndpointsError(Exception):
    """Base of the errors this package raises."""


class ConfigurationError(AsyncEndpointsError):
    """A setting, handler, store or broker that cannot work; raised at start, and says how to mend it."""


class JobNotFound(AsyncEndpointsError):
    """No job has this id: it never existed, its record has expired, or it belongs to somebody else."""


class JobConflict(AsyncEndpointsError):
    """The job exists and its state, or what it was submitted with, forbids this.

    `same_key` is true when an `Idempotency-Key` was used again with another payload.
    """

    def __init__(self, message: str, *, job_id: str | None = None, same_key: bool = False) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.same_key = same_key


class QueueFull(AsyncEndpointsError):
    """`maximum_queue_size` jobs are waiting already; nothing was stored."""


class PayloadTooLarge(AsyncEndpointsError):
    """The request is larger than `max_payload_bytes`; nothing was stored."""


class HeadersTooLarge(PayloadTooLarge):
    """The captured headers are larger than `max_header_bytes`; nothing was stored."""


class StoreUnavailable(AsyncEndpointsError):
    """Redis or the broker did not answer in time.

    The outcome may be unknown: repeating the submission with the same `job_id` is safe.
    """

    def __init__(self, message: str, *, job_id: str | None = None) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobFailed(Exception):
    """Raise this in a handler to fail the job with a code and a message of your own.

    Args:
        code: a stable word for programs, shown as `error.code`.
        message: a sentence for people, shown as `error.message`.
        retryable: whether the job may be tried again while it has retries left.
        retry_after: seconds until that retry, instead of the back-off.
    """

    def __init__(self, code: str, message: str, *, retryable: bool = False, retry_after: float | None = None) -> None:
        if retry_after is not None and not 0 <= retry_after < math.inf:
            raise ValueError(f"retry_after is {retry_after}: give seconds from now, 0 or more")
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments would be lost by the default: a pool child hands exceptions to its parent.
        return _rebuild_job_failed, (self.code, self.message, self.retryable, self.retry_after)


def _rebuild_job_failed(code: str, message: str, retryable: bool, retry_after: float | None) -> JobFailed:
    return JobFailed(code, message, retryable=retryable, retry_after=retry_after)


def readable(text: object, limit: int = MAX_MESSAGE_CHARS) -> str:
    """Text that Redis can keep: of bounded length, and without the lone surrogates that no UTF-8 has."""
    try:
        clean = str(text).encode("utf-8", "backslashreplace").decode()
    except Exception:  # a broken __str__ must not hide the failure itself
        return f"<{type(text).__name__} has no readable message>"
    return clean if len(clean) <= limit else clean[:limit] + "…"


Readable = Annotated[str, BeforeValidator(readable)]


class _Stored(BaseModel):
    """camelCase on the wire and in Redis, immutable in Python."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)


class ExceptionInfo(_Stored):
    """One exception of a chain: its type, message, stack trace and the exception that caused it."""

    type: Readable
    message: Readable
    stack_trace: str | None = None
    inner_exception: ExceptionInfo | None = None

    def without_stack_traces(self) -> ExceptionInfo:
        inner = self.inner_exception.without_stack_traces() if self.inner_exception else None
        return self.model_copy(update={"stack_trace": None, "inner_exception": inner})


class AsyncEndpointError(_Stored):
    """Why a job failed: a code for programs, a message for people and, if there was one, the exception."""

    code: Readable
    message: Readable
    exception: ExceptionInfo | None = None

    @classmethod
    def of(cls, failure: AsyncEndpointError | BaseException | str) -> AsyncEndpointError:
        """The stored form of anything a handler can fail with.

        A message becomes code `UNKNOWN`, an exception its type's name in capitals, `JobFailed` its own code.
        """
        if isinstance(failure, AsyncEndpointError):
            return failure
        if isinstance(failure, JobFailed):
            return cls(code=failure.code, message=failure.message, exception=exception_info(failure))
        if isinstance(failure, BaseException):
            info = exception_info(failure)
            return cls(code=type(failure).__name__.upper(), message=info.message, exception=info)
        return cls(code=UNKNOWN, message=failure)

    def without_stack_traces(self) -> AsyncEndpointError:
        """A copy that may be shown to a client."""
        if self.exception is None:
            return self
        return self.model_copy(update={"exception": self.exception.without_stack_traces()})


def exception_info(exc: BaseException) -> ExceptionInfo:
    """The exception and its chain of causes, as `traceback` would print them."""
    info: ExceptionInfo | None = None
    for cause in reversed(list(_causes(exc))):
        info = ExceptionInfo(
            type=_qualified_name(type(cause)),
            message=readable(cause),
            stack_trace=_stack_trace(cause),
            inner_exception=info,
        )
    assert info is not None  # _causes yields exc itself first
    return info


def _causes(exc: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen and len(seen) < MAX_CAUSES:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _qualified_name(cls: type[BaseException]) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _stack_trace(exc: BaseException) -> str | None:
    if exc.__traceback__ is None:
        return None
    text = "".join(traceback.format_tb(exc.__traceback__)).encode("utf-8", "backslashreplace").decode()
    # The end of a trace is where it happened.
    return text if len(text) <= MAX_STACK_TRACE_CHARS else "…" + text[-MAX_STACK_TRACE_CHARS:]
