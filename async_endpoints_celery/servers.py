"""Where jobs are kept: Redis and Valkey servers, Sentinels, and a fake one in this process; and how to talk to each.

Every wait is bounded, for what redis-py leaves unset would wait for ever:

    socket_connect_timeout  1 s    an unreachable host answers nothing at all
    socket_timeout          1.5 s  a stopped server keeps its connections open
    pool wait               1.5 s  more callers than connections queue up; redis-py's default pool would refuse them
    retry                   once, at once, on a broken connection only: a server that was restarted leaves a pool of
                            dead connections behind. Scripts are safe to send twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)

from async_endpoints_celery.errors import ConfigurationError, StoreUnavailable

#: What `store=` may be.
StoreLike: TypeAlias = str | redis.Redis | redis.asyncio.Redis

CONNECT_TIMEOUT = 1.0
SOCKET_TIMEOUT = 1.5
#: Seconds any operation may take for a web client, waiting for a connection included.
ANSWER_WITHIN = 1.5
#: Connections of one event loop, and of one process's threads.
MAX_CONNECTIONS = 50
#: Seconds between two pings on a subscription.
SUBSCRIPTION_PING_SECONDS = 10

_PASSING = (
    redis.ConnectionError,
    redis.TimeoutError,
    ClusterDownError,
    MasterDownError,
    ReadOnlyError,
    OutOfMemoryError,
)


class Server(Protocol):
    """A Redis that clients can be made for."""

    @property
    def identity(self) -> tuple[str, int, int] | None:
        """What tells whether the broker is this same database; None for one inside this process."""

    @property
    def kind(self) -> str:
        """The label of metrics: "redis" or "memory"."""

    def client(self) -> redis.Redis: ...

    def async_client(self) -> redis.asyncio.Redis: ...

    def subscription(self) -> Subscription: ...


@dataclass(frozen=True)
class RedisServer:
    """A Redis or Valkey server, by the keyword arguments of its connections."""

    options: Mapping[str, Any]
    kind: str = "redis"
    sync_class: type[redis.Connection] = redis.Connection
    async_class: type[redis.asyncio.Connection] = redis.asyncio.Connection

    @property
    def identity(self) -> tuple[str, int, int] | None:
        return identity(
            self.options.get("path") or self.options.get("host", "localhost"),
            self.options.get("port", 6379),
            self.options.get("db", 0),
        )

    def client(self) -> redis.Redis:
        pool = redis.BlockingConnectionPool(
            max_connections=MAX_CONNECTIONS,
            timeout=SOCKET_TIMEOUT,
            connection_class=self.sync_class,
            retry=redis.retry.Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            **self._bounded(),
        )
        return redis.Redis.from_pool(pool)

    def async_client(self) -> redis.asyncio.Redis:
        pool = redis.asyncio.BlockingConnectionPool(
            max_connections=MAX_CONNECTIONS,
            timeout=SOCKET_TIMEOUT,
            connection_class=self.async_class,
            retry=redis.asyncio.retry.Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            **self._bounded(),
        )
        return redis.asyncio.Redis.from_pool(pool)

    def subscription(self) -> Subscription:
        # It waits for messages as long as it takes, and a ping now and then tells whether the server is still there.
        options = {**self._bounded(), "socket_timeout": None, "health_check_interval": SUBSCRIPTION_PING_SECONDS}
        pool = redis.asyncio.ConnectionPool(connection_class=self.async_class, **options)
        return Subscription(redis.asyncio.Redis.from_pool(pool))

    def _bounded(self) -> dict[str, Any]:
        bounds = {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_timeout": SOCKET_TIMEOUT}
        if "path" in self.options:
            bounds.pop("socket_connect_timeout")
        return {**bounds, **self.options, "decode_responses": True}

    @classmethod
    def from_url(cls, url: str) -> RedisServer:
        """Raises ConfigurationError when `url` is not one of redis-py's."""
        try:
            options = dict(redis.connection.parse_url(url))
        except ValueError as error:
            raise ConfigurationError(f"store={_without_password(url)!r} is not a Redis URL: {error}") from None
        connection_class = options.pop("connection_class", redis.Connection)
        return cls.from_options(options, connection_class.__name__)

    @classmethod
    def from_client(cls, client: redis.Redis | redis.asyncio.Redis) -> RedisServer:
        """The server of an existing client. Its pool is not used: it may belong to another loop or process."""
        pool = client.connection_pool
        kind = pool.connection_class.__name__
        if kind not in _SYNC_CLASSES:
            raise ConfigurationError(
                f"store={client!r}: connections of class {kind} cannot be made anew from it; give a URL"
                " (redis+sentinel:// for Sentinel, memory:// for a store in this process)"
            )
        return cls.from_options(pool.connection_kwargs, pool.connection_class.__name__)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], connection_class: str) -> RedisServer:
        """The server of redis-py's connection arguments; what is not about where and as whom is dropped."""
        return cls(
            {name: value for name, value in options.items() if name in _CONNECTION_OPTIONS},
            sync_class=_SYNC_CLASSES.get(connection_class, redis.Connection),
            async_class=_ASYNC_CLASSES.get(connection_class, redis.asyncio.Connection),
        )


