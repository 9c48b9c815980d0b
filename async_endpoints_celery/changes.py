"""Being told of changes: one subscription connection per event loop, however many clients wait.

Every script that changes a record publishes on the job's own channel (scripts/prelude.lua). A watch is told that there
was a change; what it was, its owner reads from the record. After a lost connection all watches are told, for nobody
knows what was missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from async_endpoints_celery.errors import StoreUnavailable
from async_endpoints_celery.keys import Keys
from async_endpoints_celery.servers import ANSWER_WITHIN, Server, Subscription, SubscriptionRefused

logger = logging.getLogger("async_endpoints_celery")

#: Seconds before a lost subscription is tried again.
RECONNECT_SECONDS = 0.2


class Watch:
    """Tells one waiting client that its job has changed."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def tell(self) -> None:
        self._changed.set()

    async def wait(self, seconds: float) -> bool:
        """Whether there was a change since the last call, or within so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        changed = self._changed.is_set()
        self._changed.clear()
        return changed


class Changes:
    """The watches of one process; each event loop has a feed of its own."""

    def __init__(self, server: Server, keys: Keys) -> None:
        self._server = server
        self._keys = keys
        self._feeds: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Feed] = weakref.WeakKeyDictionary()

    @asynccontextmanager
    async def watching(self, job_id: str) -> AsyncIterator[Watch]:
        """A watch that misses nothing from now on.

        Raises:
            StoreUnavailable: Redis did not confirm the subscription.
        """
        feed, channel = self._feed(), self._keys.changes(job_id)
        watch = await feed.add(channel)
        try:
            yield watch
        finally:
            await feed.remove(channel, watch)

    def _feed(self) -> _Feed:
        loop = asyncio.get_running_loop()
        feed = self._feeds.get(loop)
        if feed is None or feed.pid != os.getpid():
            feed = self._feeds[loop] = _Feed(self._server.subscription, self._keys.changes("-"))
        return feed

    async def close(self) -> None:
        """Ends the running loop's feed."""
        feed = self._feeds.pop(asyncio.get_running_loop(), None)
        if feed is not None:
            await feed.close()


class _Feed:
    """The subscription of one event loop. Its reader owns the connection: makes it, and after a loss makes it anew."""

    def __init__(self, subscribe: Callable[[], Subscription], home: str) -> None:
        self.pid = os.getpid()
        self._subscribe = subscribe
        # A channel of its own, on which nobody speaks: a subscription to none could not be read.
        self._home = home
        self._watches: dict[str, set[Watch]] = {}
        self._confirmed: dict[str, asyncio.Event] = {}
        # Connected, and so open to further channels; None while there is no connection.
        self._subscription: Subscription | None = None
        self._subscribing = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self._refused: SubscriptionRefused | None = None

    async def add(self, channel: str) -> Watch:
        watch = Watch()
        self._watches.setdefault(channel, set()).add(watch)
        confirmed = self._confirmed.setdefault(channel, asyncio.Event())
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                if self._reading is None:
                    self._reading = asyncio.create_task(self._read())
                if not confirmed.is_set():
                    await self._subscribe_to(channel)
                    await confirmed.wait()
            if self._refused is not None:
                raise self._refused
        except SubscriptionRefused:
            await self.remove(channel, watch)
            raise
        except (TimeoutError, StoreUnavailable) as error:
            await self.remove(channel, watch)
            raise StoreUnavailable("Redis did not confirm the subscription") from error
        except asyncio.CancelledError:
            await self.remove(channel, watch)
            raise
        return watch

    async def _subscribe_to(self, channel: str) -> None:
        """Where there is no connection yet, the reader subscribes to everything once it has made one."""
        async with self._subscribing:
            if self._subscription is not None:
                await self._subscription.subscribe(channel)

    async def remove(self, channel: str, watch: Watch) -> None:
        watches = self._watches.get(channel)
        if watches is None or watch not in watches:
            return
        watches.discard(watch)
        if watches:
            return
        del self._watches[channel]
        self._confirmed.pop(channel, None)
        with contextlib.suppress(StoreUnavailable):
            async with self._subscribing:
                if self._subscription is not None and channel not in self._watches:
                    await self._subscription.unsubscribe(channel)

    async def _read(self) -> None:
        """Connect, hand on what comes, and begin again after every loss."""
        while True:
            subscription = self._subscribe()
            try:
                async with self._subscribing:
                    await subscription.subscribe(self._home, *self._watches)
                    self._subscription = subscription
                for watches in list(self._watches.values()):
                    for watch in watches:
                        watch.tell()  # nobody knows what was missed
                async for kind, channel in subscription.messages():
                    self._handle(kind, channel)
            except SubscriptionRefused as error:
                logger.warning("nobody can wait for jobs: %s", error)
                self._refused = error
                for confirmed in self._confirmed.values():
                    confirmed.set()
            except Exception as error:  # this task must not end: every waiting client depends on it
                logger.warning("the subscription to changes was lost, trying again: %s", error)
            finally:
                self._subscription = None
                await subscription.close()
            await asyncio.sleep(RECONNECT_SECONDS)

    def _handle(self, kind: str, channel: str) -> None:
        if kind == "subscribe":
            self._refused = None
            confirmed = self._confirmed.get(channel)
            if confirmed is not None:
                confirmed.set()
        elif kind == "message":
            for watch in self._watches.get(channel, ()):
                watch.tell()

    async def close(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
