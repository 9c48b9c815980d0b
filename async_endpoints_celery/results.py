"""What a handler may return instead of raising."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

from async_endpoints_celery.errors import AsyncEndpointError, JobFailed

T = TypeVar("T")


class MethodResult(Generic[T]):
    """The outcome of a handler: a value or a failure.

    Make one with `MethodResult.success(value)` or `MethodResult.failure(why)`; returning the bare value and
    raising an exception say the same.
    """

    __slots__ = ("_cause", "_error", "_value")

    def __init__(
        self,
        value: T | None = None,
        error: AsyncEndpointError | None = None,
        cause: BaseException | None = None,
    ) -> None:
        self._value = value
        self._error = error
        self._cause = cause

    @classmethod
    def success(cls, value: T) -> MethodResult[T]:
        """The job is done and this is its result (a pydantic model, a dataclass or any JSON value)."""
        return cls(value=value)

    @classmethod
    def failure(cls, error: AsyncEndpointError | BaseException | str) -> MethodResult[Any]:
        """The attempt failed: an error, an exception (its type's name is the code) or a message (`UNKNOWN`)."""
        if not isinstance(error, (AsyncEndpointError, BaseException, str)):
            raise TypeError(
                f"MethodResult.failure takes an AsyncEndpointError, an exception or a message, not {error!r}"
            )
        cause = error if isinstance(error, BaseException) else None
        return cls(error=AsyncEndpointError.of(error), cause=cause)

    @property
    def is_success(self) -> bool:
        return self._error is None

    @property
    def is_failure(self) -> bool:
        return self._error is not None

    @property
    def value(self) -> T:
        """The result.

        Raises:
            JobFailed: the outcome is a failure.
        """
        if self._error is not None:
            raise JobFailed(self._error.code, self._error.message)
        return cast(T, self._value)

    @property
    def error(self) -> AsyncEndpointError | None:
        return self._error

    @property
    def cause(self) -> BaseException | None:
        """The exception that the failure was made from, for the retry rules."""
        return self._cause

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MethodResult):
            return NotImplemented
        return self._value == other._value and self._error == other._error

    __hash__ = None  # type: ignore[assignment]  # it holds any value

    def __repr__(self) -> str:
        if self._error is None:
            return f"MethodResult.success({self._value!r})"
        return f"MethodResult.failure({self._error.code!r}, {self._error.message!r})"
