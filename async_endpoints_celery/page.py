"""The live page of a job, for a browser that opens its status URL. It needs no other host, and works without script."""

from __future__ import annotations

import html
import json
import secrets
from functools import cache
from importlib.resources import files
from string import Template

from starlette.requests import Request
from starlette.responses import Response

from async_endpoints_celery.jobs import Job, JobStatus


def wants_page(request: Request) -> bool:
    """Whether the client prefers HTML to JSON (RFC 9110, 12.5.1): a browser does, a program says nothing of HTML."""
    accept = request.headers.get("accept", "").lower()
    page = _quality(accept, "text/html")
    return "text/html" in accept and page > 0 and page > _quality(accept, "application/json")


def _quality(accept: str, media_type: str) -> float:
    """How much of it is wanted; the most specific range counts."""
    found = {}
    for entry in accept.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        weights = [p.removeprefix("q=") for p in parameters if p.startswith("q=")]
        try:
            found[name] = float(weights[0]) if weights else 1.0
        except ValueError:
            found[name] = 0.0
    ranges = (media_type, media_type.partition("/")[0] + "/*", "*/*")
    return next((found[name] for name in ranges if name in found), 0.0)


def page_response(job: Job, etag: str) -> Response:
    """The page as it is now; its script follows the job from there."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": policy,
        "ETag": f'{etag[:-1]}-page"',  # another representation
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept",
        "X-Content-Type-Options": "nosniff",
        "Async-Job-Id": str(job.id),
    }
    values = {name: html.escape(value) for name, value in _values(job).items()}
    return Response(_template().substitute(values, nonce=nonce), 200, headers, "text/html")


def _values(job: Job) -> dict[str, str]:
    outcome, title = "", "Result"
    if job.error is not None:
        outcome, title = f"{job.error.code}: {job.error.message}", "Error"
    elif job.status is JobStatus.COMPLETED:
        outcome = json.dumps(job.result, indent=2, ensure_ascii=False)
    progress = job.progress
    return {
        "name": job.name,
        "id": str(job.id),
        "status": str(job.status),
        "retries": f"Retry {job.retry_count} of {job.max_retries}",
        "retries_hidden": "" if job.retry_count else "hidden",
        "percent": f"{progress.percent:g}" if progress else "0",
        "message": f"{progress.percent:.0f} % {progress.message or ''}" if progress else "",
        "progress_hidden": "" if progress else "hidden",
        "outcome": outcome,
        "outcome_title": title,
        "outcome_hidden": "" if outcome else "hidden",
    }


@cache
def _template() -> Template:
    return Template((files("async_endpoints_celery") / "page.html").read_text(encoding="utf-8"))
