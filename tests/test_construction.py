"""Making an `AsyncEndpoints`: the stores it takes, what it refuses and how, and what it leaves alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
import redis.asyncio
from celery import Celery
from fastapi import FastAPI
from pydantic import BaseModel

from async_endpoints_celery import AsyncContext, AsyncEndpoints, ConfigurationError, JobStatus
from tests.servers import ValkeyServer, valkey_server
from tests.web import TestClient, new_celery, new_endpoints


def keys(url: str) -> set[str]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        return set(client.keys("*"))


async def assert_works(endpoints: AsyncEndpoints) -> None:
    """Both kinds of access see the same jobs."""
    job = await endpoints.submit("Elsewhere")
    assert endpoints.sync.get_job(job.id) == job
    assert (await endpoints.cancel_job(job.id)).status is JobStatus.CANCELED
    endpoints.sync.submit("Elsewhere")
    assert len(await endpoints.list_jobs()) == 2


@pytest.fixture
def other_database(redis_url: str) -> str:
    return redis_url.replace("/0", "/5")


# Stores.


async def test_no_store_is_the_brokers_redis(redis_url: str) -> None:
    endpoints = AsyncEndpoints(new_celery(redis_url))
    async with endpoints.lifespan(None)(FastAPI()):
        await assert_works(endpoints)
    assert any(key.startswith("ae:") for key in keys(redis_url))
    assert "celery" in keys(redis_url)  # the queue


async def test_store_by_url(redis_url: str, other_database: str) -> None:
    endpoints = AsyncEndpoints(new_celery(redis_url), store=other_database)
    async with endpoints.lifespan()(FastAPI()):
        await assert_works(endpoints)
    assert any(key.startswith("ae:") for key in keys(other_database))
    assert not any(key.startswith("ae:") for key in keys(redis_url))


async def test_store_by_client(redis_url: str, other_database: str) -> None:
    with redis.Redis.from_url(other_database) as client:
        endpoints = AsyncEndpoints(new_celery(redis_url), store=client)
        async with endpoints.lifespan()(FastAPI()):
            await assert_works(endpoints)
        assert client.ping()
    assert any(key.startswith("ae:") for key in keys(other_database))


async def test_store_by_async_client(redis_url: str, other_database: str) -> None:
    async with redis.asyncio.Redis.from_url(other_database) as client:
        endpoints = AsyncEndpoints(new_celery(redis_url), store=client)
        async with endpoints.lifespan()(FastAPI()):
            await assert_works(endpoints)
        assert await client.ping()
    assert any(key.startswith("ae:") for key in keys(other_database))


async def test_store_in_memory(redis_url: str) -> None:
    endpoints = AsyncEndpoints(new_celery(redis_url), store="memory://")
    async with endpoints.lifespan()(FastAPI()):
        await assert_works(endpoints)
    assert not any(key.startswith("ae:") for key in keys(redis_url))


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("s") / "redis.sock"
    with valkey_server(extra_args=["--unixsocket", str(path)]):
        yield path


async def test_store_by_unix_socket(socket_path: Path) -> None:
    endpoints = AsyncEndpoints(new_celery(), store=f"unix://{socket_path}?db=2")
    async with endpoints.lifespan()(FastAPI()):
        await assert_works(endpoints)
    assert any(key.startswith("ae:") for key in keys(f"unix://{socket_path}?db=2"))


async def test_broker_on_a_unix_socket_is_a_store_too(socket_path: Path) -> None:
    endpoints = AsyncEndpoints(new_celery(f"redis+socket://{socket_path}"))
    async with endpoints.lifespan()(FastAPI()):
        await assert_works(endpoints)


@pytest.mark.parametrize("url", ["rediss://host.invalid:6380/1", "redis+sentinel://host.invalid:26379/mymaster/0"])
def test_every_documented_kind_of_url_is_taken(url: str) -> None:
    AsyncEndpoints(new_celery(), store=url)  # connects to nothing yet


async def test_the_password_of_the_broker_is_used() -> None:
    with valkey_server() as server:
        with server.client() as client:
            client.config_set("requirepass", "s3cret")
        url = server.url.replace("redis://", "redis://:s3cret@")
        endpoints = AsyncEndpoints(new_celery(url))
        async with endpoints.lifespan()(FastAPI()):
            await assert_works(endpoints)


# What is refused.


@pytest.mark.parametrize(
    "broker", ["amqp://guest@localhost//", "sqs://", "memory://", None], ids=["amqp", "sqs", "memory", "default"]
)
def test_a_broker_that_is_no_redis_needs_a_store(broker: str | None) -> None:
    celery = Celery("tests", broker=broker, set_as_current=False)
    with pytest.raises(ConfigurationError, match=r"store=.*redis://"):
        AsyncEndpoints(celery)


class RabbitConfig:
    broker_url = "amqp://guest@localhost//"


def test_a_broker_named_in_a_configuration_is_refused_at_the_latest_when_the_application_starts() -> None:
    celery = Celery("tests", set_as_current=False)
    celery.config_from_object(RabbitConfig)

    def start() -> None:
        endpoints = AsyncEndpoints(celery)
        with TestClient(FastAPI(lifespan=endpoints.lifespan)):
            pass

    with pytest.raises(ConfigurationError, match=r"store=.*redis://"):
        start()


@pytest.mark.parametrize("store", ["http://localhost", "localhost:6379", "", 5, object()])
def test_a_store_that_is_none(store: Any) -> None:
    with pytest.raises(ConfigurationError, match="redis://"):
        AsyncEndpoints(new_celery(), store=store)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as refused:
        AsyncEndpoints(new_celery(), store="mysql://me:s3cret@host/0")
    assert "s3cret" not in str(refused.value)


def test_celery_must_be_an_app() -> None:
    with pytest.raises(ConfigurationError, match="Celery"):
        AsyncEndpoints("redis://localhost")


# Handlers that are refused.


class Model(BaseModel):
    x: int


class NoHandle:
    pass


class NeedsArguments:
    def __init__(self, service: Any) -> None:
        self.service = service

    def handle(self, context: AsyncContext) -> None:
        pass


def fine(context: AsyncContext) -> int:
    return 1


def takes_nothing() -> None:
    pass


def takes_two(context: AsyncContext, other: int) -> None:
    pass


def takes_a_model(request: Model) -> None:
    pass


@pytest.mark.parametrize("handler", [NoHandle, NeedsArguments, takes_nothing, takes_two, takes_a_model, 5])
def test_what_is_no_handler_is_an_error_at_once(handler: Any) -> None:
    with pytest.raises(ConfigurationError):
        new_endpoints().add_handler("Name", handler)


def test_a_name_twice_is_an_error() -> None:
    endpoints = new_endpoints()
    endpoints.add_handler("Name", fine)
    with pytest.raises(ConfigurationError, match="Name"):
        endpoints.add_handler("Name", takes_nothing)
    with pytest.raises(ConfigurationError, match="Name"):
        endpoints.handler("Name")(fine)


GOOD_OPTIONS: dict[str, Any] = {
    "max_retries": 0,
    "retry_delay_base_seconds": 0.5,
    "retry_delay_max_seconds": 9,
    "retry_jitter": 0.5,
    "retry_on": (OSError,),
    "do_not_retry_on": (KeyError,),
    "timeout_seconds": 1.5,
    "queue": "slow",
    "priority": 3,
    "retention_seconds": 60,
}


def test_every_option_is_taken_in_both_ways() -> None:
    endpoints = new_endpoints()
    endpoints.handler("One", **GOOD_OPTIONS)(fine)
    endpoints.add_handler("Two", takes_a_context, **GOOD_OPTIONS)
    for name in ("One", "Two"):
        assert endpoints.sync.submit(name).max_retries == 0


def takes_a_context(context: AsyncContext) -> int:
    return 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_retries", -1), ("max_retries", 1.5), ("retry_delay_base_seconds", -0.1), ("retry_jitter", 2)),
        *(("timeout_seconds", 0.5), ("timeout_seconds", float("nan")), ("retention_seconds", 0), ("priority", "low")),
        *(("retry_on", (5,)), ("retry_on", 5), ("do_not_retry_on", ("KeyError",)), ("queue", 5), ("max_retrys", 1)),
    ],
)
def test_a_wrong_option_is_a_clear_error_at_once(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        new_endpoints().add_handler("Name", fine, **{option: value})


# What is left alone.


class Config:
    broker_url = "redis://127.0.0.1:1/0"
    task_default_queue = "theirs"


def build(celery: Celery) -> AsyncEndpoints:
    endpoints = AsyncEndpoints(celery)
    endpoints.add_handler("Name", fine)
    return endpoints


def test_construction_does_not_load_the_configuration() -> None:
    celery = Celery("tests", set_as_current=False)
    celery.config_from_object(Config)
    build(celery)
    assert not celery.configured
    assert not celery.finalized
    heard: list[str] = []
    celery.on_after_configure.connect(lambda **_: heard.append("configure"), weak=False)
    celery.on_after_finalize.connect(lambda **_: heard.append("finalize"), weak=False)
    celery.conf.task_track_started = True  # a setting that comes later still counts
    assert celery.conf.task_default_queue == "theirs"
    celery.finalize()
    assert set(heard) == {"configure", "finalize"}
    assert celery.conf.task_track_started is True


def test_the_broker_may_be_named_later() -> None:
    celery = Celery("tests", broker="redis://127.0.0.1:1/0", set_as_current=False)
    build(celery)
    celery.conf.broker_url = "redis://127.0.0.1:2/0"
    assert celery.conf.broker_url == "redis://127.0.0.1:2/0"


def test_no_setting_changes_but_the_beat_schedule_has_one_more_entry() -> None:
    plain, ours = (Celery("tests", broker=Config.broker_url, set_as_current=False) for _ in range(2))
    build(ours)
    for celery in (plain, ours):
        celery.finalize()
    before, after = plain.conf.table(with_defaults=True), ours.conf.table(with_defaults=True)
    schedules = before.pop("beat_schedule"), after.pop("beat_schedule")
    assert after == before
    assert len(schedules[1]) == len(schedules[0]) + 1


def test_the_tasks_of_the_user_stay_as_they_are(redis_url: str, valkey: ValkeyServer) -> None:
    celery = new_celery(redis_url)

    @celery.task(name="theirs")
    def theirs() -> None: ...

    build(celery)
    sent = theirs.apply_async(task_id=str(uuid4()))
    with valkey.client() as client:
        assert sent.id in client.lindex("celery", 0)
