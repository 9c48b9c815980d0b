"""A deployment of tests/worker_app.py: web process, workers and beat as real processes around real servers."""

import asyncio
import json
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import httpx
import redis
from celery import Celery

from tests.nodes import WorkerNode, WorkerProcess
from tests.processes import Process, free_port, wait_until

APP = "tests.worker_app:celery_app"
OVER = ("Completed", "Failed", "Canceled")


class Deployment:
    """Everything around one broker and one store.

    Args:
        directory: for logs.
        broker: the URL that web and workers use.
        store: the URL of the store; None for the broker's Redis.
        trace: where handlers leave their traces; the store by default.
        env: of every process.
    """

    def __init__(
        self,
        directory: Path,
        broker: str,
        store: str | None = None,
        *,
        trace: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.broker = broker
        self.redis = redis.Redis.from_url(trace or store or broker, decode_responses=True)
        self.env = {
            "TEST_BROKER_URL": broker,
            "TEST_TRACE_URL": trace or store or broker,
            "ASYNC_ENDPOINTS_MAXIMUM_QUEUE_SIZE": "none",
            **({"TEST_STORE_URL": store} if store else {}),
            **(env or {}),
        }
        self.celery = Celery("outside", broker=broker, set_as_current=False)
        if "TEST_QUORUM" in self.env:
            self.celery.conf.task_default_queue_type = "quorum"
        self.http: httpx.Client
        self.web: Process
        self._processes: list[Process] = []
        self._nodes: list[WorkerNode] = []
        self._clients: list[httpx.Client] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for node in self._nodes:
            node.teardown()
        for process in self._processes:
            process.kill()
        for client in self._clients:
            client.close()
        self.redis.close()
        self.celery.close()

    # Processes.

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> Process:
        """`python -m …`, until the end of the test."""
        process = Process(
            [sys.executable, "-m", *command],
            log=self.directory / f"{command[0]}-{uuid4().hex[:8]}.log",
            env={**self.env, **(env or {})},
        )
        self._processes.append(process)
        return process

    def start_web(self, *, env: Mapping[str, str] | None = None) -> Process:
        """The API; `http` talks to it. One that ran before is left alone."""
        port = free_port()
        self.web = self.run(
            *("uvicorn", "tests.worker_app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"),
            env=env,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)
        self._clients.append(self.http)
        self.web.wait_for("Uvicorn running on")
        return self.web

    def start_worker(self, *arguments: str, ready: bool = True, env: Mapping[str, str] | None = None) -> WorkerNode:
        container = WorkerProcess(
            APP,
            *("--without-gossip", *arguments),
            directory=self.directory,
            env={**self.env, **(env or {})},
        )
        node = WorkerNode(container, app=None)
        self._nodes.append(node)
        if ready:
            node.ready()
        return node

    def start_beat(self) -> Process:
        return self.run(
            *("celery", "-A", APP, "beat", "-l", "INFO", "--pidfile", ""),
            *("-s", str(self.directory / f"beat-{uuid4().hex[:8]}")),
        )

    # Jobs.

    def post(self, name: str, headers: Mapping[str, str] | None = None, **payload: Any) -> httpx.Response:
        return self.http.post(f"/run/{name}", json=payload, headers=dict(headers or {}))

    def submit(self, name: str, headers: Mapping[str, str] | None = None, **payload: Any) -> str:
        """The id of an accepted job."""
        response = self.post(name, headers, **payload)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """The record as a client sees it."""
        response = self.http.get(f"/jobs/{job_id}")
        assert response.status_code == 200, response.text
        record: dict[str, Any] = response.json()
        return record

    def wait(self, job_id: str, *statuses: str, timeout: float = 8.0) -> dict[str, Any]:
        """The record once it is in one of the statuses; any that ends it, by default."""
        latest: dict[str, Any] = {}

        def reached() -> bool:
            latest.clear()
            latest.update(self.job(job_id))
            return latest["status"] in (statuses or OVER)

        try:
            wait_until(reached, timeout)
        except TimeoutError:
            logs = "\n".join(node.logs()[-4000:] for node in self._nodes)
            raise TimeoutError(f"job {job_id} is {latest}, not {statuses or OVER}:\n{logs}") from None
        return latest

    def finish(self, name: str, headers: Mapping[str, str] | None = None, **payload: Any) -> dict[str, Any]:
        """Submit and wait for the end."""
        return self.wait(self.submit(name, headers, **payload))

    def runs(self, job_id: str) -> list[int]:
        """The process of each attempt whose handler was called."""
        found: Any = self.redis.lrange(f"test:runs:{job_id}", 0, -1)
        return [int(pid) for pid in found]

    def open_gate(self, job_id: str) -> None:
        self.redis.set(f"test:gate:{job_id}", "open", ex=60)

    # What is in Redis.

    def record(self, job_id: str) -> dict[str, str]:
        """The stored hash."""
        fields: Any = self.redis.hgetall(f"ae:job:{job_id}")
        return dict(fields)

    def dispatch_due(self, job_id: str) -> float | None:
        """When the sweep dispatches the waiting job, in milliseconds since the epoch."""
        score: Any = self.redis.zscore("ae:waiting", job_id)
        return None if score is None else float(score)

    def make_due(self, job_id: str) -> None:
        """Backdates a waiting job: the sweep's next run dispatches it."""
        assert self.make_due_if_waiting(job_id), "the job does not wait"

    def make_due_if_waiting(self, job_id: str) -> bool:
        self.redis.delete("ae:claimed")  # nothing was claimed for a while
        return bool(self.redis.zadd("ae:waiting", {job_id: 1}, xx=True, ch=True))

    def sweep(self) -> None:
        """Have a worker sweep."""
        self.celery.send_task("async_endpoints.sweep")

    def sweep_until_over(self, job_id: str) -> None:
        """As time and beat would, however often a sweep finds the broker away."""

        def over() -> bool:
            if self.record(job_id)["status"] in OVER:
                return True
            if self.make_due_if_waiting(job_id):
                self.sweep()
            return False

        wait_until(over, 15, interval=0.5)

    def clear(self) -> None:
        """No job is left to do."""
        self.redis.delete("celery", "parked", "ae:waiting", "ae:running")

    def messages(self, queue: str = "celery") -> list[dict[str, Any]]:
        """What waits in a queue of the broker's Redis, oldest first."""
        entries: Any = self.redis.lrange(queue, 0, -1)
        return [json.loads(entry) for entry in reversed(entries)]


class Proxy:
    """A TCP proxy that can lose the answer to a request: `lose_replies(b"EVALSHA")`.

    The request that contains these bytes is handed on, and when the server has answered the connection is cut, and the
    answer with it.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = free_port()
        self.lost = 0
        self._pattern = b""
        self._remaining = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        self._loop.close()

    def lose_replies(self, pattern: bytes, times: int = 1) -> None:
        self._pattern, self._remaining = pattern, times

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self._ready.set()
        await self._stop.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        cut = asyncio.Event()
        pumps = [
            asyncio.ensure_future(self._requests(reader, server_writer, cut)),
            asyncio.ensure_future(self._replies(server_reader, writer, cut)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for side in (writer, server_writer):
                side.close()
                with suppress(OSError, asyncio.CancelledError):
                    await side.wait_closed()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        with suppress(OSError):
            while chunk := await reader.read(65536):
                if self._remaining and self._pattern in chunk:
                    self._remaining -= 1
                    cut.set()
                writer.write(chunk)
                await writer.drain()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        with suppress(OSError):
            while chunk := await reader.read(65536):
                if cut.is_set():
                    self.lost += 1
                    return
                writer.write(chunk)
                await writer.drain()
