"""A client of the HTTP contract: submit a job, follow it, get its record. Needs the extra `client` (httpx).

    with JobsClient("https://shop.example") as jobs:
        job = jobs.submit("/api/process-data", {"data": "hello"})
        job = jobs.wait(job, timeout=60, show_progress=True)

What is said to the server is said by flows, which do no I/O: they yield steps and are sent the outcome. The two clients
perform them.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias, TypedDict, Unpack
from urllib.parse import urljoin
from uuid import UUID, uuid4

from pydantic import Field, ValidationError
from pydantic_core import to_jsonable_python

from async_endpoints_celery.jobs import Job, JobStatus

try:
    import httpx
except ImportError as error:
    raise ImportError('the client needs an extra: pip install "async-endpoints-celery[client]"') from error

#: Seconds that an event stream may be silent (the server comments every 15), and that a long poll asks for.
SILENCE_SECONDS, POLL_SECONDS = 40.0, 30.0


class RemoteJob(Job):
    """The record as the server sent it, and the URL where it is read."""

    location: str | None = Field(default=None, exclude=True)


class JobsClientError(Exception):
    """The server refused: its problem details (RFC 9457), as far as it sent any."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        self.problem = dict(problem)
        self.type: str = self.problem.get("type", "about:blank")
        self.title: str = self.problem.get("title", "")
        self.status: int = self.problem.get("status", 0)
        self.detail: str | None = self.problem.get("detail")
        self.instance: str | None = self.problem.get("instance")
        self.code: str | None = self.problem.get("code")
        self.job_id: str | None = self.problem.get("jobId")
        self.errors: list[Any] = self.problem.get("errors") or []
        super().__init__(f"{self.status} {self.code or self.title}" + (f": {self.detail}" if self.detail else ""))


class Submission(TypedDict, total=False):
    """Options of `submit`: POST by default; the job's id, or a key that stands for it; more headers."""

    method: str
    job_id: UUID | str
    idempotency_key: str
    headers: Mapping[str, str]


class Shown(TypedDict, total=False):
    """Options of `wait`: a function that gets each record, and a bar on stderr."""

    on_progress: Callable[[RemoteJob], Any]
    show_progress: bool


