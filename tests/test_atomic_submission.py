"""Record and message in one step, when the broker's Redis is the store: never one without the other."""

import base64
import json
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import redis
from celery import Celery, signals
from kombu import Exchange, Queue
from pydantic import BaseModel

from async_endpoints_celery import AsyncContext, AsyncEndpoints
from tests.deployment import Deployment, Proxy
from tests.processes import wait_until
from tests.servers import ValkeyServer, valkey_server

#: The most that an answer may take while Redis is away, in seconds.
ANSWERED_WITHIN = 2.0


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="module")
def shared(server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("atomic"), server.url) as deployed:
        deployed.start_web()
        yield deployed


@pytest.fixture
def deployed(shared: Deployment, server: ValkeyServer) -> Deployment:
    server.flush()
    return shared


class Monitor:
    """What Redis was asked during the block, scripts' own commands marked `lua`."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url, decode_responses=True)
        self._other = redis.Redis.from_url(url)
        self._other.ping()  # connected before the block
        self.commands: list[tuple[str, str]] = []
        self._end = uuid4().hex

    def __enter__(self) -> "Monitor":
        self._monitor = self._client.monitor().__enter__()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        for command in self._monitor.listen():
            if self._end in command["command"]:
                return
            self.commands.append((command["client_type"], command["command"]))

    def __exit__(self, *exc: object) -> None:
        self._other.echo(self._end)
        self._thread.join(5)
        self._other.close()
        self._monitor.__exit__(None, None, None)
        self._client.close()

    def names(self, *, by_scripts: bool) -> list[str]:
        return [command.split()[0].upper() for origin, command in self.commands if (origin == "lua") == by_scripts]


class TestOneRoundTrip:
    def test_a_post_is_one_script_call(self, deployed: Deployment, server: ValkeyServer) -> None:
        for _ in range(3):  # connections are made and scripts are loaded
            deployed.submit("Echo")
        with Monitor(server.url) as monitor:
            job_id = deployed.submit("Echo", text="one round trip")
        assert monitor.names(by_scripts=False) == ["EVALSHA"]
        inner = monitor.names(by_scripts=True)
        assert inner.count("LPUSH") == 1
        assert "HSET" in inner
        (push,) = [command for origin, command in monitor.commands if origin == "lua" and "LPUSH" in command.upper()]
        assert job_id in push

    def test_a_burst_costs_as_many_calls_as_jobs(self, deployed: Deployment, server: ValkeyServer) -> None:
        deployed.submit("Echo")
        with server.client() as client:
            client.config_resetstat()
            for _ in range(20):
                deployed.submit("Echo")
            stats: Any = client.info("commandstats")
        assert stats["cmdstat_evalsha"]["calls"] == 20
        assert "cmdstat_eval" not in stats
        assert stats["cmdstat_lpush"]["calls"] == 20

    def test_refused_submissions_leave_no_message(self, deployed: Deployment) -> None:
        job_id = deployed.submit("Echo", text="first")
        response = deployed.post("Echo", {"X-Async-Request-Id": job_id}, text="second")
        assert response.status_code == 409
        response = deployed.post("Echo", {"X-Async-Request-Id": job_id}, text="first")
        assert (response.status_code, response.headers["idempotent-replayed"]) == (202, "true")
        assert len(deployed.messages()) == 1


class Request(BaseModel):
    text: str


def topic_routes(celery: Celery) -> None:
    topic = Exchange("orders", type="topic")
    celery.conf.task_queues = [
        Queue("celery"),
        Queue("all-orders", topic, routing_key="order.#"),
        Queue("eu-orders", topic, routing_key="order.eu"),
    ]
    celery.conf.task_routes = {"async_endpoints.*": {"exchange": "orders", "routing_key": "order.eu"}}


def direct_exchange(celery: Celery) -> None:
    celery.conf.task_queues = [Queue("work", Exchange("works", type="direct"), routing_key="work.key")]
    celery.conf.task_default_queue = "work"


def route_function(celery: Celery) -> None:
    def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
        return {"queue": "by-function", "priority": 3} if name.endswith("Work") else None

    celery.conf.task_routes = (route,)


def queue_arguments(celery: Celery) -> None:
    celery.conf.task_queues = [Queue("celery", expires=60.0, message_ttl=30.0)]


CONFIGURATIONS: dict[str, tuple[Callable[[Celery], None], dict[str, Any]]] = {
    "plain": (lambda _: None, {}),
    "queue of the handler": (lambda _: None, {"queue": "special"}),
    "priority of the handler": (lambda _: None, {"priority": 9}),
    "route to a queue": (lambda c: c.conf.update(task_routes={"async_endpoints.*": {"queue": "routed"}}), {}),
    "route by a function": (route_function, {}),
    "route to a topic exchange": (topic_routes, {}),
    "a direct exchange": (direct_exchange, {}),
    "queue priorities": (
        lambda c: c.conf.update(broker_transport_options={"priority_steps": [0, 5], "sep": "/"}),
        {"priority": 7},
    ),
    "default priority": (lambda c: c.conf.update(task_default_priority=6), {}),
    "annotations": (
        lambda c: c.conf.update(task_annotations={"async_endpoints.Work": {"priority": 4, "expires": 300}}),
        {},
    ),
    "global key prefix": (
        lambda c: c.conf.update(broker_transport_options={"global_keyprefix": "mine:"}),
        {},
    ),
    "sent event": (lambda c: c.conf.update(task_send_sent_event=True), {}),
    "compression": (lambda c: c.conf.update(task_compression="gzip"), {}),
    "queue that expires": (queue_arguments, {}),
    "time limit": (lambda _: None, {"timeout_seconds": 5}),
    "other serializer": (lambda c: c.conf.update(task_serializer="yaml", accept_content=["json", "yaml"]), {}),
}


def lists(client: redis.Redis) -> dict[str, list[dict[str, Any]]]:
    """All messages in the broker, by the key of their queue."""
    found = {}
    keys: Any = client.keys("*")
    for key in keys:
        if client.type(key) == "list":
            entries: Any = client.lrange(key, 0, -1)
            found[key] = [json.loads(entry) for entry in entries]
    return found


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what differs between any two: its delivery tag, and the thread that would hear the reply."""
    properties = {key: value for key, value in message["properties"].items() if key not in ("delivery_tag", "reply_to")}
    headers = dict(message["headers"])
    if headers.get("expires"):
        headers["expires"] = headers["expires"][:16]  # a moment, to the minute
    return {**message, "properties": properties, "headers": headers}


