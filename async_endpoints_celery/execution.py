"""Use case: one attempt of a job, from its claim to the write that ends it.

    claim → decode → call the handler → judge → write

The calling itself (threads, event loop, deadline) is the worker's; here is what it means for the record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from async_endpoints_celery.codec import CapturedRequest, encode_error, milliseconds
from async_endpoints_celery.context import AsyncContext, Attempt, JobCanceled
from async_endpoints_celery.dispatch import Capture, Dispatcher, Message
from async_endpoints_celery.drivers import Flow
from async_endpoints_celery.errors import (
    HANDLER_NOT_FOUND,
    JOB_TIMEOUT,
    PAYLOAD_INVALID,
    RESULT_NOT_SERIALIZABLE,
    RESULT_TOO_LARGE,
    AsyncEndpointError,
    JobFailed,
    StoreUnavailable,
)
from async_endpoints_celery.handlers import RegisteredHandler
from async_endpoints_celery.operations import Claimed, Operations, Refused
from async_endpoints_celery.outbox import hand_over
from async_endpoints_celery.results import MethodResult
from async_endpoints_celery.settings import Settings

logger = logging.getLogger("async_endpoints_celery")

#: Seconds past its deadline that a worker keeps the lease of a job, to end it itself before the sweep does.
DEADLINE_GRACE = 5.0


#: What means the process that runs the handler, not the handler.
ENDS_THE_PROCESS = (SystemExit, KeyboardInterrupt)


class JobTimedOut(Exception):
    """The worker's way to say that the handler was interrupted at its deadline."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a message brought: whose attempt it is."""

    job_id: str
    name: str
    attempt: int
    request: str
    copy: int
    #: Unique to this delivery; two of the same message are two runners, and one of them loses.
    runner: str
    #: The worker's name, for people.
    worker: str


# What becomes of an attempt.


@dataclass(frozen=True, slots=True)
class Completed:
    result: str


@dataclass(frozen=True, slots=True)
class Failed:
    error: AsyncEndpointError
    #: The exception, for the retry rules and for Celery's log.
    cause: BaseException | None = None
    #: False: trying again cannot help, whatever the policy says.
    retryable: bool = True


@dataclass(frozen=True, slots=True)
class Canceled:
    """The handler stopped because it was asked to."""


Outcome = Completed | Failed | Canceled


@dataclass(frozen=True, slots=True)
class Ending:
    """What was written: another attempt in `retry_in` seconds; nothing (`refused`) when the job was no longer ours."""

    refused: bool = False
    retry_in: float | None = None