@dataclass(frozen=True)
class _Send:
    """A step of a flow; the outcome is the response. `stream`: its lines are asked for one by one."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    timeout: float | None = None
    stream: bool = False


#: Besides requests: a record for the caller, seconds to pause, and "line": the next one of the stream, None at its end.
_Step: TypeAlias = _Send | RemoteJob | float | Literal["line"]
_Flow: TypeAlias = Generator[_Step, Any, None]


def _next(flow: _Flow, outcome: Any) -> _Step | None:
    """The step that follows an outcome; None at the end."""
    try:
        return flow.throw(outcome) if isinstance(outcome, Exception) else flow.send(outcome)
    except StopIteration:
        return None


def _submitting(path: str, body: Any, options: Submission, attempts: int) -> _Flow:
    """Repeated on 503 and lost connections: an id or a key makes sure that it gives one job."""
    headers, key = dict(options.get("headers") or {}), options.get("idempotency_key")
    if key is not None:
        headers["Idempotency-Key"] = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if "job_id" in options or key is None:  # with a key alone the key makes the id
        headers["X-Async-Request-Id"] = str(options.get("job_id") or uuid4())
    send = _Send(options.get("method", "POST"), path, headers, to_jsonable_python(body))
    for attempt in range(1, max(attempts, 1) + 1):
        response = None
        try:
            response = yield send
        except httpx.TransportError:
            if attempt >= attempts:
                raise
        if response is not None and (response.status_code != 503 or attempt >= attempts):
            yield _record(response)
            return
        yield _retry_after(response, min(0.25 * 2**attempt, 10.0))


def _asking(method: str, job: Job | str) -> _Flow:
    location = _where(job)
    response = yield _Send(method, location)
    yield _record(response, location)


def _following(job: Job | str, timeout: float | None) -> _Flow:
    return _Follower(_where(job), timeout).flow()


class _Follower:
    """Shows a job's record now and after each change, until it is over."""

    def __init__(self, location: str, timeout: float | None) -> None:
        self.location = location
        self.deadline = time.monotonic() + timeout if timeout is not None else math.inf
        self.last: RemoteJob | None = None
        self.event_id = ""

    @property
    def left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the job at {self.location} is {self.last.status if self.last else 'not known'} still")
        return left

    @property
    def is_over(self) -> bool:
        return self.last is not None and self.last.status.is_over

    def flow(self) -> _Flow:
        """By events; where there are none, by long polls; where nothing waits, by asking as often as we are told to."""
        failures = 0
        has_events = True
        while not self.is_over:
            seen = self.last
            step = self._events() if has_events and failures < 3 else self._poll()
            try:
                has_events = yield from step
            except httpx.TransportError:
                failures += 1
                if failures >= 10:
                    raise
            failures = failures if seen == self.last else 0

    def _events(self) -> Generator[_Step, Any, bool]:
        """Whether there is such a route; the stream may have ended for any reason."""
        patience = min(SILENCE_SECONDS, self.left)
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": self.event_id} if self.event_id else {})}
        url = self.location.rstrip("/") + "/events"
        response = yield _Send("GET", url, headers, timeout=patience, stream=True)
        if response.status_code != 200 or not response.headers.get("content-type", "").startswith("text/event-stream"):
            return False
        fields: dict[str, str] = {}
        line: str | None
        while (line := (yield "line")) is not None:
            name, _, value = line.partition(": ")
            fields[name] = value
            if not line:
                if "data" in fields:  # and not a mere comment
                    self.event_id = fields.get("id", "")
                    yield from self._seen(RemoteJob.model_validate_json(fields["data"]))
                fields = {}
            if self.is_over or self.left + 1 < patience:
                return True  # if need be to a new stream, which is not read for longer than there is time
        yield min(0.2, self.left)
        return True

    def _poll(self) -> Generator[_Step, Any, bool]:
        seconds = min(POLL_SECONDS, self.left)
        headers = {"Prefer": f"wait={math.ceil(seconds)}"}
        response = yield _Send("GET", self.location, headers, timeout=seconds + 5)
        if response.status_code != 503:
            yield from self._seen(_record(response))
        if not self.is_over and "preference-applied" not in response.headers:
            yield min(_retry_after(response, 1.0) or 0.1, self.left)
        return False

    def _seen(self, job: RemoteJob) -> _Flow:
        job = job.model_copy(update={"location": self.location})
        if job != self.last:
            self.last = job
            yield job


def _record(response: httpx.Response, location: str | None = None) -> RemoteJob:
    if response.is_success:
        try:
            job = RemoteJob.model_validate_json(response.content)
        except ValidationError:
            title = f"{response.url} answered with something that is no job"
            raise JobsClientError({"title": title, "status": response.status_code}) from None
        where = response.headers.get("location")
        return job.model_copy(update={"location": urljoin(str(response.url), where) if where else location})
    is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
    problem = response.json() if is_problem else {"title": response.reason_phrase, "detail": response.text[:500]}
    raise JobsClientError({**problem, "status": response.status_code})


def _retry_after(response: httpx.Response | None, otherwise: float) -> float:
    text = response.headers.get("retry-after", "") if response is not None else ""
    return min(float(text), 60.0) if text.isascii() and text.isdigit() else otherwise


def _where(job: Job | str) -> str:
    location = job if isinstance(job, str) else getattr(job, "location", None)
    if location is None:
        raise ValueError("the job has no location: its application has no status route")
    return str(location)


def _request(http: httpx.Client | httpx.AsyncClient, send: _Send) -> httpx.Request:
    timeout = http.timeout if send.timeout is None else httpx.Timeout(http.timeout.connect, read=send.timeout)
    return http.build_request(send.method, send.url, headers=dict(send.headers), json=send.json, timeout=timeout)


def _show(job: RemoteJob, options: Shown) -> None:
    if "on_progress" in options:
        options["on_progress"](job)
    if options.get("show_progress"):
        percent = 100.0 if job.status is JobStatus.COMPLETED else job.progress.percent if job.progress else 0.0
        message = (job.progress and not job.status.is_over and job.progress.message) or ""
        # It is other people's data: nothing of it may control the terminal.
        message = "".join(c if c.isprintable() else " " for c in message)[:40]
        bar, end = "#" * round(percent / 4), "\n" if job.status.is_over else ""
        sys.stderr.write(f"\r[{bar:<25}] {percent:3.0f} % {job.status} {message}\x1b[K{end}")
        sys.stderr.flush()


