"""The examples as their READMEs start them: web and worker processes around a real server."""

import base64
import csv
import io
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from examples.csv_report.make_sales import COLUMNS, make_sales
from tests.nodes import WorkerProcess
from tests.processes import ROOT, Process, free_port, wait_until
from tests.servers import valkey_server

EXAMPLES = ROOT / "examples"
OVER = {"Completed", "Failed", "Canceled"}


@dataclass
class Example:
    """A running example, and the client to talk to it."""

    client: httpx.Client
    directory: Path
    worker: WorkerProcess
    #: Every progress seen, in order.
    progress: list[dict[str, Any]] = field(default_factory=list)

    def submit(self, path: str, body: object) -> dict[str, Any]:
        response = self.client.post(path, json=body)
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        assert response.headers["Location"] == f"/jobs/{job['id']}"
        return job

    def read(self, job: Mapping[str, Any]) -> dict[str, Any]:
        response = self.client.get(f"/jobs/{job['id']}")
        assert response.status_code == 200, response.text
        record: dict[str, Any] = response.json()
        if record["progress"] and record["progress"] not in self.progress[-1:]:
            self.progress.append(record["progress"])
        return record

    def wait(self, job: Mapping[str, Any], until: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
        """The record, once the job is over or `until` is true of it."""
        last: dict[str, Any] = {}

        def seen() -> bool:
            last.update(self.read(job))
            return last["status"] in OVER or bool(until and until(last))

        try:
            wait_until(seen, timeout=20)
        except TimeoutError:
            raise TimeoutError(f"{last}\n{self.worker.logs()}") from None
        return last


@contextmanager
def running(
    directory: Path, web: str, web_code: list[Path], worker: str, worker_code: list[Path], env: dict[str, str]
) -> Iterator[Example]:
    """A server, uvicorn and a Celery worker; each process imports its own code base only."""
    with ExitStack() as stack:
        server = stack.enter_context(valkey_server())
        env = {"BROKER_URL": server.url, **env}
        port = free_port()
        api = Process(
            [sys.executable, "-m", "uvicorn", web, "--port", str(port)],
            log=directory / "web.log",
            env={**env, "PYTHONPATH": python_path(web_code)},
            cwd=directory,
        )
        stack.callback(api.kill)
        node = WorkerProcess(
            worker,
            *("-c", "2", "-B", "-s", str(directory / "beat")),
            directory=directory,
            env={**env, "PYTHONPATH": python_path(worker_code)},
            cwd=directory,
        )
        stack.callback(node.teardown)
        api.wait_for("Application startup complete")
        node.ready()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield Example(client, directory, node)


def python_path(code: list[Path]) -> str:
    return os.pathsep.join(str(path) for path in [ROOT, *code])


def assert_problem(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["title"]
    for word in words:
        assert word in problem["detail"]


# CSV reports.


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    directory = tmp_path_factory.mktemp("csv_report")
    make_sales(directory / "data" / "sales.csv", 5_000)
    (directory / "secret.csv").write_text("amount\n1\n")
    (directory / "data" / "way-out.csv").symlink_to(directory / "secret.csv")
    code = [EXAMPLES / "csv_report"]
    env = {"CSV_DATA_DIR": str(directory / "data"), "CSV_REPORT_DIR": str(directory / "reports")}
    with running(directory, "report:app", code, "report:celery_app", code, env) as example:
        yield example


class TestCsvReport:
    def test_the_totals_are_right(self, reports: Example) -> None:
        job = reports.submit("/reports", {"file": "sales.csv", "group_by": ["region", "product"]})
        record = reports.wait(job)
        assert record["status"] == "Completed", record

        amounts: defaultdict[tuple[str, str], list[Decimal]] = defaultdict(list)
        for line in (reports.directory / "data" / "sales.csv").read_text().splitlines()[1:]:
            _, region, product, _, amount = line.split(",")
            amounts[region, product].append(Decimal(amount))
        everything = [amount for group in amounts.values() for amount in group]
        result = record["result"]
        assert (result["rows"], result["groups"]) == (5_000, 20)
        assert Decimal(result["total"]) == sum(everything)
        assert result["mean"] == pytest.approx(float(statistics.mean(everything)))
        assert result["largest_group"] == list(max((sum(group), key) for key, group in amounts.items())[1])
        assert record["progress"] == {"percent": 100.0, "message": "report written"}

        response = reports.client.get(result["report"])
        assert response.headers["Content-Type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(response.text)))
        assert [(row["region"], row["product"]) for row in rows] == sorted(amounts)
        for row in rows:
            group = amounts[row["region"], row["product"]]
            assert int(row["rows"]) == len(group)
            assert Decimal(row["total"]) == sum(group)
            assert float(row["mean"]) == pytest.approx(float(statistics.mean(group)), abs=0.0051)
            assert float(row["median"]) == pytest.approx(float(statistics.median(group)), abs=0.0051)

    def test_a_long_report_shows_its_progress_and_can_be_canceled(self, reports: Example) -> None:
        block = "".join(f"2025-01-01,north,tea,1,{n}.25\n" for n in range(1_000))
        large = reports.directory / "data" / "large.csv"
        large.write_text(",".join(COLUMNS) + "\n" + block * 1_500)
        before = set((reports.directory / "reports").glob("*"))
        job = reports.submit("/reports", {"file": "large.csv", "group_by": ["product"]})
        seen = reports.wait(job, lambda record: record["progress"])
        assert seen["status"] == "InProgress", seen
        assert 0 < seen["progress"]["percent"] < 95
        assert seen["progress"]["message"].endswith("rows read")

        response = reports.client.delete(f"/jobs/{job['id']}")
        assert response.status_code == 202
        record = reports.wait(job)
        assert record["status"] == "Canceled"
        assert record["result"] is None
        assert record["progress"]["percent"] < 95  # it did not go on to the end
        assert_problem(reports.client.get(f"/reports/{job['id']}"), 404)
        assert set((reports.directory / "reports").glob("*")) == before
        assert_problem(reports.client.delete(f"/jobs/{job['id']}"), 409, "Canceled")

    @pytest.mark.parametrize(
        "name",
        ["../secret.csv", "{outside}/secret.csv", "way-out.csv", "data/../../secret.csv", "absent.csv", "a\0.csv", "."],
    )
    def test_no_file_but_those_of_the_data_directory(self, reports: Example, name: str) -> None:
        name = name.format(outside=reports.directory)
        response = reports.client.post("/reports", json={"file": name, "group_by": ["amount"]})
        assert_problem(response, 404, "there is no CSV file")

    def test_bad_input_is_refused_before_anything_is_queued(self, reports: Example) -> None:
        post = reports.client.post
        assert_problem(post("/reports", json={"file": "sales.csv", "group_by": ["planet"]}), 422, "planet", "region")
        assert_problem(post("/reports", json={"file": "sales.csv", "group_by": []}), 422, "group_by")
        assert_problem(post("/reports", content="{", headers={"Content-Type": "application/json"}), 400)
        assert_problem(post("/reports", content="file=sales.csv"), 415)

    def test_a_broken_file_fails_the_job_at_once(self, reports: Example) -> None:
        (reports.directory / "data" / "broken.csv").write_text("region,amount\nnorth,1.00\nsouth,plenty\n")
        job = reports.submit("/reports", {"file": "broken.csv", "group_by": ["region"]})
        record = reports.wait(job)
        assert (record["status"], record["retryCount"]) == ("Failed", 0)
        assert record["error"]["code"] == "FILE_NOT_READABLE"
        assert record["error"]["message"].startswith("line 3:")


# Thumbnails.


@pytest.fixture(scope="module")
def thumbnails(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    directory = tmp_path_factory.mktemp("thumbnails")
    (directory / "inbox").mkdir()
    (directory / "outside.png").write_bytes(picture("PNG", (64, 64)))
    (directory / "inbox" / "way-out.png").symlink_to(directory / "outside.png")
    env = {"THUMBNAIL_INBOX": str(directory / "inbox"), "THUMBNAIL_DIR": str(directory / "thumbnails")}
    code = EXAMPLES / "thumbnails"
    with running(
        directory,
        *("thumbnail_api:app", [code / "shared", code / "web"]),
        *("thumbnail_worker:celery_app", [code / "shared", code / "worker"]),
        env,
    ) as example:
        yield example


def picture(format: str, size: tuple[int, int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, format, **options)
    return buffer.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


class TestThumbnails:
    def test_they_have_the_right_sizes(self, thumbnails: Example) -> None:
        rotated = Image.Exif()
        rotated[0x0112] = 6  # the camera was held upright
        (thumbnails.directory / "inbox" / "beach.jpg").write_bytes(picture("JPEG", (1600, 1200), exif=rotated))
        pictures = [
            {"name": "wide.png", "data": encoded(picture("PNG", (640, 480)))},
            {"name": "small.gif", "data": encoded(picture("GIF", (48, 30)))},
            {"name": "beach.jpg"},
        ]
        job = thumbnails.submit("/thumbnails", {"pictures": pictures, "sizes": [320, 64]})
        record = thumbnails.wait(job)
        assert record["status"] == "Completed", record

        made = record["result"]["thumbnails"]
        assert [(entry["picture"], entry["width"], entry["height"]) for entry in made] == [
            ("wide.png", 64, 48),
            ("wide.png", 320, 240),
            ("small.gif", 48, 30),  # never enlarged
            ("small.gif", 48, 30),
            ("beach.jpg", 48, 64),
            ("beach.jpg", 240, 320),
        ]
        formats = []
        for entry in made:
            path = thumbnails.directory / "thumbnails" / entry["file"]
            assert path.parent.name == job["id"]
            assert path.stat().st_size == entry["bytes"]
            with Image.open(path) as image:
                assert image.size == (entry["width"], entry["height"])
                formats.append(image.format)
        assert formats == ["PNG", "PNG", "PNG", "PNG", "JPEG", "JPEG"]

    def test_progress_is_shown_picture_by_picture(self, thumbnails: Example) -> None:
        content = encoded(picture("PNG", (1400, 1400)))
        pictures = [{"name": f"{number}.png", "data": content} for number in range(10)]
        thumbnails.progress.clear()
        record = thumbnails.wait(
            thumbnails.submit("/thumbnails", {"pictures": pictures, "sizes": [128, 512, 1024]}),
            lambda record: record["progress"],
        )
        assert record["status"] == "InProgress"
        assert record["progress"]["percent"] < 100
        record = thumbnails.wait(record)
        assert record["status"] == "Completed", record
        assert record["progress"] == {"percent": 100.0, "message": "9.png done"}
        percents = [progress["percent"] for progress in thumbnails.progress]
        assert percents == sorted(set(percents))

    @pytest.mark.parametrize(
        ("pictures", "code", "word"),
        [
            ([{"name": "a.png", "data": encoded(b"no picture")}], "NOT_A_PICTURE", "a.png"),
            ([{"name": "cut.png", "data": encoded(picture("PNG", (64, 64))[:60])}], "NOT_A_PICTURE", "cut.png"),
            ([{"name": "absent.png"}], "PICTURE_NOT_FOUND", "absent.png"),
            ([{"name": "way-out.png"}], "PICTURE_NOT_FOUND", "way-out.png"),
        ],
    )
    def test_a_picture_that_cannot_be_read_fails_the_job_at_once(
        self, thumbnails: Example, pictures: list[dict[str, str]], code: str, word: str
    ) -> None:
        record = thumbnails.wait(thumbnails.submit("/thumbnails", {"pictures": pictures}))
        assert (record["status"], record["retryCount"]) == ("Failed", 0)
        assert record["error"]["code"] == code
        assert word in record["error"]["message"]

    @pytest.mark.parametrize(
        "body",
        [
            {"pictures": []},
            {"pictures": [{"name": "../outside.png"}]},
            {"pictures": [{"name": "a.png", "data": "not base64"}]},
            {"pictures": [{"name": "a.png"}, {"name": "a.jpg"}]},
            {"pictures": [{"name": "a.png"}], "sizes": [1_000_000]},
        ],
    )
    def test_bad_input_is_refused(self, thumbnails: Example, body: dict[str, Any]) -> None:
        response = thumbnails.client.post("/thumbnails", json=body)
        assert_problem(response, 422)
        assert response.json()["errors"]
