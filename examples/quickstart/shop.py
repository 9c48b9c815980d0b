"""The quick start in one file: an API whose slow requests become jobs on Celery.

uvicorn shop:app
celery -A shop:celery_app worker -B

curl -i localhost:8000/api/process-data -H 'Content-Type: application/json' -d '{"data": "hello"}'
"""

import asyncio
import os
import time

from celery import Celery
from fastapi import FastAPI
from pydantic import AliasChoices, BaseModel, Field

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter

celery_app = Celery("shop", broker=os.environ.get("BROKER_URL", "redis://localhost:6379/0"))
endpoints = AsyncEndpoints(celery_app, store=os.environ.get("STORE_URL") or None)  # None: the broker's Redis


class DataRequest(BaseModel):
    data: str
    processing_priority: int = Field(1, validation_alias=AliasChoices("processing_priority", "processingPriority"))


class ProcessResult(BaseModel):
    processed_data: str
    character_count: int


@endpoints.handler("ProcessData")
async def process_data(context: AsyncContext[DataRequest]) -> ProcessResult:
    text = context.request.data
    for step in range(1, 5):
        await asyncio.sleep(0.5)  # the slow part
        await context.report_progress(25 * step, f"step {step} of 4")
    return ProcessResult(processed_data=f"Processed: {text.upper()}", character_count=len(text))


class Order(BaseModel):
    item: str


@endpoints.handler("ShipOrder", retry_delay_base_seconds=1)
def ship_order(context: AsyncContext[Order]) -> dict[str, str]:
    time.sleep(0.5)  # a plain function may block
    if context.retry_count == 0:
        raise ConnectionError("The carrier does not answer")  # tried again one second later
    return {"shipped": context.request.item}


router = AsyncRouter(endpoints)
router.async_post("/api/process-data", process_data)
router.async_post("/api/orders", ship_order)
router.async_jobs("/jobs")

app = FastAPI(title="Shop", lifespan=endpoints.lifespan)
app.include_router(router)
