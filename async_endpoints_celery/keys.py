"""The names of everything in Redis, built here and nowhere else.

    ae:job:<id>       hash    the record (fields in codec.py)
    ae:request:<id>   string  the captured request, until the job completed
    ae:waiting        zset    Queued and Scheduled jobs → when the sweep dispatches them (again)
    ae:running        zset    InProgress jobs           → when their lease ends
    ae:ended          zset    jobs that are over        → when their retention ends
    ae:jobs           zset    all jobs                  → when they were created
    ae:claimed        hash    how far the queue of each job name is (scripts/judge.lua)
    ae:sweep          hash    when the sweep last ran
    ae:secret         string  what ids derived from Idempotency-Key are keyed with
    ae:changes:<id>   channel "<version> <status>" for each change of a job

All scores are milliseconds since the epoch by the clock of Redis.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """The key names under one prefix."""

    prefix: str = "ae"

    @property
    def waiting(self) -> str:
        return f"{self.prefix}:waiting"

    @property
    def running(self) -> str:
        return f"{self.prefix}:running"

    @property
    def ended(self) -> str:
        return f"{self.prefix}:ended"

    @property
    def jobs(self) -> str:
        return f"{self.prefix}:jobs"

    @property
    def claimed(self) -> str:
        return f"{self.prefix}:claimed"

    @property
    def sweep(self) -> str:
        return f"{self.prefix}:sweep"

    @property
    def secret(self) -> str:
        return f"{self.prefix}:secret"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}:job:{job_id}"

    def request(self, job_id: str) -> str:
        return f"{self.prefix}:request:{job_id}"

    def changes(self, job_id: str) -> str:
        return f"{self.prefix}:changes:{job_id}"

    def of_job(self, job_id: str) -> list[str]:
        """KEYS 1–7 of every script that moves one job, in the order of scripts/prelude.lua."""
        own = [self.job(job_id), self.request(job_id)]
        return [*own, self.waiting, self.running, self.ended, self.jobs, self.claimed]
