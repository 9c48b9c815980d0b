"""Celery's and kombu's own publishing code, and the two things done with it: capture a message, or publish it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, urlsplit

import kombu.exceptions
from celery import Celery
from kombu import Connection
from kombu.messaging import Producer
from kombu.transport import memory as kombu_memory
from kombu.transport import redis as kombu_redis
from kombu.transport.virtual import BrokerState

from async_endpoints_celery.errors import ConfigurationError, StoreUnavailable
from async_endpoints_celery.scripting import Command, Publication
from async_endpoints_celery.servers import RedisServer

logger = logging.getLogger("async_endpoints_celery")

#: Seconds a connection to the broker, a read or a write on it may take. kombu would wait without end.
PUBLISH_WITHIN = 1.0


@dataclass(frozen=True, slots=True)
class Sendable:
    """The arguments of `apply_async` for one message."""

    task_name: str
    args: tuple[int, str, int]
    options: dict[str, Any]


class Publisher:
    """The connections, threads and producers of one process; never used across a fork."""

    def __init__(self, celery: Celery) -> None:
        if celery.conf.task_protocol != 2:
            raise ConfigurationError(
                f"task_protocol is {celery.conf.task_protocol}: job messages need 2, Celery's default, whose events do"
                " not show the arguments"
            )
        self.pid = os.getpid()
        self.celery = celery
        self.builders = ThreadPoolExecutor(1, thread_name_prefix="async-endpoints-build")
        self.publishers = ThreadPoolExecutor(4, thread_name_prefix="async-endpoints-publish")
        self._lock = threading.Lock()
        self._producer: Producer | None = None
        # Tasks whose queues are declared and whose route needs no look-up: their messages are built without I/O.
        self._settled: set[str] = set()
        self._idle: list[Connection] = []

    def capture(self, sendable: Sendable) -> Publication:
        """The commands of the message. May talk to the broker, to declare a queue or look up a route.

        Raises:
            StoreUnavailable: the broker did not answer.
            ConfigurationError: the route leads nowhere.
        """
        with self._lock, broker_errors():
            try:
                publication = self._build(sendable)
                if not publication:
                    # A restarted Redis has forgotten the bindings that kombu believes declared.
                    self._forget_producer()
                    publication = self._build(sendable)
            except Exception:
                self._forget_producer()
                raise
        if not publication:
            raise ConfigurationError(
                f"the route of task {sendable.task_name} leads to no queue: bind one to its exchange"
            )
        return publication

    def capture_at_once(self, sendable: Sendable) -> Publication | None:
        """The commands of the message if that takes no I/O, or None."""
        if sendable.task_name not in self._settled or not self._lock.acquire(blocking=False):
            return None
        try:
            with broker_errors():
                return self._build(sendable, may_block=False)
        except _WouldBlock:
            return None  # a router chose a queue not seen before
        except Exception:
            self._forget_producer()
            raise
        finally:
            self._lock.release()

    def _build(self, sendable: Sendable, *, may_block: bool = True) -> Publication:
        if self._producer is None:
            self._producer = self._open_producer()
        channel = self._producer.channel
        channel.may_block, channel.looked_up = may_block, False
        with self._producer.batch():
            _send(self.celery, sendable, self._producer)
            commands = channel.captured.commands
        if not channel.looked_up:
            self._settled.add(sendable.task_name)
        prefix = channel.global_keyprefix
        return tuple(Command(name, f"{prefix}{key}", args) for name, key, args in commands)

    def _open_producer(self) -> Producer:
        connection = self.celery.connection_for_write(
            transport_options={"socket_connect_timeout": PUBLISH_WITHIN, "socket_timeout": PUBLISH_WITHIN},
        )
        connection.transport_cls = _capturing(connection.get_transport_cls())
        return self.celery.amqp.Producer(connection.channel(), auto_declare=False)

    def _forget_producer(self) -> None:
        producer, self._producer = self._producer, None
        self._settled.clear()
        if producer is not None:
            _close(producer.connection)

    def publish(self, sendable: Sendable) -> bool:
        """Publish for real; False when the broker did not confirm it."""
        while True:
            try:
                connection, kept = self._idle.pop(), True
            except IndexError:
                connection, kept = self._open_connection(), False
            try:
                producer = self.celery.amqp.Producer(connection.default_channel, auto_declare=False)
                _send(self.celery, sendable, producer)
            except Exception as error:  # whatever it was, the outbox entry stands
                _close(connection)
                if kept:
                    continue  # a broker that was restarted leaves dead connections behind
                label = sendable.options["argsrepr"]
                logger.warning("the message of %s is not confirmed; the sweep will publish it: %r", label, error)
                logger.debug("the publication that failed", exc_info=True)
                return False
            self._idle.append(connection)
            return True

    def _open_connection(self) -> Connection:
        return self.celery.connection_for_write(
            connect_timeout=PUBLISH_WITHIN,
            transport_options={
                "socket_connect_timeout": PUBLISH_WITHIN,
                "socket_timeout": PUBLISH_WITHIN,  # Redis
                "read_timeout": PUBLISH_WITHIN,
                "write_timeout": PUBLISH_WITHIN,  # AMQP
                # Without publisher confirms a message that RabbitMQ lost would look sent.
                "confirm_publish": True,
            },
        )

    def close(self) -> None:
        self.builders.shutdown(wait=False, cancel_futures=True)
        self.publishers.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._forget_producer()
        while self._idle:
            _close(self._idle.pop())


def _send(celery: Celery, sendable: Sendable, producer: Producer) -> None:
    """What `apply_async` does, for a task that this process may know by name only."""
    task = celery.tasks.get(sendable.task_name)
    if task is not None:
        task.apply_async(sendable.args, producer=producer, **sendable.options)
        return
    celery.send_task(
        sendable.task_name,
        sendable.args,
        {},
        producer=producer,
        # What the task itself says where it is registered.
        ignore_result=True,
        serializer="json",
        **sendable.options,
    )


def _close(connection: Connection) -> None:
    with suppress(Exception):  # it is broken already
        connection.release()


@contextmanager
def broker_errors() -> Iterator[None]:
    """Whatever kombu and its transports say when the broker does not answer becomes StoreUnavailable."""
    try:
        yield
    except (kombu.exceptions.OperationalError, *kombu_redis.Transport.connection_errors, OSError) as error:
        raise StoreUnavailable(f"the broker did not answer: {str(error)[:200]}") from error


# Capturing: a Redis transport whose publish batch keeps the commands instead of sending them.


class _WouldBlock(Exception):
    """Building this message needs the broker, and the caller is an event loop."""


class _Captured:
    """Stands in for kombu's PublishBatch: the same calls, and nothing is sent."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.commands: list[tuple[str, str, tuple[Any, ...]]] = []

    def publish(self, message: Any, **kwargs: Any) -> Any:
        return self.channel.basic_publish(message, _publish_batch=self, **kwargs)

    def add(self, name: str, key: str, *args: Any) -> None:
        self.commands.append((name, key, args))

    def flush(self) -> None:
        pass

    def discard(self) -> None:
        self.commands.clear()

    def close(self) -> None:
        pass


