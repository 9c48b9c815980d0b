"""Lists of jobs, as a caller gets them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.operations import Page


@dataclass(frozen=True)
class JobPage(Sequence[Job]):
    """A page of jobs, newest first; `next_cursor` begins the next one, None after the last."""

    items: list[Job]
    next_cursor: str | None

    @classmethod
    def of(cls, page: Page) -> JobPage:
        return cls(page.jobs, page.next_cursor)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Job: ...

    @overload
    def __getitem__(self, index: slice) -> list[Job]: ...

    def __getitem__(self, index: int | slice) -> Job | list[Job]:
        return self.items[index]

    def __iter__(self) -> Iterator[Job]:
        return iter(self.items)


class JobListing:
    """What `list_jobs` returns: `await` it for a page, `async for` over it for all jobs."""

    def __init__(self, fetch: Callable[[str | None], Awaitable[JobPage]], cursor: str | None) -> None:
        self._fetch = fetch
        self._cursor = cursor

    def __await__(self) -> Generator[Any, None, JobPage]:
        return self._fetch(self._cursor).__await__()

    async def __aiter__(self) -> AsyncIterator[Job]:
        cursor = self._cursor
        while True:
            page = await self._fetch(cursor)
            for job in page:
                yield job
            cursor = page.next_cursor
            if cursor is None:
                return


def job_filter(status: JobStatus | str | None, name: str | None, owner: str | None = None) -> Callable[[Job], bool]:
    wanted = None if status is None else JobStatus.parse(status)

    def matches(job: Job) -> bool:
        return (
            (wanted is None or job.status is wanted)
            and (name is None or job.name == name)
            and (owner is None or job.owner == owner)
        )

    return matches


def check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit={limit}: ask for at least one job")
