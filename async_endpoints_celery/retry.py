"""When a failed attempt is tried again: pure; failure and record in, decision out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from async_endpoints_celery.errors import JobFailed


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, how late and after which exceptions a handler is tried again. Delays in seconds."""

    max_retries: int = 3
    base_seconds: float = 2.0
    max_seconds: float = 3600.0
    jitter: float = 0.0
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    do_not_retry_on: tuple[type[BaseException], ...] = ()

    def delay(self, retry: int, spread: Callable[[], float] = random.random) -> float:
        """Seconds before retry number `retry` (1, 2, 3 …): base × 2^(retry − 1), capped, spread by the jitter."""
        # 2**1100 overflows a float; long before that the cap has spoken.
        delay = min(self.base_seconds * math.ldexp(1.0, min(retry - 1, 1000)), self.max_seconds)
        if self.jitter:
            delay *= 1 + self.jitter * (2 * spread() - 1)
        return min(delay, self.max_seconds)

    def next_delay(self, retries_done: int, max_retries: int, cause: BaseException | None) -> float | None:
        """Seconds until the next attempt, or None when there is none.

        Args:
            retries_done: the record's retry count.
            max_retries: the record's limit.
            cause: the exception, or None for a failure that is not one (`MethodResult.failure("…")`).
        """
        if retries_done >= max_retries or not self.allows(cause):
            return None
        if isinstance(cause, JobFailed) and cause.retry_after is not None:
            return cause.retry_after
        return self.delay(retries_done + 1)

    def allows(self, cause: BaseException | None) -> bool:
        """Whether a failure of this kind may be tried again at all."""
        if cause is None:
            return True
        if isinstance(cause, self.do_not_retry_on):
            return False
        if isinstance(cause, JobFailed):
            return cause.retryable
        return isinstance(cause, self.retry_on)
