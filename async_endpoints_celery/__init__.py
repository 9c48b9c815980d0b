"""Asynchronous job endpoints for FastAPI on the Celery deployment that you already have."""

from async_endpoints_celery.app import AsyncEndpoints
from async_endpoints_celery.context import AsyncContext
from async_endpoints_celery.errors import (
    AsyncEndpointError,
    AsyncEndpointsError,
    ConfigurationError,
    JobConflict,
    JobFailed,
    JobNotFound,
    PayloadTooLarge,
    QueueFull,
    StoreUnavailable,
)
from async_endpoints_celery.jobs import Job, JobStatus
from async_endpoints_celery.responses import ResponseFactories
from async_endpoints_celery.results import MethodResult
from async_endpoints_celery.routes import AsyncRouter
from async_endpoints_celery.settings import Settings

__all__ = [
    "AsyncContext",
    "AsyncEndpointError",
    "AsyncEndpoints",
    "AsyncEndpointsError",
    "AsyncRouter",
    "ConfigurationError",
    "Job",
    "JobConflict",
    "JobFailed",
    "JobNotFound",
    "JobStatus",
    "MethodResult",
    "PayloadTooLarge",
    "QueueFull",
    "ResponseFactories",
    "Settings",
    "StoreUnavailable",
]
