"""Reports on CSV files, as jobs: web and worker in one code base.

uvicorn report:app
celery -A report:celery_app worker -B

The files are read from CSV_DATA_DIR (default: ./data), the reports written to CSV_REPORT_DIR (default: ./reports).
"""

import csv
import os
import statistics
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, BinaryIO, TextIO
from uuid import UUID, uuid4

from celery import Celery
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field, StringConstraints

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter, JobFailed

DATA_DIR = Path(os.environ.get("CSV_DATA_DIR", "data"))
REPORT_DIR = Path(os.environ.get("CSV_REPORT_DIR", "reports"))

celery_app = Celery("report", broker=os.environ.get("BROKER_URL", "redis://localhost:6379/0"))
endpoints = AsyncEndpoints(celery_app)


# What goes in and what comes out.

Column = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class ReportRequest(BaseModel):
    file: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    group_by: list[Column] = Field(min_length=1, max_length=3)
    value: Column = "amount"


class ReportResult(BaseModel):
    report: str
    rows: int
    groups: int
    total: Decimal  # a string in JSON, so that no cent is lost in a float
    mean: float
    largest_group: list[str]


# Files.


def source_path(name: str) -> Path:
    """The file called `name`, which is inside DATA_DIR whatever dots and symbolic links the name is made of.

    Raises:
        FileNotFoundError: there is no such file in there.
    """
    root = DATA_DIR.resolve()
    try:
        path = (root / name).resolve()
        found = path.is_relative_to(root) and path.suffix == ".csv" and path.is_file()
    except (OSError, ValueError):  # a loop of links, a null byte
        found = False
    if not found:
        raise FileNotFoundError(f"there is no CSV file {name!r}")
    return path


def report_path(job_id: UUID) -> Path:
    return REPORT_DIR / f"{job_id}.csv"


@contextmanager
def written_at_once(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name when it is complete, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}")  # of its own: a lost attempt may still be writing
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# The job.


@dataclass
class Group:
    total: Decimal = Decimal(0)
    values: "array[float]" = field(default_factory=lambda: array("d"))  # the median needs them all: 8 bytes each


@endpoints.handler("SalesReport", timeout_seconds=600)
def sales_report(context: AsyncContext[ReportRequest]) -> ReportResult:
    """Aggregates a CSV file by group."""
    request = context.request
    try:
        source = source_path(request.file)
    except FileNotFoundError as error:  # it was there when the job was submitted
        raise JobFailed("FILE_NOT_FOUND", str(error)) from error
    groups = read_groups(context, source)
    largest = max(groups, key=lambda key: groups[key].total)
    with written_at_once(report_path(context.job_id)) as file:
        write_report(file, request, groups)
    context.report_progress(100, "report written")
    rows = sum(len(group.values) for group in groups.values())
    total = sum((group.total for group in groups.values()), Decimal(0))
    return ReportResult(
        report=f"/reports/{context.job_id}",
        rows=rows,
        groups=len(groups),
        total=total,
        mean=float(total / rows),
        largest_group=list(largest),
    )


def read_groups(context: AsyncContext[ReportRequest], source: Path) -> dict[tuple[str, ...], Group]:
    """Streams the file; of each row only the value stays in memory."""
    groups: dict[tuple[str, ...], Group] = {}
    size = max(source.stat().st_size, 1)
    shown = 0.0
    with source.open("rb") as raw:
        for number, (key, value) in enumerate(read_rows(raw, context.request), 1):
            group = groups.setdefault(key, Group())
            group.total += value
            group.values.append(float(value))
            if number % 1_000 == 0:
                context.raise_if_canceled()
                # The text layer reads ahead by some kilobytes: near enough for a progress bar.
                percent = 95 * raw.tell() / size
                if percent - shown >= 1:
                    shown = percent
                    context.report_progress(percent, f"{number} rows read")
    if not groups:
        raise unreadable("there are no rows")
    return groups


def read_rows(raw: BinaryIO, request: ReportRequest) -> Iterator[tuple[tuple[str, ...], Decimal]]:
    """The group and the value of each row."""
    rows = csv.DictReader(TextIOWrapper(raw, encoding="utf-8-sig", newline=""))
    try:
        for row in rows:
            key = tuple(row[column] for column in request.group_by)
            value = Decimal(row[request.value])
            if None in key or not value.is_finite():
                raise ValueError
            yield key, value
    except (KeyError, TypeError, ValueError, InvalidOperation, csv.Error) as error:
        raise unreadable(
            f"line {rows.line_num}: a column is missing, {request.value} is no number, or this is no CSV in UTF-8"
        ) from error


def unreadable(reason: str) -> JobFailed:
    """The same file will not be better the next time: not retried."""
    return JobFailed("FILE_NOT_READABLE", reason)


def write_report(file: TextIO, request: ReportRequest, groups: dict[tuple[str, ...], Group]) -> None:
    writer = csv.writer(file)
    writer.writerow([*request.group_by, "rows", "total", "mean", "median"])
    for key, group in sorted(groups.items()):
        mean, median = statistics.fmean(group.values), statistics.median(group.values)
        writer.writerow([*key, len(group.values), group.total, f"{mean:.2f}", f"{median:.2f}"])


# The API.


def check(request: Request, report: ReportRequest) -> Response | None:
    """Before anything is queued: is the file there, and does it have these columns?"""
    try:
        with source_path(report.file).open(newline="", encoding="utf-8-sig") as file:
            columns = next(csv.reader(file), [])
    except FileNotFoundError as error:
        return problem(request, 404, "File not found", str(error))
    except (OSError, UnicodeDecodeError, csv.Error):
        return problem(request, 422, "File not readable", f"{report.file!r} is not a CSV file in UTF-8")
    missing = sorted({*report.group_by, report.value} - set(columns))
    if missing:
        detail = f"{report.file!r} has no column {', '.join(missing)}; it has {', '.join(columns)}"
        return problem(request, 422, "No such column", detail)
    return None


def problem(request: Request, status: int, title: str, detail: str) -> Response:
    """Problem details (RFC 9457), as the other answers give them."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "instance": request.url.path}
    return JSONResponse(body, status, media_type="application/problem+json")


router = AsyncRouter(endpoints)
router.async_post("/reports", sales_report, validate=check)
router.async_jobs("/jobs")

app = FastAPI(title="CSV reports", lifespan=endpoints.lifespan)
app.include_router(router)


@app.get("/reports/{job_id}", response_model=None)
def download(request: Request, job_id: UUID) -> Response:
    """The report of a job, as CSV."""
    path = report_path(job_id)
    if not path.is_file():
        return problem(request, 404, "Report not found", "there is no report of such a job (yet)")
    return FileResponse(path, media_type="text/csv", filename=f"report-{job_id}.csv")
