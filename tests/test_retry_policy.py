"""When a failed attempt is tried again: pure arithmetic and a few rules."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_endpoints_celery.errors import JobFailed
from async_endpoints_celery.retry import RetryPolicy

deterministic = settings(derandomize=True, database=None, deadline=None)


class TestDelay:
    def test_two_four_eight_by_default(self) -> None:
        assert [RetryPolicy().delay(retry) for retry in (1, 2, 3, 4)] == [2.0, 4.0, 8.0, 16.0]

    def test_doubles_from_the_base(self) -> None:
        assert [RetryPolicy(base_seconds=0.5).delay(retry) for retry in (1, 2, 3)] == [0.5, 1.0, 2.0]

    def test_no_base_is_no_delay(self) -> None:
        assert RetryPolicy(base_seconds=0).delay(5) == 0

    def test_the_cap(self) -> None:
        policy = RetryPolicy(max_seconds=5)
        assert [policy.delay(retry) for retry in (1, 2, 3, 4)] == [2, 4, 5, 5]
        assert RetryPolicy().delay(13) == 3600

    @pytest.mark.parametrize("retry", [1_000, 1_100, 10**9])
    def test_the_cap_also_where_a_power_would_overflow(self, retry: int) -> None:
        assert RetryPolicy().delay(retry) == 3600
        assert RetryPolicy(base_seconds=1e300, max_seconds=7).delay(retry) == 7

    @pytest.mark.parametrize(("spread", "expected"), [(0.0, 6.0), (0.5, 8.0), (1.0, 10.0)])
    def test_jitter_spreads_to_both_sides(self, spread: float, expected: float) -> None:
        assert RetryPolicy(jitter=0.25).delay(3, lambda: spread) == pytest.approx(expected)

    def test_jitter_really_spreads(self) -> None:
        random.seed(1)
        assert len({RetryPolicy(jitter=0.5).delay(1) for _ in range(50)}) > 40

    @deterministic
    @given(
        retry=st.integers(1, 2_000),
        base=st.floats(0, 1e6),
        cap=st.floats(0, 1e6),
        jitter=st.floats(0, 1),
        spread=st.floats(0, 1),
    )
    def test_bounds(self, retry: int, base: float, cap: float, jitter: float, spread: float) -> None:
        plain = RetryPolicy(base_seconds=base, max_seconds=cap).delay(retry)
        delay = RetryPolicy(base_seconds=base, max_seconds=cap, jitter=jitter).delay(retry, lambda: spread)
        assert math.isfinite(delay)
        assert 0 <= delay <= cap
        assert plain * (1 - jitter) * (1 - 1e-9) <= delay <= plain * (1 + jitter) * (1 + 1e-9)


class TestNextDelay:
    def test_follows_the_retries_done(self) -> None:
        policy = RetryPolicy()
        assert [policy.next_delay(done, 3, ValueError()) for done in range(5)] == [2, 4, 8, None, None]

    def test_the_records_limit_counts_not_the_policys(self) -> None:
        assert RetryPolicy(max_retries=0).next_delay(0, 1, ValueError()) == 2
        assert RetryPolicy(max_retries=9).next_delay(1, 1, ValueError()) is None

    def test_a_failure_that_is_no_exception(self) -> None:
        assert RetryPolicy(retry_on=(KeyError,)).next_delay(0, 3, None) == 2

    @pytest.mark.parametrize("after", [0, 0.5, 120, 10_000])
    def test_retry_after_wins(self, after: float) -> None:
        policy = RetryPolicy(max_seconds=60, jitter=1.0)
        assert policy.next_delay(2, 3, JobFailed("BUSY", "later", retryable=True, retry_after=after)) == after

    def test_retry_after_does_not_win_over_the_limit(self) -> None:
        cause = JobFailed("BUSY", "later", retryable=True, retry_after=1)
        assert RetryPolicy().next_delay(3, 3, cause) is None

    def test_retry_after_alone_does_not_make_it_retryable(self) -> None:
        assert RetryPolicy().next_delay(0, 3, JobFailed("BUSY", "later", retry_after=1)) is None


class TestAllows:
    @pytest.mark.parametrize(("retryable", "allowed"), [(True, True), (False, False)])
    def test_job_failed_says_it_itself(self, retryable: bool, allowed: bool) -> None:
        cause = JobFailed("CODE", "message", retryable=retryable)
        assert RetryPolicy().allows(cause) is allowed
        assert RetryPolicy(retry_on=(KeyError,)).allows(cause) is allowed

    def test_job_failed_is_not_retryable_by_default(self) -> None:
        assert not RetryPolicy().allows(JobFailed("CODE", "message"))

    def test_retry_on(self) -> None:
        policy = RetryPolicy(retry_on=(LookupError, OSError))
        assert policy.allows(KeyError("x"))
        assert policy.allows(ConnectionError())
        assert not policy.allows(ValueError())

    def test_do_not_retry_on_wins(self) -> None:
        policy = RetryPolicy(retry_on=(LookupError,), do_not_retry_on=(KeyError,))
        assert policy.allows(IndexError())
        assert not policy.allows(KeyError())
        assert policy.next_delay(0, 3, KeyError()) is None

    def test_do_not_retry_on_wins_over_job_failed_too(self) -> None:
        class Busy(JobFailed):
            pass

        policy = RetryPolicy(do_not_retry_on=(Busy,))
        assert not policy.allows(Busy("BUSY", "later", retryable=True, retry_after=1))

    def test_what_is_no_exception_is_not_retried_by_default(self) -> None:
        assert not RetryPolicy().allows(KeyboardInterrupt())
