"""One run: clients submit, a killer kills, and at the end ledger, records and logs must agree that nothing was lost."""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from uuid import UUID

import httpx
import redis

from chaos.deployment import LEASE_SECONDS, SWEEP_SECONDS, Deployment
from chaos.ledger import Ledger, judge
from tests.servers import valkey_server

#: Seconds a client goes on with one submission, under one X-Async-Request-Id.
SUBMIT_WITHIN = 60.0
#: Seconds all jobs have to end once the last kill is over.
END_WITHIN = 120.0
#: Seconds between two kills: from, to.
PAUSE = (0.4, 1.6)


@dataclass(frozen=True)
class Report:
    """What one run found. Times in seconds."""

    seed: int
    jobs: int
    accepted: int
    ended: dict[str, int]
    lost: int
    completed_twice: int
    overlapping: int
    attempts: int
    interrupted: int
    stale_writes_refused: int
    kills: dict[str, int]
    recovery: dict[str, dict[str, float]]
    seconds: float

    @property
    def passed(self) -> bool:
        return self.lost == self.completed_twice == self.overlapping == 0 and self.accepted == self.jobs


class Run:
    """One deployment, one seed."""

    def __init__(
        self,
        seed: int,
        jobs: int,
        clients: int,
        kill_seconds: float,
        *,
        verbose: bool = False,
        logs: Path | None = None,
    ) -> None:
        self.seed, self.jobs, self.clients = seed, jobs, clients
        self.kill_seconds = kill_seconds
        self.verbose, self.logs = verbose, logs
        self.rng = random.Random(seed)
        self.accepted: set[str] = set()
        self.kills: Counter[str] = Counter()

    def __call__(self) -> Report:
        started = time.monotonic()
        # Every write on disk before it is answered: what was accepted must survive a kill -9 of Redis too.
        options = ["--appendfsync", "always"]
        with tempfile.TemporaryDirectory(prefix="ae-chaos-", ignore_cleanup_errors=True) as directory:
            place = self.logs / str(self.seed) if self.logs else Path(directory)
            place.mkdir(parents=True, exist_ok=True)
            with valkey_server(appendonly=True, extra_args=options) as server:
                deployment = Deployment(place, server)
                try:
                    deployment.start()
                    asyncio.run(self._fire(deployment))
                    states = self._await_ends(deployment)
                    return self._report(deployment, states, time.monotonic() - started)
                finally:
                    deployment.stop()

    async def _fire(self, deployment: Deployment) -> None:
        plans = [self._plan() for _ in range(self.jobs)]
        killer = asyncio.create_task(asyncio.to_thread(self._kill, deployment))
        shares = [plans[n :: self.clients] for n in range(self.clients)]
        async with httpx.AsyncClient(base_url=deployment.url, timeout=5.0) as http:
            await asyncio.gather(*(self._client(http, share) for share in shares))
        await killer

    def _plan(self) -> tuple[str, str, float]:
        path = self.rng.choices(["/async", "/sync", "/flaky"], [6, 3, 1])[0]
        return str(UUID(int=self.rng.getrandbits(128), version=4)), path, round(self.rng.uniform(0.01, 0.3), 3)

    async def _client(self, http: httpx.AsyncClient, plans: list[tuple[str, str, float]]) -> None:
        pace = self.kill_seconds / max(len(plans), 1)
        for job_id, path, seconds in plans:
            began = time.monotonic()
            await self._submit(http, job_id, path, seconds)
            await asyncio.sleep(max(0.0, pace - (time.monotonic() - began)))

    async def _submit(self, http: httpx.AsyncClient, job_id: str, path: str, seconds: float) -> None:
        """As a good client does it: the same id again until it is accepted."""
        give_up = time.monotonic() + SUBMIT_WITHIN
        while time.monotonic() < give_up:
            try:
                response = await http.post(path, json={"seconds": seconds}, headers={"X-Async-Request-Id": job_id})
            except httpx.TransportError:
                await asyncio.sleep(0.1)
                continue
            if response.status_code == 202:
                self.accepted.add(job_id)
                return
            if response.status_code != 503:
                raise RuntimeError(f"{path} answered {response.status_code}: {response.text}")
            await asyncio.sleep(0.1)

    def _kill(self, deployment: Deployment) -> None:
        rng = random.Random(self.seed + 1)
        weights, actions = zip(*deployment.weapons(), strict=True)
        end = time.monotonic() + self.kill_seconds
        while time.monotonic() < end:
            time.sleep(rng.uniform(*PAUSE))
            action = rng.choices(actions, weights)[0]
            deployment.supervise()
            done = action(rng)
            self.kills[action.__name__.replace("_", " ")] += 1
            if self.verbose:
                print(f"  {done}", flush=True)

    def _await_ends(self, deployment: Deployment) -> Counter[str]:
        """The states of all accepted jobs, once they are over or the time for that is."""
        give_up = time.monotonic() + END_WITHIN
        while True:
            deployment.supervise()
            states = self._states(deployment)
            over = sum(states[word] for word in ("Completed", "Failed", "Canceled"))
            if over == len(self.accepted) or time.monotonic() > give_up:
                return states
            time.sleep(0.5)

    def _states(self, deployment: Deployment) -> Counter[str]:
        with redis.Redis.from_url(deployment.server.url, decode_responses=True) as client:
            pipe = client.pipeline(transaction=False)
            for job_id in sorted(self.accepted):
                pipe.hget(f"ae:job:{job_id}", "status")
            return Counter(status or "missing" for status in pipe.execute())

    def _report(self, deployment: Deployment, states: Counter[str], seconds: float) -> Report:
        logs = deployment.logs("prefork") + deployment.logs("threads")
        verdict = judge(Ledger(deployment.ledger).read(), deployment.kills, _recoveries(logs))
        succeeded = Counter(re.findall(r"Task async_endpoints\.\w+\[([0-9a-f-]+)\] succeeded", logs))
        over = sum(states[word] for word in ("Completed", "Failed", "Canceled"))
        return Report(
            seed=self.seed,
            jobs=self.jobs,
            accepted=len(self.accepted),
            ended={word: states[word] for word in ("Completed", "Failed", "Canceled")},
            lost=len(self.accepted) - over,
            completed_twice=sum(1 for times in succeeded.values() if times > 1),
            overlapping=verdict.overlapping,
            attempts=verdict.attempts,
            interrupted=verdict.interrupted,
            stale_writes_refused=logs.count("was no longer this worker's"),
            kills=dict(self.kills),
            recovery={kind: _spread(times) for kind, times in sorted(verdict.recoveries.items())},
            seconds=round(seconds, 1),
        )


