"""`async_endpoints_celery.client` against real web processes, workers and servers; and against worse ones."""

import asyncio
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from async_endpoints_celery import AsyncRouter, Job, JobStatus
from async_endpoints_celery.client import AsyncJobsClient, JobsClient, JobsClientError, RemoteJob
from tests.deployment import Deployment, Proxy
from tests.processes import wait_until
from tests.servers import valkey_server
from tests.streaming import listeners, served, tell
from tests.web import BODY, DataRequest, add_process_data, app_with, new_endpoints, request_id, shop


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("client"), server.url) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "4")
        yield deployed


class Twin:
    """The asynchronous client, called like the blocking one."""

    def __init__(self, base_url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._jobs = AsyncJobsClient(base_url, **options)

    def __enter__(self) -> "Twin":
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner.run(self._jobs.aclose())
        self._runner.close()

    def events(self, *arguments: Any) -> Iterator[RemoteJob]:
        events = self._jobs.events(*arguments)

        async def following() -> RemoteJob | None:
            return await anext(events, None)

        while (job := self._runner.run(following())) is not None:
            yield job

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._jobs, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            return await method(*arguments, **options)

        return lambda *arguments, **options: self._runner.run(call(*arguments, **options))


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Any:
    return JobsClient if request.param == "sync" else Twin


@pytest.fixture
def jobs(deployed: Deployment, connect: Any) -> Iterator[JobsClient]:
    with connect(str(deployed.http.base_url)) as jobs:
        yield jobs


class TestJobs:
    def test_submit_and_wait(self, jobs: JobsClient, deployed: Deployment) -> None:
        job = jobs.submit("/run/Echo", {"text": "hello"})
        assert isinstance(job, Job)
        assert (job.name, job.status) == ("Echo", JobStatus.QUEUED)
        assert job.location == f"{deployed.http.base_url}/jobs/{job.id}".replace("//jobs", "/jobs")
        job = jobs.wait(job, timeout=10)
        assert job.status is JobStatus.COMPLETED
        assert job.result["text"] == "hello"
        assert jobs.get(job) == job == jobs.get(job.location or "")

    def test_a_model_as_the_body(self, redis_url: str, connect: Any) -> None:
        with served(shop(new_endpoints(redis_url))) as url, connect(url) as jobs:
            assert jobs.submit("/process", DataRequest(data="x")).name == "ProcessData"

    def test_ids_keys_and_headers(self, jobs: JobsClient, deployed: Deployment) -> None:
        job_id = request_id()
        job = jobs.submit("/run/Echo", {}, job_id=job_id, headers={"X-Echo": "me"})
        assert str(job.id) == job_id
        assert jobs.wait(job).result["header"] == "me"
        key = f'a "key" \\ {request_id()}'
        one, other = (jobs.submit("/run/Echo", {}, idempotency_key=key) for _ in range(2))
        assert one.id == other.id != job.id
        with pytest.raises(JobsClientError) as refused:
            jobs.submit("/run/Echo", {"text": "other"}, idempotency_key=key)
        assert (refused.value.status, refused.value.job_id) == (422, str(one.id))

    def test_a_failed_job_is_a_record_too(self, jobs: JobsClient) -> None:
        job = jobs.wait(jobs.submit("/run/Outcome", {"kind": "job-failed"}))
        assert job.status is JobStatus.FAILED
        assert job.error is not None
        assert (job.error.code, job.error.message) == ("CARD_DECLINED", "ask the bank")

    def test_what_was_refused(self, jobs: JobsClient) -> None:
        with pytest.raises(JobsClientError, match="422 BODY_INVALID") as refused:
            jobs.submit("/run/Echo", {"seconds": "long"})
        error = refused.value
        assert (error.status, error.code, error.instance) == (422, "BODY_INVALID", "/run/Echo")
        assert error.type == "urn:async-endpoints:problem:body-invalid"
        assert error.title
        assert error.detail
        assert error.errors[0]["loc"][-1] == "seconds"
        with pytest.raises(JobsClientError) as refused:  # not one of ours
            jobs.submit("/nowhere", {})
        assert refused.value.status == 404
        for operation in (jobs.get, jobs.cancel, jobs.wait):
            with pytest.raises(JobsClientError) as refused:
                operation(f"/jobs/{request_id()}")
            assert (refused.value.status, refused.value.code) == (404, "JOB_NOT_FOUND")

    def test_cancel(self, jobs: JobsClient) -> None:
        job = jobs.submit("/run/Parked", {})
        assert jobs.cancel(job).status is JobStatus.CANCELED
        with pytest.raises(JobsClientError) as refused:
            jobs.cancel(job)
        assert refused.value.status == 409
        job = jobs.submit("/run/Instructed", {})
        next(iter(running := jobs.events(job)))
        while jobs.get(job).status is not JobStatus.IN_PROGRESS:
            next(running)
        assert jobs.cancel(job).status is JobStatus.IN_PROGRESS
        assert jobs.wait(job, 10).status is JobStatus.CANCELED


class TestFollowing:
    def test_events_and_progress(self, jobs: JobsClient, deployed: Deployment) -> None:
        job = jobs.submit("/run/Instructed", {})
        seen: list[RemoteJob] = []
        tell(deployed.redis, str(job.id), progress=[50, "half"])
        for record in jobs.events(job, 10):
            seen.append(record)
            if record.progress is not None and record.progress.percent == 50 and record.status == 300:
                tell(deployed.redis, str(job.id), result=[1])
        assert (seen[-1].status, seen[-1].result) == (JobStatus.COMPLETED, [1])
        assert all(one != other for one, other in itertools.pairwise(seen))
        assert all(record.location == job.location for record in seen)

    def test_on_progress_and_the_bar(
        self, jobs: JobsClient, deployed: Deployment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job = jobs.submit("/run/Instructed", {})
        seen: list[float | None] = []

        def told(record: RemoteJob) -> None:
            seen.append(record.progress.percent if record.progress else None)
            if record.status is JobStatus.IN_PROGRESS:
                order = {"result": 1} if record.progress else {"progress": [48, "\x1b]0;owned\x07 a\nb"]}
                tell(deployed.redis, str(job.id), **order)

        jobs.wait(job, 10, on_progress=told, show_progress=True)
        assert seen[-1] == 48
        drawn = capsys.readouterr().err
        assert f"[{'#' * 12:<25}]  48 % InProgress  ]0;owned  a b\x1b[K" in drawn
        assert drawn.endswith(f"\r[{'#' * 25}] 100 % Completed \x1b[K\n")
        assert drawn.replace("\x1b[K", "").isprintable() is False
        assert "\x1b]" not in drawn
        assert "\x07" not in drawn

    def test_a_timeout(self, jobs: JobsClient) -> None:
        job = jobs.submit("/run/Parked", {})
        with pytest.raises(TimeoutError, match="Queued"):
            jobs.wait(job, 0.3)
        jobs.cancel(job)

    def test_who_stops_looking_is_gone(self, jobs: JobsClient, deployed: Deployment) -> None:
        job = jobs.submit("/run/Parked", {})
        events = jobs.events(job)
        assert next(events).status is JobStatus.QUEUED
        wait_until(lambda: listeners(deployed.redis, str(job.id)) == 1)
        if isinstance(jobs, JobsClient):
            events.close()  # type: ignore[attr-defined]
            wait_until(lambda: listeners(deployed.redis, str(job.id)) == 0)
        jobs.cancel(job)

    def test_by_long_polls_where_there_are_no_events(self, redis_url: str, connect: Any) -> None:
        endpoints = new_endpoints(redis_url)
        router = AsyncRouter(endpoints)
        router.async_post("/process", add_process_data(endpoints))
        router.async_get_job_details("/status/{job_id}")
        with served(app_with(router, lifespan=endpoints.lifespan)) as url, connect(url) as jobs:
            job = jobs.submit("/process", BODY)
            threading.Timer(0.3, endpoints.sync.cancel_job, [job.id]).start()
            statuses = [str(seen.status) for seen in jobs.events(job, 5)]
        assert statuses in (["Queued", "Canceled"], ["Canceled"])  # a long poll tells the end only


class Scripted(BaseHTTPRequestHandler):
    """A server that answers with what the test has written down, and then with the last of it."""

    answers: list[tuple[int, dict[str, str], Any]]
    requests: list[tuple[str, str, dict[str, str]]]

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        status, headers, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status == 0:
            return  # the connection is closed without an answer
        content = body.encode() if isinstance(body, str) else body.model_dump_json(by_alias=True).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def scripted() -> Iterator[tuple[str, type[Scripted]]]:
    handler = type("Handler", (Scripted,), {"answers": [], "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def record(status: str, **fields: Any) -> Job:
    now = "2025-10-14T10:30:00.000Z"
    job_id = "5b7e0e4a-8f8b-4c8a-9f1f-8d8f8e8f8e8f"
    return Job.model_validate(
        {"id": job_id, "name": "X", "status": status, "created_at": now, "last_updated_at": now, **fields}
    )


ACCEPTED = (202, {"location": "/jobs/1"}, record("Queued"))
AT_ONCE = {"retry-after": "0"}


class TestTrouble:
    def test_a_submission_is_repeated_with_the_same_id(self, scripted: Any, connect: Any) -> None:
        url, server = scripted
        server.answers += [(503, AT_ONCE, "{}"), (0, {}, ""), ACCEPTED]
        with connect(url) as jobs:
            assert jobs.submit("/x", {}).location == f"{url}/jobs/1"
        ids = [headers["x-async-request-id"] for _, _, headers in server.requests]
        assert len(ids) == 3
        assert len(set(ids)) == 1

    def test_with_a_key_there_is_no_id(self, scripted: Any, connect: Any) -> None:
        url, server = scripted
        server.answers += [(503, AT_ONCE, "{}"), ACCEPTED]
        with connect(url) as jobs:
            jobs.submit("/x", {}, idempotency_key="k")
        for _, _, headers in server.requests:
            assert headers["idempotency-key"] == '"k"'
            assert "x-async-request-id" not in headers

    def test_not_for_ever(self, scripted: Any, connect: Any) -> None:
        url, server = scripted
        problem = '{"type": "urn:x", "title": "Full", "status": 503, "code": "QUEUE_FULL"}'
        server.answers += [(503, {**AT_ONCE, "content-type": "application/problem+json"}, problem)]
        with connect(url, attempts=3) as jobs, pytest.raises(JobsClientError) as refused:
            jobs.submit("/x", {})
        assert (refused.value.code, len(server.requests)) == ("QUEUE_FULL", 3)

    def test_a_refusal_is_not_repeated(self, scripted: Any, connect: Any) -> None:
        url, server = scripted
        server.answers += [(500, {}, "oops")]
        with connect(url) as jobs, pytest.raises(JobsClientError, match="500"):
            jobs.submit("/x", {})
        assert len(server.requests) == 1

    def test_by_asking_where_nothing_waits(self, scripted: Any, connect: Any) -> None:
        url, server = scripted
        running = (200, AT_ONCE, record("InProgress"))
        server.answers += [(404, {}, "{}"), running, running, (503, AT_ONCE, "{}"), (200, {}, record("Completed"))]
        with connect(url) as jobs:
            statuses = [str(job.status) for job in jobs.events("/jobs/1", 10)]
        assert statuses == ["InProgress", "Completed"]
        assert [path for _, path, _ in server.requests] == ["/jobs/1/events"] + ["/jobs/1"] * 4
        assert server.requests[1][2]["prefer"].startswith("wait=")

    def test_a_stream_that_breaks_off_is_resumed(self, scripted: Any, connect: Any) -> None:
        url, server = scripted
        stream = {"content-type": "text/event-stream"}

        def event(number: int, status: str) -> str:
            return f"event: {status}\ndata: {record(status).model_dump_json(by_alias=True)}\nid: {number}\n\n"

        half = event(3, "InProgress")[:40]
        server.answers += [
            (200, stream, event(1, "Queued") + ": keep-alive\n\n" + event(2, "InProgress")),
            (200, {**stream, "content-length": "4000"}, half),
            (200, stream, event(3, "Completed")),
        ]
        with connect(url) as jobs:
            statuses = [str(job.status) for job in jobs.events("/jobs/1", 10)]
        assert statuses == ["Queued", "InProgress", "Completed"]
        assert [headers.get("last-event-id") for _, _, headers in server.requests] == [None, "2", "2"]

    def test_a_lost_answer_gives_one_job(self, deployed: Deployment, connect: Any) -> None:
        port = deployed.http.base_url.port
        assert port is not None
        with Proxy(port) as proxy, connect(f"http://127.0.0.1:{proxy.port}") as jobs:
            proxy.lose_replies(b"POST /run/Echo")
            job = jobs.wait(jobs.submit("/run/Echo", {"text": "once"}), 10)
            assert proxy.lost == 1
        assert job.status is JobStatus.COMPLETED
        assert len(deployed.runs(str(job.id))) == 1

    def test_nobody_there(self, connect: Any) -> None:
        with connect("http://127.0.0.1:9", attempts=1) as jobs, pytest.raises(httpx.ConnectError):
            jobs.submit("/x", {})


def test_a_client_of_ones_own_stays_open(deployed: Deployment) -> None:
    with JobsClient(http=deployed.http) as jobs:
        job = jobs.submit("/run/Echo", {})
    assert deployed.job(str(job.id))["id"] == str(job.id)


def test_a_job_without_a_location_cannot_be_read(deployed: Deployment) -> None:
    with JobsClient(str(deployed.http.base_url)) as jobs, pytest.raises(ValueError, match="no location"):
        jobs.get(record("Queued"))


def test_httpx_is_an_extra() -> None:
    """Without it there is a word on what to install; nothing else needs it."""
    script = (
        "import sys; sys.modules['httpx'] = None\n"
        "import async_endpoints_celery\n"
        "try: import async_endpoints_celery.client\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 'pip install "async-endpoints-celery[client]"' in run.stdout