@cache
def _capturing(transport: type[Any]) -> type[Any]:
    """The user's Redis transport with a channel that captures."""

    class Channel(transport.Channel):  # type: ignore[name-defined]
        # A captured publication is never sent by kombu, so it cannot be sent twice by it.
        supports_batch_publish = True
        may_block = True
        looked_up = False
        captured: _Captured

        def create_publish_batch(self, max_size: int) -> _Captured:
            self.captured = _Captured(self)
            return self.captured

        def get_table(self, exchange: str) -> Any:
            self.looked_up = True
            self._needs_broker()
            return super().get_table(exchange)

        def _queue_bind(self, *args: Any) -> Any:
            self._needs_broker()
            return super()._queue_bind(*args)

        def _needs_broker(self) -> None:
            if not self.may_block:
                raise _WouldBlock

    return type("CapturingTransport", (transport,), {"Channel": Channel})


# The broker of development.


def own_memory_broker(celery: Celery) -> None:
    """Give the app an in-memory broker of its own: kombu's is one for the whole process, and apps would take each
    other's messages out of it."""

    class Channel(kombu_memory.Channel):
        queues: ClassVar[dict[str, Any]] = {}

    channel_class = Channel

    class Transport(kombu_memory.Transport):
        Channel = channel_class
        global_state = BrokerState()

    class OwnConnection(Connection):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.transport_cls = Transport

    celery.amqp.Connection = OwnConnection


# Where the broker is.


def early_broker_url(celery: Celery) -> str | None:
    """The broker's URL if it can be told without loading the app's configuration, else None.

    Loading it here would fire `on_after_configure` before the user has connected to it, and close the door on settings
    that follow.
    """
    if celery.configured:
        return _one_url(celery.conf.broker_write_url)
    pending = celery._preconf
    url = (
        os.environ.get("CELERY_BROKER_WRITE_URL")
        or pending.get("broker_write_url")
        or os.environ.get("CELERY_BROKER_URL")
        or pending.get("broker_url")
    )
    if url:
        return _one_url(url)
    return None if celery._config_source else "amqp://"  # Celery's default


def _one_url(url: Any) -> str:
    """Celery takes lists too; several brokers are told by their separator."""
    return ";".join(map(str, url)) if isinstance(url, (list, tuple)) else str(url)


def broker_server(celery: Celery) -> RedisServer | None:
    """The broker as a server for the store, or None when it is no (single) Redis."""
    url = _one_url(celery.conf.broker_write_url)
    if ";" in url:
        return None
    return _broker_server(url, _tls_options(celery))


@cache
def _broker_server(url: str, tls: tuple[tuple[str, Any], ...]) -> RedisServer | None:
    parts = urlsplit(url)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    credentials = {name: value for name, value in (("username", parts.username), ("password", parts.password)) if value}
    if parts.scheme in {"redis+socket", "socket"}:
        options = {"path": parts.path, "db": int(query.get("virtual_host", "0").strip("/") or 0), **credentials}
        return RedisServer.from_options(options, "UnixDomainSocketConnection")
    if parts.scheme not in {"redis", "rediss", "valkey", "valkeys"}:
        return None
    scheme = "rediss" if parts.scheme in {"rediss", "valkeys"} else "redis"
    server = RedisServer.from_url(f"{scheme}://{parts.netloc}{quote(parts.path)}")
    options = dict(server.options)
    if "ssl_cert_reqs" in query:
        # kombu takes CERT_NONE and none, redis-py takes none.
        options["ssl_cert_reqs"] = query.pop("ssl_cert_reqs").lower().removeprefix("cert_")
    options.update({name: value for name, value in query.items() if name.startswith("ssl_")}, **dict(tls))
    return RedisServer.from_options(options, "SSLConnection" if scheme == "rediss" or tls else "Connection")


def _tls_options(celery: Celery) -> tuple[tuple[str, Any], ...]:
    tls = celery.conf.broker_use_ssl
    return tuple(sorted(tls.items())) if isinstance(tls, dict) else ()
