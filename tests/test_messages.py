"""Messages that come twice, late or never: a job runs once for each attempt, and it does run."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from tests.deployment import Deployment
from tests.nodes import WorkerNode
from tests.processes import wait_until
from tests.servers import valkey_server

SETTINGS = {
    "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": "2",
    "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1",
}
VISIBILITY_TIMEOUT = 2
#: Seconds before a sweep first doubts the message of a waiting job.
DOUBT = 10

#: Makes everything that the sweep judges by older. KEYS: waiting, claimed; ARGV: milliseconds, key prefix of records.
LET_TIME_PASS = """
local by = tonumber(ARGV[1])
local entries = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for n = 1, #entries, 2 do
  redis.call('ZADD', KEYS[1], string.format('%.0f', entries[n + 1] - by), entries[n])
  local job = ARGV[2] .. entries[n]
  local dispatched = tonumber(redis.call('HGET', job, 'dispatched') or '')
  if dispatched then
    redis.call('HSET', job, 'dispatched', string.format('%.0f', dispatched - by))
  end
end
local fields = redis.call('HGETALL', KEYS[2])
for n = 1, #fields, 2 do
  if not string.find(fields[n], '|probes', 1, true) then
    redis.call('HSET', KEYS[2], fields[n], string.format('%.0f', fields[n + 1] - by))
  end
end
"""
#: Multiplies a waiting job and its message. KEYS: job, request, waiting, jobs, queue; ARGV: id, message, new ids …
MULTIPLY = """
local record, request = redis.call('HGETALL', KEYS[1]), redis.call('GET', KEYS[2])
local due, created = redis.call('ZSCORE', KEYS[3], ARGV[1]), redis.call('ZSCORE', KEYS[4], ARGV[1])
local pattern = string.gsub(ARGV[1], '-', '%%-')
for n = 3, #ARGV do
  redis.call('HSET', 'ae:job:' .. ARGV[n], unpack(record))
  redis.call('SET', 'ae:request:' .. ARGV[n], request)
  redis.call('ZADD', KEYS[3], due, ARGV[n])
  redis.call('ZADD', KEYS[4], created, ARGV[n])
  redis.call('LPUSH', KEYS[5], (string.gsub(ARGV[2], pattern, ARGV[n])))
end
"""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A web process, and a worker that sweeps when it is told to."""
    config = {"broker_transport_options": {"visibility_timeout": VISIBILITY_TIMEOUT}}
    env = {**SETTINGS, "TEST_CELERY_CONFIG": json.dumps(config)}
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("messages"), server.url, env=env) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "2")
        yield deployed


@pytest.fixture
def start_parked(deployed: Deployment) -> Iterator[Callable[[], WorkerNode]]:
    """Starts workers for a queue of their own; they end with the test."""
    nodes: list[WorkerNode] = []

    def start() -> WorkerNode:
        nodes.append(deployed.start_worker("-P", "threads", "-c", "2", "-Q", "parked"))
        return nodes[-1]

    yield start
    for node in nodes:
        node.teardown()
    deployed.redis.delete("parked", "unacked", "unacked_index", "ae:waiting", "ae:claimed")


def raw_messages(deployed: Deployment, queue: str = "parked") -> list[str]:
    """Newest first, as they are stored."""
    found: Any = deployed.redis.lrange(queue, 0, -1)
    return list(found)


def sweep(deployed: Deployment) -> None:
    """One sweep, from its beginning to its end."""
    before = deployed.redis.hget("ae:sweep", "last_run")
    deployed.sweep()
    wait_until(lambda: deployed.redis.hget("ae:sweep", "last_run") != before)


def let_time_pass(deployed: Deployment, seconds: float) -> None:
    deployed.redis.eval(LET_TIME_PASS, 2, "ae:waiting", "ae:claimed", int(seconds * 1000), "ae:job:")


def assert_ran_once(deployed: Deployment, job_id: str) -> None:
    record = deployed.wait(job_id)
    assert (record["status"], record["retryCount"], record["error"]) == ("Completed", 0, None)
    assert len(deployed.runs(job_id)) == 1


