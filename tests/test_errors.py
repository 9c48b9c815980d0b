"""What is kept of a failure, what of it clients may see, and the one base of the package's errors."""

import pickle  # noqa: TID251  # what billiard does with an exception on its way out of a pool process

import pytest

import async_endpoints_celery
from async_endpoints_celery import errors
from async_endpoints_celery.codec import encode_error
from async_endpoints_celery.errors import (
    MAX_CAUSES,
    MAX_MESSAGE_CHARS,
    MAX_STACK_TRACE_CHARS,
    AsyncEndpointError,
    AsyncEndpointsError,
    ExceptionInfo,
    JobFailed,
)
from async_endpoints_celery.results import MethodResult


def raised(exc: BaseException, cause: BaseException | None = None) -> BaseException:
    """The exception with a traceback, from `cause` if there is one."""
    try:
        if cause is None:
            raise exc
        raise exc from cause
    except BaseException as caught:
        return caught


def chain(error: AsyncEndpointError) -> list[ExceptionInfo]:
    found = []
    info = error.exception
    while info is not None:
        found.append(info)
        info = info.inner_exception
    return found


class TestTheTree:
    @pytest.mark.parametrize(
        "name",
        ["ConfigurationError", "JobConflict", "JobNotFound", "PayloadTooLarge", "QueueFull", "StoreUnavailable"],
    )
    def test_one_base(self, name: str) -> None:
        error = getattr(async_endpoints_celery, name)
        assert issubclass(error, AsyncEndpointsError)
        assert str(error("what to do")) == "what to do"

    def test_job_failed_is_the_users_own_word(self) -> None:
        assert not issubclass(JobFailed, AsyncEndpointsError)
        assert issubclass(JobFailed, Exception)


class TestJobFailed:
    def test_defaults(self) -> None:
        error = JobFailed("NO_STOCK", "nothing left")
        assert (error.code, error.message, error.retryable, error.retry_after) == (
            "NO_STOCK",
            "nothing left",
            False,
            None,
        )
        assert str(error) == "NO_STOCK: nothing left"

    def test_options_are_keywords(self) -> None:
        with pytest.raises(TypeError):
            JobFailed("CODE", "message", True)  # type: ignore[call-arg]

    @pytest.mark.parametrize("after", [-1, -0.001, float("nan"), float("inf")])
    def test_retry_after_is_a_number_of_seconds_from_now(self, after: float) -> None:
        with pytest.raises(ValueError, match="retry_after"):
            JobFailed("CODE", "message", retryable=True, retry_after=after)

    def test_leaves_a_pool_process_whole(self) -> None:
        error = pickle.loads(pickle.dumps(JobFailed("CODE", "message", retryable=True, retry_after=3)))  # noqa: S301
        assert (error.code, error.message, error.retryable, error.retry_after) == ("CODE", "message", True, 3)


