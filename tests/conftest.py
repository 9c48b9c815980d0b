"""Fixtures: real servers and workers. Each pytest-xdist worker has servers of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import WorkerNode, WorkerProcess
from tests.servers import RabbitMQServer, ValkeyServer, rabbitmq_server, valkey_server


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A server that many tests share. One that stops or reconfigures it starts its own: `valkey_server()`."""
    with valkey_server() as server:
        yield server


@pytest.fixture
def redis_url(valkey: ValkeyServer) -> str:
    """The URL of an empty server."""
    valkey.flush()
    return valkey.url


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQServer]:
    with rabbitmq_server() as server:
        yield server


@pytest.fixture
def rabbitmq_url(rabbitmq: RabbitMQServer) -> str:
    """The URL of a new virtual host."""
    return rabbitmq.add_vhost()


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., WorkerNode]]:
    """Starts Celery workers that end with the test.

    `start_worker("tests.apps.shop:celery_app", "-P", "threads", env={...})` returns when the worker is ready
    (`ready=False`: at once).
    """
    nodes: list[WorkerNode] = []

    def start(app: str, *arguments: str, ready: bool = True, **options: Any) -> WorkerNode:
        node = WorkerNode(WorkerProcess(app, *arguments, directory=tmp_path, **options), app=None)
        nodes.append(node)
        if ready:
            node.ready()
        return node

    yield start
    for node in nodes:
        node.teardown()