def _recoveries(logs: str) -> dict[str, list[float]]:
    """When workers said that they recovered a job: job → times."""
    recovered: dict[str, list[float]] = defaultdict(list)
    for stamp, job_id in re.findall(
        r"^\[([\d-]+ [\d:,]+): .* job ([0-9a-f-]{36}) \(\w+\) lost its", logs, re.MULTILINE
    ):
        # Celery logs in local time.
        moment = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").astimezone()
        recovered[job_id].append(moment.timestamp())
    return recovered


def _spread(times: list[float]) -> dict[str, float]:
    p99 = quantiles(times, n=100, method="inclusive")[98] if len(times) > 1 else times[0]
    return {"n": len(times), "p50": round(median(times), 2), "p99": round(p99, 2), "max": round(max(times), 2)}


def table(reports: list[Report]) -> str:
    """The reports as a Markdown table."""
    rows: list[tuple[str, list[Any]]] = [
        ("seed", [r.seed for r in reports]),
        ("accepted / submitted", [f"{r.accepted} / {r.jobs}" for r in reports]),
        ("Completed", [r.ended["Completed"] for r in reports]),
        ("Failed", [r.ended["Failed"] for r in reports]),
        ("**lost**", [r.lost for r in reports]),
        ("**completed more than once**", [r.completed_twice for r in reports]),
        ("**attempts overlapping in time**", [r.overlapping for r in reports]),
        ("attempts / interrupted", [f"{r.attempts} / {r.interrupted}" for r in reports]),
        ("stale writes refused", [r.stale_writes_refused for r in reports]),
        ("kills", [sum(r.kills.values()) for r in reports]),
        *((f"recovery after a killed {kind}: p50 / p99 / max", [_times(r, kind) for r in reports]) for kind in KINDS),
        ("seconds", [r.seconds for r in reports]),
    ]
    lines = ["| " + " | ".join([name, *map(str, cells)]) + " |" for name, cells in rows]
    return "\n".join([lines[0], "| --- " + "| ---: " * len(reports) + "|", *lines[1:]])


KINDS = ("pool process", "worker")
LIMITS = {"pool process": 2.0, "worker": LEASE_SECONDS + SWEEP_SECONDS}


def _times(report: Report, kind: str) -> str:
    spread = report.recovery.get(kind)
    return f"{spread['p50']} / {spread['p99']} / {spread['max']} s" if spread else "–"


def as_json(reports: list[Report]) -> list[dict[str, Any]]:
    return [asdict(report) for report in reports]
