"""The deployment under fire: Redis with an append-only file, a web process, two workers, two beats."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.processes import Process, free_port
from tests.servers import ValkeyServer

LEASE_SECONDS = 3.0
SWEEP_SECONDS = 1.0


class Deployment:
    """Starts everything, and knows how to kill each part and start it again."""

    def __init__(self, directory: Path, server: ValkeyServer) -> None:
        self.directory = directory
        self.server = server
        self.port = free_port()
        self.ledger = directory / "ledger.jsonl"
        self.env = {
            "CHAOS_BROKER": server.url,
            "CHAOS_LEDGER": str(self.ledger),
            "ASYNC_ENDPOINTS_MAXIMUM_QUEUE_SIZE": "none",
            "ASYNC_ENDPOINTS_JOB_CLAIM_TIMEOUT_SECONDS": str(LEASE_SECONDS),
            "ASYNC_ENDPOINTS_RECOVERY_CHECK_INTERVAL_SECONDS": str(SWEEP_SECONDS),
            "ASYNC_ENDPOINTS_DEFAULT_MAX_RETRIES": "20",
            "ASYNC_ENDPOINTS_RECOVERY_MAXIMUM_RETRIES": "20",
        }
        #: pid → (time of its kill, what was killed).
        self.kills: dict[int, tuple[float, str]] = {}
        self._processes: dict[str, Process] = {}
        self._generation = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        for name in ("web", "prefork", "threads", "beat-1", "beat-2"):
            self._start(name, wait=True)

    def _start(self, name: str, *, wait: bool = False) -> None:
        self._generation += 1
        celery = [sys.executable, "-m", "celery", "-A", "chaos.app:celery_app"]
        worker = [*celery, "worker", "-l", "INFO", "-n", f"{name}-{self._generation}@%h", "--without-mingle"]
        commands = {
            "web": [sys.executable, "-m", "uvicorn", "chaos.app:app", "--port", str(self.port), "--no-access-log"],
            "prefork": [*worker, "-P", "prefork", "-c", "4"],
            "threads": [*worker, "-P", "threads", "-c", "4"],
        }
        schedule = self.directory / f"{name}.schedule"
        beat = [*celery, "beat", "-s", str(schedule), "--pidfile=", "-l", "WARNING"]
        ready = {"web": "startup complete", "prefork": r" ready\.", "threads": r" ready\."}
        process = Process(
            commands.get(name, beat),
            env={**os.environ, **self.env},
            log=self.directory / f"{name}-{self._generation}.log",
        )
        self._processes[name] = process
        if wait and name in ready:
            process.wait_for(ready[name])

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()

    def logs(self, name: str) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.directory.glob(f"{name}-*.log")))

    def supervise(self) -> None:
        """Start again what ended by itself, as any process manager does: a worker whose pool died at its start."""
        for name, process in list(self._processes.items()):
            if process.returncode is not None:
                self._start(name)

    # What can be done to it; each returns what it did, for the protocol.

    def weapons(self) -> list[tuple[int, Callable[[random.Random], str]]]:
        """(weight, action) of each kind of kill."""
        return [
            (5, self.kill_child),
            (2, self.kill_worker),
            (2, self.terminate_worker),
            (1, self.kill_beat),
            (2, self.kill_web),
            (1, self.restart_redis),
        ]

    def kill_child(self, rng: random.Random) -> str:
        children = self._processes["prefork"].children()
        if not children:
            return "no pool process to kill"
        child = rng.choice(sorted(children, key=lambda process: process.pid))
        self._note(child.pid, "pool process")
        child.kill()
        return f"kill -9 pool process {child.pid}"

    def kill_worker(self, rng: random.Random) -> str:
        name = self._spare_worker(rng)
        process = self._processes[name]
        for member in process.members():
            self._note(member.pid, "worker")
        process.kill()
        self._start(name)
        return f"kill -9 worker {name}"

    def terminate_worker(self, rng: random.Random) -> str:
        name = self._spare_worker(rng)
        process = self._processes[name]
        process.stop(timeout=20)
        self._start(name)
        return f"SIGTERM worker {name}"

    def _spare_worker(self, rng: random.Random) -> str:
        """One of the two, once the other is ready: how fast jobs are recovered is told by those who are there."""
        name, other = rng.sample(["prefork", "threads"], 2)
        self._processes[other].wait_for(r" ready\.")
        return name

    def kill_beat(self, rng: random.Random) -> str:
        name = rng.choice(["beat-1", "beat-2"])
        self._processes[name].kill()
        self._start(name)
        return f"kill -9 {name}"

    def kill_web(self, rng: random.Random) -> str:
        self._processes["web"].kill()
        self._start("web")
        return "kill -9 web"

    def restart_redis(self, rng: random.Random) -> str:
        self.server.kill()
        time.sleep(rng.uniform(0, 1))
        self.server.start()
        return "kill -9 Redis, and start it again"

    def _note(self, pid: int, kind: str) -> None:
        self.kills.setdefault(pid, (time.time(), kind))