_SYNC_CLASSES: dict[str, type[Any]] = {
    "Connection": redis.Connection,
    "SSLConnection": redis.SSLConnection,
    "UnixDomainSocketConnection": redis.UnixDomainSocketConnection,
}
_ASYNC_CLASSES: dict[str, type[Any]] = {
    "Connection": redis.asyncio.Connection,
    "SSLConnection": redis.asyncio.SSLConnection,
    "UnixDomainSocketConnection": redis.asyncio.UnixDomainSocketConnection,
}
#: What is taken over from a given client: where and as whom it connects. How is ours.
_CONNECTION_OPTIONS = frozenset(
    {
        *("host", "port", "path", "db", "username", "password", "credential_provider"),
        *("client_name", "protocol", "health_check_interval", "socket_keepalive", "socket_keepalive_options"),
        *("ssl_keyfile", "ssl_certfile", "ssl_cert_reqs", "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path"),
        *("ssl_check_hostname", "ssl_password", "ssl_min_version", "ssl_ciphers"),
    }
)


@dataclass(frozen=True)
class SentinelServer:
    """The master that Sentinels know under a name. Who it is is asked anew for each connection."""

    sentinels: tuple[tuple[str, int], ...]
    service: str
    options: Mapping[str, Any]
    kind: str = "redis"
    #: The broker may be the same servers; that it is the same master at any moment cannot be told.
    identity: tuple[str, int, int] | None = None

    def client(self) -> redis.Redis:
        options = self._bounded()
        retry = redis.retry.Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        sentinel = redis.Sentinel(self.sentinels, sentinel_kwargs=options)
        master = sentinel.master_for(self.service, retry=retry, **{**options, **self.options})
        return cast(redis.Redis, master)

    def async_client(self) -> redis.asyncio.Redis:
        return self._async_client(**self._bounded())

    def subscription(self) -> Subscription:
        return Subscription(self._async_client(**{**self._bounded(), "socket_timeout": None}))

    def _async_client(self, **options: Any) -> redis.asyncio.Redis:
        retry = redis.asyncio.retry.Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        sentinel = redis.asyncio.Sentinel(self.sentinels, sentinel_kwargs=self._bounded())
        return sentinel.master_for(self.service, retry=retry, **{**options, **self.options})  # type: ignore[no-any-return]

    def _bounded(self) -> dict[str, Any]:
        return {
            "socket_connect_timeout": CONNECT_TIMEOUT,
            "socket_timeout": SOCKET_TIMEOUT,
            "decode_responses": True,
        }

    @classmethod
    def from_url(cls, url: str) -> SentinelServer:
        """`redis+sentinel://[user:password@]host:port[,host:port…]/service[/database]`.

        Raises:
            ConfigurationError: it is not one.
        """
        parts = urlsplit(url)
        credentials, _, hosts = parts.netloc.rpartition("@")
        service, _, database = parts.path.strip("/").partition("/")
        try:
            sentinels = tuple(
                (host, int(port or 26379)) for host, _, port in (h.partition(":") for h in hosts.split(","))
            )
            options: dict[str, Any] = {"db": int(database or 0)}
        except ValueError:
            sentinels, options = (), {}
        if not service or not all(host for host, _ in sentinels) or not sentinels:
            raise ConfigurationError(
                f"store={_without_password(url)!r}: write redis+sentinel://host:port,host:port/service/database"
            )
        user, _, password = credentials.partition(":")
        if user:
            options["username"] = unquote(user)
        if password:
            options["password"] = unquote(password)
        return cls(sentinels, service, options)