@contextmanager
def publish_receiver() -> Iterator[list[str]]:
    """A receiver that adds a header to every message, as tracing libraries do."""
    calls: list[str] = []

    def before(sender: str, headers: dict[str, Any], **_: Any) -> None:
        calls.append(f"before {sender}")
        headers["trace"] = "0af765"

    def after(sender: str, headers: dict[str, Any], **_: Any) -> None:
        calls.append(f"after {sender}")

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    try:
        yield calls
    finally:
        signals.before_task_publish.disconnect(before)
        signals.after_task_publish.disconnect(after)


@pytest.mark.parametrize("known", [True, False], ids=["handler here", "name only"])
@pytest.mark.parametrize("label", CONFIGURATIONS)
async def test_the_message_is_what_apply_async_sends(server: ValkeyServer, label: str, known: bool) -> None:
    if label == "other serializer":
        pytest.importorskip("yaml")
    server.flush()
    configure, options = CONFIGURATIONS[label]
    if options and not known:
        pytest.skip("options of a handler are not known where only its name is")
    job_id, fields = str(uuid4()), {"timelimit", "ignore_result"}
    celery = Celery("fields", broker=server.url, set_as_current=False)
    configure(celery)
    endpoints = AsyncEndpoints(celery)

    def work(context: AsyncContext[Request]) -> None:
        pass

    if known:
        endpoints.add_handler("Work", work, **options)
    with celery.connection_for_write() as connection:
        for queue in celery.amqp.queues.values():  # as a worker does
            queue(connection.default_channel).declare()

    with server.client() as client, publish_receiver() as calls:
        heard = client.pubsub()
        heard.psubscribe("*celeryev*")
        heard.get_message(timeout=1)

        job = await endpoints.submit("Work", {"text": "ü"}, job_id=job_id)
        assert job.id == UUID(job_id)
        ours = lists(client)
        our_calls, our_events = calls.copy(), sent_events(heard)
        calls.clear()
        ((first, *_),) = list(ours.values())[:1]
        args, _, _ = json.loads(decoded_body(first))
        for key in ours:
            client.delete(key)

        names = {key: first["headers"][key] for key in ("argsrepr", "kwargsrepr")}
        if known:
            celery.tasks["async_endpoints.Work"].apply_async(args, task_id=job_id, **names)
        else:
            # What the task would say of itself.
            said = {"ignore_result": True, "serializer": "json"}
            celery.send_task("async_endpoints.Work", args, {}, task_id=job_id, **names, **said)
        theirs = lists(client)
        their_events = sent_events(heard)
        heard.close()

    assert ours.keys() == theirs.keys()
    for queue, messages in ours.items():
        assert [comparable(m) for m in messages] == [comparable(m) for m in theirs[queue]], queue
        assert len(messages) == 1
        assert messages[0]["headers"]["trace"] == "0af765"
        assert fields <= messages[0]["headers"].keys()
    assert our_calls == calls == ["before async_endpoints.Work", "after async_endpoints.Work"]
    assert our_events == their_events
    assert len(our_events) == (1 if label == "sent event" else 0)
    await endpoints.aclose()
    celery.close()


