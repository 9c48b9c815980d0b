"""The registry of handlers: what is known of each, and the checks that make a wrong one fail at start."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic import PydanticUserError, TypeAdapter

from async_endpoints_celery.context import AsyncContext
from async_endpoints_celery.errors import ConfigurationError
from async_endpoints_celery.results import MethodResult
from async_endpoints_celery.retry import RetryPolicy
from async_endpoints_celery.settings import MAX_SECONDS, Settings

#: Names the tasks of this package use themselves.
RESERVED_NAMES = frozenset({"sweep"})
_NAME = re.compile(r"[^\W_][\w.:/-]{0,199}")


class HandlerOptions(TypedDict, total=False):
    """What a registration may say of its handler (see `AsyncEndpoints.handler`). Times in seconds."""

    max_retries: int | None
    retry_delay_base_seconds: float | None
    retry_delay_max_seconds: float | None
    retry_jitter: float | None
    retry_on: Iterable[type[BaseException]]
    do_not_retry_on: Iterable[type[BaseException]]
    timeout_seconds: float | None
    queue: str | None
    priority: int | None
    retention_seconds: float | None


@dataclass(frozen=True)
class RegisteredHandler:
    """A handler with everything the registration said about it. Times in seconds."""

    name: str
    target: Callable[..., Any]
    #: The request model (anything pydantic validates), or None for a handler without a body.
    request_type: Any
    #: What the handler returns, unwrapped from `MethodResult`; `Any` where it does not say.
    result_type: Any
    is_async: bool
    retry: RetryPolicy
    timeout_seconds: float
    retention_seconds: float
    queue: str | None = None
    priority: int | None = None

    @cached_property
    def request_adapter(self) -> TypeAdapter[Any] | None:
        return None if self.request_type is None else TypeAdapter(self.request_type)

    def call(self, context: AsyncContext[Any]) -> Any:
        """The handler's return value, an awaitable if it is async; a class gets a fresh instance."""
        target: Callable[..., Any] = self.target
        if inspect.isclass(self.target):
            target = self.target().handle  # type: ignore[attr-defined]  # checked at registration
        return target(context)


class HandlerRegistry:
    """The handlers of one `AsyncEndpoints`, by name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._by_name: dict[str, RegisteredHandler] = {}

    def __iter__(self) -> Iterator[RegisteredHandler]:
        return iter(self._by_name.values())

    def get(self, name: str) -> RegisteredHandler | None:
        return self._by_name.get(name)

    def find(self, target: Any) -> RegisteredHandler:
        """The registration of a function or class.

        Raises:
            ConfigurationError: it is not registered, or under several names.
        """
        found = [handler for handler in self if handler.target == target]  # == for bound methods
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(repr(handler.name) for handler in found)
            raise ConfigurationError(f"{_label(target)} is registered as {names}: give the route one of these names")
        raise ConfigurationError(
            f"{_label(target)} is not a registered handler: decorate it with @endpoints.handler(…), or give its job"
            " name (and body= its request model)"
        )

    def add(
        self, name: str | None, target: Any, names: Mapping[str, Any], options: HandlerOptions
    ) -> RegisteredHandler:
        """Check and keep a handler.

        Args:
            name: the job's name, by default the function's.
            target: a function, or a class with `handle`.
            names: what annotations may refer to besides the handler's own globals (a caller's locals).
            options: what the registration says; the settings say the rest.

        Raises:
            ConfigurationError: the name is taken or unusable, the signature or an option is wrong.
        """
        function = _handling_function(target)
        name = check_name(getattr(target, "__name__", None) if name is None else name)
        if name in RESERVED_NAMES:
            raise ConfigurationError(f"the job name {name!r} is used by this package itself: choose another")
        if name in self._by_name:
            raise ConfigurationError(f"a handler named {name!r} is registered already: names are unique")
        request_type, result_type = _types(function, inspect.isclass(target), names)
        number = functools.partial(_number, options, self._settings)
        handler = RegisteredHandler(
            name=name,
            target=target,
            request_type=request_type,
            result_type=result_type,
            is_async=_is_async(function),
            retry=RetryPolicy(
                max_retries=number("max_retries", "default_max_retries", low=0),
                base_seconds=number("retry_delay_base_seconds", low=0),
                max_seconds=number("retry_delay_max_seconds", low=0),
                jitter=number("retry_jitter", low=0, high=1),
                retry_on=_exception_types("retry_on", options.get("retry_on", (Exception,))),
                do_not_retry_on=_exception_types("do_not_retry_on", options.get("do_not_retry_on", ())),
            ),
            timeout_seconds=number("timeout_seconds", "job_timeout_seconds", low=1),
            retention_seconds=number("retention_seconds", low=1),
            queue=_queue(options.get("queue")),
            priority=_priority(options.get("priority")),
        )
        try:
            _ = handler.request_adapter
        except PydanticUserError as error:
            raise ConfigurationError(
                f"handler {name!r}: pydantic cannot validate {request_type!r}: {error.message}"
            ) from None
        self._by_name[name] = handler
        return handler


def check_name(name: Any) -> str:
    """Raises ConfigurationError for a job name that could not be a Celery task's."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} is no job name: begin with a letter or digit, go on with letters, digits and _ . : / -"
            " (200 characters at most)"
        )
    return name


