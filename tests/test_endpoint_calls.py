"""`submit`, `get_job`, `cancel_job`, `retry_job`, `list_jobs`: called from Python, awaited and through `.sync`."""

import inspect
from typing import Any
from uuid import UUID, uuid4

import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.datastructures import Headers, QueryParams

from async_endpoints_celery import (
    AsyncContext,
    AsyncEndpoints,
    JobConflict,
    JobNotFound,
    JobStatus,
    PayloadTooLarge,
    QueueFull,
    StoreUnavailable,
)
from tests.processes import free_port, wait_until
from tests.web import DataRequest, add_process_data, add_seen, new_endpoints


class Caller:
    """Calls an operation in one of its two forms."""

    def __init__(self, endpoints: AsyncEndpoints, twin: bool) -> None:
        self._target: Any = endpoints.sync if twin else endpoints

    async def __call__(self, operation: str, *args: Any, **options: Any) -> Any:
        answer = getattr(self._target, operation)(*args, **options)
        return await answer if inspect.isawaitable(answer) else answer


@pytest.fixture(params=["async", "sync"])
def twin(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "sync")


@pytest.fixture
def endpoints(redis_url: str) -> AsyncEndpoints:
    return new_endpoints(redis_url, max_payload_bytes=1000)


@pytest.fixture
def call(endpoints: AsyncEndpoints, twin: bool) -> Caller:
    return Caller(endpoints, twin)


async def test_submit_and_get(endpoints: AsyncEndpoints, call: Caller) -> None:
    add_process_data(endpoints)
    job = await call("submit", "ProcessData", DataRequest(data="x"), owner="ann")
    assert (job.name, job.status, job.owner) == ("ProcessData", JobStatus.QUEUED, "ann")
    assert await call("get_job", job.id) == job
    assert await call("get_job", str(job.id)) == job
    assert await call("get_job", uuid4()) is None


@pytest.mark.parametrize(
    "request_", [DataRequest(data="abc"), {"data": "abc"}, {"data": "abc", "processingPriority": 2}]
)
async def test_a_request_may_be_a_model_or_what_fits_it(endpoints: AsyncEndpoints, call: Caller, request_: Any) -> None:
    add_process_data(endpoints)
    async with endpoints.lifespan(embedded_worker=True)(FastAPI()):
        job = await call("submit", "ProcessData", request_)
        done = wait_until(lambda: (j := endpoints.sync.get_job(job.id)) and j.status is JobStatus.COMPLETED and j)
    assert done.result == {"processed_data": "Processed: ABC", "character_count": 3}


async def test_a_request_that_does_not_fit(endpoints: AsyncEndpoints, call: Caller) -> None:
    add_process_data(endpoints)
    for request in (None, {}, {"data": 5}):
        with pytest.raises(ValidationError):
            await call("submit", "ProcessData", request)
    with pytest.raises(PayloadTooLarge, match="max_payload_bytes"):
        await call("submit", "ProcessData", {"data": "x" * 1001})
    assert len(await call("list_jobs")) == 0


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"X-A": "1"}, {"q": "2"}),
        ([("X-A", "1")], [("q", "1"), ("q", "2")]),
        (Headers({"X-A": "1"}), QueryParams("q=1&q=2")),
    ],
    ids=["mappings", "pairs", "starlette"],
)
async def test_the_context_shows_what_was_given(
    endpoints: AsyncEndpoints, call: Caller, headers: Any, query: Any
) -> None:
    add_seen(endpoints)
    async with endpoints.lifespan(embedded_worker=True)(FastAPI()):
        job = await call(
            *("submit", "Seen"), headers=headers, query_params=query, route_params={"item": 5}, owner="ann"
        )
        done = wait_until(lambda: (j := endpoints.sync.get_job(job.id)) and j.status is JobStatus.COMPLETED and j)
    assert done.result["headers"] == [["x-a", "1"]]
    assert done.result["query"] == [list(pair) for pair in QueryParams(query).multi_items()]
    assert done.result["route"] == {"item": 5}
    assert (done.result["owner"], done.result["id"]) == ("ann", str(job.id))


