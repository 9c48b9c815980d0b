"""Every option, its default, its bounds; wrong ones are named at once, with how to set them right."""

import os
from typing import Any

import pytest
from pydantic import ValidationError

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
    "retention_seconds": 86_400,
    "max_payload_bytes": 1024 * 1024,
    "max_result_bytes": 4 * 1024 * 1024,
    "max_header_bytes": 16 * 1024,
    "dropped_headers": frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key"}),
    "include_stack_traces": False,
    "key_prefix": "ae",
    "task_prefix": "async_endpoints.",
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("ASYNC_ENDPOINTS_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("option", DEFAULTS)
def test_defaults(option: str) -> None:
    assert getattr(Settings(), option) == DEFAULTS[option]


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        *[(option, -1) for option in ("default_max_retries", "recovery_maximum_retries")],
        ("default_max_retries", 1.5),
        ("default_max_retries", "many"),
        *[(option, -0.1) for option in ("retry_delay_base_seconds", "retry_delay_max_seconds", "retry_jitter")],
        ("retry_jitter", 1.1),
        *[("maximum_queue_size", value) for value in (0, -1, "lots")],
        *[
            (option, value)
            for option in (
                "job_timeout_seconds",
                "job_claim_timeout_seconds",
                "recovery_check_interval_seconds",
                "retention_seconds",
            )
            for value in (0, 0.9, -1, float("inf"), float("nan"), None, "soon")
        ],
        ("retry_delay_max_seconds", float("inf")),
        *[(option, 0) for option in ("max_payload_bytes", "max_result_bytes", "max_header_bytes")],
        ("dropped_headers", 5),
        ("dropped_headers", [5]),
        ("include_stack_traces", "perhaps"),
        *[(option, value) for option in ("key_prefix", "task_prefix") for value in ("", "a b", "ä", "a\n", 5)],
    ],
)
def test_a_wrong_value_is_named_with_its_option(option: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{option}.*ASYNC_ENDPOINTS_{option.upper()}") as caught:
        Settings(**{option: wrong})
    assert caught.value.__cause__ is None


def test_all_wrong_values_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"retry_jitter.*retention_seconds"):
        Settings(retry_jitter=2, retention_seconds=0)


def test_an_unknown_option_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"max_queue_size is not an option.*maximum_queue_size"):
        Settings(max_queue_size=5)


@pytest.mark.parametrize("seconds", [1e17, 1e300])
def test_a_retention_that_redis_cannot_keep_is_wrong(seconds: float) -> None:
    """PEXPIRE takes 64 bits: the job could never end."""
    with pytest.raises(ConfigurationError, match="retention_seconds"):
        Settings(retention_seconds=seconds)


def test_the_smallest_that_work() -> None:
    settings = Settings(
        default_max_retries=0,
        retry_delay_base_seconds=0,
        retry_delay_max_seconds=0,
        maximum_queue_size=1,
        job_timeout_seconds=1,
        job_claim_timeout_seconds=1,
        recovery_check_interval_seconds=1,
        recovery_maximum_retries=0,
        retention_seconds=1,
        max_payload_bytes=1,
        max_result_bytes=1,
    )
    assert settings.job_claim_timeout_seconds == 1.0
    assert isinstance(settings.job_claim_timeout_seconds, float)


def test_immutable() -> None:
    with pytest.raises(ValidationError):
        Settings().maximum_queue_size = 5


class TestEnvironment:
    @pytest.mark.parametrize(
        ("option", "text", "value"),
        [
            ("default_max_retries", "7", 7),
            ("retry_delay_base_seconds", "0.5", 0.5),
            ("retry_jitter", "0.1", 0.1),
            ("enable_distributed_job_recovery", "false", False),
            ("include_stack_traces", "1", True),
            ("key_prefix", "shop:jobs", "shop:jobs"),
            ("maximum_queue_size", "1000", 1000),
            ("maximum_queue_size", "none", None),
            ("maximum_queue_size", "None", None),
            ("maximum_queue_size", "", None),
            ("dropped_headers", "Cookie, X-Secret", frozenset({"cookie", "x-secret"})),
            ("dropped_headers", "cookie", frozenset({"cookie"})),
            ("dropped_headers", "cookie x-secret,,authorization ", frozenset({"cookie", "x-secret", "authorization"})),
            ("dropped_headers", "", frozenset()),
        ],
    )
    def test_sets_options(self, monkeypatch: pytest.MonkeyPatch, option: str, text: str, value: Any) -> None:
        monkeypatch.setenv(f"ASYNC_ENDPOINTS_{option.upper()}", text)
        assert getattr(Settings(), option) == value

    def test_an_argument_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ASYNC_ENDPOINTS_DEFAULT_MAX_RETRIES", "7")
        assert Settings(default_max_retries=1).default_max_retries == 1

    def test_a_wrong_value_names_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ASYNC_ENDPOINTS_JOB_TIMEOUT_SECONDS", "soon")
        with pytest.raises(ConfigurationError, match="ASYNC_ENDPOINTS_JOB_TIMEOUT_SECONDS"):
            Settings()

    def test_another_prefix_is_somebody_elses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEFAULT_MAX_RETRIES", "7")
        assert Settings().default_max_retries == 3


@pytest.mark.parametrize(
    "names", [["Cookie", "X-Secret"], ("cookie", "X-SECRET"), {"COOKIE", "x-secret"}, "Cookie,X-Secret"]
)
def test_dropped_headers_have_no_case(names: Any) -> None:
    assert Settings(dropped_headers=names).dropped_headers == {"cookie", "x-secret"}


def test_no_limit() -> None:
    assert Settings(maximum_queue_size=None).maximum_queue_size is None
