"""The whole system in one process that needs nothing installed, and clients that start no lifespan."""

import asyncio
import gc
import threading
import warnings
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter, JobFailed, JobStatus, MethodResult
from tests.processes import wait_until
from tests.web import (
    BODY,
    OVER,
    TestClient,
    add_process_data,
    app_with,
    assert_record,
    finished,
    new_endpoints,
    serving,
    shop,
    wait_for_status,
)


class Number(BaseModel):
    number: int


class ClassHandler:
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.used = False

    def handle(self, context: AsyncContext[Number]) -> int:
        assert not self.used, "a fresh instance for each job"
        self.used = True
        return context.request.number + 1


class AsyncClassHandler:
    async def handle(self, context: AsyncContext[Number]) -> MethodResult[int]:
        await asyncio.sleep(0)
        return MethodResult.success(context.request.number + 2)


def full_router(endpoints: AsyncEndpoints, go: threading.Event) -> AsyncRouter:
    @endpoints.handler()
    def sync_handler(context: AsyncContext[Number]) -> int:
        context.report_progress(10)
        context.report_progress(50.0, "half")
        return context.request.number * 2

    @endpoints.handler()
    async def async_handler(context: AsyncContext[Number]) -> int:
        await context.report_progress(50.0, "half")
        return context.request.number * 3

    @endpoints.handler(max_retries=2, retry_delay_base_seconds=0.05)
    def second_try(context: AsyncContext) -> int:
        if context.retry_count < 1:
            raise OSError("not yet")
        return context.retry_count

    @endpoints.handler(max_retries=1, retry_delay_base_seconds=0.01)
    async def never(context: AsyncContext) -> MethodResult[int]:
        return MethodResult.failure("no luck")

    @endpoints.handler()
    def permanent(context: AsyncContext) -> None:
        raise JobFailed("MINE", "for good")

    @endpoints.handler()
    async def sleeps(context: AsyncContext) -> None:
        await asyncio.sleep(60)

    @endpoints.handler()
    def loops(context: AsyncContext) -> str:
        while not context.cancellation_requested:
            if go.wait(0.02):
                return "went"
        context.raise_if_canceled()
        raise AssertionError("unreachable")

    endpoints.add_handler("ClassHandler", ClassHandler)
    endpoints.add_handler("AsyncClassHandler", AsyncClassHandler)
    router = AsyncRouter(endpoints)
    for handler in (sync_handler, async_handler, second_try, never, permanent, sleeps, loops):
        router.async_post(f"/{handler.__name__}", handler)
    router.async_post("/class", ClassHandler)
    router.async_post("/async-class", AsyncClassHandler)
    router.async_jobs(admin=True)
    return router


@pytest.fixture
def go() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def client(go: threading.Event) -> Iterator[TestClient]:
    endpoints = new_endpoints()
    with serving(endpoints, full_router(endpoints, go)) as client:
        yield client


def test_jobs_complete(client: TestClient) -> None:
    made = ClassHandler.made
    accepted = {
        path: [client.post(path, json={"number": number}) for number in (1, 5)]
        for path in ("/sync_handler", "/async_handler", "/class", "/async-class")
    }
    results = {path: [finished(client, response)["result"] for response in found] for path, found in accepted.items()}
    assert results == {"/sync_handler": [2, 10], "/async_handler": [3, 15], "/class": [2, 6], "/async-class": [3, 7]}
    assert ClassHandler.made == made + 2


@pytest.mark.parametrize("path", ["/sync_handler", "/async_handler"])
def test_progress(client: TestClient, path: str) -> None:
    record = finished(client, client.post(path, json={"number": 1}))
    assert_record(record, status="Completed", progress={"percent": 50.0, "message": "half"})


def test_retries_and_failures(client: TestClient) -> None:
    again, never, permanent = (client.post(path) for path in ("/second_try", "/never", "/permanent"))
    assert_record(finished(client, again), status="Completed", result=1, retryCount=1, error=None)
    record = finished(client, never)
    assert_record(record, status="Failed", retryCount=1, maxRetries=1, result=None)
    assert (record["error"]["code"], record["error"]["message"]) == ("UNKNOWN", "no luck")
    record = finished(client, permanent)
    assert_record(record, status="Failed", retryCount=0)
    assert record["error"]["code"] == "MINE"


@pytest.mark.parametrize("path", ["/sleeps", "/loops"])
def test_cancel(client: TestClient, path: str) -> None:
    location = client.post(path).headers["location"]
    wait_for_status(client, location, {"InProgress"})
    assert client.delete(location).status_code == 202
    wait_for_status(client, location, {"Canceled"})