class TestTwice:
    def test_delivered_again_after_the_visibility_timeout(
        self, deployed: Deployment, start_parked: Callable[[], WorkerNode]
    ) -> None:
        first = start_parked()
        job_id = deployed.submit("Turns")
        deployed.wait(job_id, "InProgress")
        assert deployed.redis.zcard("unacked_index") == 1
        time.sleep(VISIBILITY_TIMEOUT + 0.1)
        other = start_parked()  # looks for overdue messages at its start, and one of the two gets it
        wait_until(lambda: f"job {job_id} is InProgress, not waiting" in first.logs() + other.logs())
        assert deployed.job(job_id)["status"] == "InProgress"
        deployed.open_gate(f"{job_id}:0")
        assert_ran_once(deployed, job_id)

    def test_and_the_worker_that_runs_it_dies(
        self, deployed: Deployment, start_parked: Callable[[], WorkerNode]
    ) -> None:
        """The copy is acknowledged, the first message is nobody's: the sweep makes a new one."""
        victim = start_parked()
        job_id = deployed.submit("Turns")
        deployed.wait(job_id, "InProgress")
        deployed.redis.lpush("parked", _held_message(deployed))
        other = start_parked()
        wait_until(lambda: f"job {job_id} is InProgress, not waiting" in victim.logs() + other.logs())
        deployed.redis.delete("unacked", "unacked_index")
        victim.teardown()

        def recovered() -> bool:
            deployed.sweep()
            return len(deployed.runs(job_id)) == 2

        wait_until(recovered, interval=0.5)
        deployed.open_gate(f"{job_id}:1")
        record = deployed.wait(job_id)
        assert (record["status"], record["result"], record["retryCount"]) == ("Completed", 1, 1)

    def test_published_by_hand(self, deployed: Deployment, start_parked: Callable[[], WorkerNode]) -> None:
        job_id = deployed.submit("Parked")
        (message,) = raw_messages(deployed)
        for _ in range(3):
            deployed.redis.lpush("parked", message)
        start_parked()
        assert_ran_once(deployed, job_id)
        deployed.redis.lpush("parked", message)
        assert_ran_once(deployed, deployed.submit("Parked"))
        wait_until(lambda: not deployed.redis.exists("parked", "unacked"))
        assert_ran_once(deployed, job_id)


def _held_message(deployed: Deployment) -> str:
    """The message that a worker holds."""
    (held,) = deployed.redis.hvals("unacked")
    return json.dumps(json.loads(held)[0])


class TestLost:
    def test_a_purged_queue_with_idle_workers(
        self, deployed: Deployment, start_parked: Callable[[], WorkerNode]
    ) -> None:
        ids = [deployed.submit("Parked") for _ in range(20)]
        assert deployed.redis.delete("parked") == 1
        start_parked()
        assert_ran_once(deployed, deployed.submit("Echo"))
        sweep(deployed)
        assert {deployed.job(job_id)["status"] for job_id in ids} == {"Queued"}  # too early to doubt

        def over() -> bool:
            let_time_pass(deployed, DOUBT)
            sweep(deployed)
            return all(deployed.record(job_id)["status"] == "Completed" for job_id in ids)

        wait_until(over, interval=0.2)
        for job_id in ids:
            assert_ran_once(deployed, job_id)

    def test_one_message_from_the_middle_of_a_queue_that_moves(
        self, deployed: Deployment, start_parked: Callable[[], WorkerNode]
    ) -> None:
        ids = [deployed.submit("Parked") for _ in range(9)]
        lost = ids[4]
        (message,) = [message for message in raw_messages(deployed) if lost in message]
        assert deployed.redis.lrem("parked", 1, message) == 1
        start_parked()
        for job_id in ids:
            if job_id != lost:
                assert_ran_once(deployed, job_id)
        assert deployed.record(lost)["status"] == "Queued"
        # The queue has just moved, so this is no case of an idle one.
        deployed.redis.zadd("ae:waiting", {lost: 1}, xx=True)
        assert_ran_once(deployed, deployed.submit("Parked"))
        sweep(deployed)
        assert_ran_once(deployed, lost)
        assert deployed.redis.hget("ae:claimed", "Parked|probes") is None


def test_a_deep_queue_does_not_fill_with_copies(deployed: Deployment, start_parked: Callable[[], WorkerNode]) -> None:
    """An hour without any worker: what the sweep publishes again is a few probes."""
    job_id = deployed.submit("Parked")
    (message,) = raw_messages(deployed)
    ids = [str(uuid4()) for _ in range(1_999)]
    keys = [f"ae:job:{job_id}", f"ae:request:{job_id}", "ae:waiting", "ae:jobs", "parked"]
    deployed.redis.eval(MULTIPLY, len(keys), *keys, job_id, message, *ids)
    depth = len(ids) + 1
    assert deployed.redis.zcard("ae:waiting") == deployed.redis.llen("parked") == depth

    for _ in range(60):
        let_time_pass(deployed, 60)
        sweep(deployed)
    copies = int(deployed.redis.llen("parked")) - depth
    assert 0 < copies < depth / 100
    assert deployed.redis.zcard("ae:waiting") == depth

    # And the first worker that comes gets them all.
    deployed.redis.ltrim("parked", -40, -1)
    start_parked()
    assert_ran_once(deployed, job_id)
