"""Use case: wait for a job, for a client that asked for it (`Prefer: wait=N`) or reads its events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from uuid import UUID

from async_endpoints_celery.changes import Changes, Watch
from async_endpoints_celery.drivers import AsyncDriver
from async_endpoints_celery.jobs import Job
from async_endpoints_celery.operations import Operations

#: Seconds between two keep-alive comments of an event stream.
KEEP_ALIVE_SECONDS = 15.0


class Waiter:
    """Follows records by being told of changes; Redis is never polled."""

    def __init__(self, operations: Operations, driver: AsyncDriver, changes: Changes) -> None:
        self._operations = operations
        self._driver = driver
        self._changes = changes

    async def until_over(self, job_id: UUID, seconds: float, watch: Watch | None = None) -> Job | None:
        """The record once the job is over, or as it is after so many seconds; None when there is none."""
        if watch is None:
            async with self._changes.watching(str(job_id)) as watch:
                return await self.until_over(job_id, seconds, watch)
        deadline = time.monotonic() + seconds
        while True:
            job = await self._read(job_id)
            left = deadline - time.monotonic()
            if job is None or job.status.is_over or left <= 0:
                return job
            await watch.wait(left)

    async def events(self, job_id: UUID, seen: int | None) -> AsyncIterator[Job | None]:
        """The record as it is now, unless its version was `seen`, and again after each change until the job is over.

        None stands for "nothing new": time for a keep-alive.
        """
        async with self._changes.watching(str(job_id)) as watch:
            while True:
                job = await self._read(job_id)
                if job is None:
                    return
                if job.version != seen:
                    seen = job.version
                    yield job
                if job.status.is_over:
                    return
                while not await watch.wait(KEEP_ALIVE_SECONDS):
                    yield None

    async def _read(self, job_id: UUID) -> Job | None:
        return await self._driver.store.run(self._operations.get(str(job_id)))
