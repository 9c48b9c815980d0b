"""The one-file example of the documentation, exactly as it is written there."""

import sys
from pathlib import Path

import httpx

from tests.processes import Process, free_port, wait_until
from tests.servers import ValkeyServer

IMPORTS = """\
from celery import Celery
from fastapi import FastAPI
from pydantic import AliasChoices, BaseModel, Field

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter
"""

EXAMPLE = """\
celery_app = Celery("shop", broker="redis://localhost:6379/0")
endpoints = AsyncEndpoints(celery_app)            # store: the broker's Redis unless store="redis://…" or "memory://"

class DataRequest(BaseModel):
    data: str
    processing_priority: int = Field(1, validation_alias=AliasChoices("processing_priority", "processingPriority"))

class ProcessResult(BaseModel):
    processed_data: str
    character_count: int

@endpoints.handler("ProcessData")
async def process_data(context: AsyncContext[DataRequest]) -> ProcessResult:
    text = context.request.data
    return ProcessResult(processed_data=f"Processed: {text.upper()}", character_count=len(text))

router = AsyncRouter(endpoints)
router.async_post("/api/process-data", process_data)     # handler in this code base: name and model are known
router.async_jobs("/jobs")                               # status, cancel, events

app = FastAPI()
app.include_router(router)
"""


def test_the_example(valkey: ValkeyServer, redis_url: str, tmp_path: Path) -> None:
    source = IMPORTS + "\n" + EXAMPLE.replace("redis://localhost:6379/0", redis_url)
    assert redis_url in source
    (tmp_path / "shop.py").write_text(source)
    port = free_port()
    root = str(Path(__file__).resolve().parent.parent)
    env = {"PYTHONPATH": f"{root}:{tmp_path}"}
    web_command = [sys.executable, "-m", "uvicorn", "shop:app", "--port", str(port)]
    worker_command = [sys.executable, "-m", "celery", "-A", "shop:celery_app", "worker", "-B"]
    web = Process(web_command, log=tmp_path / "web.log", env=env, cwd=tmp_path)
    worker = Process(worker_command, log=tmp_path / "worker.log", env=env, cwd=tmp_path)
    try:
        web.wait_for("Uvicorn running on")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            accepted = http.post("/api/process-data", json={"data": "hello", "processingPriority": 2})
            assert accepted.status_code == 202
            record = accepted.json()
            assert (record["name"], record["status"]) == ("ProcessData", "Queued")
            location = accepted.headers["location"]
            assert location == f"/jobs/{record['id']}"
            worker.wait_for(lambda: http.get(location).json()["status"] == "Completed")
            assert http.get(location).json()["result"] == {
                "processed_data": "Processed: HELLO",
                "character_count": 5,
            }
            with valkey.client() as client:
                worker.wait_for(lambda: client.hget("ae:sweep", "last_run"))
            assert http.get("/openapi.json").status_code == 200
            assert http.post("/api/process-data", json={}).status_code == 422
    finally:
        worker.stop()
        web.stop()
    wait_until(lambda: not worker.members())
