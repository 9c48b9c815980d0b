"""`AsyncEndpoints`: one Celery app, one job store, the settings and the handlers, bound together."""

from __future__ import annotations

import functools
import secrets
import sys
import weakref
from collections.abc import (
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cached_property
from typing import Any, TypeVar, Unpack
from uuid import UUID

from celery import Celery

from async_endpoints_celery.broker import broker_server, early_broker_url, own_memory_broker
from async_endpoints_celery.changes import Changes
from async_endpoints_celery.dispatch import Dispatcher
from async_endpoints_celery.drivers import AsyncDriver, SyncDriver
from async_endpoints_celery.embedded import EmbeddedWorker
from async_endpoints_celery.errors import ConfigurationError
from async_endpoints_celery.handlers import HandlerOptions, HandlerRegistry
from async_endpoints_celery.intake import HeadersLike, HttpSubmission, Intake, QueryLike, as_uuid
from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.keys import Keys
from async_endpoints_celery.listing import JobListing, JobPage, check_limit, job_filter
from async_endpoints_celery.operations import Operations
from async_endpoints_celery.responses import RequestRefused, ResponseFactories
from async_endpoints_celery.runtime import WorkerRuntime
from async_endpoints_celery.servers import Server, StoreLike, open_server
from async_endpoints_celery.settings import Settings
from async_endpoints_celery.store import AsyncStore, SyncStore
from async_endpoints_celery.submission import Accepted, Submitter
from async_endpoints_celery.sync import SyncEndpoints
from async_endpoints_celery.tasks import join_worker, register_sweep, register_task
from async_endpoints_celery.waiting import Waiter

#: Seconds a worker goes on trying to write what became of a job.
WORKER_PATIENCE = 120.0

F = TypeVar("F", bound=Callable[..., Any])

_bound: weakref.WeakKeyDictionary[Celery, set[str]] = weakref.WeakKeyDictionary()


class AsyncEndpoints:
    """Job endpoints on a Celery app: the registry of handlers, and everything that can be done to jobs.

    Args:
        celery: the app whose broker carries the jobs and whose workers run them. Nothing of its configuration changes.
        store: where records live: a URL (`redis://`, `rediss://`, `unix://`), an existing `redis.Redis` or
            `redis.asyncio.Redis` client, `"memory://"` for development, or None for the broker's own Redis.
        settings: the options; by default from `ASYNC_ENDPOINTS_*` environment variables.
        responses: your own HTTP answers.
        owner: a FastAPI dependency returning the caller's identity. It is stored with the job, and every route that
            shows or changes a job answers 404 to anyone else.

    Raises:
        ConfigurationError: something that cannot work; the message says how to mend it.
    """

    def __init__(
        self,
        celery: Celery,
        *,
        store: StoreLike | None = None,
        settings: Settings | None = None,
        responses: ResponseFactories | None = None,
        owner: Callable[..., Any] | None = None,
    ) -> None:
        if not isinstance(celery, Celery):
            raise ConfigurationError(f"AsyncEndpoints takes a Celery app, not {celery!r}")
        if owner is not None and not callable(owner):
            raise ConfigurationError(
                f"owner={owner!r} is no dependency: give a function that returns the caller's identity"
            )
        self.celery = celery
        self.settings = settings if settings is not None else Settings()
        self.responses = (responses or ResponseFactories()).completed()
        self.owner = owner
        self.registry = HandlerRegistry(self.settings)
        self._store = store
        self._secret: str | None = None
        broker = early_broker_url(celery)
        if broker is not None and broker.startswith("memory://"):
            own_memory_broker(celery)
        if store is None:
            _check_broker_is_redis(broker)
        else:
            _ = self.server
        _claim_prefixes(celery, self.settings)
        self.runtime = WorkerRuntime(celery, self.settings, self.registry, self.operations, self._worker_driver)
        register_sweep(celery, self.runtime)
        join_worker(celery, self.runtime)

    # The parts, made when they are first used: reading the broker's address loads the app's configuration, and that
    # must not happen before the user is done with it.

    @cached_property
    def server(self) -> Server:
        if self._store is not None:
            return open_server(self._store)
        server = broker_server(self.celery)
        if server is None:
            _check_broker_is_redis(str(self.celery.conf.broker_write_url))
            raise ConfigurationError("the broker's Redis cannot be used as the store: give store=")
        return server

    @cached_property
    def operations(self) -> Operations:
        return Operations(Keys(self.settings.key_prefix))

    @cached_property
    def dispatcher(self) -> Dispatcher:
        return Dispatcher(self.celery, self.server, self.settings)

    @cached_property
    def intake(self) -> Intake:
        return Intake(self.registry, self.settings)

    @cached_property
    def submitter(self) -> Submitter:
        return Submitter(self.operations, self.dispatcher, self.settings.maximum_queue_size)

    @cached_property
    def _async(self) -> AsyncDriver:
        return AsyncDriver(AsyncStore(self.server), self.dispatcher)

    @cached_property
    def changes(self) -> Changes:
        return Changes(self.server, self.operations.keys)

    @cached_property
    def waiter(self) -> Waiter:
        return Waiter(self.operations, self._async, self.changes)

    @cached_property
    def _sync_store(self) -> SyncStore:
        return SyncStore(self.server)

    def _worker_driver(self) -> SyncDriver:
        # A handler's result is worth waiting for: while Redis is away nobody else can take the job either.
        return SyncDriver(self._sync_store, self.dispatcher, patience=WORKER_PATIENCE)

    @cached_property
    def sync(self) -> SyncEndpoints:
        """The same operations for code without an event loop: scripts, Django views, Celery tasks."""
        return SyncEndpoints(self.intake, self.submitter, SyncDriver(self._sync_store, self.dispatcher))

    # Handlers.

    def handler(
        self,
        name: str | None = None,
        *,
        max_retries: int | None = None,
        retry_delay_base_seconds: float | None = None,
        retry_delay_max_seconds: float | None = None,
        retry_jitter: float | None = None,
        retry_on: Iterable[type[BaseException]] = (Exception,),
        do_not_retry_on: Iterable[type[BaseException]] = (),
        timeout_seconds: float | None = None,
        queue: str | None = None,
        priority: int | None = None,
        retention_seconds: float | None = None,
    ) -> Callable[[F], F]:
        """Register the decorated function as the handler of the jobs called `name`, its own name by default.

        Args:
            name: the job's name.
            max_retries: retries after the first attempt.
            retry_delay_base_seconds: before the first retry; doubled for each one after it.
            retry_delay_max_seconds: what no delay exceeds.
            retry_jitter: spread of a delay, as a fraction of it.
            retry_on: the exceptions after which it is tried again.
            do_not_retry_on: exceptions of these after which it is not.
            timeout_seconds: how long an attempt may take from its claim.
            queue: the Celery queue; otherwise the app's `task_routes` say.
            priority: the message's priority, as the broker understands it.
            retention_seconds: how long the record is kept after the job ended.

        What is left out comes from the settings.

        Raises:
            ConfigurationError: the name is taken, the signature or an option is wrong.
        """
        if name is not None and not isinstance(name, str):
            raise ConfigurationError('write @endpoints.handler() with parentheses, or @endpoints.handler("Name")')
        names = sys._getframe(1).f_locals  # a model defined in a function is found here
        options = HandlerOptions(
            max_retries=max_retries,
            retry_delay_base_seconds=retry_delay_base_seconds,
            retry_delay_max_seconds=retry_delay_max_seconds,
            retry_jitter=retry_jitter,
            retry_on=retry_on,
            do_not_retry_on=do_not_retry_on,
            timeout_seconds=timeout_seconds,
            queue=queue,
            priority=priority,
            retention_seconds=retention_seconds,
        )

        def register(function: F) -> F:
            self._register(name, function, names, options)
            return function

        return register

    def add_handler(self, name: str, handler: Callable[..., Any], **options: Unpack[HandlerOptions]) -> None:
        """Register a function, or a class with `handle(self, context)`, of which each job gets a fresh instance.

        Args:
            name: the job's name.
            handler: sync or async.
            options: as for `handler`.

        Raises:
            ConfigurationError: the name is taken, the signature or an option is wrong.
        """
        unknown = options.keys() - HandlerOptions.__annotations__.keys()
        if unknown:
            known = ", ".join(HandlerOptions.__annotations__)
            raise ConfigurationError(f"handlers have no option {', '.join(sorted(unknown))}; they have {known}")
        self._register(name, handler, sys._getframe(1).f_locals, options)

    def _register(self, name: str | None, handler: Any, names: Mapping[str, Any], options: HandlerOptions) -> None:
        register_task(self.celery, self.runtime, self.registry.add(name, handler, names, options))

    # Jobs.

    async def submit(
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
        """Submit a job as a route would.

        Args:
            name: a registered handler's, or one that other code registers.
            request: an instance of the request model, or a JSON value that fits it.
            headers, route_params, query_params: what the handler's context shall show.
            job_id: the id to use; the same submission again returns the job that is there.
            owner: whose job it is.
            delay_seconds: run it this much later.

        Raises:
            pydantic.ValidationError: `request` does not fit the handler's model.
            JobConflict: another job has this id.
            QueueFull, PayloadTooLarge, StoreUnavailable: nothing was accepted.
        """
        submission = self.intake.from_python(
            name,
            request,
            headers=headers,
            route_params=route_params,
            query_params=query_params,
            job_id=job_id,
            owner=owner,
            delay_seconds=delay_seconds,
        )
        return (await self._async.run(self.submitter.submit(submission))).job

    async def get_job(self, job_id: UUID | str) -> Job | None:
        """The job's record, or None. Raises StoreUnavailable."""
        return await self._async.run(self.submitter.get(as_uuid(job_id)))

    async def cancel_job(self, job_id: UUID | str) -> Job:
        """Cancel the job: at once while it waits; a running one is told, and its record still says InProgress.

        Raises:
            JobNotFound: no such job.
            JobConflict: it is over.
            StoreUnavailable: Redis did not answer.
        """
        return await self._async.run(self.submitter.cancel(as_uuid(job_id)))

    async def retry_job(self, job_id: UUID | str) -> Job:
        """Run a Failed or Canceled job again, with all its retries.

        Raises:
            JobNotFound: no such job.
            JobConflict: it is neither Failed nor Canceled.
            StoreUnavailable: Redis did not answer.
        """
        return await self._async.run(self.submitter.retry(as_uuid(job_id)))

    def list_jobs(
        self,
        status: JobStatus | str | None = None,
        name: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobListing:
        """Jobs, newest first: await it for one page, or iterate (`async for`) over all.

        Raises:
            ValueError: no such status, a limit below 1, a cursor that is not one.
        """
        matches = job_filter(status, name)
        check_limit(limit)

        async def fetch(place: str | None) -> JobPage:
            return JobPage.of(await self._async.run(self.submitter.page(matches, limit, place)))

        return JobListing(fetch, cursor)

    # For the routes.

    async def list_own_jobs(
        self, *, status: str | None, name: str | None, limit: int, cursor: str | None, owner: str | None
    ) -> JobPage:
        matches = job_filter(status, name, owner)
        return JobPage.of(await self._async.run(self.submitter.page(matches, limit, cursor)))

    async def submit_request(self, request: HttpSubmission) -> Accepted:
        """Submit what an HTTP request asks for."""
        try:
            submission = self.intake.from_http(request)
        except ValueError as error:
            raise RequestRefused(400, "BODY_NOT_JSON", f"the body cannot be stored: {error}") from None
        return await self._async.run(self.submitter.submit(submission))

    async def secret(self) -> str:
        """What ids derived from `Idempotency-Key` are keyed with: one for the whole deployment, made once.

        Asked for each time, and put back if Redis has lost it, so that all web processes agree at any moment.
        """
        self._secret = await self._async.store.run(self.operations.secret(self._secret or secrets.token_hex(32)))
        return self._secret

    # The application's life.

    def lifespan(self, app: Any = None, *, embedded_worker: bool = False) -> Any:
        """For `FastAPI(lifespan=endpoints.lifespan)`: closes the connections when the application stops.

        Args:
            app: given by FastAPI.
            embedded_worker: also run a Celery worker and the sweep inside this process, for development:
                `FastAPI(lifespan=endpoints.lifespan(embedded_worker=True))`.
        """
        if app is None:
            return functools.partial(self._lifespan, embedded_worker=embedded_worker)
        return self._lifespan(app, embedded_worker=embedded_worker)

    def _lifespan(self, app: Any, *, embedded_worker: bool) -> AbstractAsyncContextManager[None]:
        return self._running(embedded_worker)

    @asynccontextmanager
    async def _running(self, embedded_worker: bool) -> AsyncIterator[None]:
        worker = EmbeddedWorker(self.celery, self.settings, self._async, self.runtime) if embedded_worker else None
        if worker is not None:
            await worker.start()
        try:
            yield
        finally:
            if worker is not None:
                await worker.stop()
            await self.aclose()

    async def aclose(self) -> None:
        """Close the connections of the running event loop and of this process's threads."""
        await self.changes.close()
        await self._async.store.close()
        self.close()

    def close(self) -> None:
        """Close the connections of this process's threads."""
        self._sync_store.close()
        self.dispatcher.close()


def _check_broker_is_redis(url: str | None) -> None:
    """None: not known yet."""
    if url is not None and ";" in url:
        raise ConfigurationError(
            "the Celery app has several brokers: say which server keeps the job records, for instance"
            ' AsyncEndpoints(celery_app, store="redis://localhost:6379/0")'
        )
    if url is None or url.split("://")[0] in {"redis", "rediss", "redis+socket", "valkey", "valkeys"}:
        return
    scheme = url.split("://")[0] or "none"
    raise ConfigurationError(
        f"the Celery app's broker is not Redis ({scheme}): say where the job records live, for instance"
        ' AsyncEndpoints(celery_app, store="redis://localhost:6379/0") (set the broker before, if it is meant to be'
        " Redis)"
    )


def _claim_prefixes(celery: Celery, settings: Settings) -> None:
    """Two AsyncEndpoints on one app share nothing: neither task names nor records."""
    mine = {f"task_prefix {settings.task_prefix!r}", f"key_prefix {settings.key_prefix!r}"}
    taken = _bound.setdefault(celery, set())
    if mine & taken:
        raise ConfigurationError(
            f"this Celery app has an AsyncEndpoints with {' and '.join(sorted(mine & taken))} already: use that one, or"
            " give each its own task_prefix and key_prefix"
        )
    taken |= mine
