"""Bugs that a review found in the HTTP side and in submission: each was there once."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from uuid import UUID, uuid4

import fakeredis
import httpx
import pytest
import redis
from celery import Celery
from fastapi import Depends, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field, SecretStr, computed_field

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter, ConfigurationError, Settings
from tests.processes import wait_until
from tests.servers import ValkeyServer, valkey_server
from tests.streaming import channel, listeners
from tests.web import (
    BODY,
    DataRequest,
    TestClient,
    add_process_data,
    app_with,
    assert_no_jobs,
    assert_problem,
    new_celery,
    new_endpoints,
    request_id,
    shop,
)


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """One that may be stopped and reconfigured."""
    with valkey_server() as server:
        yield server


def submitting(endpoints: AsyncEndpoints, *routers: AsyncRouter, **route: Any) -> Any:
    """POST /job, which has no body, and the job routes."""
    router = AsyncRouter(endpoints)
    router.async_post("/job", "Elsewhere", **route)
    router.async_jobs()
    return app_with(router, *routers)


class TestDependencies:
    @pytest.mark.parametrize("place", ["dependencies", "validate"])
    def test_the_raw_body_of_a_job_without_one(self, place: str) -> None:
        """How webhooks are signed."""
        sent, bodies = b'{"event": "paid" }', []

        async def signed(request: Request) -> None:
            bodies.append(await request.body())
            signature = hmac.new(b"key", bodies[-1], hashlib.sha256).hexdigest()
            if not hmac.compare_digest(signature, request.headers["x-signature"]):
                raise HTTPException(403, "wrong signature")

        route: dict[str, Any] = {"validate": signed} if place == "validate" else {"dependencies": [Depends(signed)]}
        signature = hmac.new(b"key", sent, hashlib.sha256).hexdigest()
        with TestClient(submitting(new_endpoints(), **route)) as client:
            for body, status in ((sent, 202), (b'{"event": "void" }', 403)):
                response = client.post("/job", content=body, headers={"X-Signature": signature})
                assert response.status_code == status, response.text
        assert bodies == [sent, b'{"event": "void" }']

    def test_its_json_too(self) -> None:
        seen = []

        async def read(request: Request) -> None:
            seen.append(await request.json())

        with TestClient(submitting(new_endpoints(), dependencies=[Depends(read)])) as client:
            assert client.post("/job", json={"a": [1]}).status_code == 202
        assert seen == [{"a": [1]}]

    @pytest.mark.parametrize("place", ["dependencies", "validate"])
    def test_an_exception_that_the_application_handles(self, place: str) -> None:
        class OutOfCredit(Exception):
            pass

        class Today(OutOfCredit):
            pass

        def charge() -> None:
            raise Today("0 left")

        async def refuse(request: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"credit": str(error)}, 402, {"X-Buy": "more"})

        route: dict[str, Any] = {"validate": charge} if place == "validate" else {"dependencies": [Depends(charge)]}
        endpoints = new_endpoints()
        app = submitting(endpoints, **route)
        app.add_exception_handler(OutOfCredit, refuse)
        with TestClient(app) as client:
            response = client.post("/job")
        assert (response.status_code, response.json()) == (402, {"credit": "0 left"})
        assert response.headers["x-buy"] == "more"
        assert_no_jobs(endpoints)

    def test_one_that_it_does_not_is_a_problem(self) -> None:
        def broken() -> None:
            raise LookupError("no such thing")

        with TestClient(submitting(new_endpoints(), dependencies=[Depends(broken)])) as client:
            assert_problem(client.post("/job"), 500)

    def test_starlettes_http_exception(self) -> None:
        from starlette.exceptions import HTTPException as StarletteHTTPException

        def refuse() -> None:
            raise StarletteHTTPException(418, "no coffee", {"X-Pot": "tea"})

        with TestClient(submitting(new_endpoints(), dependencies=[Depends(refuse)])) as client:
            response = client.post("/job")
        assert (response.status_code, response.json()) == (418, {"detail": "no coffee"})
        assert response.headers["x-pot"] == "tea"


def word(payload: DataRequest) -> str:
    return "stop"


def validate_payload(payload: DataRequest, stop: Annotated[str, Depends(word)]) -> Any:
    return PlainTextResponse("stopped", 403) if payload.data == stop else None


class TestOverrides:
    @pytest.fixture
    def app(self) -> Any:
        endpoints = new_endpoints()
        router = AsyncRouter(endpoints)
        router.async_post("/process", add_process_data(endpoints), validate=validate_payload)
        return app_with(router)

    def statuses(self, app: Any, *data: str) -> list[int]:
        with TestClient(app) as client:
            return [client.post("/process", json={"data": text}).status_code for text in data]

    def test_without(self, app: Any) -> None:
        assert self.statuses(app, "stop", "go") == [403, 202]

    def test_of_validate(self, app: Any) -> None:
        seen = []

        def other(request: DataRequest) -> Any:
            seen.append(request.data)
            return PlainTextResponse("stopped", 409)

        app.dependency_overrides[validate_payload] = other
        assert self.statuses(app, "stop", "go") == [409, 409]
        assert seen == ["stop", "go"]

    def test_of_what_validate_depends_on(self, app: Any) -> None:
        app.dependency_overrides[word] = lambda: "go"
        assert self.statuses(app, "stop", "go") == [202, 403]

    def test_the_body_is_not_embedded(self, app: Any) -> None:
        schema = app.openapi()["paths"]["/process"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["$ref"] == "#/components/schemas/DataRequest"
        with TestClient(app) as client:
            assert client.post("/process", json={"payload": BODY}).status_code == 422


@pytest.mark.parametrize(
    "tenant",
    ["%C4%80", "%20", "a%20b", "x%0d%0aSet-Cookie:%20a=b", "%0d%0a", "100%25", "%3Fq%23f", "%00"],
    ids=["latin-extended", "space", "words", "header", "line-end", "percent", "query", "nul"],
)
def test_the_location_holds_prefix_parameters_percent_encoded(tenant: str) -> None:
    endpoints = new_endpoints()
    router = AsyncRouter(endpoints, prefix="/tenants/{tenant}")
    router.async_post("/job", "Elsewhere")
    router.async_jobs()
    with TestClient(app_with(router)) as client:
        for _ in range(2):  # the second time the route is known
            accepted = client.post(f"/tenants/{tenant}/job")
            assert accepted.status_code == 202, accepted.text
            location = accepted.headers["location"]
            assert location.isascii()
            assert not set(location) & set("\r\n\x00 ")
            assert location.lower() == f"/tenants/{tenant}/jobs/{accepted.json()['id']}".lower()
            assert "set-cookie" not in accepted.headers
            assert client.get(location).json()["id"] == accepted.json()["id"]


class WithPin(BaseModel):
    data: str
    pin: int = Field(exclude=True)


class WithPassword(BaseModel):
    data: str
    password: SecretStr


class Inner(BaseModel):
    password: SecretStr


class WithNestedPassword(BaseModel):
    data: str
    inner: list[Inner]


class Tag(BaseModel):
    """Its place in a set is not the same each time, as that of a text is not in each process."""

    n: int

    def __hash__(self) -> int:
        return (self.n + SALT[0]) % 8


SALT = [0]


class WithTags(BaseModel):
    tags: set[Tag]


def taking(endpoints: AsyncEndpoints, model: Any) -> Any:
    router = AsyncRouter(endpoints)
    router.async_post("/job", "Elsewhere", body=model)
    return app_with(router)


@pytest.mark.parametrize(("header", "conflict"), [("Idempotency-Key", 422), ("X-Async-Request-Id", 409)])
class TestReplays:
    @pytest.mark.parametrize(
        ("model", "body", "other"),
        [
            (WithPin, {"pin": 1}, {"pin": 2}),
            (WithPassword, {"password": "a"}, {"password": "b"}),
            (WithNestedPassword, {"inner": [{"password": "a"}]}, {"inner": [{"password": "b"}]}),
        ],
        ids=["excluded", "secret", "nested-secret"],
    )
    def test_what_a_dump_hides_is_part_of_the_payload(
        self, header: str, conflict: int, model: Any, body: dict[str, Any], other: dict[str, Any]
    ) -> None:
        headers = {header: request_id()}
        with TestClient(taking(new_endpoints(), model)) as client:
            first = client.post("/job", json={"data": "x", **body}, headers=headers)
            assert first.status_code == 202, first.text
            again = client.post("/job", content=json.dumps({**body, "data": "x"}, indent=2), headers=_json(headers))
            assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
            assert again.headers["idempotent-replayed"] == "true"
            assert_problem(client.post("/job", json={"data": "x", **other}, headers=headers), conflict)

    def test_a_set_has_no_order(self, header: str, conflict: int) -> None:
        headers, body = {header: request_id()}, {"tags": [{"n": 0}, {"n": 1}]}
        ids = set()
        try:
            with TestClient(taking(new_endpoints(), WithTags)) as client:
                for salt in (0, 7):
                    SALT[0] = salt
                    response = client.post("/job", json=body, headers=headers)
                    assert response.status_code == 202, response.text
                    ids.add(response.json()["id"])
                assert_problem(client.post("/job", json={"tags": [{"n": 5}]}, headers=headers), conflict)
        finally:
            SALT[0] = 0
        assert len(ids) == 1


def _json(headers: dict[str, str]) -> dict[str, str]:
    return {**headers, "Content-Type": "application/json"}


class Circle(BaseModel):
    radius: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> float:
        return 3 * self.radius**2


class TestSubmissionFromPython:
    @pytest.fixture
    def endpoints(self) -> AsyncEndpoints:
        endpoints = new_endpoints()

        @endpoints.handler("Login")
        def login(context: AsyncContext[WithPassword]) -> None: ...

        @endpoints.handler("Draw")
        def draw(context: AsyncContext[Circle]) -> None: ...

        return endpoints

    def payload(self, endpoints: AsyncEndpoints) -> Any:
        """What is stored of the only request."""
        client: Any = endpoints.server.client()
        [key] = client.keys("ae:request:*")
        return json.loads(json.loads(client.get(key))["payload"])

    def test_a_secret_in_a_model_is_refused(self, endpoints: AsyncEndpoints) -> None:
        with pytest.raises(ValueError, match=r"'Login' holds a secret.*submit a dict") as refused:
            endpoints.sync.submit("Login", WithPassword(data="x", password=SecretStr("hunter2")))
        assert "hunter2" not in str(refused.value)
        assert_no_jobs(endpoints)

    def test_a_secret_in_a_dict_is_stored(self, endpoints: AsyncEndpoints) -> None:
        endpoints.sync.submit("Login", {"data": "x", "password": "hunter2"})
        assert self.payload(endpoints) == {"data": "x", "password": "hunter2"}

    def test_computed_fields_are_no_input(self, endpoints: AsyncEndpoints) -> None:
        endpoints.sync.submit("Draw", Circle(radius=2))
        assert self.payload(endpoints) == {"radius": 2.0}


@pytest.mark.parametrize("identity", [7, 0, UUID(int=7)], ids=["int", "zero", "uuid"])
def test_an_owner_need_not_be_text(identity: Any) -> None:
    def caller(request: Request) -> Any:
        return None if "x-nobody" in request.headers else identity

    endpoints = new_endpoints(owner=caller)
    with TestClient(shop(endpoints, admin=True)) as client:
        accepted = client.post("/process", json=BODY)
        assert accepted.status_code == 202, accepted.text
        assert client.get(accepted.headers["location"]).status_code == 200
        assert [job["id"] for job in client.get("/jobs").json()["items"]] == [accepted.json()["id"]]
        assert_problem(client.get(accepted.headers["location"], headers={"X-Nobody": "1"}), 401)
        assert client.delete(accepted.headers["location"]).json()["status"] == "Canceled"
    job = endpoints.sync.get_job(accepted.json()["id"])
    assert job is not None
    assert job.owner == str(identity)


def test_eager_mode_stores_nothing_of_a_job_that_nobody_handles() -> None:
    endpoints = AsyncEndpoints(new_celery(task_always_eager=True), store="memory://", settings=Settings())
    with pytest.raises(ConfigurationError, match="no handler 'Elsewhere'"):
        endpoints.sync.submit("Elsewhere")
    with TestClient(submitting(endpoints)) as client:
        assert client.post("/job").status_code == 500
    assert not [key for key in endpoints.server.client().scan_iter() if not str(key).endswith("secret")]


def test_nothing_comes_after_the_last_event() -> None:
    with TestClient(submitting(new_endpoints())) as client:
        location = client.post("/job").headers["location"]
        assert client.delete(location).json()["status"] == "Canceled"
        events = client.get(f"{location}/events")
        assert events.status_code == 200
        last = next(line for line in events.text.splitlines() if line.startswith("id: ")).removeprefix("id: ")
        gone = client.get(f"{location}/events", headers={"Last-Event-ID": last})
        assert (gone.status_code, gone.content) == (204, b"")
        assert client.get(f"{location}/events", headers={"Last-Event-ID": "0"}).status_code == 200


def wait_for(seconds: int) -> dict[str, str]:
    return {"Prefer": f"wait={seconds}"}


async def until(condition: Callable[[], Any]) -> None:
    """`wait_until` beside an event loop that has work to do."""
    await asyncio.to_thread(wait_until, condition)


class TestWaiting:
    @pytest.mark.parametrize("before", [True, False], ids=["as-before", "for-the-first-time"])
    async def test_works_after_redis_was_away(self, server: ValkeyServer, before: bool) -> None:
        endpoints = new_endpoints(server.url)
        transport = httpx.ASGITransport(shop(endpoints))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            if before:
                await self.assert_waiting_works(http, server)
            server.stop()
            # Long enough for the subscription to fail, and to fail again.
            for _ in range(2):
                refused = await http.post("/process", json=BODY, headers=wait_for(5))
                assert_problem(refused, 503, code="UNAVAILABLE")
            await asyncio.to_thread(server.start)
            await self.assert_waiting_works(http, server)
        await endpoints.aclose()

    async def assert_waiting_works(self, http: httpx.AsyncClient, server: ValkeyServer) -> None:
        """The one who waits is listening, and hears of it."""
        job_id = request_id()
        headers = {**wait_for(10), "X-Async-Request-Id": job_id}

        async def post() -> httpx.Response:
            for _ in range(20):
                response = await http.post("/process", json=BODY, headers=headers)
                if response.status_code != 503:  # a connection of before
                    break
            return response

        posting = asyncio.create_task(post())
        with server.client() as client:
            await until(lambda: client.exists(f"ae:job:{job_id}") and listeners(client, job_id) == 1)
            assert (await http.delete(f"/jobs/{job_id}")).status_code == 200
        async with asyncio.timeout(5):
            response = await posting
        assert (response.status_code, response.json()["status"]) == (200, "Canceled")

    async def test_thirty_begin_to_wait_at_once(self, redis_url: str) -> None:
        endpoints = new_endpoints(redis_url)
        transport = httpx.ASGITransport(shop(endpoints))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            ids = [request_id() for _ in range(30)]
            headers = [{**wait_for(10), "X-Async-Request-Id": job_id} for job_id in ids]
            polls = [asyncio.create_task(http.post("/process", json=BODY, headers=given)) for given in headers]
            with redis.Redis.from_url(redis_url, decode_responses=True) as client:
                await until(
                    lambda: (
                        (
                            client.zcard("ae:waiting") == 30
                            and all(count == 1 for _, count in client.pubsub_numsub(*map(channel, ids)))
                        )
                        or any(poll.done() for poll in polls)
                    )
                )
            assert [poll.result().text for poll in polls if poll.done()] == []
            for job_id in ids:
                assert (await http.delete(f"/jobs/{job_id}")).status_code == 200
            async with asyncio.timeout(5):
                answers = await asyncio.gather(*polls)
        await endpoints.aclose()
        assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "Canceled")}

    def test_without_the_right_to_subscribe_a_job_is_submitted(self, server: ValkeyServer) -> None:
        endpoints = new_endpoints(server.url)
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "-subscribe")
        with TestClient(shop(endpoints)) as http:
            accepted = http.post("/process", json=BODY, headers=wait_for(5))
            assert accepted.status_code == 202, accepted.text
            assert accepted.json()["status"] == "Queued"
            assert http.get(accepted.headers["location"]).json()["id"] == accepted.json()["id"]
        endpoints.close()


class TestConfiguration:
    def test_two_endpoints_of_one_app_do_not_share_keys(self) -> None:
        celery = new_celery()
        AsyncEndpoints(celery, store="memory://", settings=Settings())
        with pytest.raises(ConfigurationError, match="key_prefix 'ae' already"):
            AsyncEndpoints(celery, store="memory://", settings=Settings(task_prefix="other."))

    def test_each_has_its_own_sweep(self) -> None:
        celery = new_celery()
        AsyncEndpoints(celery, store="memory://", settings=Settings())
        others = Settings(task_prefix="other.", key_prefix="other", recovery_check_interval_seconds=3)
        AsyncEndpoints(celery, store="memory://", settings=others)
        celery.finalize()
        schedule = {name: (entry["task"], entry["schedule"]) for name, entry in celery.conf.beat_schedule.items()}
        assert schedule == {
            "async-endpoints-sweep": ("async_endpoints.sweep", 15.0),
            "async-endpoints-sweep-other": ("other.sweep", 3.0),
        }
        assert {"async_endpoints.sweep", "other.sweep"} <= set(celery.tasks)

    @pytest.mark.parametrize("loaded", [False, True], ids=["early", "loaded"])
    @pytest.mark.parametrize(
        "url",
        [["redis://one:6379/0", "redis://two:6379/0"], "redis://one:6379/0;redis://two:6379/0"],
        ids=["list", "text"],
    )
    def test_several_brokers_are_no_store(self, url: Any, loaded: bool) -> None:
        celery = Celery("tests", set_as_current=False, changes={"broker_url": url})
        if loaded:
            assert celery.conf.broker_url
        with pytest.raises(ConfigurationError, match=r"several brokers.*store="):
            AsyncEndpoints(celery, settings=Settings())

    def test_a_fake_client_is_no_store(self) -> None:
        with (
            fakeredis.FakeRedis() as client,
            pytest.raises(ConfigurationError, match=r"Fake\w*Connection cannot be made anew.*memory://"),
        ):
            AsyncEndpoints(new_celery(), store=client, settings=Settings())

    def test_task_protocol_1_shows_the_arguments(self, redis_url: str) -> None:
        endpoints = AsyncEndpoints(new_celery(redis_url, task_protocol=1), settings=Settings())
        with pytest.raises(ConfigurationError, match="task_protocol is 1"):
            endpoints.sync.submit("Elsewhere", job_id=uuid4())
        endpoints.close()
        with redis.Redis.from_url(redis_url) as client:
            assert client.dbsize() == 0
