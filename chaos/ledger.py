"""What really ran: an append-only file, outside the system under test, and the verdict drawn from it."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID


class Ledger:
    """One line for each start and end of an attempt. Appending a short line is atomic on a local file system."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, event: str, job_id: UUID, run: str) -> None:
        line = {"event": event, "job": str(job_id), "run": run, "pid": os.getpid(), "at": time.time()}
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
        finally:
            os.close(handle)

    def read(self) -> list[Attempt]:
        """All attempts, in the order of their starts."""
        attempts: dict[str, Attempt] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            entry = json.loads(line)
            if entry["event"] == "start":
                attempts[entry["run"]] = Attempt(entry["job"], entry["pid"], entry["at"])
            else:
                attempts[entry["run"]].end = entry["at"]
        return sorted(attempts.values(), key=lambda attempt: attempt.start)


@dataclass
class Attempt:
    """One run of a handler. Times in seconds since the epoch; `end` is None when it never came to its end."""

    job: str
    pid: int
    start: float
    end: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What the ledger proves."""

    attempts: int
    interrupted: int
    overlapping: int
    #: Seconds from the kill of a process to the recovery of the job it ran, by what was killed.
    recoveries: Mapping[str, list[float]]


def judge(
    attempts: Iterable[Attempt],
    kills: Mapping[int, tuple[float, str]],
    recovered: Mapping[str, list[float]],
) -> Verdict:
    """Compare the attempts with the kills, pid → (time, what was killed), and the recoveries, job → times."""
    by_job: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        by_job[attempt.job].append(attempt)
    total = interrupted = overlapping = 0
    recoveries: dict[str, list[float]] = defaultdict(list)
    for runs in by_job.values():
        total += len(runs)
        for attempt, following in zip(runs, [*runs[1:], None], strict=True):
            killed_at, kind = kills.get(attempt.pid, (None, ""))
            end = attempt.end
            if end is None:
                interrupted += 1
                end = killed_at
            if following is None:
                continue
            if end is None or following.start < end:
                overlapping += 1
            elif attempt.end is None and killed_at is not None:
                # It was waiting again by then; when its turn came depends on how long the queue was.
                times = [at for at in recovered.get(attempt.job, []) if killed_at <= at <= following.start]
                recoveries[kind].append(min(times, default=following.start) - killed_at)
    return Verdict(total, interrupted, overlapping, recoveries)
