"""The Celery edge: the task of each handler, the request that carries it through a worker, and the sweep task."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Any
from uuid import uuid4

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, WorkerLostError
from celery import Celery, Task, bootsteps, signals
from celery.exceptions import Ignore, Reject, Retry
from celery.worker.request import Request

from async_endpoints_celery.broker import broker_server
from async_endpoints_celery.errors import JobFailed, StoreUnavailable
from async_endpoints_celery.execution import (
    Canceled,
    Completed,
    Delivery,
    Failed,
)
from async_endpoints_celery.handlers import RegisteredHandler
from async_endpoints_celery.jobs import JobStatus
from async_endpoints_celery.operations import Refused
from async_endpoints_celery.runtime import WorkerRuntime
from async_endpoints_celery.worker import (
    HARD_LIMIT_GRACE,
    SOFT_LIMIT_GRACE,
    HiddenBodies,
)

logger = logging.getLogger("async_endpoints_celery")

#: The header with which the worker's main process tells its pool process who the runner is.
RUNNER_HEADER = "async_endpoints_runner"
#: Seconds between two looks at whether a pool process has died.
POOL_CHECK_SECONDS = 1.0
BEAT_ENTRY = "async-endpoints-sweep"


#: Exceptions that would tell Celery something else than that the handler failed.
_CELERYS_OWN = (Ignore, Reject, Retry, MemoryError, SystemExit, KeyboardInterrupt, WorkerLostError, Terminated)


class JobRevoked(Ignore):
    """Ends the Celery task of a canceled job."""


class JobRequest(Request):
    """A job's message in the worker's main process: it holds the lease, and shows nobody the client's data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._runner = uuid4().hex
        self.request_dict[RUNNER_HEADER] = self._runner

    @property
    def _runtime(self) -> WorkerRuntime:
        return self.task.runtime  # type: ignore[no-any-return]

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        self._runtime.keeper.hold(self.id, self._runner, pid)
        super().on_accepted(pid, time_accepted)

    def acknowledge(self) -> None:
        # With acks_late=False (a user's task_annotations) this is the beginning, not the end; the lease is then dropped
        # when Redis says that the job is over.
        if self.task.acks_late:
            self._runtime.keeper.drop(self.id, self._runner)
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        self._runtime.keeper.drop(self.id, self._runner)
        super().reject(requeue=requeue)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        exc = exc_info.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        # billiard tells of a lost process in these three ways; the message then goes back to its queue.
        is_lost = isinstance(exc, (WorkerLostError, SystemExit, KeyboardInterrupt))
        if is_lost and not self._already_cancelled and not self._already_revoked:
            self._runtime.lost(self.id, self.task.job_name, self._runner, requeued=True)
        super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        if isinstance(exc, JobRevoked):
            # What Celery says of a revoked task, so that Flower shows REVOKED.
            self.send_event("task-revoked", terminated=False, signum=None, expired=False)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        super()._announce_revoked(reason, terminated, signum, expired)
        self._runtime.revoked(self.id, self.task.job_name, self._runner)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        # A cold shutdown, or a lost broker connection with worker_cancel_long_running_tasks_on_connection_loss.
        with suppress(NotImplementedError):  # a pool of threads has nothing to kill: what still comes is refused
            super().cancel(pool, signal, emit_retry=emit_retry)
        self._runtime.give_back(self.id, self.task.job_name, self._runner)
        self.reject(requeue=True)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if not soft:
            # The process did not heed its soft limit and is killed; Celery acknowledges the message.
            self._runtime.lost(self.id, self.task.job_name, self._runner, requeued=False)
        super().on_timeout(soft, timeout)

    def info(self, safe: bool = False) -> dict[str, Any]:
        # `celery inspect` and Flower ask for the real arguments.
        return super().info(safe=True)  # type: ignore[no-any-return]


