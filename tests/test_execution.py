"""Jobs through a real web process, a real broker and a real worker, in each of Celery's pools."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.deployment import Deployment
from tests.nodes import WorkerNode
from tests.processes import wait_until
from tests.servers import valkey_server

HEADER_SECRET = "header-8c1f2e"
PAYLOAD_SECRET = "payload-5d7a90"
QUERY_SECRET = "query-77aa01"

SETTINGS = {
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": "2",
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
    "ASYNC_ENDPOINTS_MAX_RESULT_BYTES": "10000",
    # Longer delays wait in Redis, where a test can backdate them.
    "ASYNC_ENDPOINTS_MESSAGE_COUNTDOWN_MAX_SECONDS": "1",
}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with (
        valkey_server() as server,
        Deployment(tmp_path_factory.mktemp("execution"), server.url, env=SETTINGS) as deployed,
    ):
        deployed.start_web()
        yield deployed


@pytest.fixture(scope="module", params=["prefork", "threads", "solo", "gevent"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared_worker(deployed: Deployment, pool: str) -> Iterator[list[WorkerNode]]:
    nodes = [deployed.start_worker("-P", pool, "-c", "2", "-E")]
    yield nodes
    nodes[0].teardown()


@pytest.fixture
def worker(deployed: Deployment, pool: str, shared_worker: list[WorkerNode]) -> WorkerNode:
    """The worker that the tests of this pool share; a new one when an earlier test has broken it."""
    try:
        for name in ("EchoSync", "Echo"):
            deployed.wait(deployed.submit(name), timeout=2)
    except TimeoutError:
        shared_worker[0].teardown()
        deployed.clear()
        shared_worker[0] = deployed.start_worker("-P", pool, "-c", "2", "-E")
    return shared_worker[0]


@pytest.fixture
def jobs(deployed: Deployment, worker: WorkerNode) -> Iterator[Deployment]:
    yield deployed
    deployed.clear()  # what a failing test left behind must not fail the next one


class TestWhatAHandlerSees:
    @pytest.mark.parametrize("path", ["/shops/main%20street/items/7", "/sync/shops/main%20street/items/7"])
    def test_the_original_request(self, jobs: Deployment, path: str) -> None:
        response = jobs.http.post(
            f"{path}?tag=a&tag=b&empty=&q=%C3%BC",
            json={"text": "hello"},
            headers=[("X-Echo", "one"), ("x-echo", "two"), ("Authorization", "Bearer secret"), ("Cookie", "a=b")],
        )
        result = jobs.wait(response.json()["id"])["result"]
        assert result["text"] == "hello"
        assert result["header"] == "one"
        assert result["list"] == ["one", "two"]
        assert not {"authorization", "cookie"} & {name for name, _ in result["headers"]}
        assert result["route"] == {"shop": "main street", "item": 7}
        assert result["query"] == [["tag", "a"], ["tag", "b"], ["empty", ""], ["q", "ü"]]

    def test_the_job(self, jobs: Deployment) -> None:
        record = jobs.finish("Echo")
        result = record["result"]
        assert result["job_id"] == record["id"]
        assert (result["job_name"], result["retry_count"], result["max_retries"]) == ("Echo", 0, 3)
        assert result["owner"] is None
        assert record["createdAt"] <= record["startedAt"] <= record["completedAt"] == record["lastUpdatedAt"]

    @pytest.mark.parametrize("name", ["EchoClass", "EchoAsyncClass"])
    def test_a_class_has_a_fresh_instance_for_each_job(self, jobs: Deployment, name: str) -> None:
        for _ in range(2):
            assert jobs.finish(name, text="hello")["result"]["jobs"] == 1

    def test_a_job_without_a_body(self, jobs: Deployment) -> None:
        response = jobs.http.post("/run/NoBody")
        record = jobs.wait(response.json()["id"])
        assert (record["status"], record["result"], record["error"]) == ("Completed", None, None)

    @pytest.mark.parametrize("name", ["Steps", "StepsAsync"])
    def test_progress_is_seen_while_it_runs(self, jobs: Deployment, name: str) -> None:
        job_id = jobs.submit(name)
        wait_until(lambda: jobs.job(job_id)["progress"])
        record = jobs.job(job_id)
        assert (record["status"], record["progress"]) == ("InProgress", {"percent": 25.0, "message": "began"})
        jobs.open_gate(job_id)
        record = jobs.wait(job_id)
        assert (record["status"], record["result"]) == ("Completed", "done")
        assert record["progress"] == {"percent": 100.0, "message": "nearly"}


class TestOutcomes:
    @pytest.mark.parametrize(
        ("kind", "result"), [("success", {"answer": 42}), ("none", None), ("payload", {"text": "a model"})]
    )
    def test_success(self, jobs: Deployment, kind: str, result: Any) -> None:
        record = jobs.finish("Outcome", kind=kind)
        assert (record["status"], record["error"]) == ("Completed", None)
        if isinstance(result, dict):
            assert record["result"].items() >= result.items()
        else:
            assert record["result"] == result

    @pytest.mark.parametrize("name", ["Outcome", "OutcomeSync"])
    @pytest.mark.parametrize(
        ("kind", "code", "message"),
        [
            ("failure", "UNKNOWN", "out of paper"),
            ("failure-error", "PRINTER", "on fire"),
            ("failure-exception", "KEYERROR", "'drawer'"),
            ("value-error", "VALUEERROR", "no such number"),
            ("job-failed", "CARD_DECLINED", "ask the bank"),
            ("unpicklable", "UNPICKLABLE", "locked"),
            ("unreadable", "UNREADABLE", "Unreadable"),
        ],
    )
    def test_failure(self, jobs: Deployment, name: str, kind: str, code: str, message: str) -> None:
        record = jobs.finish(name, kind=kind)
        assert (record["status"], record["result"]) == ("Failed", None)
        assert record["error"]["code"] == code
        assert message in record["error"]["message"]
        assert record["completedAt"] is not None

    def test_the_chain_of_causes(self, jobs: Deployment) -> None:
        job_id = jobs.submit("Outcome", kind="chain")
        exception = jobs.wait(job_id)["error"]["exception"]
        chain = []
        while exception is not None:
            assert exception["stackTrace"] is None  # clients do not see it
            chain.append((exception["type"], exception["message"]))
            exception = exception["innerException"]
        assert chain == [("RuntimeError", "house"), ("LookupError", "attic"), ("KeyError", "'cellar'")]
        stored = json.loads(jobs.record(job_id)["error"])["exception"]
        for _ in range(3):
            assert "fail_with_causes" in stored["stackTrace"]
            stored = stored["innerException"]

    @pytest.mark.parametrize("name", ["Outcome", "OutcomeSync"])
    @pytest.mark.parametrize("kind", ["sys-exit", "memory-error", "celery-ignore", "celery-reject"])
    def test_exceptions_that_mean_something_to_celery(self, jobs: Deployment, name: str, kind: str) -> None:
        """The job ends Failed, and the worker lives: it runs sync and async handlers as before."""
        record = jobs.finish(name, kind=kind)
        assert record["status"] == "Failed"
        assert [jobs.finish(name)["status"] for name in ("Echo", "EchoSync") * 2] == ["Completed"] * 4

    @pytest.mark.parametrize(
        ("kind", "code"),
        [
            ("object", "RESULT_NOT_SERIALIZABLE"),
            ("bytes", "RESULT_NOT_SERIALIZABLE"),
            ("large", "RESULT_TOO_LARGE"),
            ("job-failed", "CARD_DECLINED"),
        ],
    )
    def test_what_is_not_retried(self, jobs: Deployment, kind: str, code: str) -> None:
        job_id = jobs.submit("OutcomeWithRetries", kind=kind)
        record = jobs.wait(job_id)
        assert (record["status"], record["error"]["code"], record["retryCount"]) == ("Failed", code, 0)
        assert len(jobs.runs(job_id)) == 1

    @pytest.mark.parametrize(("kind", "status"), [("vetoed", "Failed"), ("value-error", "Failed")])
    def test_exceptions_that_the_handler_does_not_retry(self, jobs: Deployment, kind: str, status: str) -> None:
        record = jobs.finish("Picky", kind=kind)
        assert (record["status"], record["retryCount"]) == (status, 0)

    def test_an_unknown_handler(self, jobs: Deployment) -> None:
        record = jobs.finish("Nobody", text=PAYLOAD_SECRET)
        assert (record["status"], record["retryCount"]) == ("Failed", 0)
        assert record["error"]["code"] == "HANDLER_NOT_FOUND"
        assert "Nobody" in record["error"]["message"]

    @pytest.mark.parametrize(
        "request_text",
        [
            "not json",
            '{"payload": null}',
            '{"payload":"{\\"seconds\\":\\"soon ' + PAYLOAD_SECRET + '\\"}","headers":[],"routeParams":{},"query":"",'
            '"byName":false}',
        ],
        ids=["no JSON", "incomplete", "not the model's"],
    )
    def test_a_payload_that_cannot_be_read(self, jobs: Deployment, request_text: str) -> None:
        # Nobody consumes its own queue: this message is the only one that a worker sees.
        job_id = jobs.submit("Parked")
        jobs.celery.send_task("async_endpoints.Parked", [1, request_text], task_id=job_id, queue="celery")
        record = jobs.wait(job_id)
        assert (record["status"], record["retryCount"]) == ("Failed", 0)
        assert record["error"]["code"] == "PAYLOAD_INVALID"
        assert PAYLOAD_SECRET not in record["error"]["message"]
        assert jobs.runs(job_id) == []

    @pytest.mark.parametrize("arguments", [[], [1], ["one", "two", "three"]])
    def test_a_message_that_is_not_ours(self, jobs: Deployment, arguments: list[Any]) -> None:
        """It runs nothing; the job waits for its own message."""
        job_id = jobs.submit("Parked")
        jobs.celery.send_task("async_endpoints.Parked", arguments, task_id=job_id, queue="celery")
        assert jobs.finish("Echo")["status"] == "Completed"
        assert jobs.job(job_id)["status"] == "Queued"


class TestRetries:
    def test_until_it_succeeds(self, jobs: Deployment) -> None:
        job_id = jobs.submit("Flaky", failures=2)
        record = jobs.wait(job_id)
        assert (record["status"], record["retryCount"], record["result"]) == ("Completed", 2, {"retries": 2})
        assert record["error"] is None
        assert len(jobs.runs(job_id)) == 3

    def test_the_delays_double_and_the_last_failure_stands(self, jobs: Deployment) -> None:
        job_id = jobs.submit("Failing")
        delays = []
        for retry in (1, 2, 3):
            record = wait_until(
                lambda: (r := jobs.record(job_id))["status"] == "Scheduled" and r["retries"] == str(retry) and r  # noqa: B023
            )
            assert json.loads(record["error"])["code"] == "CONNECTIONERROR"
            due = jobs.dispatch_due(job_id)
            assert due is not None
            delays.append(due - int(record["updated"]))
            jobs.make_due(job_id)
            jobs.sweep()
        assert delays == [2000, 4000, 8000]
        record = jobs.wait(job_id)
        assert (record["status"], record["retryCount"]) == ("Failed", 3)
        assert record["error"]["message"] == "attempt 4"
        assert len(jobs.runs(job_id)) == 4

    @pytest.mark.parametrize(("kind", "delay"), [("job-failed-later", 77_000), ("job-failed-retryable", 2_000)])
    def test_job_failed_says_when(self, jobs: Deployment, kind: str, delay: int) -> None:
        job_id = jobs.submit("OutcomeWithRetries", kind=kind)
        jobs.wait(job_id, "Scheduled")
        due = jobs.dispatch_due(job_id)
        assert due is not None
        assert due - int(jobs.record(job_id)["updated"]) == delay

    def test_an_exception_that_cannot_be_pickled_is_retried(self, jobs: Deployment) -> None:
        job_id = jobs.submit("OutcomeWithRetries", kind="unpicklable")
        assert jobs.wait(job_id, "Scheduled")["error"]["code"] == "UNPICKLABLE"
        assert jobs.finish("Echo")["status"] == "Completed"

    def test_a_duplicate_of_the_message_runs_nothing(self, jobs: Deployment) -> None:
        job_id = jobs.submit("Parked")
        (message,) = jobs.messages("parked")
        raw = json.dumps(message)
        jobs.redis.lpush("celery", raw, raw, raw)
        assert jobs.wait(job_id)["status"] == "Completed"
        assert jobs.finish("Echo")["status"] == "Completed"  # the others are behind us
        jobs.redis.lpush("celery", raw)
        assert jobs.finish("Echo")["status"] == "Completed"
        assert len(jobs.runs(job_id)) == 1


class TestDeadlines:
    def test_an_async_handler(self, jobs: Deployment) -> None:
        before = time.monotonic()
        record = jobs.finish("ShortAsync", seconds=30)
        assert (record["status"], record["error"]["code"]) == ("Failed", "JOB_TIMEOUT")
        assert 0.9 < time.monotonic() - before < 3

    def test_an_async_handler_that_does_not_heed_it(self, jobs: Deployment) -> None:
        record = jobs.finish("DeafAsync", seconds=0.5)
        assert (record["status"], record["error"] and record["error"]["code"]) == ("Failed", "JOB_TIMEOUT")

    def test_a_sync_handler(self, jobs: Deployment, pool: str) -> None:
        """Where the pool cannot interrupt it, the record still ends on time, and the late result is refused."""
        before = time.monotonic()
        job_id = jobs.submit("ShortSync", seconds=4 if pool != "prefork" else 30)
        record = jobs.wait(job_id)
        assert (record["status"], record["error"] and record["error"]["code"]) == ("Failed", "JOB_TIMEOUT")
        assert 0.9 < time.monotonic() - before < 4
        # Until the handler is through.
        assert jobs.wait(jobs.submit("Echo"), timeout=8)["status"] == "Completed"
        assert jobs.job(job_id) == record


class TestTheEventLoop:
    def test_is_one_for_each_process(self, jobs: Deployment, pool: str) -> None:
        ids = [jobs.submit("WhereAmI", seconds=0.1) for _ in range(6)]
        places = [jobs.wait(job_id)["result"] for job_id in ids]
        loops: dict[int, set[int]] = {}
        for place in places:
            loops.setdefault(place["pid"], set()).add(place["loop"])
        assert all(len(found) == 1 for found in loops.values())
        assert len(loops) <= (2 if pool == "prefork" else 1)


class Events:
    """What Flower would see: Celery's events of one deployment, from here to the end of the block."""

    def __init__(self, deployed: Deployment) -> None:
        self._deployed = deployed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._capture, daemon=True)
        self.seen: list[dict[str, Any]] = []

    def _capture(self) -> None:
        celery = self._deployed.celery
        with celery.connection_for_read() as connection:
            receiver = celery.events.Receiver(connection, handlers={"*": self.seen.append})
            with receiver.consumer_context() as (listening, _, _):
                while not self._stopping.is_set():
                    with suppress(TimeoutError):
                        listening.drain_events(timeout=0.1)

    def __enter__(self) -> "Events":
        patterns = self._deployed.redis.pubsub_numpat()
        self._thread.start()
        wait_until(lambda: self._deployed.redis.pubsub_numpat() > patterns)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._thread.join(5)
        wait_until(lambda: not self._thread.is_alive())

    def of(self, job_id: str) -> list[dict[str, Any]]:
        return [event for event in self.seen if event.get("uuid") == job_id]

    def types(self, job_id: str) -> list[str]:
        return [event["type"] for event in self.of(job_id)]


