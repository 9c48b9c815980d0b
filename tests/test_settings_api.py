"""`Settings` as documented: every option, its default, its environment variable and its limits."""

from typing import Any

import pytest

from async_endpoints_celery import ConfigurationError, Settings

DEFAULTS: dict[str, Any] = {
    "default_max_retries": 3,
    "retry_delay_base_seconds": 2.0,
    "retry_delay_max_seconds": 3600,
    "retry_jitter": 0.0,
    "maximum_queue_size": 50,
    "job_timeout_seconds": 1800,
    "job_claim_timeout_seconds": 30,
    "enable_distributed_job_recovery": True,
    "recovery_check_interval_seconds": 15,
    "recovery_maximum_retries": 3,
    "retention_seconds": 86400,
    "max_payload_bytes": 1024 * 1024,
    "max_result_bytes": 4 * 1024 * 1024,
    "max_header_bytes": 16 * 1024,
    "dropped_headers": {"authorization", "proxy-authorization", "cookie", "x-api-key"},
    "include_stack_traces": False,
    "key_prefix": "ae",
    "task_prefix": "async_endpoints.",
}
OTHERS: dict[str, tuple[str, Any]] = {
    "default_max_retries": ("5", 5),
    "retry_delay_base_seconds": ("0.25", 0.25),
    "retry_delay_max_seconds": ("7.5", 7.5),
    "retry_jitter": ("0.1", 0.1),
    "maximum_queue_size": ("7", 7),
    "job_timeout_seconds": ("1.5", 1.5),
    "job_claim_timeout_seconds": ("2.5", 2.5),
    "enable_distributed_job_recovery": ("false", False),
    "recovery_check_interval_seconds": ("1.25", 1.25),
    "recovery_maximum_retries": ("0", 0),
    "retention_seconds": ("60.5", 60.5),
    "max_payload_bytes": ("10", 10),
    "max_result_bytes": ("20", 20),
    "max_header_bytes": ("30", 30),
    "include_stack_traces": ("true", True),
    "key_prefix": ("other", "other"),
    "task_prefix": ("jobs.", "jobs."),
}


@pytest.mark.parametrize("option", DEFAULTS)
def test_default(option: str) -> None:
    assert getattr(Settings(), option) == DEFAULTS[option]


@pytest.mark.parametrize("option", OTHERS)
def test_option_from_argument_and_environment(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = OTHERS[option]
    assert getattr(Settings(**{option: value}), option) == value
    monkeypatch.setenv(f"ASYNC_ENDPOINTS_{option.upper()}", text)
    assert getattr(Settings(), option) == value


def test_no_queue_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(maximum_queue_size=None).maximum_queue_size is None
    monkeypatch.setenv("ASYNC_ENDPOINTS_MAXIMUM_QUEUE_SIZE", "none")
    assert Settings().maximum_queue_size is None


def test_dropped_headers_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(Settings(dropped_headers=["X-Secret"]).dropped_headers) == {"x-secret"}
    monkeypatch.setenv("ASYNC_ENDPOINTS_DROPPED_HEADERS", "Cookie, X-Token")
    assert set(Settings().dropped_headers) == {"cookie", "x-token"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, -1) for name in ("default_max_retries", "retry_delay_base_seconds", "retry_delay_max_seconds")),
        *((name, 0.5) for name in ("job_timeout_seconds", "job_claim_timeout_seconds")),
        *((name, 0.5) for name in ("recovery_check_interval_seconds", "retention_seconds")),
        *((name, 0) for name in ("max_payload_bytes", "max_result_bytes", "maximum_queue_size")),
        *((name, float("nan")) for name in ("job_timeout_seconds", "retry_delay_base_seconds")),
        *((name, "many") for name in ("maximum_queue_size", "default_max_retries")),
        *(("retry_jitter", 1.5), ("recovery_maximum_retries", -1), ("key_prefix", ""), ("task_prefix", "a b")),
    ],
)
def test_a_wrong_value_is_a_clear_error(option: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=option):
        Settings(**{option: value})
    variable = f"ASYNC_ENDPOINTS_{option.upper()}"
    monkeypatch.setenv(variable, str(value))
    with pytest.raises(ConfigurationError, match=variable):
        Settings()


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="maximum_queue_size"):
        Settings(max_queue_size=3)