class JobTask(Task):
    """The Celery task of one handler. What a job needs is said here, never in the app's configuration."""

    abstract = True
    Request = "async_endpoints_celery.tasks:JobRequest"
    acks_late = True
    acks_on_failure = acks_on_timeout = acks_on_failure_or_timeout = True
    reject_on_worker_lost = True
    # Ours is the lease: Celery's own would publish the arguments where they show.
    retry_on_worker_lost = False
    ignore_result = True
    store_errors_even_if_ignored = False
    track_started = False
    max_retries = None
    serializer = "json"

    runtime: WorkerRuntime
    job_name: str

    def execute(self, attempt: int, request: str, copy: int) -> None:
        """One attempt. Ends as Celery wants to hear it: returning, `Retry`, or the handler's exception."""
        context = self.request
        delivery = Delivery(
            job_id=context.id,
            name=self.job_name,
            attempt=attempt,
            request=request,
            copy=copy,
            runner=context.get(RUNNER_HEADER) or uuid4().hex,
            worker=context.hostname or "",
        )
        try:
            ran = self.runtime.run(delivery, keep_lease=bool(context.is_eager))
        except StoreUnavailable as error:
            logger.warning("job %s goes back to its queue: %s", delivery.job_id, error)
            raise Reject(error, requeue=True) from error
        if isinstance(ran, Refused):
            logger.info("job %s is %s, not waiting for attempt %d", delivery.job_id, ran.status, attempt)
            raise JobRevoked if ran.status is JobStatus.CANCELED else Ignore
        outcome, ending = ran
        if ending.refused:
            logger.warning("job %s was no longer this worker's: its outcome is dropped", delivery.job_id)
            raise Ignore
        match outcome:
            case Completed():
                return
            case Canceled():
                logger.info("job %s was canceled", delivery.job_id)
                raise JobRevoked
            case Failed():
                reason = outcome.cause
                if reason is None or isinstance(reason, _CELERYS_OWN):
                    reason = JobFailed(outcome.error.code, outcome.error.message)
                if ending.retry_in is not None:
                    # The message is out already, in one step with the record: this only tells Celery.
                    raise Retry(exc=reason, when=ending.retry_in)
                raise reason


def register_task(celery: Celery, runtime: WorkerRuntime, handler: RegisteredHandler) -> None:
    """Make the handler's Celery task, named by the handler. Registered lazily: the app is not finalized by it."""

    def run(self: JobTask, attempt: int, request: str, copy: int = 0) -> None:
        return self.execute(attempt, request, copy)

    run.__name__ = run.__qualname__ = handler.name
    run.__doc__ = handler.target.__doc__
    run.__module__ = getattr(handler.target, "__module__", None) or __name__
    options: dict[str, Any] = {}
    if handler.queue is not None:
        options["queue"] = handler.queue
    if handler.priority is not None:
        options["priority"] = handler.priority
    grace = SOFT_LIMIT_GRACE if handler.is_async else 0.0
    # Inherited: an attribute of the task's own class is deprecated.
    base = type("JobTask", (JobTask,), {**options, "abstract": True})
    celery.task(
        bind=True,
        base=base,
        name=f"{runtime.settings.task_prefix}{handler.name}",
        shared=False,
        runtime=runtime,
        job_name=handler.name,
        soft_time_limit=handler.timeout_seconds + grace,
        time_limit=handler.timeout_seconds + HARD_LIMIT_GRACE,
    )(run)


