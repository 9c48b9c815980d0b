"""The application under test, run by `uvicorn tests.worker_app:app` and `celery -A tests.worker_app:celery_app worker`.

Broker, store and settings come from the environment. Handlers leave traces of what they did under `test:` keys in the
store's Redis, where tests look for what ran, and how often.
"""

import asyncio
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from functools import cache
from typing import Any

import redis
from celery import Celery, signals
from celery.exceptions import Ignore, Reject
from fastapi import FastAPI
from pydantic import BaseModel

from async_endpoints_celery import (
    AsyncContext,
    AsyncEndpointError,
    AsyncEndpoints,
    AsyncRouter,
    JobFailed,
    MethodResult,
)

BROKER_URL = os.environ["TEST_BROKER_URL"]
#: None: the broker's own Redis.
STORE_URL = os.environ.get("TEST_STORE_URL")

celery_app = Celery("worker_app", broker=BROKER_URL)
celery_app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=1,
    **json.loads(os.environ.get("TEST_CELERY_CONFIG", "{}")),
)
if os.environ.get("TEST_QUORUM"):
    celery_app.conf.task_default_queue_type = "quorum"
endpoints = AsyncEndpoints(celery_app, store=STORE_URL)


class Payload(BaseModel):
    """What every job here takes; handlers use of it what they need."""

    text: str = ""
    seconds: float = 0.0
    failures: int = 0
    kind: str = ""


Context = AsyncContext[Payload]


