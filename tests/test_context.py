"""What a handler receives; made by hand, as in a user's unit test."""

import asyncio
from collections.abc import Awaitable
from uuid import UUID, uuid4

import pytest
from starlette.datastructures import Headers, QueryParams

from async_endpoints_celery import AsyncContext
from async_endpoints_celery.context import DONE, JobCanceled


class Recorder:
    """An attempt that remembers what its handler said."""

    def __init__(self, canceled: bool = False) -> None:
        self.canceled = canceled
        self.reports: list[tuple[float, str | None]] = []

    def report_progress(self, percent: float, message: str | None) -> Awaitable[None]:
        self.reports.append((percent, message))
        return DONE

    def cancellation_requested(self) -> bool:
        return self.canceled


class TestMadeByHand:
    def test_nothing_is_needed(self) -> None:
        context: AsyncContext[None] = AsyncContext()
        assert context.request is None
        assert isinstance(context.job_id, UUID)
        assert (context.job_name, context.retry_count, context.max_retries, context.owner) == ("", 0, 0, None)
        assert (dict(context.headers), context.route_params, dict(context.query_params)) == ({}, {}, {})
        assert not context.cancellation_requested
        context.raise_if_canceled()

    def test_everything_can_be_given(self) -> None:
        job_id = uuid4()
        context = AsyncContext(
            {"n": 1},
            headers={"X-Tenant": "acme"},
            route_params={"shop": 7},
            query_params="a=1&a=2",
            job_id=job_id,
            job_name="Order",
            retry_count=2,
            max_retries=5,
            owner="ada",
        )
        assert context.request == {"n": 1}
        assert context.route_params == {"shop": 7}
        assert context.query_params.getlist("a") == ["1", "2"]
        assert (context.job_id, context.job_name, context.owner) == (job_id, "Order", "ada")
        assert (context.retry_count, context.max_retries) == (2, 5)

    def test_two_have_two_ids(self) -> None:
        assert AsyncContext().job_id != AsyncContext().job_id

    def test_route_params_are_a_copy(self) -> None:
        given = {"a": 1}
        AsyncContext(route_params=given).route_params["a"] = 2
        assert given == {"a": 1}

    def test_progress_goes_nowhere(self) -> None:
        context: AsyncContext[None] = AsyncContext()
        context.report_progress(50)

        async def handler() -> None:
            await context.report_progress(100, "done")

        asyncio.run(handler())


class TestHeaders:
    def test_case_does_not_matter(self) -> None:
        headers = AsyncContext(headers={"X-Tenant": "acme", "accept": "a/b"}).headers
        assert headers["x-tenant"] == headers["X-TENANT"] == headers.get("x-Tenant") == "acme"
        assert "ACCEPT" in headers
        assert headers.get("missing") is None
        with pytest.raises(KeyError):
            headers["missing"]

    def test_repeated_names_are_kept_in_order(self) -> None:
        headers = AsyncContext(headers=[("Via", "one"), ("X", "y"), ("via", "two")]).headers
        assert headers.getlist("VIA") == ["one", "two"]
        assert headers["via"] == "one"

    def test_starlettes_own_pass(self) -> None:
        given = Headers({"a": "b"})
        assert AsyncContext(headers=given).headers is given

    def test_latin_1_as_http_has_it_and_other_text_escaped(self) -> None:
        headers = AsyncContext(headers={"X-City": "Zürich", "X-Smile": "☺"}).headers
        assert headers["x-city"] == "Zürich"
        assert headers["x-smile"] == "\\u263a"


class TestQueryParams:
    @pytest.mark.parametrize("given", [QueryParams("a=1&b=2&a=3"), "a=1&b=2&a=3", [("a", "1"), ("b", "2"), ("a", "3")]])
    def test_order_and_repetition_survive(self, given: QueryParams | str | list[tuple[str, str]]) -> None:
        assert AsyncContext(query_params=given).query_params.multi_items() == [("a", "1"), ("b", "2"), ("a", "3")]

    def test_a_mapping(self) -> None:
        assert AsyncContext(query_params={"a": "1"}).query_params["a"] == "1"


class TestProgress:
    @pytest.mark.parametrize(
        ("given", "shown"), [(0, 0.0), (33, 33.0), (99.5, 99.5), (-5, 0.0), (150, 100.0), (float("inf"), 100.0)]
    )
    def test_is_clipped(self, given: float, shown: float) -> None:
        attempt = Recorder()
        AsyncContext(attempt=attempt).report_progress(given, "step")
        assert attempt.reports == [(shown, "step")]
        assert isinstance(attempt.reports[0][0], float)

    def test_a_message_is_optional(self) -> None:
        attempt = Recorder()
        AsyncContext(attempt=attempt).report_progress(1)
        assert attempt.reports == [(1.0, None)]

    @pytest.mark.parametrize("wrong", [float("nan"), "half"])
    def test_no_number(self, wrong: float) -> None:
        attempt = Recorder()
        with pytest.raises(ValueError):
            AsyncContext(attempt=attempt).report_progress(wrong)
        assert attempt.reports == []


class TestCancellation:
    def test_is_asked_of_the_attempt_each_time(self) -> None:
        attempt = Recorder()
        context: AsyncContext[None] = AsyncContext(attempt=attempt)
        context.raise_if_canceled()
        attempt.canceled = True
        assert context.cancellation_requested
        with pytest.raises(JobCanceled, match=str(context.job_id)):
            context.raise_if_canceled()

    def test_passes_through_except_exception(self) -> None:
        assert not issubclass(JobCanceled, Exception)
        assert issubclass(JobCanceled, asyncio.CancelledError)
