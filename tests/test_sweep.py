"""Sweeps side by side, a sweep that dies, and what a sweep costs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from uuid import uuid4

import pytest
import redis
from celery import Celery

from async_endpoints_celery import AsyncEndpoints, Settings
from tests.deployment import Deployment
from tests.processes import ROOT, wait_until
from tests.servers import ValkeyServer, valkey_server

SWEEP = (
    "from tests.worker_app import celery_app; print('ready', flush=True); input();"
    " celery_app.tasks['async_endpoints.sweep']()"
)

#: KEYS: waiting, ended, jobs; ARGV: seconds until a waiting job is due (negative: no message of it went out yet),
#: status, ids …
ADD_JOBS = """
local clock = redis.call('TIME')
local now = clock[1] * 1000
for n = 3, #ARGV do
  local id, status = ARGV[n], ARGV[2]
  redis.call('HSET', 'ae:job:' .. id, 'name', 'Parked', 'status', status, 'created', now, 'updated', now,
    'retries', 0, 'max_retries', 3, 'retention', 86400000, 'attempt', 1, 'fence', 0, 'version', 1, 'fingerprint', 'x')
  if status == 'Queued' then
    redis.call('HSET', 'ae:job:' .. id, 'copies', 0,
      'dispatched', tonumber(ARGV[1]) < 0 and '' or now)
    redis.call('SET', 'ae:request:' .. id, '{}')
    redis.call('ZADD', KEYS[1], now + 1000 * ARGV[1], id)
  else
    redis.call('ZADD', KEYS[2], now + 86400000, id)
    redis.call('PEXPIRE', 'ae:job:' .. id, 86400000)
  end
  redis.call('ZADD', KEYS[3], now, id)
end
"""


def add_jobs(client: redis.Redis, number: int, status: str, due: int = 3600) -> list[str]:
    ids = [str(uuid4()) for _ in range(number)]
    for first in range(0, number, 1000):
        client.eval(ADD_JOBS, 3, "ae:waiting", "ae:ended", "ae:jobs", due, status, *ids[first : first + 1000])
    return ids


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """No process runs yet: the sweepers are the tests' own."""
    env = {"ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": "1"}
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("sweep"), server.url, env=env) as deployed:
        yield deployed


class Sweeper:
    """A process that sweeps once when told to."""

    def __init__(self, deployed: Deployment) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SWEEP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **deployed.env},
        )

    def ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        return self.process.returncode


@pytest.fixture
def sweepers(deployed: Deployment) -> Iterator[list[Sweeper]]:
    sweepers = [Sweeper(deployed) for _ in range(3)]
    try:
        for sweeper in sweepers:
            sweeper.ready()
        yield sweepers
    finally:
        for sweeper in sweepers:
            sweeper.end()


@pytest.fixture
def undispatched(deployed: Deployment) -> list[str]:
    """Jobs whose message never went out, more than a batch."""
    deployed.clear()
    return add_jobs(deployed.redis, 450, "Queued", due=-1)


def dispatched(deployed: Deployment) -> list[str]:
    return sorted(message["headers"]["id"] for message in deployed.messages("parked"))


def test_three_at_once_publish_each_message_once(
    deployed: Deployment, sweepers: list[Sweeper], undispatched: list[str]
) -> None:
    for sweeper in sweepers:
        sweeper.go()
    for sweeper in sweepers:
        assert sweeper.process.wait(20) == 0
    assert dispatched(deployed) == sorted(undispatched)
    assert all(deployed.record(job_id)["copies"] == "0" for job_id in undispatched)


def test_one_that_is_killed_leaves_nothing_behind(
    deployed: Deployment, sweepers: list[Sweeper], undispatched: list[str]
) -> None:
    victim, heir, _ = sweepers
    victim.go()
    wait_until(lambda: int(deployed.redis.llen("parked")) > 20, interval=0.001)
    assert victim.end() == -signal.SIGKILL
    done = len(dispatched(deployed))
    assert 20 < done < len(undispatched), "it was killed too late"
    heir.go()
    assert heir.process.wait(20) == 0
    assert dispatched(deployed) == sorted(undispatched)
    keys = {key for key in deployed.redis.scan_iter("ae:*") if not key.startswith(("ae:job:", "ae:request:"))}
    assert keys <= {"ae:waiting", "ae:jobs", "ae:sweep", "ae:secret", "ae:claimed"}


def test_the_last_run_is_visible(deployed: Deployment, sweepers: list[Sweeper]) -> None:
    deployed.redis.delete("ae:sweep")
    sweepers[0].go()
    assert sweepers[0].process.wait(20) == 0
    seconds, _ = deployed.redis.time()
    last_run = int(deployed.redis.hget("ae:sweep", "last_run") or 0)
    assert 0 <= seconds * 1000 + 1000 - last_run < 10_000


def test_sweeps_that_nobody_hears_expire(deployed: Deployment) -> None:
    deployed.redis.delete("celery")
    beat = deployed.start_beat()
    wait_until(deployed.messages, 15)
    beat.kill()
    message = deployed.messages()[0]
    assert message["headers"]["task"] == "async_endpoints.sweep"
    assert message["headers"]["expires"] is not None
    deployed.redis.delete("celery")


class TestCost:
    @pytest.fixture
    def server(self) -> Iterator[ValkeyServer]:
        with valkey_server() as server:
            yield server

    def commands(self, client: redis.Redis) -> dict[str, int]:
        stats = client.info("commandstats")
        return {name: int(values["calls"]) for name, values in stats.items() if name != "cmdstat_info"}

    def test_is_the_same_however_many_jobs_are_at_rest(self, server: ValkeyServer) -> None:
        with Celery("sweeper", broker=server.url, set_as_current=False) as celery, server.client() as client:
            endpoints = AsyncEndpoints(celery, settings=Settings())
            sweep = celery.tasks["async_endpoints.sweep"]
            sweep()  # connects, and the scripts are known

            def cost() -> dict[str, int]:
                before = self.commands(client)
                sweep()
                return {name: calls - before.get(name, 0) for name, calls in self.commands(client).items()}

            costs = []
            for ended, waiting in ((1_000, 100), (99_000, 9_900)):
                add_jobs(client, ended, "Completed")
                add_jobs(client, waiting, "Queued")
                costs.append({name: calls for name, calls in cost().items() if calls})
            endpoints.close()
            assert (client.zcard("ae:ended"), client.zcard("ae:waiting")) == (100_000, 10_000)
        few, many = costs
        assert many == few
        assert 0 < sum(many.values()) < 20
