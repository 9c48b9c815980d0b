"""What a job should be: a small model in Python, whose moves are those of `TRANSITIONS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from async_endpoints_celery.jobs import TRANSITIONS, JobStatus
from tests.jobs_in_redis import FAILURE, LOST, OVERDUE

QUEUED, SCHEDULED, IN_PROGRESS = JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.IN_PROGRESS
COMPLETED, FAILED, CANCELED = JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELED

RECOVERY_LIMIT = 2

#: What the writes of a runner make of a running job. Heard again in that state, they are answered "OK" again.
ENDS_OF_AN_ATTEMPT = {"complete": COMPLETED, "fail": FAILED, "canceled": CANCELED, "reschedule": SCHEDULED}


@dataclass
class Model:
    """What a job should be."""

    id: str
    status: JobStatus
    max_retries: int
    attempt: int = 1
    fence: int = 0
    retries: int = 0
    #: The number of the last message of this attempt among them, and whether any went out.
    copy: int = 0
    published: bool = True
    canceling: bool = False
    overdue: bool = False
    leased: bool = False
    due: bool = False
    error: str | None = None
    result: str | None = None
    runner: str = ""
    #: The whole record when it completed.
    final: Any = None
    history: list[JobStatus] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history.append(self.status)

    def move(self, status: JobStatus) -> None:
        assert status is self.status or status in TRANSITIONS[self.status], f"{self.status} → {status}"
        if status is not IN_PROGRESS:
            self.canceling = self.overdue = self.leased = False
            self.runner = ""
        self.due = False
        if status.is_waiting and not self.status.is_waiting:
            self.copy, self.published = 0, True
        self.status = status
        self.history.append(status)

    def claim(self, runner: str) -> None:
        self.move(IN_PROGRESS)
        self.fence += 1
        self.runner, self.leased = runner, True

    def end_attempt(self, script: str) -> None:
        self.move(ENDS_OF_AN_ATTEMPT[script])
        if script == "reschedule":
            self.attempt, self.retries, self.error = self.attempt + 1, self.retries + 1, FAILURE
        elif script == "fail":
            self.error = FAILURE
        elif script == "complete":
            self.result, self.error = "42", None

    def release(self) -> None:
        self.fence += 1
        self.move(CANCELED if self.canceling else QUEUED)

    def lose_worker(self) -> str:
        self.fence += 1
        failure = OVERDUE if self.overdue else LOST
        if self.canceling:
            self.move(CANCELED)
            return "CANCELED"
        self.error = failure
        if self.retries >= min(self.max_retries, RECOVERY_LIMIT):
            self.move(FAILED)
            return "FAILED"
        self.retries += 1
        self.move(QUEUED)
        return "QUEUED"

    def retry(self) -> None:
        self.move(QUEUED)
        self.attempt, self.retries = self.attempt + 1, 0
        self.error = self.result = None
