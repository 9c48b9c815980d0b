"""The API: knows the job's name and models, and nothing of how thumbnails are made.

uvicorn thumbnail_api:app
"""

import os

from celery import Celery
from fastapi import FastAPI
from thumbnail_models import MAKE_THUMBNAILS, ThumbnailRequest

from async_endpoints_celery import AsyncEndpoints, AsyncRouter, Settings

celery_app = Celery("thumbnails", broker=os.environ.get("BROKER_URL", "redis://localhost:6379/0"))
# Pictures come in the body, and base64 makes 4 bytes of 3.
endpoints = AsyncEndpoints(celery_app, settings=Settings(max_payload_bytes=8 * 1024 * 1024))

router = AsyncRouter(endpoints)
router.async_post("/thumbnails", MAKE_THUMBNAILS, body=ThumbnailRequest, summary="Make thumbnails")
router.async_jobs("/jobs")

app = FastAPI(title="Thumbnails", lifespan=endpoints.lifespan)
app.include_router(router)
