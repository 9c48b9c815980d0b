"""A Celery worker and the sweep inside the web process, for development: nothing else has to run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import Celery
from celery.concurrency.thread import TaskPool
from celery.utils.nodenames import anon_nodename
from celery.worker import WorkController

from async_endpoints_celery.drivers import AsyncDriver
from async_endpoints_celery.errors import StoreUnavailable
from async_endpoints_celery.runtime import WorkerRuntime
from async_endpoints_celery.settings import Settings

logger = logging.getLogger("async_endpoints_celery")

#: Handlers that run at once.
CONCURRENCY = 10
#: Seconds between two looks into Celery's in-memory broker, whose default of one second is all one would notice.
MEMORY_POLLING_SECONDS = 0.02
#: Seconds the worker has to become ready, and to finish what it runs when the application stops.
START_WITHIN = 10.0
STOP_WITHIN = 10.0


class _ThreadPool(TaskPool):
    """Celery's thread pool, whose threads know which app they work for.

    A worker process makes its app the default for all its threads; here other apps may live in the same process.
    """

    executor: ThreadPoolExecutor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.executor.shutdown()
        self.executor = ThreadPoolExecutor(self.limit, "async-endpoints-pool", initializer=self.app.set_current)


class _QuietWorker(WorkController):
    """A worker that belongs to another program: no banner, no signal handlers, and it says when it is ready."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ready = threading.Event()
        super().__init__(*args, ready_callback=lambda _: self.ready.set(), **kwargs)


class EmbeddedWorker:
    """Starts and stops with the application's lifespan."""

    def __init__(self, celery: Celery, settings: Settings, driver: AsyncDriver, runtime: WorkerRuntime) -> None:
        self._celery = celery
        self._settings = settings
        self._driver = driver
        self._runtime = runtime
        self._worker: _QuietWorker | None = None
        self._thread: threading.Thread | None = None
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the worker consumes. Raises RuntimeError when it does not start."""
        if str(self._celery.conf.broker_url).startswith("memory://"):
            options = dict(self._celery.conf.broker_transport_options or {})
            options.setdefault("polling_interval", MEMORY_POLLING_SECONDS)
            self._celery.conf.broker_transport_options = options
        self._celery.finalize()
        self._worker = _QuietWorker(
            app=self._celery,
            hostname=anon_nodename(),
            pool_cls=_ThreadPool,
            concurrency=CONCURRENCY,
            without_heartbeat=True,
            without_mingle=True,
            without_gossip=True,
        )
        self._thread = threading.Thread(target=self._work, name="async-endpoints-worker", daemon=True)
        self._thread.start()
        if not await asyncio.to_thread(self._worker.ready.wait, START_WITHIN):
            raise RuntimeError(f"the embedded Celery worker was not ready within {START_WITHIN:g} s; see its log")
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    def _work(self) -> None:
        assert self._worker is not None
        self._celery.set_current()
        self._worker.start()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._settings.recovery_check_interval_seconds)
            try:
                await self._driver.run(self._runtime.sweeper.sweep())
            except StoreUnavailable as error:
                logger.warning("no sweep: %s", error)

    async def stop(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeping
        if self._worker is not None and self._thread is not None:
            await asyncio.to_thread(self._worker.stop)
            await asyncio.to_thread(self._thread.join, STOP_WITHIN)
        self._runtime.loop.stop()
