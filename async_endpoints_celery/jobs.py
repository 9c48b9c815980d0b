"""The record of a job, its six states and the moves between them.

The Lua scripts enforce the moves; `TRANSITIONS` says them in Python, and a test holds the two (and the chart
in the documentation) together.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import IntEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel

from async_endpoints_celery.errors import AsyncEndpointError


class JobStatus(IntEnum):
    """Where a job is in its life; `str(status)` is the word on the wire."""

    QUEUED = 100
    SCHEDULED = 200
    IN_PROGRESS = 300
    COMPLETED = 400
    FAILED = 500
    CANCELED = 600

    @property
    def word(self) -> str:
        """The status as clients and Redis spell it."""
        return _WORDS[self]

    @property
    def is_over(self) -> bool:
        """Whether the job has ended: nothing but a retry by hand moves it any more."""
        return self in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELED)

    @property
    def is_waiting(self) -> bool:
        """Whether the job waits for a worker, and so counts towards `maximum_queue_size`."""
        return self in (JobStatus.QUEUED, JobStatus.SCHEDULED)

    @classmethod
    def parse(cls, value: JobStatus | int | str) -> JobStatus:
        """The status of a word ("InProgress"), a number or a member.

        Raises:
            ValueError: no status is called so.
        """
        if isinstance(value, str):
            for status, word in _WORDS.items():
                if word.lower() == value.lower():
                    return status
            raise ValueError(f"{value!r} is no job status; they are {', '.join(_WORDS.values())}")
        return cls(value)

    def __str__(self) -> str:
        return _WORDS[self]


_WORDS = {
    JobStatus.QUEUED: "Queued",
    JobStatus.SCHEDULED: "Scheduled",
    JobStatus.IN_PROGRESS: "InProgress",
    JobStatus.COMPLETED: "Completed",
    JobStatus.FAILED: "Failed",
    JobStatus.CANCELED: "Canceled",
}

#: Every legal move; whatever is not here is refused.
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    # Queued → Scheduled is a delayed submission, made in the submit step itself.
    JobStatus.QUEUED: frozenset({JobStatus.IN_PROGRESS, JobStatus.SCHEDULED, JobStatus.CANCELED}),
    JobStatus.SCHEDULED: frozenset({JobStatus.IN_PROGRESS, JobStatus.QUEUED, JobStatus.CANCELED}),
    JobStatus.IN_PROGRESS: frozenset(
        {
            JobStatus.COMPLETED,
            JobStatus.FAILED,
            JobStatus.SCHEDULED,
            JobStatus.QUEUED,
            JobStatus.CANCELED,
        }
    ),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.CANCELED: frozenset({JobStatus.QUEUED}),
}


def _wire_time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Status = Annotated[
    JobStatus,
    BeforeValidator(JobStatus.parse),
    PlainSerializer(str, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "enum": list(_WORDS.values()), "title": "JobStatus"}),
]
Moment = Annotated[datetime, PlainSerializer(_wire_time, return_type=str, when_used="json")]


class Progress(BaseModel):
    """How far a running job is, as its handler last reported."""

    model_config = ConfigDict(frozen=True)

    percent: float
    message: str | None = None


class Job(BaseModel):
    """The record of a job, as it was when it was read. Immutable; `model_dump_json(by_alias=True)` is the wire form."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)

    id: UUID
    name: str
    status: Status
    retry_count: int = 0
    max_retries: int = 0
    created_at: Moment
    started_at: Moment | None = None
    completed_at: Moment | None = None
    last_updated_at: Moment
    result: Any = None
    error: AsyncEndpointError | None = None
    progress: Progress | None = None
    #: Whose job it is; never part of a response.
    owner: str | None = Field(default=None, exclude=True)
    #: Rises with every change of the record; the ETag and the ids of events are made of it.
    version: int = Field(default=1, exclude=True)