def decoded_body(message: dict[str, Any]) -> str:
    body = base64.b64decode(message["body"])
    return (zlib.decompress(body) if message["headers"].get("compression") else body).decode()


def sent_events(heard: Any) -> list[dict[str, Any]]:
    """Celery's task-sent events so far, without what differs between any two."""
    found = []
    while (entry := heard.get_message(ignore_subscribe_messages=True, timeout=0.3)) is not None:
        message = json.loads(entry["data"])
        event = json.loads(decoded_body(message))
        found.append({k: v for k, v in event.items() if k not in ("timestamp", "clock", "expires", "utcoffset")})
    return found


async def test_the_message_holds_no_data_in_its_headers(server: ValkeyServer) -> None:
    server.flush()
    celery = Celery("fields", broker=server.url, set_as_current=False)
    endpoints = AsyncEndpoints(celery)
    await endpoints.submit("Work", {"text": "payload-secret"}, headers={"X-Secret": "header-secret"})
    with server.client() as client:
        ((message,),) = lists(client).values()
    assert "secret" not in json.dumps({**message, "body": ""})
    await endpoints.aclose()
    celery.close()


class TestAWebProcessThatDies:
    @pytest.mark.parametrize("moment", ["before_task_publish", "after_task_publish"])
    def test_before_it_stores(self, deployed: Deployment, moment: str) -> None:
        """kill -9 between building the message and storing it leaves nothing."""
        alive_web, alive_http = deployed.web, deployed.http
        web = deployed.start_web(env={"TEST_DIE_AT": moment})
        chosen = str(uuid4())
        deployed.submit("Echo")  # another job passes
        with pytest.raises(httpx.TransportError):
            deployed.post("EchoSync", {"X-Async-Request-Id": chosen}, text="last words")
        assert web.wait() == -signal.SIGKILL
        deployed.web, deployed.http = alive_web, alive_http
        assert deployed.record(chosen) == {}
        assert deployed.redis.exists(f"ae:request:{chosen}") == 0
        assert deployed.dispatch_due(chosen) is None
        assert [m["headers"]["id"] for m in deployed.messages() if m["headers"]["id"] == chosen] == []
        # The client comes again, to another process.
        assert deployed.submit("EchoSync", {"X-Async-Request-Id": chosen}, text="last words") == chosen

    def test_at_any_moment_of_a_burst(self, deployed: Deployment) -> None:
        alive_web, alive_http = deployed.web, deployed.http
        web = deployed.start_web()
        http, stop = deployed.http, threading.Event()

        def submit() -> None:
            while not stop.is_set():
                try:
                    http.post("/run/Echo", json={"text": "x" * 1000})
                except httpx.TransportError:
                    return

        with ThreadPoolExecutor(8) as threads:
            for _ in range(8):
                threads.submit(submit)
            wait_until(lambda: deployed.redis.zcard("ae:jobs") > 30)
            web.kill()
            stop.set()
        deployed.web, deployed.http = alive_web, alive_http
        records = {key.removeprefix("ae:job:") for key in deployed.redis.scan_iter("ae:job:*")}
        requests = {key.removeprefix("ae:request:") for key in deployed.redis.scan_iter("ae:request:*")}
        messages = [message["headers"]["id"] for message in deployed.messages()]
        assert len(messages) == len(set(messages)) > 30
        assert records == requests == set(messages)