def register_sweep(celery: Celery, runtime: WorkerRuntime) -> None:
    """The sweep as a task, and its place in the beat schedule unless the user gave it one."""
    settings = runtime.settings
    name = f"{settings.task_prefix}sweep"
    # A second AsyncEndpoints on the same app has a prefix of its own, and needs a sweep of its own.
    is_first = settings.task_prefix == type(settings).model_fields["task_prefix"].default
    entry_name = BEAT_ENTRY if is_first else f"{BEAT_ENTRY}-{settings.task_prefix.strip('.')}"
    interval = settings.recovery_check_interval_seconds

    def sweep() -> dict[str, int]:
        """Dispatch due and lost jobs, recover those of dead workers, prune the indices."""
        return runtime.sweep()

    # Nobody knows whether a worker listens: without an end a stopped one finds a pile of sweeps. On the task, for
    # schedulers that know nothing of the entry's options.
    base = type("SweepTask", (Task,), {"abstract": True, "expires": max(60.0, 2 * interval)})
    celery.task(name=name, base=base, shared=False, ignore_result=True, serializer="json")(sweep)

    def add_to_schedule(sender: Any = None, **_: Any) -> None:
        entry = {
            "task": name,
            "schedule": interval,
            "options": {"expires": max(60.0, 2 * interval), "ignore_result": True},
        }
        celery.conf.beat_schedule.setdefault(entry_name, entry)

    if celery.finalized:
        add_to_schedule()
    else:
        celery.on_after_finalize.connect(add_to_schedule, weak=False)


def join_worker(celery: Celery, runtime: WorkerRuntime) -> None:
    """Have every worker of the app keep leases, sweep once at its start, and fail jobs that nobody handles."""

    def sweep_once() -> None:
        try:
            runtime.impatient_driver.run(runtime.sweeper.sweep())
        except StoreUnavailable as error:
            logger.warning("no sweep at worker start: %s", error)

    class LeaseKeeperStep(bootsteps.StartStopStep):
        name = f"async_endpoints.leases.{id(runtime):x}"
        requires = ("celery.worker.components:Hub", "celery.worker.components:Pool")

        def __init__(self, parent: Any, **kwargs: Any) -> None:
            super().__init__(parent, **kwargs)
            logging.getLogger("celery.worker.consumer.consumer").addFilter(HiddenBodies(runtime.settings.task_prefix))

        def start(self, parent: Any) -> None:
            runtime.prepare()
            runtime.keeper.start()
            maintain_pool = getattr(parent.pool, "maintain_pool", None)
            if parent.hub is not None and maintain_pool is not None:
                # Forked siblings keep each other's exit sentinels open, so billiard notices a killed process only at
                # its own look every five seconds.
                parent.hub.call_repeatedly(POOL_CHECK_SECONDS, maintain_pool)
            threading.Thread(target=sweep_once, name="async-endpoints-sweep", daemon=True).start()

    celery.steps["worker"].add(LeaseKeeperStep)

    class ConnectionLossStep(bootsteps.StartStopStep):
        """Closing a connection that is lost already must not end the worker.

        After a Redis restart kombu 5.7 at times still has an open channel when Celery closes the lost connection for
        the second time; without its transport that is an AttributeError, which Celery takes for unrecoverable.
        """

        name = f"async_endpoints.connection.{id(runtime):x}"
        requires = ("celery.worker.consumer.connection:Connection",)

        def include_if(self, parent: Any) -> bool:
            return broker_server(celery) is not None

        def start(self, parent: Any) -> None:
            close = parent.connection.close

            def close_at_last() -> None:
                with suppress(AttributeError):
                    close()

            parent.connection.close = close_at_last

    celery.steps["consumer"].add(ConnectionLossStep)

    def on_shutdown(sender: Any, **_: Any) -> None:
        # Not as a step: steps stop in reverse order, and the pool still finishes what runs after this one.
        if sender.app is celery:
            runtime.keeper.stop()

    signals.worker_shutdown.connect(on_shutdown, weak=False)

    def on_unknown(sender: Any, message: Any, name: str, id: str, **_: Any) -> None:
        if sender.app is celery and name.startswith(runtime.settings.task_prefix):
            job_name = name.removeprefix(runtime.settings.task_prefix)
            try:
                arguments = message.payload[0]
            except (LookupError, TypeError):
                logger.warning("job %s: a message that is not of this package", id)
                return
            runtime.unknown(id, job_name, arguments, sender.hostname)

    signals.task_unknown.connect(on_unknown, weak=False)