class TestWhatOthersSee:
    def test_events_name_the_job_and_show_its_retries(self, jobs: Deployment) -> None:
        with Events(jobs) as events:
            job_id = jobs.submit("Flaky", {"X-Secret": HEADER_SECRET}, text=PAYLOAD_SECRET, failures=2)
            jobs.wait(job_id)
            wait_until(lambda: "task-succeeded" in events.types(job_id))
        types = events.types(job_id)
        assert types.count("task-retried") == 2
        assert types.count("task-received") == 3
        received = [event for event in events.of(job_id) if event["type"] == "task-received"]
        assert [event["retries"] for event in received] == [0, 1, 2]
        for event in received:
            assert event["name"] == "async_endpoints.Flaky"
            assert job_id in event["args"]
            assert "Flaky" in event["args"]
            assert event["kwargs"] == "{}"
        assert not [secret for secret in (HEADER_SECRET, PAYLOAD_SECRET) if secret in repr(events.seen)]

    def test_a_failure_is_a_failure_in_celery_too(self, jobs: Deployment) -> None:
        with Events(jobs) as events:
            job_id = jobs.submit("Outcome", kind="job-failed")
            wait_until(lambda: "task-failed" in events.types(job_id))
        (failed,) = [event for event in events.of(job_id) if event["type"] == "task-failed"]
        assert "CARD_DECLINED" in failed["exception"]

    def test_inspect_shows_running_jobs_without_their_data(self, jobs: Deployment, pool: str) -> None:
        if pool == "solo":
            pytest.skip("a solo worker answers nobody while it runs a job")
        job_id = jobs.submit("Gate", {"X-Secret": HEADER_SECRET}, text=PAYLOAD_SECRET)
        jobs.wait(job_id, "InProgress")
        inspect = jobs.celery.control.inspect(timeout=2)
        active = next(task for task in next(iter(inspect.active().values())) if task["id"] == job_id)
        queried = inspect.query_task(job_id)
        jobs.open_gate(job_id)
        assert jobs.wait(job_id)["status"] == "Completed"
        assert (active["id"], active["name"]) == (job_id, "async_endpoints.Gate")
        for shown in (repr(active), repr(queried)):
            assert "Gate" in shown
            assert HEADER_SECRET not in shown
            assert PAYLOAD_SECRET not in shown

    def test_logs_hold_no_data(self, jobs: Deployment, worker: WorkerNode) -> None:
        """Of jobs that end in every way, retried, dispatched again and unknown ones included."""
        headers = {"X-Secret": HEADER_SECRET}
        for name, kind in [
            ("Echo", ""),
            ("EchoSync", ""),
            ("Nobody", ""),
            ("Outcome", "value-error"),
            ("Outcome", "object"),
            ("Outcome", "large"),
        ]:
            jobs.wait(
                jobs.http.post(
                    f"/run/{name}?q={QUERY_SECRET}", json={"kind": kind, "text": PAYLOAD_SECRET}, headers=headers
                ).json()["id"]
            )
        job_id = jobs.submit("Failing", headers, text=PAYLOAD_SECRET)
        jobs.wait(job_id, "Scheduled")
        jobs.make_due(job_id)
        jobs.sweep()
        wait_until(lambda: jobs.job(job_id)["retryCount"] == 2)
        logs = worker.logs()
        assert job_id in logs
        assert not [secret for secret in (HEADER_SECRET, PAYLOAD_SECRET, QUERY_SECRET) if secret in logs]


def test_a_chosen_id_is_the_task_id(jobs: Deployment) -> None:
    chosen = uuid4()
    with Events(jobs) as events:
        response = jobs.post("Echo", {"X-Async-Request-Id": str(chosen)})
        assert UUID(response.json()["id"]) == chosen
        wait_until(lambda: "task-succeeded" in events.types(str(chosen)))
    assert jobs.wait(str(chosen))["result"]["job_id"] == str(chosen)
