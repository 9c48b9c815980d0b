"""Nothing is kept for ever: after its retention a job has left no trace, and memory comes back."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment
from tests.processes import wait_until
from tests.servers import valkey_server

SETTINGS = {
    "ASYNC_ENDPOINTS_RETENTION_SECONDS": "1",
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": "5",
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
}
JOBS = 2_000
#: What is no job's: one entry for each job name, the last sweep, one secret; and kombu's own.
KEPT = {"ae:claimed", "ae:sweep", "ae:secret"}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("bounds"), server.url, env=SETTINGS) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "4", "-B", "-s", str(deployed.directory / "beat"))
        yield deployed


def left(deployed: Deployment) -> set[str]:
    keys: Any = deployed.redis.scan_iter("*", count=1000)
    return {key for key in keys if not key.startswith(("_kombu.", "test:"))} - KEPT


def test_nothing_is_left_of_a_job_however_it_ended(deployed: Deployment) -> None:
    completed = deployed.submit("Echo")
    failed = deployed.submit("Outcome", kind="value-error")
    retried = deployed.submit("Flaky", failures=1)
    canceled = deployed.submit("Parked")
    assert deployed.http.delete(f"/jobs/{canceled}").status_code == 200
    assert deployed.http.post(f"/jobs/{canceled}/retry").status_code == 202
    assert deployed.http.delete(f"/jobs/{canceled}").status_code == 200
    stopped = deployed.submit("Cancelable")
    wait_until(lambda: deployed.runs(stopped))
    assert deployed.http.delete(f"/jobs/{stopped}").status_code == 202
    deployed.redis.delete("parked")
    for job_id in (completed, failed, retried, canceled, stopped):
        wait_until(lambda: deployed.redis.exists(f"ae:job:{job_id}") == 0)  # noqa: B023
        assert deployed.http.get(f"/jobs/{job_id}").status_code == 404
    wait_until(lambda: not left(deployed), message=str(left(deployed)))


async def submit_many(url: httpx.URL, number: int) -> None:
    async def client(share: int) -> None:
        for _ in range(share):
            response = await http.post("/run/WhereAmI", json={})
            assert response.status_code == 202

    async with httpx.AsyncClient(base_url=url, timeout=10) as http:
        await asyncio.gather(*(client(number // 10) for _ in range(10)))


async def test_memory_comes_back(deployed: Deployment) -> None:
    assert deployed.finish("WhereAmI")["status"] == "Completed"
    await asyncio.to_thread(wait_until, lambda: not left(deployed))
    keys, names = deployed.redis.dbsize(), deployed.redis.hlen("ae:claimed")
    began = time.monotonic()
    await submit_many(deployed.http.base_url, JOBS)

    def forgotten() -> bool:
        return not deployed.redis.exists("ae:waiting", "ae:running", "ae:ended", "ae:jobs", "celery", "unacked")

    await asyncio.to_thread(wait_until, forgotten, 60, interval=0.2)
    await asyncio.to_thread(wait_until, lambda: deployed.redis.dbsize() == keys)
    assert deployed.redis.hlen("ae:claimed") == names
    assert left(deployed) == set()
    assert time.monotonic() - began > 1