async def test_job_id(call: Caller) -> None:
    job_id = uuid4()
    first = await call("submit", "Any", {"x": 1}, job_id=job_id, owner="ann")
    assert first.id == job_id
    assert await call("submit", "Any", {"x": 1}, job_id=str(job_id), owner="ann") == first
    for name, request, owner in (("Any", {"x": 2}, "ann"), ("Other", {"x": 1}, "ann"), ("Any", {"x": 1}, "bob")):
        with pytest.raises(JobConflict, match=str(job_id)):
            await call("submit", name, request, job_id=job_id, owner=owner)
    with pytest.raises(ValueError):
        await call("submit", "Any", job_id="no-uuid")
    assert len(await call("list_jobs")) == 1


async def test_delay_seconds(endpoints: AsyncEndpoints, call: Caller) -> None:
    @endpoints.handler()
    async def now(context: AsyncContext) -> str:
        return "done"

    async with endpoints.lifespan(embedded_worker=True)(FastAPI()):
        late = await call("submit", "now", delay_seconds=3600)
        soon = await call("submit", "now", delay_seconds=0.5)
        assert (late.status, soon.status) == (JobStatus.SCHEDULED, JobStatus.SCHEDULED)
        done = wait_until(lambda: (j := endpoints.sync.get_job(soon.id)) and j.status is JobStatus.COMPLETED and j)
        assert (done.started_at - done.created_at).total_seconds() >= 0.45
        still = await call("get_job", late.id)
    assert still.status is JobStatus.SCHEDULED
    assert (await call("submit", "now", delay_seconds=0)).status is JobStatus.QUEUED
    for wrong in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError):
            await call("submit", "now", delay_seconds=wrong)


async def test_cancel(call: Caller) -> None:
    job = await call("submit", "Any")
    canceled = await call("cancel_job", job.id)
    assert (canceled.id, canceled.status) == (job.id, JobStatus.CANCELED)
    assert canceled.completed_at is not None
    with pytest.raises(JobConflict, match="Canceled"):
        await call("cancel_job", str(job.id))
    with pytest.raises(JobNotFound):
        await call("cancel_job", uuid4())


async def test_retry(call: Caller) -> None:
    job = await call("submit", "Any")
    with pytest.raises(JobConflict, match="Queued"):
        await call("retry_job", job.id)
    await call("cancel_job", job.id)
    again = await call("retry_job", str(job.id))
    assert (again.id, again.status, again.completed_at) == (job.id, JobStatus.QUEUED, None)
    with pytest.raises(JobNotFound):
        await call("retry_job", uuid4())


async def test_list(call: Caller) -> None:
    jobs = [await call("submit", name) for name in ("A", "B", "A")]
    await call("cancel_job", jobs[0].id)
    page = await call("list_jobs")
    assert [job.created_at for job in page] == sorted((job.created_at for job in page), reverse=True)
    assert {job.id for job in page} == {job.id for job in jobs}
    assert page.next_cursor is None
    assert {job.id for job in await call("list_jobs", name="A")} == {jobs[0].id, jobs[2].id}
    for status in (JobStatus.CANCELED, "Canceled"):
        assert [job.id for job in await call("list_jobs", status)] == [jobs[0].id]
    seen: list[UUID] = []
    cursor = None
    while True:
        part = await call("list_jobs", limit=1, cursor=cursor)
        seen += [job.id for job in part]
        if (cursor := part.next_cursor) is None:
            break
    assert seen == [job.id for job in page]
    for wrong in ({"limit": 0}, {"status": "Nonsense"}, {"cursor": "nonsense"}):
        with pytest.raises(ValueError):
            await call("list_jobs", **wrong)


async def test_a_full_queue(redis_url: str, twin: bool) -> None:
    call = Caller(new_endpoints(redis_url, maximum_queue_size=1), twin)
    job = await call("submit", "Any", job_id=uuid4())
    with pytest.raises(QueueFull, match="maximum_queue_size"):
        await call("submit", "Any")
    assert await call("submit", "Any", job_id=job.id) == job  # a replay passes


async def test_no_redis(twin: bool) -> None:
    call = Caller(new_endpoints(f"redis://127.0.0.1:{free_port()}/0"), twin)
    job_id = uuid4()
    with pytest.raises(StoreUnavailable) as refused:
        await call("submit", "Any", job_id=job_id)
    assert refused.value.job_id == str(job_id)
    for operation in ("get_job", "cancel_job", "retry_job"):
        with pytest.raises(StoreUnavailable):
            await call(operation, job_id)
    with pytest.raises(StoreUnavailable):
        await call("list_jobs")
