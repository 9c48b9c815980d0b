"""The lease keeper: the one thread of a worker node that watches over everything the node runs.

It renews leases, hears of cancels and lost leases, and ends what is past its deadline in a pool that cannot interrupt
it. It lives in the worker's main process, so a handler that never lets go of its own process's interpreter lock keeps
its job all the same.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from async_endpoints_celery.codec import milliseconds
from async_endpoints_celery.errors import StoreUnavailable
from async_endpoints_celery.execution import DEADLINE_GRACE
from async_endpoints_celery.operations import ROUND_SECONDS, Operations
from async_endpoints_celery.store import SyncStore

logger = logging.getLogger("async_endpoints_celery")

#: A lease is renewed this often within its life, at least: one lost call must not lose the job.
RENEWALS_PER_LEASE = 3
#: Seconds a handler has to heed a cancel before its pool process is interrupted.
CANCEL_GRACE = 5.0
#: What billiard interrupts a pool process with; it becomes SoftTimeLimitExceeded there.
INTERRUPT = signal.SIGUSR1


@dataclass(slots=True)
class _Held:
    runner: str
    #: The pool process that runs the job, if it is another one than ours.
    child: int | None
    since: float = field(default_factory=time.monotonic)
    canceling_since: float | None = None


class LeaseKeeper:
    """One thread, and one call to Redis per round for all jobs of the node."""

    def __init__(self, store: SyncStore, operations: Operations, lease_seconds: float) -> None:
        self._store = store
        self._operations = operations
        self._lease_ms = milliseconds(lease_seconds)
        self._interval = min(lease_seconds / RENEWALS_PER_LEASE, ROUND_SECONDS)
        self._held: dict[str, _Held] = {}
        self._deadlines: dict[str, tuple[float, Callable[[], None]]] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = 0

    @property
    def is_here(self) -> bool:
        """Whether the keeper of this node runs in this very process (it does not in a prefork pool's children)."""
        return self._thread is not None and self._pid == os.getpid()

    def hold(self, job_id: str, runner: str, pid: int | None = None) -> None:
        """Renew this job's lease from now on. `pid` is the process that runs it."""
        self._held[job_id] = _Held(runner, pid if pid != os.getpid() else None)

    def drop(self, job_id: str, runner: str) -> None:
        held = self._held.get(job_id)
        if held is not None and held.runner == runner:
            del self._held[job_id]

    def limit(self, runner: str, seconds: float, overdue: Callable[[], None]) -> None:
        """Call `overdue` from the keeper's thread once `seconds` are over, unless `unlimit` comes first."""
        self._deadlines[runner] = time.monotonic() + seconds, overdue

    def unlimit(self, runner: str) -> None:
        self._deadlines.pop(runner, None)

    def start(self) -> None:
        if self.is_here:
            return
        self._pid = os.getpid()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="async-endpoints-leases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self.is_here and self._thread is not None:
            self._thread.join(timeout=5)
        self._thread = None

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            try:
                self.end_overdue()
                self.renew()
            except StoreUnavailable as error:
                logger.warning("leases not renewed, trying again: %s", error)
            except Exception:
                logger.exception("leases not renewed, trying again")

    def end_overdue(self) -> None:
        now = time.monotonic()
        for runner, (deadline, overdue) in list(self._deadlines.items()):
            if deadline <= now and self._deadlines.pop(runner, None) is not None:
                overdue()

    def renew(self) -> None:
        """One round. Raises StoreUnavailable."""
        grown = time.monotonic() - self._interval
        held = [(job_id, job) for job_id, job in list(self._held.items()) if job.since <= grown]
        if not held:
            return
        runners = [(job_id, job.runner) for job_id, job in held]
        replies = self._store.run(
            self._operations.renew(runners, lease_ms=self._lease_ms, grace_ms=milliseconds(DEADLINE_GRACE))
        )
        for (job_id, job), reply in zip(held, replies, strict=True):
            if reply == "LOST":
                self.drop(job_id, job.runner)
            elif reply == "CANCELING":
                self._interrupt_if_deaf(job_id, job)

    def _interrupt_if_deaf(self, job_id: str, job: _Held) -> None:
        """A handler that does not heed a cancel in time is interrupted, where there is a process to interrupt."""
        now = time.monotonic()
        job.canceling_since = job.canceling_since or now
        if job.child is None or now - job.canceling_since < CANCEL_GRACE:
            return
        if self._held.get(job_id) is job:
            job.canceling_since = now  # and again, should it swallow this
            with suppress(ProcessLookupError):
                os.kill(job.child, INTERRUPT)