class TestALostReply:
    @pytest.fixture
    def through_proxy(self, server: ValkeyServer, tmp_path: Path) -> Iterator[tuple[Deployment, Proxy]]:
        server.flush()
        with (
            Proxy(server.port) as proxy,
            Deployment(
                tmp_path,
                f"redis://127.0.0.1:{proxy.port}/0",
                trace=server.url,
                env={"ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1"},
            ) as deployed,
        ):
            deployed.start_web()
            deployed.submit("Echo")
            yield deployed, proxy

    @pytest.mark.parametrize("times", [1, 2, 3])
    def test_the_same_request_again_is_the_same_job(self, through_proxy: tuple[Deployment, Proxy], times: int) -> None:
        deployed, proxy = through_proxy
        chosen = str(uuid4())
        proxy.lose_replies(b"EVALSHA", times)
        response = deployed.post("EchoSync", {"X-Async-Request-Id": chosen}, text="once")
        assert proxy.lost
        assert response.status_code in (202, 503)
        if response.status_code == 503:
            assert response.json()["jobId"] == chosen
            assert response.headers["retry-after"]
        proxy.lose_replies(b"", 0)
        again = deployed.post("EchoSync", {"X-Async-Request-Id": chosen}, text="once")
        assert (again.status_code, again.json()["id"]) == (202, chosen)
        assert again.headers["idempotent-replayed"] == "true"
        assert [m["headers"]["id"] for m in deployed.messages()].count(chosen) == 1
        deployed.start_worker("-P", "solo")
        assert deployed.wait(chosen)["status"] == "Completed"
        assert len(deployed.runs(chosen)) == 1

    def test_without_a_chosen_id_the_answer_names_one(self, through_proxy: tuple[Deployment, Proxy]) -> None:
        deployed, proxy = through_proxy
        proxy.lose_replies(b"EVALSHA", 5)
        response = deployed.post("EchoSync", text="once")
        assert response.status_code == 503
        proxy.lose_replies(b"", 0)
        job_id = response.json()["jobId"]
        again = deployed.post("EchoSync", {"X-Async-Request-Id": job_id}, text="once")
        assert (again.status_code, again.json()["id"]) == (202, job_id)
        assert [m["headers"]["id"] for m in deployed.messages()].count(job_id) == 1


class TestRedisIsAway:
    @pytest.fixture
    def own_server(self) -> Iterator[ValkeyServer]:
        with valkey_server(appendonly=True) as server:
            yield server

    @pytest.fixture
    def own(self, own_server: ValkeyServer, tmp_path: Path) -> Iterator[Deployment]:
        with Deployment(tmp_path, own_server.url) as deployed:
            deployed.start_web()
            yield deployed

    def burst(self, deployed: Deployment, count: int) -> list[tuple[httpx.Response, float]]:
        limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
        with (
            httpx.Client(base_url=deployed.http.base_url, timeout=20, limits=limits) as http,
            ThreadPoolExecutor(count) as threads,
        ):

            def post(_: int) -> tuple[httpx.Response, float]:
                began = time.monotonic()
                response = http.post("/run/Echo", json={"text": "anybody there?"})
                return response, time.monotonic() - began

            return list(threads.map(post, range(count)))

    @pytest.mark.parametrize("way", ["stop", "pause"])
    @pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
    def test_answered_within_two_seconds_and_recovered_at_once(
        self, own: Deployment, own_server: ValkeyServer, way: str, warm: bool
    ) -> None:
        if warm:
            assert {response.status_code for response, _ in self.burst(own, 20)} == {202}
        getattr(own_server, way)()
        for count in (1, 100):
            for response, seconds in self.burst(own, count):
                assert response.status_code == 503
                assert response.headers["content-type"] == "application/problem+json"
                assert int(response.headers["retry-after"]) >= 1
                UUID(response.json()["jobId"])
                # The clients of a burst share this machine's two cores with the server.
                assert seconds < ANSWERED_WITHIN + (0.5 if count > 1 else 0)
        getattr(own_server, {"stop": "start", "pause": "resume"}[way])()
        first = own.post("Echo", text="the first")
        assert first.status_code == 202, first.text
        for response, _ in self.burst(own, 20):
            assert response.status_code == 202
        # Whatever happened: a record for each message, a message for each record.
        records = {key.removeprefix("ae:job:") for key in own.redis.scan_iter("ae:job:*")}
        messages = [message["headers"]["id"] for message in own.messages()]
        assert len(messages) == len(set(messages))
        assert set(messages) == records