class JobsClient:
    """Jobs over a blocking httpx: `base_url` of the application, or a client of your own (`http`), closed by you.

    `attempts`: how often a submission is tried while the server does not answer, or answers 503.
    Raises JobsClientError; and httpx's errors when there is no answer at all.
    """

    def __init__(self, base_url: str = "", *, http: httpx.Client | None = None, attempts: int = 5) -> None:
        self.http = http or httpx.Client(base_url=base_url, timeout=10)
        self._owned, self._attempts = http is None, attempts

    def submit(self, path: str, json: Any = None, **options: Unpack[Submission]) -> RemoteJob:
        """Submit a job: safe to repeat, and repeated while the server cannot take it."""
        [job] = self._perform(_submitting(path, json, options, self._attempts))
        return job

    def get(self, job: Job | str) -> RemoteJob:
        """The record as it is now. A job may be given by its URL."""
        [job] = self._perform(_asking("GET", job))
        return job

    def cancel(self, job: Job | str) -> RemoteJob:
        """Cancel the job; one that runs is told, and InProgress still."""
        [job] = self._perform(_asking("DELETE", job))
        return job

    def events(self, job: Job | str, timeout: float | None = None) -> Iterator[RemoteJob]:
        """The record now and after each change, until the job is over. Raises TimeoutError."""
        return self._perform(_following(job, timeout))

    def wait(self, job: Job | str, timeout: float | None = None, **options: Unpack[Shown]) -> RemoteJob:
        """The record once the job is over. Raises TimeoutError."""
        for record in self.events(job, timeout):
            _show(record, options)
        return record

    def _perform(self, flow: _Flow) -> Iterator[RemoteJob]:
        outcome: Any = None
        lines: Iterator[str] = iter(())
        with ExitStack() as stream:
            while (step := _next(flow, outcome)) is not None:
                outcome = None
                if isinstance(step, RemoteJob):
                    yield step
                    continue
                try:
                    if isinstance(step, float):
                        time.sleep(step)
                    elif isinstance(step, str):
                        outcome = next(lines, None)
                    else:
                        stream.close()
                        outcome = self.http.send(_request(self.http, step), stream=step.stream)
                        stream.callback(outcome.close)
                        lines = outcome.iter_lines() if step.stream else lines
                except httpx.TransportError as error:
                    outcome = error

    def close(self) -> None:
        if self._owned:
            self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncJobsClient:
    """The same over an asynchronous httpx: see `JobsClient`."""

    def __init__(self, base_url: str = "", *, http: httpx.AsyncClient | None = None, attempts: int = 5) -> None:
        self.http = http or httpx.AsyncClient(base_url=base_url, timeout=10)
        self._owned, self._attempts = http is None, attempts

    async def submit(self, path: str, json: Any = None, **options: Unpack[Submission]) -> RemoteJob:
        [job] = [job async for job in self._perform(_submitting(path, json, options, self._attempts))]
        return job

    async def get(self, job: Job | str) -> RemoteJob:
        [job] = [job async for job in self._perform(_asking("GET", job))]
        return job

    async def cancel(self, job: Job | str) -> RemoteJob:
        [job] = [job async for job in self._perform(_asking("DELETE", job))]
        return job

    def events(self, job: Job | str, timeout: float | None = None) -> AsyncIterator[RemoteJob]:
        return self._perform(_following(job, timeout))

    async def wait(self, job: Job | str, timeout: float | None = None, **options: Unpack[Shown]) -> RemoteJob:
        async for record in self.events(job, timeout):
            _show(record, options)
        return record

    async def _perform(self, flow: _Flow) -> AsyncIterator[RemoteJob]:
        outcome: Any = None
        lines: Any = None
        async with AsyncExitStack() as stream:
            while (step := _next(flow, outcome)) is not None:
                outcome = None
                if isinstance(step, RemoteJob):
                    yield step
                    continue
                try:
                    if isinstance(step, float):
                        await asyncio.sleep(step)
                    elif isinstance(step, str):
                        outcome = await anext(lines, None)
                    else:
                        await stream.aclose()
                        outcome = await self.http.send(_request(self.http, step), stream=step.stream)
                        stream.push_async_callback(outcome.aclose)
                        lines = outcome.aiter_lines() if step.stream else lines
                except httpx.TransportError as error:
                    outcome = error

    async def aclose(self) -> None:
        if self._owned:
            await self.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
