"""tests/worker_app.py with handlers that once did harm: `celery -A tests.review_app:celery_app worker`."""

import asyncio
import time

from tests.worker_app import Context, endpoints, leave_trace, traces, wait_at_gate
from tests.worker_app import celery_app as celery_app


class Unnatural(BaseException):
    """Nobody catches this."""


@endpoints.handler("Unnatural", max_retries=1, retry_delay_base_seconds=0)
def unnatural(context: Context) -> None:
    leave_trace(context)
    raise Unnatural("alien") if context.request.kind == "custom" else asyncio.CancelledError("alien")


@endpoints.handler("BlocksTheLoop", timeout_seconds=1, max_retries=0)
async def blocks_the_loop(context: Context) -> None:
    leave_trace(context)
    while not traces().get(f"test:gate:{context.job_id}"):
        time.sleep(0.02)  # noqa: ASYNC251


@endpoints.handler("GateWithLimit", timeout_seconds=2, max_retries=0)
def gate_with_limit(context: Context) -> str:
    leave_trace(context)
    wait_at_gate(context)
    return "written late"