@dataclass
class MemoryServer:
    """The development store: a fake Redis inside this process, running the same scripts."""

    kind: str = "memory"
    identity: tuple[str, int, int] | None = None

    def __post_init__(self) -> None:
        try:
            import fakeredis
            import lupa  # noqa: F401
        except ImportError:
            raise ConfigurationError(
                'store="memory://" needs the extra: pip install "async-endpoints-celery[memory]"'
            ) from None
        self._fakeredis = fakeredis
        self._server = fakeredis.FakeServer()

    def client(self) -> redis.Redis:
        return cast(redis.Redis, self._fakeredis.FakeRedis(server=self._server, decode_responses=True))

    def async_client(self) -> redis.asyncio.Redis:
        client = self._fakeredis.FakeAsyncRedis(server=self._server, decode_responses=True)
        return cast(redis.asyncio.Redis, client)

    def subscription(self) -> Subscription:
        return Subscription(self.async_client())


def open_server(store: StoreLike) -> Server:
    """The server that the `store=` argument names.

    Raises:
        ConfigurationError: it is neither a URL we know nor a Redis client.
    """
    if isinstance(store, str):
        scheme = urlsplit(store).scheme
        if scheme == "memory":
            return MemoryServer()
        if scheme in {"redis", "rediss", "unix"}:
            return RedisServer.from_url(store)
        if scheme == "redis+sentinel":
            return SentinelServer.from_url(store)
        raise ConfigurationError(
            f"store={_without_password(store)!r}: use redis://, rediss://, unix://, redis+sentinel:// or memory://"
        )
    if isinstance(store, (redis.Redis, redis.asyncio.Redis)):
        return RedisServer.from_client(store)
    raise ConfigurationError(
        f"store={store!r}: give a URL (redis://, rediss://, unix://, redis+sentinel://, memory://), a redis.Redis"
        " client or None"
    )


def identity(host: str, port: Any, db: Any) -> tuple[str, int, int]:
    """A database's name, for comparing: (host or socket path, port, database number)."""
    if host in ("localhost", "::1", ""):
        host = "127.0.0.1"
    return host, int(port or 0) if not host.startswith("/") else 0, int(db or 0)


def _without_password(url: str) -> str:
    """The URL as it may be shown."""
    credentials, at, _ = urlsplit(url).netloc.rpartition("@")
    password = credentials.partition(":")[2]
    return url.replace(f":{password}{at}", ":***@") if password else url


@contextmanager
def unavailable() -> Iterator[None]:
    """Redis-py's many ways to say "not now" become one of ours."""
    try:
        yield
    except (*_PASSING, OSError) as error:
        raise StoreUnavailable(f"Redis did not answer: {_short(error)}") from error
    except RedisError as error:
        # "LOADING", "BUSY" and the like come as plain response errors: their first word tells.
        if str(error).split(" ")[0] in {"LOADING", "BUSY", "TRYAGAIN", "MISCONF", "NOREPLICAS"}:
            raise StoreUnavailable(f"Redis did not answer: {_short(error)}") from error
        raise


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:200]


class SubscriptionRefused(StoreUnavailable):
    """Redis is there, and does not let us listen (its ACL has no SUBSCRIBE for us)."""


class Subscription:
    """A connection that listens to channels, on one event loop."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._pubsub = client.pubsub()

    async def subscribe(self, *channels: str) -> None:
        """Raises StoreUnavailable. The confirmation comes as a message of kind "subscribe"."""
        with unavailable():
            await self._pubsub.subscribe(*channels)

    async def unsubscribe(self, *channels: str) -> None:
        with unavailable():
            await self._pubsub.unsubscribe(*channels)

    async def messages(self) -> AsyncIterator[tuple[str, str]]:
        """(kind, channel) of everything that comes, until the connection is lost: StoreUnavailable."""
        while True:
            try:
                with unavailable():
                    # Not for ever: between two waits redis-py looks after the connection's health.
                    message = await self._pubsub.get_message(timeout=SUBSCRIPTION_PING_SECONDS)
            except redis.ResponseError as error:
                raise SubscriptionRefused(f"Redis refuses the subscription: {_short(error)}") from error
            if message is not None:
                yield message["type"], message["channel"]

    async def close(self) -> None:
        with suppress(RedisError, OSError):
            await self._pubsub.aclose()
            await self._client.aclose(close_connection_pool=True)