class TestCodes:
    @pytest.mark.parametrize(
        ("failure", "code", "message"),
        [
            ("no luck", "UNKNOWN", "no luck"),
            (ValueError("bad"), "VALUEERROR", "bad"),
            (KeyError("name"), "KEYERROR", "'name'"),
            (JobFailed("NO_STOCK", "nothing left"), "NO_STOCK", "nothing left"),
            (AsyncEndpointError(code="MINE", message="own"), "MINE", "own"),
        ],
    )
    def test_of(self, failure: AsyncEndpointError | BaseException | str, code: str, message: str) -> None:
        error = AsyncEndpointError.of(failure)
        assert (error.code, error.message) == (code, message)

    def test_the_packages_own(self) -> None:
        names = ["JOB_TIMEOUT", "WORKER_LOST", "HANDLER_NOT_FOUND", "PAYLOAD_INVALID", "UNKNOWN"]
        names += ["RESULT_NOT_SERIALIZABLE", "RESULT_TOO_LARGE"]
        assert [getattr(errors, name) for name in names] == names

    def test_an_error_of_ones_own_stays_the_same(self) -> None:
        error = AsyncEndpointError(code="MINE", message="own")
        assert AsyncEndpointError.of(error) is error

    @pytest.mark.parametrize(
        "failure",
        [
            JobFailed(404, "not there"),  # type: ignore[arg-type]
            JobFailed("CODE", ValueError("the reason")),  # type: ignore[arg-type]
            JobFailed("CODE", None),  # type: ignore[arg-type]
            JobFailed("CODE\ud800", "half a character"),
            JobFailed("CODE", "half a character \ud800"),
            ValueError("half a character \ud800"),
            type("Überlauf", (Exception,), {})("x"),
            AsyncEndpointError(code="CODE", message="half a character \ud800"),
        ],
        ids=["int code", "exception as message", "no message", "code", "message", "exception", "type", "error"],
    )
    def test_whatever_a_handler_raises_can_be_stored(self, failure: AsyncEndpointError | BaseException) -> None:
        """Otherwise its job would not end Failed but lose its lease, and run again."""
        stored = encode_error(AsyncEndpointError.of(failure))
        AsyncEndpointError.model_validate_json(stored.encode())

    def test_an_exception_without_a_readable_message(self) -> None:
        class Mute(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no")

        assert AsyncEndpointError.of(Mute()).message == "<Mute has no readable message>"


class TestTheChainOfCauses:
    def test_types_messages_and_traces(self) -> None:
        error = AsyncEndpointError.of(raised(JobFailed("CODE", "outer"), raised(KeyError("inner"))))
        outer, inner = chain(error)
        assert (outer.type, outer.message) == ("async_endpoints_celery.errors.JobFailed", "CODE: outer")
        assert (inner.type, inner.message) == ("KeyError", "'inner'")
        for info in (outer, inner):
            assert "in raised" in (info.stack_trace or "")

    def test_an_exception_while_handling_another(self) -> None:
        def fail() -> None:
            try:
                raise KeyError("first")
            except KeyError:
                raise ValueError("second")  # noqa: B904

        with pytest.raises(ValueError) as caught:
            fail()
        assert [info.type for info in chain(AsyncEndpointError.of(caught.value))] == ["ValueError", "KeyError"]

    def test_from_none_hides_it(self) -> None:
        def fail() -> None:
            try:
                raise KeyError("first")
            except KeyError:
                raise ValueError("second") from None

        with pytest.raises(ValueError) as caught:
            fail()
        assert [info.type for info in chain(AsyncEndpointError.of(caught.value))] == ["ValueError"]

    def test_a_circle_ends(self) -> None:
        first, second = ValueError("1"), ValueError("2")
        first.__cause__, second.__cause__ = second, first
        assert [info.message for info in chain(AsyncEndpointError.of(first))] == ["1", "2"]

    def test_an_endless_one_ends(self) -> None:
        deep = ValueError("top")
        current: BaseException = deep
        for n in range(50):
            current.__cause__ = ValueError(str(n))
            current = current.__cause__
        assert len(chain(AsyncEndpointError.of(deep))) == MAX_CAUSES

    def test_without_a_traceback(self) -> None:
        (info,) = chain(AsyncEndpointError.of(ValueError("returned, not raised")))
        assert info.stack_trace is None


class TestSize:
    def test_messages_are_clipped(self) -> None:
        for failure in ("x" * 100_000, ValueError("x" * 100_000), JobFailed("CODE", "x" * 100_000)):
            error = AsyncEndpointError.of(failure)
            assert len(error.message) == MAX_MESSAGE_CHARS + 1
            assert all(len(info.message) <= MAX_MESSAGE_CHARS + 1 for info in chain(error))

    def test_traces_keep_their_end(self) -> None:
        # A message of many lines is no part of the trace; a long line of code is.
        scope: dict[str, object] = {}
        exec(compile("def innermost(): raise ValueError('x')", "f" * 50_000, "exec"), scope)
        with pytest.raises(ValueError) as caught:
            scope["innermost"]()  # type: ignore[operator]
        (info,) = chain(AsyncEndpointError.of(caught.value))
        trace = info.stack_trace or ""
        assert len(trace) == MAX_STACK_TRACE_CHARS + 1
        assert trace.startswith("…")
        assert "in innermost" in trace


class TestWithoutStackTraces:
    def test_is_a_copy_and_goes_to_the_bottom(self) -> None:
        error = AsyncEndpointError.of(raised(ValueError("outer"), raised(KeyError("inner"))))
        shown = error.without_stack_traces()
        assert [info.stack_trace for info in chain(shown)] == [None, None]
        assert [(info.type, info.message) for info in chain(shown)] == [
            (info.type, info.message) for info in chain(error)
        ]
        assert all(info.stack_trace for info in chain(error))

    def test_of_an_error_without_an_exception(self) -> None:
        error = AsyncEndpointError(code="CODE", message="message")
        assert error.without_stack_traces() == error

    def test_the_wire_form(self) -> None:
        error = AsyncEndpointError.of(ValueError("bad"))
        assert error.model_dump(by_alias=True) == {
            "code": "VALUEERROR",
            "message": "bad",
            "exception": {"type": "ValueError", "message": "bad", "stackTrace": None, "innerException": None},
        }


class TestMethodResult:
    @pytest.mark.parametrize("value", [None, 0, "", {"a": 1}])
    def test_success(self, value: object) -> None:
        result = MethodResult.success(value)
        assert (result.is_success, result.is_failure, result.value, result.error) == (True, False, value, None)

    def test_failure(self) -> None:
        cause = ValueError("bad")
        result = MethodResult.failure(cause)
        assert (result.is_success, result.is_failure, result.cause) == (False, True, cause)
        assert result.error is not None
        assert result.error.code == "VALUEERROR"
        assert MethodResult.failure("no").error == AsyncEndpointError(code="UNKNOWN", message="no")
        with pytest.raises(JobFailed, match="VALUEERROR: bad"):
            _ = result.value

    @pytest.mark.parametrize("wrong", [None, 5, {"code": "X"}])
    def test_failure_of_what_is_none(self, wrong: object) -> None:
        with pytest.raises(TypeError, match=r"MethodResult\.failure takes"):
            MethodResult.failure(wrong)  # type: ignore[arg-type]

    def test_equality(self) -> None:
        assert MethodResult.success(1) == MethodResult.success(1) != MethodResult.failure("1")
        assert MethodResult.success(1) != 1
