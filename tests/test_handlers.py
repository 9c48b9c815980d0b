"""The registry: what it learns from a handler, and what it refuses at once instead of at the first job."""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel

from async_endpoints_celery import AsyncContext, ConfigurationError, MethodResult, Settings
from async_endpoints_celery.handlers import HandlerOptions, HandlerRegistry, RegisteredHandler, check_name

T = TypeVar("T")


class Order(BaseModel):
    n: int


class Receipt(BaseModel):
    total: int


async def place(context: AsyncContext[Order]) -> Receipt:
    return Receipt(total=context.request.n)


def ping(context: AsyncContext) -> str:
    return "pong"


def add(target: Any, name: str | None = "Job", **options: Any) -> RegisteredHandler:
    return HandlerRegistry(Settings()).add(name, target, {}, HandlerOptions(**options))  # type: ignore[typeddict-item]


class TestWhatItLearns:
    def test_of_an_async_function(self) -> None:
        handler = add(place)
        assert (handler.request_type, handler.result_type, handler.is_async) == (Order, Receipt, True)
        assert handler.request_adapter is not None
        assert handler.request_adapter.validate_python({"n": 1}) == Order(n=1)

    def test_of_a_function_without_a_body(self) -> None:
        handler = add(ping)
        assert (handler.request_type, handler.result_type, handler.is_async) == (None, str, False)
        assert handler.request_adapter is None

    def test_of_one_that_says_nothing(self) -> None:
        handler = add(lambda context: 1)
        assert (handler.request_type, handler.result_type, handler.is_async) == (None, Any, False)

    def test_a_method_result_is_unwrapped(self) -> None:
        def generic(context: AsyncContext[Order]) -> MethodResult[Receipt]:
            return MethodResult.success(Receipt(total=1))

        def bare(context: AsyncContext[Order]) -> MethodResult:
            return MethodResult.failure("no")

        assert add(generic).result_type is Receipt
        assert add(bare).result_type is Any

    def test_any_type_that_pydantic_validates(self) -> None:
        def numbers(context: AsyncContext[list[int]]) -> dict[str, int]:
            return {"sum": sum(context.request)}

        assert add(numbers).request_type == list[int]

    def test_of_a_partial_and_of_a_callable_object(self) -> None:
        class Callee:
            async def __call__(self, context: AsyncContext[Order]) -> int:
                return 1

        def with_more(context: AsyncContext[Order], factor: int) -> int:
            return factor

        assert add(Callee()).is_async
        assert add(Callee()).request_type is Order
        partial = add(functools.partial(with_more, factor=3))
        assert (partial.request_type, partial.is_async) == (Order, False)
        assert partial.call(AsyncContext(Order(n=1))) == 3

    def test_what_a_decorator_wraps(self) -> None:
        def logged(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def wrapper(*args: Any) -> Any:
                return function(*args)

            return wrapper

        handler = add(logged(place))
        assert (handler.request_type, handler.is_async) == (Order, True)

    def test_a_model_of_the_callers_scope(self) -> None:
        class Local(BaseModel):
            n: int

        def handle(context: "AsyncContext[Local]") -> None: ...

        with pytest.raises(ConfigurationError, match=r"handle cannot be resolved.*Local.*module level"):
            add(handle)
        registry = HandlerRegistry(Settings())
        assert registry.add("Job", handle, {"Local": Local}, {}).request_type is Local

    def test_parameters_with_defaults_are_fine(self) -> None:
        def handle(context: AsyncContext[Order], factor: int = 2, *more: int, **options: int) -> int:
            return factor

        assert add(handle).call(AsyncContext(Order(n=1))) == 2


class TestSignatures:
    @pytest.mark.parametrize(
        "handler",
        [
            lambda: None,
            lambda context, other: None,
            lambda context, *, other: None,
            lambda *, context: None,
            lambda **options: None,
        ],
        ids=["none", "two", "a keyword too", "a keyword", "keywords"],
    )
    def test_exactly_one_argument(self, handler: Any) -> None:
        with pytest.raises(ConfigurationError, match="must take exactly one argument, the context"):
            add(handler)

    def test_another_annotation(self) -> None:
        def handle(request: Order) -> None: ...

        with pytest.raises(ConfigurationError, match=r"'request' of .*handle is annotated .*Order.*AsyncContext\["):
            add(handle)

    def test_generators(self) -> None:
        def sync(context: AsyncContext) -> Iterator[int]:
            yield 1

        async def asynchronous(context: AsyncContext) -> AsyncIterator[int]:
            yield 1

        for handler in (sync, asynchronous):
            with pytest.raises(ConfigurationError, match="is a generator"):
                add(handler)

    @pytest.mark.parametrize("thing", [None, 5, "place", Order(n=1)])
    def test_what_cannot_be_called(self, thing: Any) -> None:
        with pytest.raises(ConfigurationError, match="is no handler"):
            add(thing)

    def test_a_request_that_pydantic_does_not_know(self) -> None:
        class Opaque:
            pass

        def handle(context: AsyncContext[Opaque]) -> None: ...

        with pytest.raises(ConfigurationError, match=r"pydantic cannot validate .*Opaque"):
            add(handle)

    def test_nothing_is_kept_of_a_refused_one(self) -> None:
        registry = HandlerRegistry(Settings())
        with pytest.raises(ConfigurationError):
            registry.add("Job", ping, {}, {"timeout_seconds": 0})
        assert list(registry) == []
        registry.add("Job", ping, {}, {})


class TestClasses:
    def test_each_job_gets_a_fresh_instance(self) -> None:
        class Counter:
            def __init__(self, start: int = 0) -> None:
                self.n = start

            async def handle(self, context: AsyncContext[Order]) -> int:
                self.n += 1
                return self.n

        handler = add(Counter)
        assert (handler.request_type, handler.result_type, handler.is_async) == (Order, int, True)
        first, second = (handler.call(AsyncContext(Order(n=1))) for _ in range(2))
        with pytest.raises(StopIteration, match="1"):
            first.send(None)
        with pytest.raises(StopIteration, match="1"):
            second.send(None)

    def test_sync_ones(self) -> None:
        class Ping:
            def handle(self, context: AsyncContext) -> str:
                return "pong"

        handler = add(Ping)
        assert not handler.is_async
        assert handler.call(AsyncContext()) == "pong"
        assert add(Ping, name=None).name == "Ping"

    def test_without_handle(self) -> None:
        with pytest.raises(ConfigurationError, match=r"Order has no method handle\(self, context\)"):
            add(Order)

    def test_that_cannot_be_made_without_arguments(self) -> None:
        @dataclass
        class Needy:
            database: str

            def handle(self, context: AsyncContext) -> None: ...

        with pytest.raises(ConfigurationError, match="Needy cannot be made without arguments"):
            add(Needy)

    def test_handle_takes_the_context(self) -> None:
        class Deaf:
            def handle(self) -> None: ...

        with pytest.raises(ConfigurationError, match="exactly one argument"):
            add(Deaf)


class TestNames:
    def test_by_default_the_functions(self) -> None:
        assert add(place, name=None).name == "place"

    def test_are_unique(self) -> None:
        registry = HandlerRegistry(Settings())
        registry.add("Job", ping, {}, {})
        with pytest.raises(ConfigurationError, match="'Job' is registered already"):
            registry.add("Job", place, {}, {})
        assert registry.get("Job") is next(iter(registry))
        assert registry.get("Other") is None

    def test_the_packages_own(self) -> None:
        with pytest.raises(ConfigurationError, match="'sweep' is used by this package"):
            add(ping, name="sweep")

    @pytest.mark.parametrize("name", ["A", "ProcessData", "shop.orders:place/v2", "a-b_c", "7up", "Größe", "x" * 200])
    def test_good_ones(self, name: str) -> None:
        assert check_name(name) == name

    @pytest.mark.parametrize("name", ["", " ", "_a", "-a", ".a", "a b", "a\n", "a|b", "a*", "x" * 201, None, 5, b"a"])
    def test_bad_ones(self, name: Any) -> None:
        with pytest.raises(ConfigurationError, match="is no job name"):
            check_name(name)

    def test_a_lambda_needs_one(self) -> None:
        with pytest.raises(ConfigurationError, match="'<lambda>' is no job name"):
            add(lambda context: 1, name=None)


class TestFind:
    def test_by_the_function(self) -> None:
        registry = HandlerRegistry(Settings())
        handler = registry.add("Job", ping, {}, {})
        assert registry.find(ping) is handler
        with pytest.raises(ConfigurationError, match="place is not a registered handler"):
            registry.find(place)

    def test_under_two_names(self) -> None:
        registry = HandlerRegistry(Settings())
        registry.add("A", ping, {}, {})
        registry.add("B", ping, {}, {})
        with pytest.raises(ConfigurationError, match="ping is registered as 'A', 'B'"):
            registry.find(ping)

    def test_by_a_bound_method(self) -> None:
        class Shop:
            def place(self, context: AsyncContext[Order]) -> int:
                return 1

        shop, registry = Shop(), HandlerRegistry(Settings())
        handler = registry.add("Job", shop.place, {}, {})
        assert registry.find(shop.place) is handler


class TestOptions:
    def test_the_settings_say_the_rest(self) -> None:
        settings = Settings(
            default_max_retries=1,
            retry_delay_base_seconds=3,
            retry_delay_max_seconds=4,
            retry_jitter=0.5,
            job_timeout_seconds=6,
            retention_seconds=7,
        )
        handler = HandlerRegistry(settings).add("Job", ping, {}, {})
        retry = handler.retry
        assert (retry.max_retries, retry.base_seconds, retry.max_seconds, retry.jitter) == (1, 3, 4, 0.5)
        assert (retry.retry_on, retry.do_not_retry_on) == ((Exception,), ())
        assert (handler.timeout_seconds, handler.retention_seconds) == (6, 7)
        assert (handler.queue, handler.priority) == (None, None)

    def test_an_option_wins(self) -> None:
        handler = add(
            ping,
            max_retries=0,
            retry_delay_base_seconds=0,
            retry_delay_max_seconds=9,
            retry_jitter=1,
            retry_on=[ValueError, KeyError],
            do_not_retry_on=TypeError,
            timeout_seconds=1,
            queue="slow",
            priority=0,
            retention_seconds=1.5,
        )
        retry = handler.retry
        assert (retry.max_retries, retry.base_seconds, retry.max_seconds, retry.jitter) == (0, 0, 9, 1)
        assert (retry.retry_on, retry.do_not_retry_on) == ((ValueError, KeyError), (TypeError,))
        assert (handler.timeout_seconds, handler.retention_seconds) == (1, 1.5)
        assert (handler.queue, handler.priority) == ("slow", 0)

    @pytest.mark.parametrize(
        ("option", "wrong"),
        [
            *[("max_retries", value) for value in (-1, 1.5, "3", True)],
            *[("retry_delay_base_seconds", value) for value in (-1, "2", True, float("inf"), float("nan"))],
            *[("retry_delay_max_seconds", value) for value in (-1, float("inf"))],
            *[("retry_jitter", value) for value in (-0.1, 1.1, float("nan"))],
            *[("timeout_seconds", value) for value in (0, 0.9, -1, float("inf"), "60", True)],
            *[("retention_seconds", value) for value in (0, 0.5, float("inf"), 1e17)],
            *[("priority", value) for value in (-1, 256, 1.5, "9", True)],
            *[
                (option, value)
                for option in ("retry_on", "do_not_retry_on")
                for value in (int, [ValueError, int], [ValueError()], "ValueError", 5)
            ],
        ],
    )
    def test_a_wrong_one_is_named(self, option: str, wrong: Any) -> None:
        with pytest.raises(ConfigurationError, match=option):
            add(ping, **{option: wrong})
