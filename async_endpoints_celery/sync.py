"""The synchronous twins of `AsyncEndpoints`' operations: for scripts, Django views and Celery tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from async_endpoints_celery.drivers import SyncDriver
from async_endpoints_celery.intake import HeadersLike, Intake, QueryLike, as_uuid
from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.listing import JobPage, check_limit, job_filter
from async_endpoints_celery.submission import Submitter


class SyncEndpoints:
    """The synchronous twins of `AsyncEndpoints`' operations: same arguments, same errors."""

    def __init__(self, intake: Intake, submitter: Submitter, driver: SyncDriver) -> None:
        self._intake = intake
        self._submitter = submitter
        self._driver = driver

    def submit(
        self,
        name: str,
        request: Any = None,
        *,
        headers: HeadersLike | None = None,
        route_params: Mapping[str, Any] | None = None,
        query_params: QueryLike | None = None,
        job_id: UUID | str | None = None,
        owner: str | None = None,
        delay_seconds: float | None = None,
    ) -> Job:
        submission = self._intake.from_python(
            name,
            request,
            headers=headers,
            route_params=route_params,
            query_params=query_params,
            job_id=job_id,
            owner=owner,
            delay_seconds=delay_seconds,
        )
        return self._driver.run(self._submitter.submit(submission)).job

    def get_job(self, job_id: UUID | str) -> Job | None:
        return self._driver.run(self._submitter.get(as_uuid(job_id)))

    def cancel_job(self, job_id: UUID | str) -> Job:
        return self._driver.run(self._submitter.cancel(as_uuid(job_id)))

    def retry_job(self, job_id: UUID | str) -> Job:
        return self._driver.run(self._submitter.retry(as_uuid(job_id)))

    def list_jobs(
        self,
        status: JobStatus | str | None = None,
        name: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        matches = job_filter(status, name)
        check_limit(limit)
        return JobPage.of(self._driver.run(self._submitter.page(matches, limit, cursor)))
