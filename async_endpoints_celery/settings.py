"""Every option, its unit and its default; from arguments or `ASYNC_ENDPOINTS_*` environment variables."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from async_endpoints_celery.errors import ConfigurationError

ENV_PREFIX = "ASYNC_ENDPOINTS_"

#: A hundred years: Redis cannot keep what is much longer, and nobody means it.
MAX_SECONDS = 100 * 365 * 86_400
Interval = Annotated[float, Field(ge=1, le=MAX_SECONDS, allow_inf_nan=False)]
Delay = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Bytes = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """The options of one `AsyncEndpoints`. Seconds are floats: leases, intervals and timeouts at least 1.

    Raises:
        ConfigurationError: a value that cannot work, an option that does not exist.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    #: Retries after the first attempt, for handlers that do not say.
    default_max_retries: Count = 3
    #: Seconds before the first retry; doubled for each one after it.
    retry_delay_base_seconds: Delay = 2.0
    #: Seconds no back-off exceeds.
    retry_delay_max_seconds: Delay = 3600.0
    #: Spread of a delay as a fraction of it: 0.1 means ± 10 %.
    retry_jitter: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    #: Jobs that may wait (Queued or Scheduled) before submissions are refused; None for no limit.
    maximum_queue_size: Annotated[int, Field(ge=1)] | None = 50
    #: Seconds an attempt may take from its claim.
    job_timeout_seconds: Interval = 1800.0
    #: Seconds a job stays with a worker that no longer renews its lease.
    job_claim_timeout_seconds: Interval = 30.0
    #: Whether the sweep recovers the jobs of dead workers.
    enable_distributed_job_recovery: bool = True
    #: Seconds between two sweeps.
    recovery_check_interval_seconds: Interval = 15.0
    #: Times a job may lose its worker; min(max_retries, this) counts.
    recovery_maximum_retries: Count = 3
    #: Seconds a record is kept after its job ended.
    retention_seconds: Interval = 86_400.0
    #: Bytes of a request body (and of a submitted payload).
    max_payload_bytes: Bytes = 1024 * 1024
    #: Bytes of a result as JSON.
    max_result_bytes: Bytes = 4 * 1024 * 1024
    #: Bytes of captured header names and values together.
    max_header_bytes: Bytes = 16 * 1024
    #: Headers that are never captured, whatever their case.
    dropped_headers: Annotated[frozenset[str], NoDecode] = frozenset(
        {"authorization", "proxy-authorization", "cookie", "x-api-key"}
    )
    #: Whether clients see stack traces; the record keeps them either way.
    include_stack_traces: bool = False
    #: Seconds a worker may hold the message of a delayed job in its memory; longer delays wait in Redis.
    message_countdown_max_seconds: Delay = 300.0
    #: Seconds a client may ask to wait with `Prefer: wait=N`.
    max_wait_seconds: Delay = 60.0
    #: What every key in Redis begins with.
    key_prefix: str = "ae"
    #: What every Celery task of a job is named with.
    task_prefix: str = "async_endpoints."

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_explain(error)) from None

    @field_validator("dropped_headers", mode="before")
    @classmethod
    def _header_names(cls, value: Any) -> Any:
        # An environment variable is one string: "cookie, x-api-key", or a JSON array as pydantic-settings has it.
        if isinstance(value, str):
            value = json.loads(value) if value.startswith("[") else [n for n in re.split(r"[\s,]+", value) if n]
        if isinstance(value, (list, tuple, set, frozenset)):
            return frozenset(name.lower() if isinstance(name, str) else name for name in value)
        return value

    @field_validator("maximum_queue_size", mode="before")
    @classmethod
    def _no_limit(cls, value: Any) -> Any:
        return None if isinstance(value, str) and value.strip().lower() in {"", "none", "null"} else value

    @field_validator("key_prefix", "task_prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.:-]+", value, re.ASCII):
            raise ValueError("use letters, digits and . _ : - only, and at least one of them")
        return value


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        option = str(problem["loc"][0]) if problem["loc"] else "settings"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(Settings.model_fields))
            lines.append(f"{option} is not an option; the options are {known}")
        else:
            value = repr(problem["input"])[:80]
            lines.append(f"{option} = {value}: {problem['msg']} (argument {option} or {ENV_PREFIX}{option.upper()})")
    return "wrong settings: " + "; ".join(lines)