class Executor:
    """The steps of an attempt around one store; `claim` and `finish` are flows for a driver, the rest is pure."""

    def __init__(self, operations: Operations, dispatcher: Dispatcher, settings: Settings) -> None:
        self._operations = operations
        self._dispatcher = dispatcher
        self._settings = settings

    def claim(self, delivery: Delivery, handler: RegisteredHandler | None) -> Flow[Claimed | Refused]:
        """The right to run the attempt, unless somebody else has it or nobody should."""
        claimed: Claimed | Refused = yield self._operations.claim(
            delivery.job_id,
            attempt=delivery.attempt,
            copy=delivery.copy,
            runner=delivery.runner,
            worker=delivery.worker,
            lease_ms=milliseconds(self._settings.job_claim_timeout_seconds),
            timeout_ms=milliseconds(handler.timeout_seconds if handler else self._settings.job_timeout_seconds),
            grace_ms=milliseconds(DEADLINE_GRACE),
            max_retries=handler.retry.max_retries if handler else None,
            retention_ms=milliseconds(handler.retention_seconds) if handler else None,
        )
        return claimed

    def run(
        self,
        delivery: Delivery,
        claimed: Claimed,
        handler: RegisteredHandler | None,
        attempt: Attempt | None = None,
        call: Callable[[RegisteredHandler, AsyncContext[Any]], Any] = RegisteredHandler.call,
    ) -> Outcome:
        """Call the handler, and judge what comes of it. `call` runs it within its deadline."""
        if handler is None:
            return _permanent(
                HANDLER_NOT_FOUND,
                f"no handler is registered for {delivery.name!r} in this worker: import the module that defines it"
                " (Celery's `include`), or correct the name that was submitted",
            )
        try:
            context = _context(delivery, claimed, handler, attempt)
        except ValueError as error:
            return _permanent(PAYLOAD_INVALID, _unreadable(delivery.name, error))
        try:
            returned = call(handler, context)
        except JobCanceled:
            return Canceled()
        except JobTimedOut as error:
            return timed_out(handler, error)
        except Exception as error:
            return Failed(AsyncEndpointError.of(error), error)
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            # No worker may die, and no record be left running, because a handler raised what nobody catches.
            return Failed(AsyncEndpointError.of(error))
        return self._judge(delivery.name, returned)

    def _judge(self, name: str, returned: Any) -> Outcome:
        if isinstance(returned, MethodResult):
            if returned.error is not None:
                return Failed(returned.error, returned.cause)
            returned = returned.value
        try:
            # NaN and infinity are no JSON: null, as pydantic writes them.
            result = to_json(returned, by_alias=True, inf_nan_mode="null").decode()
            from_json(result)  # what cannot be read again (an integer of thousands of digits) must not be stored
        except (PydanticSerializationError, UnicodeDecodeError, ValueError, RecursionError) as error:
            kind = type(returned).__name__
            return _permanent(
                RESULT_NOT_SERIALIZABLE,
                f"{name} returned a {kind} that is not JSON ({str(error)[:300]}): return a pydantic model, a dataclass"
                " or a JSON value",
            )
        size, limit = len(result.encode()), self._settings.max_result_bytes
        if size > limit:
            return _permanent(
                RESULT_TOO_LARGE,
                f"the result of {name} has {size} bytes, max_result_bytes is {limit}: store it elsewhere and return"
                " where it is",
            )
        return Completed(result)

    def finish(
        self,
        delivery: Delivery,
        claimed: Claimed,
        handler: RegisteredHandler | None,
        outcome: Outcome,
    ) -> Flow[Ending]:
        """Write what became of the attempt; with another attempt to come, its message too."""
        if isinstance(outcome, Failed):
            delay = _next_delay(claimed, handler, outcome)
            if delay is not None:
                return (yield from self._reschedule(delivery, claimed, outcome, delay))
        job_id, fence = delivery.job_id, claimed.fence
        match outcome:
            case Completed(result):
                written = yield self._operations.complete(job_id, fence=fence, result=result)
            case Failed(error):
                written = yield self._operations.fail(job_id, fence=fence, failure=encode_error(error))
            case Canceled():
                written = yield self._operations.canceled(job_id, fence=fence)
        return Ending(refused=not written)

    def _reschedule(self, delivery: Delivery, claimed: Claimed, outcome: Failed, delay: float) -> Flow[Ending]:
        message = Message(
            delivery.job_id,
            delivery.name,
            delivery.request,
            attempt=delivery.attempt + 1,
            retries=claimed.retries + 1,
            countdown=delay or None,
        )
        try:
            publication = yield Capture(message)
        except StoreUnavailable:
            raise
        except Exception:
            # Its retry is not lost by that: it waits in the outbox, and the sweep tries again.
            logger.exception("the message of job %s (%s) cannot be built", delivery.job_id, delivery.name)
            publication = ()
        written = yield self._operations.reschedule(
            delivery.job_id,
            fence=claimed.fence,
            failure=encode_error(outcome.error),
            delay_ms=milliseconds(delay),
            dispatch_after_ms=self._dispatcher.dispatch_after_ms(delay),
            publication=publication,
        )
        if not written:
            return Ending(refused=True)
        yield from hand_over(self._operations, self._dispatcher, message)
        return Ending(retry_in=delay)


def timed_out(handler: RegisteredHandler, cause: JobTimedOut) -> Failed:
    message = f"{handler.name} took longer than {handler.timeout_seconds:g} s (timeout_seconds)"
    return Failed(AsyncEndpointError(code=JOB_TIMEOUT, message=message), cause)


def _next_delay(claimed: Claimed, handler: RegisteredHandler | None, outcome: Failed) -> float | None:
    if handler is None or not outcome.retryable:
        return None
    cause = outcome.cause
    if isinstance(cause, JobTimedOut):
        cause = None  # a timeout is retried, whatever the handler's retry_on says of exceptions
    return handler.retry.next_delay(claimed.retries, claimed.max_retries, cause)


def _context(
    delivery: Delivery, claimed: Claimed, handler: RegisteredHandler, attempt: Attempt | None
) -> AsyncContext[Any]:
    """Raises ValueError when the captured request is not what the handler's model wants."""
    captured = CapturedRequest.decode(delivery.request)
    return AsyncContext(
        _validated(handler, captured),
        headers=captured.headers,
        route_params=captured.route_params,
        query_params=captured.query,
        job_id=UUID(delivery.job_id),
        job_name=delivery.name,
        retry_count=claimed.retries,
        max_retries=claimed.max_retries,
        owner=claimed.owner,
        attempt=attempt,
    )


def _validated(handler: RegisteredHandler, captured: CapturedRequest) -> Any:
    adapter = handler.request_adapter
    if adapter is None:
        return None
    if captured.payload is None:
        raise ValueError("the job was submitted without a body, and its handler wants one")
    by_name = True if captured.by_name else None
    return adapter.validate_json(captured.payload, by_name=by_name, by_alias=None if not by_name else True)


def _unreadable(name: str, error: ValueError) -> str:
    """The reason without the payload: what was sent must not reach a log by way of an error message."""
    if isinstance(error, ValidationError):
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        reason = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems[:5])
    else:
        reason = str(error)
    return (
        f"the stored request of {name} does not fit its handler's model ({reason}): do the web process and the worker"
        " run the same version of it?"
    )


def _permanent(code: str, message: str) -> Failed:
    return Failed(AsyncEndpointError(code=code, message=message), JobFailed(code, message), retryable=False)