class Unpicklable(Exception):
    """An exception that cannot leave its process as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class Vetoed(Exception):
    """What the handler Picky is not retried on."""


@cache
def _client(pid: int) -> redis.Redis:
    return redis.Redis.from_url(os.environ["TEST_TRACE_URL"], decode_responses=True)


def traces() -> redis.Redis:
    return _client(os.getpid())


def leave_trace(context: AsyncContext[Any]) -> None:
    """This attempt began, in this process."""
    traces().rpush(f"test:runs:{context.job_id}", os.getpid())


# What a handler sees.


def seen(context: Context) -> dict[str, Any]:
    leave_trace(context)
    return {
        "text": context.request.text,
        "headers": context.headers.items(),
        "header": context.headers.get("X-ECHO"),
        "list": context.headers.getlist("x-Echo"),
        "route": context.route_params,
        "query": context.query_params.multi_items(),
        "job_id": str(context.job_id),
        "job_name": context.job_name,
        "retry_count": context.retry_count,
        "max_retries": context.max_retries,
        "owner": context.owner,
    }


@endpoints.handler("Echo")
async def echo(context: Context) -> dict[str, Any]:
    await asyncio.sleep(0)
    return seen(context)


@endpoints.handler("EchoSync")
def echo_sync(context: Context) -> dict[str, Any]:
    return seen(context)


class EchoClass:
    """A fresh instance for each job."""

    def __init__(self) -> None:
        self.jobs = 0

    def handle(self, context: Context) -> dict[str, Any]:
        self.jobs += 1
        return {**seen(context), "jobs": self.jobs}


class EchoAsyncClass:
    def __init__(self) -> None:
        self.jobs = 0

    async def handle(self, context: Context) -> dict[str, Any]:
        self.jobs += 1
        return {**seen(context), "jobs": self.jobs}


endpoints.add_handler("EchoClass", EchoClass)
endpoints.add_handler("EchoAsyncClass", EchoAsyncClass)


@endpoints.handler("Parked", queue="parked")
async def parked(context: Context) -> dict[str, Any]:
    return seen(context)


@endpoints.handler("NoBody")
def no_body(context: AsyncContext) -> None:
    leave_trace(context)


@endpoints.handler("WhereAmI")
async def where_am_i(context: Context) -> dict[str, int]:
    await asyncio.sleep(context.request.seconds)
    return {"pid": os.getpid(), "loop": id(asyncio.get_running_loop())}


# Outcomes.


@endpoints.handler("Outcome", max_retries=0)
async def outcome(context: Context) -> Any:
    return make_outcome(context.request.kind)


@endpoints.handler("OutcomeSync", max_retries=0)
def outcome_sync(context: Context) -> Any:
    return make_outcome(context.request.kind)


@endpoints.handler("OutcomeWithRetries", max_retries=3)
async def outcome_with_retries(context: Context) -> Any:
    leave_trace(context)
    return make_outcome(context.request.kind)


@endpoints.handler("Picky", max_retries=3, do_not_retry_on=(Vetoed,), retry_on=(OSError,))
def picky(context: Context) -> Any:
    leave_trace(context)
    return make_outcome(context.request.kind)


def make_outcome(kind: str) -> Any:
    match kind:
        case "success":
            return MethodResult.success({"answer": 42})
        case "none":
            return None
        case "payload":
            return Payload(text="a model")
        case "failure":
            return MethodResult.failure("out of paper")
        case "failure-error":
            return MethodResult.failure(AsyncEndpointError(code="PRINTER", message="on fire"))
        case "failure-exception":
            return MethodResult.failure(KeyError("drawer"))
        case "value-error":
            raise ValueError("no such number")
        case "os-error":
            raise OSError("no such device")
        case "vetoed":
            raise Vetoed("not again")
        case "chain":
            fail_with_causes()
        case "unpicklable":
            raise Unpicklable("locked")
        case "job-failed":
            raise JobFailed("CARD_DECLINED", "ask the bank")
        case "job-failed-later":
            raise JobFailed("BUSY", "come back", retryable=True, retry_after=77)
        case "job-failed-retryable":
            raise JobFailed("BUSY", "come back", retryable=True)
        case "celery-ignore":
            raise Ignore
        case "celery-reject":
            raise Reject("no", requeue=True)
        case "memory-error":
            raise MemoryError("too much")
        case "sys-exit":
            sys.exit(3)
        case "object":
            return object()
        case "bytes":
            return b"\xff\xfe"
        case "large":
            return "x" * 20_000
        case "unreadable":
            raise Unreadable
    raise AssertionError(kind)


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def fail_with_causes() -> None:
    try:
        try:
            raise KeyError("cellar")
        except KeyError as error:
            raise LookupError("attic") from error
    except LookupError as error:
        raise RuntimeError("house") from error


@endpoints.handler("Flaky", retry_delay_base_seconds=0.1)
def flaky(context: Context) -> dict[str, int]:
    leave_trace(context)
    if context.retry_count < context.request.failures:
        raise ConnectionError(f"attempt {context.retry_count + 1}")
    return {"retries": context.retry_count}


@endpoints.handler("Failing")
async def failing(context: Context) -> None:
    """Fails with the default back-off."""
    leave_trace(context)
    raise ConnectionError(f"attempt {context.retry_count + 1}")


# Time.


@endpoints.handler("ShortAsync", timeout_seconds=1, max_retries=0)
async def short_async(context: Context) -> str:
    leave_trace(context)
    await asyncio.sleep(context.request.seconds)
    return "in time"


@endpoints.handler("ShortSync", timeout_seconds=1, max_retries=0)
def short_sync(context: Context) -> str:
    leave_trace(context)
    time.sleep(context.request.seconds)
    return "in time"


@endpoints.handler("DeafAsync", timeout_seconds=1, max_retries=0)
async def deaf_async(context: Context) -> str:
    """Does not hear that it is canceled."""
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        await asyncio.sleep(context.request.seconds)
    return "too late"


@endpoints.handler("Steps")
def steps(context: Context) -> str:
    """Reports progress and waits at the gate."""
    context.report_progress(25, "began")
    wait_at_gate(context)
    context.report_progress(150, "nearly")
    return "done"


@endpoints.handler("StepsAsync")
async def steps_async(context: Context) -> str:
    await context.report_progress(25, "began")
    await asyncio.to_thread(wait_at_gate, context)
    await context.report_progress(150, "nearly")
    return "done"


@endpoints.handler("Gate", retry_delay_base_seconds=0)
def gate(context: Context) -> int:
    """Runs until the test opens its gate."""
    leave_trace(context)
    wait_at_gate(context)
    return context.retry_count


@endpoints.handler("ParkedGate", queue="parked", retry_delay_base_seconds=0)
def parked_gate(context: Context) -> int:
    leave_trace(context)
    wait_at_gate(context)
    return context.retry_count


@endpoints.handler("GateAsync", retry_delay_base_seconds=0)
async def gate_async(context: Context) -> int:
    leave_trace(context)
    await asyncio.to_thread(wait_at_gate, context)
    return context.retry_count


@endpoints.handler("Instructed", max_retries=0)
def instructed(context: Context) -> Any:
    """Does what the test tells it, one order after the other: see `tests.streaming.tell`."""
    leave_trace(context)
    while True:
        found: Any = traces().blpop([f"test:orders:{context.job_id}"], timeout=0.2)
        context.raise_if_canceled()
        order = json.loads(found[1]) if found else {}
        if "progress" in order:
            context.report_progress(*order["progress"])
        elif "failure" in order:
            raise JobFailed(*order["failure"])
        elif "result" in order:
            return order["result"]


def wait_at_gate(context: Context, gate: str = "") -> None:
    while not traces().get(f"test:gate:{context.job_id}{gate}"):
        time.sleep(0.02)


@endpoints.handler("Turns", queue="parked", retry_delay_base_seconds=0)
def turns(context: Context) -> int:
    """Each attempt has a gate of its own."""
    leave_trace(context)
    wait_at_gate(context, f":{context.retry_count}")
    context.report_progress(90, f"attempt {context.retry_count}")
    return context.retry_count


@endpoints.handler("Span", retry_delay_base_seconds=0)
def span(context: Context) -> int:
    """Leaves a trace at both ends."""
    traces().rpush(f"test:spans:{context.job_id}", "start")
    time.sleep(context.request.seconds)
    traces().rpush(f"test:spans:{context.job_id}", "end")
    return context.retry_count


# Cancel.


def leave_moment(context: Context) -> None:
    """This handler heard that it shall stop, now."""
    traces().rpush(f"test:stopped:{context.job_id}", time.time())


@endpoints.handler("Cancelable")
async def cancelable(context: Context) -> None:
    leave_trace(context)
    try:
        if context.retry_count == 0 and not traces().get(f"test:gate:{context.job_id}"):
            await asyncio.sleep(60)
    except asyncio.CancelledError:
        leave_moment(context)
        raise


@endpoints.handler("Attentive")
def attentive(context: Context) -> None:
    leave_trace(context)
    while not context.cancellation_requested:
        time.sleep(0.02)
    leave_moment(context)
    context.raise_if_canceled()


@endpoints.handler("DeafSync")
def deaf_sync(context: Context) -> None:
    """Never asks whether it shall stop."""
    leave_trace(context)
    try:
        time.sleep(60)
    finally:
        leave_moment(context)


@endpoints.handler("HoldGil")
def hold_gil(context: Context) -> str:
    """No other thread of this process runs Python meanwhile."""
    leave_trace(context)
    microseconds = int(context.request.seconds * 1e6)
    ctypes.PyDLL(None).usleep(microseconds)
    return "let go"


@endpoints.handler("Backtrack")
def backtrack(context: Context) -> bool:
    """The same without foreign functions: the regular expression engine does not let go either."""
    leave_trace(context)
    end = time.monotonic() + context.request.seconds
    size = 18
    while time.monotonic() < end:
        re.match(r"(a+)+$", "a" * size + "b")
        size = min(size + 1, 23)
    return True


# Death.


@endpoints.handler("Exit", max_retries=1, retry_delay_base_seconds=0)
def exit_at_once(context: Context) -> None:
    leave_trace(context)
    os._exit(7)


@endpoints.handler("ExitOnce", retry_delay_base_seconds=0)
def exit_once(context: Context) -> int:
    leave_trace(context)
    if context.retry_count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return context.retry_count


# A web process that dies, or adds to messages, while it publishes.


@signals.before_task_publish.connect
def add_header(headers: dict[str, Any], **_: Any) -> None:
    headers["x_test"] = "added by a receiver"


if at := os.environ.get("TEST_DIE_AT"):

    @getattr(signals, at).connect
    def die(sender: str = "", **_: Any) -> None:
        if sender == "async_endpoints.EchoSync":
            os.kill(os.getpid(), signal.SIGKILL)


router = AsyncRouter(endpoints)
for registered in list(endpoints.registry):
    router.async_post(f"/run/{registered.name}", registered.name)
router.async_post("/shops/{shop}/items/{item:int}", echo)
router.async_post("/sync/shops/{shop}/items/{item:int}", echo_sync)
router.async_post("/run/Nobody", "Nobody", body=Payload)
router.async_jobs("/jobs", admin=True)

app = FastAPI(lifespan=endpoints.lifespan)
app.include_router(router)