def _handling_function(target: Any) -> Callable[..., Any]:
    """The function that takes the context: the target itself, or a class's `handle`."""
    if inspect.isclass(target):
        handle = getattr(target, "handle", None)
        if not callable(handle):
            raise ConfigurationError(f"{_label(target)} has no method handle(self, context)")
        try:
            inspect.signature(target).bind()
        except TypeError:
            raise ConfigurationError(
                f"{_label(target)} cannot be made without arguments, and each job gets a fresh instance: give its"
                " parameters defaults"
            ) from None
        except ValueError:
            pass  # a class without a readable signature: calling it will tell
        return cast(Callable[..., Any], handle)
    if not callable(target):
        raise ConfigurationError(f"{target!r} is no handler: give a function or a class with handle(self, context)")
    return cast(Callable[..., Any], target)


def _types(function: Callable[..., Any], is_method: bool, names: Mapping[str, Any]) -> tuple[Any, Any]:
    """The request type and the result type that the annotations tell."""
    label = _label(function)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"{label} is a generator: a handler returns its result once")
    parameters = list(inspect.signature(function).parameters.values())[1 if is_method else 0 :]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    by_name_only = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    if not parameters or len(required) > 1 or parameters[0].kind in by_name_only:
        raise ConfigurationError(
            f"{label}{inspect.signature(function)} must take exactly one argument, the context:"
            " AsyncContext[RequestModel], or AsyncContext for a job without a body"
        )
    hints = _hints(function, names)
    annotation = hints.get(parameters[0].name, AsyncContext)
    if annotation is Any:
        annotation = AsyncContext
    origin = get_origin(annotation) or annotation
    if not (inspect.isclass(origin) and issubclass(origin, AsyncContext)):
        raise ConfigurationError(
            f"the argument {parameters[0].name!r} of {label} is annotated {annotation!r}: it gets an AsyncContext"
            " (AsyncContext[RequestModel])"
        )
    request_type = get_args(annotation)[0] if get_args(annotation) else None
    if request_type is type(None) or isinstance(request_type, TypeVar):
        request_type = None
    return request_type, _result_type(hints.get("return", Any))


def _result_type(annotation: Any) -> Any:
    if get_origin(annotation) is MethodResult:
        return get_args(annotation)[0]
    return Any if annotation is MethodResult or isinstance(annotation, TypeVar) else annotation


def _hints(function: Callable[..., Any], names: Mapping[str, Any]) -> dict[str, Any]:
    target = inspect.unwrap(function)
    if not inspect.isroutine(target) and not inspect.isclass(target):
        target = getattr(target, "func", None) or type(target).__call__
    try:
        return get_type_hints(target, localns=dict(names), include_extras=True)
    except NameError as error:
        raise ConfigurationError(
            f"an annotation of {_label(function)} cannot be resolved ({error}): define the model at module level"
        ) from None
    except (TypeError, AttributeError):
        return {}  # a builtin or C function has no annotations to read


def _is_async(function: Callable[..., Any]) -> bool:
    target = inspect.unwrap(function)
    while hasattr(target, "func"):
        target = target.func
    return inspect.iscoroutinefunction(target) or (
        not inspect.isroutine(target) and inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004
    )


def _number(
    options: HandlerOptions,
    settings: Settings,
    option: str,
    setting: str | None = None,
    *,
    low: float,
    high: float = MAX_SECONDS,
) -> Any:
    """The option's value, or the setting's where the registration does not say."""
    value, default = options.get(option), getattr(settings, setting or option)
    if value is None:
        return default
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigurationError(f"{option}={value!r} is not a {'whole ' if whole else ''}number")
    if not low <= value <= high:
        raise ConfigurationError(f"{option}={value!r}: it must be from {low} to {high}")
    return value if whole else float(value)


def _queue(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigurationError(f"queue={value!r} is not the name of a queue")
    return value


def _priority(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255):
        raise ConfigurationError(f"priority={value!r}: it must be a whole number from 0 to 255")
    return value


def _exception_types(name: str, value: Any) -> tuple[type[BaseException], ...]:
    if not inspect.isclass(value) and not isinstance(value, Iterable):
        raise ConfigurationError(f"{name}={value!r} is no exception type, and no collection of them")
    types = (value,) if inspect.isclass(value) else tuple(value)
    for entry in types:
        if not (inspect.isclass(entry) and issubclass(entry, BaseException)):
            raise ConfigurationError(f"{name} holds {entry!r}, which is no exception type")
    return types


def _label(target: Any) -> str:
    return getattr(target, "__qualname__", None) or repr(target)
