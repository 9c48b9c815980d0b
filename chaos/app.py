"""The application under fire. Its handlers write every start and end of every attempt to the ledger."""

from __future__ import annotations

import asyncio
import os
import time
from uuid import uuid4

from celery import Celery
from fastapi import FastAPI
from pydantic import BaseModel

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter
from chaos.ledger import Ledger

celery_app = Celery("chaos", broker=os.environ["CHAOS_BROKER"])
endpoints = AsyncEndpoints(celery_app)
ledger = Ledger(os.environ["CHAOS_LEDGER"])


class Work(BaseModel):
    """How long the job takes, in seconds."""

    seconds: float


@endpoints.handler("Async")
async def work_async(context: AsyncContext[Work]) -> int:
    run = uuid4().hex
    ledger.write("start", context.job_id, run)
    await asyncio.sleep(context.request.seconds)
    ledger.write("end", context.job_id, run)
    return context.retry_count


@endpoints.handler("Sync")
def work_sync(context: AsyncContext[Work]) -> int:
    run = uuid4().hex
    ledger.write("start", context.job_id, run)
    time.sleep(context.request.seconds)
    ledger.write("end", context.job_id, run)
    return context.retry_count


@endpoints.handler("Flaky", retry_delay_base_seconds=0.2)
def work_flaky(context: AsyncContext[Work]) -> int:
    run = uuid4().hex
    ledger.write("start", context.job_id, run)
    time.sleep(context.request.seconds)
    ledger.write("end", context.job_id, run)
    if context.retry_count == 0:
        raise ConnectionError("the first attempt always fails")
    return context.retry_count


router = AsyncRouter(endpoints)
router.async_post("/async", work_async)
router.async_post("/sync", work_sync)
router.async_post("/flaky", work_flaky)
router.async_jobs()

app = FastAPI(lifespan=endpoints.lifespan)
app.include_router(router)
