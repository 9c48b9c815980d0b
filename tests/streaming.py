"""Server-Sent Events as a client sees them, applications served from this process, and jobs told what to do."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import redis
import uvicorn

from tests.processes import free_port, wait_until


@dataclass(frozen=True)
class Event:
    """One event; a comment has nothing but its text."""

    name: str = ""
    id: int = 0
    record: Mapping[str, Any] | None = None
    comment: str = ""

    @property
    def status(self) -> str:
        assert self.record is not None, self
        return str(self.record["status"])


def parse_event(lines: list[str]) -> Event:
    if all(line.startswith(":") for line in lines):
        return Event(comment=" ".join(line[1:].strip() for line in lines))
    fields = dict(line.split(": ", 1) for line in lines)
    assert set(fields) == {"event", "data", "id"}, fields
    return Event(fields["event"], int(fields["id"]), json.loads(fields["data"]))


def read_events(response: httpx.Response) -> Iterator[Event]:
    """Events and comments as they come, until the server closes; none where there will be none any more (204)."""
    if response.status_code == 204:
        return
    assert response.status_code == 200, response.read()
    assert response.headers["content-type"].startswith("text/event-stream")
    lines: list[str] = []
    for line in response.iter_lines():
        if line:
            lines.append(line)
        elif lines:
            yield parse_event(lines)
            lines = []
    assert not lines, "the stream broke off within an event"


@contextmanager
def event_stream(http: httpx.Client, job_id: str, **headers: str) -> Iterator[Iterator[Event]]:
    with http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        yield read_events(response)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL of an application that runs in a thread of this process, where a test can patch it."""
    port = free_port()
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, ws="none", log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@asynccontextmanager
async def many(base_url: Any, count: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client for so many requests at once."""
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
    async with httpx.AsyncClient(base_url=base_url, timeout=30, limits=limits) as http:
        yield http


def tell(client: redis.Redis, job_id: str, **order: Any) -> None:
    """What the handler Instructed does next: progress=[percent, message], result=… or failure=[code, message]."""
    client.rpush(f"test:orders:{job_id}", json.dumps(order))


def calls(client: redis.Redis, command: str) -> int:
    """How often Redis ran this command, scripts included, since its statistics were reset."""
    stats: Any = client.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def channel(job_id: str) -> str:
    return f"ae:changes:{job_id}"


def listeners(client: redis.Redis, job_id: str) -> int:
    """Connections that are subscribed to a job's changes."""
    [(_, count)] = client.pubsub_numsub(channel(job_id))
    return int(count)


def subscriptions(client: redis.Redis) -> list[dict[str, Any]]:
    """The connections that listen to changes of jobs (Celery's workers listen to something else)."""
    found: Any = client.execute_command("CLIENT", "LIST", "TYPE", "pubsub")
    text = found if isinstance(found, str) else ""
    connections = found if isinstance(found, list) else []
    if text:
        connections = [dict(pair.split("=", 1) for pair in line.split()) for line in text.splitlines()]
    return [dict(connection) for connection in connections]