def test_a_canceled_job_can_be_retried(client: TestClient, go: threading.Event) -> None:
    location = client.post("/loops").headers["location"]
    wait_for_status(client, location, {"InProgress"})
    client.delete(location)
    wait_for_status(client, location, {"Canceled"})
    go.set()
    assert client.post(f"{location}/retry").status_code == 202
    assert wait_for_status(client, location, OVER)["result"] == "went"


def test_a_delayed_job(go: threading.Event) -> None:
    endpoints = new_endpoints()
    with serving(endpoints, full_router(endpoints, go)):
        job = endpoints.sync.submit("sync_handler", {"number": 2}, delay_seconds=0.3)
        assert job.status is JobStatus.SCHEDULED
        done = wait_until(lambda: (j := endpoints.sync.get_job(job.id)) and j.status is JobStatus.COMPLETED and j)
    assert done.result == 4
    assert (done.started_at - done.created_at).total_seconds() >= 0.25


async def test_through_the_asgi_transport_of_httpx(go: threading.Event) -> None:
    endpoints = new_endpoints()
    app = app_with(full_router(endpoints, go))
    transport = httpx.ASGITransport(app)
    async with (
        endpoints.lifespan(embedded_worker=True)(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        asyncio.timeout(20),
    ):
        answers = await asyncio.gather(
            *(client.post("/async_handler", json={"number": number}) for number in range(20))
        )
        assert {answer.status_code for answer in answers} == {202}
        results = []
        for answer in answers:
            # Each look is a round trip through the application: the loop does not stand still.
            while (record := (await client.get(answer.headers["location"])).json())["status"] not in OVER:
                pass
            results.append(record["result"])
    assert results == [3 * number for number in range(20)]


def test_several_applications_do_not_disturb_each_other() -> None:
    """The same job name, each with a handler of its own, all running at once."""
    clients = []
    for number in range(3):
        endpoints = new_endpoints()
        endpoints.add_handler("Which", lambda context, number=number: number)
        router = AsyncRouter(endpoints)
        router.async_post("/which", "Which")
        router.async_jobs()
        clients.append(serving(endpoints, router))
    with clients[0], clients[1], clients[2]:
        accepted = [[client.post("/which") for client in clients] for _ in range(5)]
        for answers in accepted:
            for number, (client, answer) in enumerate(zip(clients, answers, strict=True)):
                assert finished(client, answer)["result"] == number


def test_an_application_after_another_gets_its_own_jobs_only() -> None:
    with TestClient(shop(new_endpoints())) as client:  # nobody works here
        left_behind = client.post("/process", json=BODY)
        assert left_behind.status_code == 202
    endpoints = new_endpoints()
    router = AsyncRouter(endpoints)
    router.async_post("/process", add_process_data(endpoints))
    router.async_jobs(admin=True)
    with serving(endpoints, router) as client:
        finished(client, client.post("/process", json=BODY))
        assert len(client.get("/jobs").json()["items"]) == 1


def test_shutdown_is_clean(go: threading.Event) -> None:
    """Twice, with one application: it can be started again. ResourceWarnings are errors here."""
    endpoints = new_endpoints()
    app = app_with(full_router(endpoints, go), lifespan=endpoints.lifespan(embedded_worker=True))
    before = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with TestClient(app) as client:
                finished(client, client.post("/sync_handler", json={"number": 1}))
                finished(client, client.post("/async_handler", json={"number": 1}))
            gc.collect()
            left = set(threading.enumerate()) - before
            assert not left


# Without a lifespan: starlette's TestClient then has a new event loop for each request.


def plain_app(endpoints: AsyncEndpoints) -> FastAPI:
    router = AsyncRouter(endpoints)
    router.async_post("/process", add_process_data(endpoints))
    router.async_jobs(admin=True)
    return app_with(router)


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "redis"])
def test_a_client_without_lifespan(redis_url: str, in_memory: bool) -> None:
    endpoints = new_endpoints("memory://" if in_memory else redis_url)
    client = TestClient(plain_app(endpoints))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            location = client.post("/process", json=BODY).headers["location"]
            assert client.get(location).json()["status"] == "Queued"
            assert client.delete(location).json()["status"] == "Canceled"
            gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert len(client.get("/jobs").json()["items"]) == 5


async def test_loops_in_other_threads(redis_url: str) -> None:
    """One `AsyncEndpoints`, three event loops at once, and a thread without any."""
    endpoints = new_endpoints(redis_url)

    def work() -> bool:
        return asyncio.run(use())

    async def use() -> bool:
        jobs = await asyncio.gather(*(endpoints.submit("Any") for _ in range(5)))
        return [await endpoints.get_job(job.id) for job in jobs] == jobs

    async with endpoints.lifespan()(FastAPI()):
        found = await asyncio.gather(use(), asyncio.to_thread(work), asyncio.to_thread(work))
        assert list(found) == [True, True, True]
        assert len(await asyncio.to_thread(endpoints.sync.list_jobs)) == 15
