"""Celery workers under test as pytest-celery nodes, run as local processes instead of Docker containers.

A node asks little of its container: `ready`, `logs`, `kill`, `restart`, `teardown`, `status` and a name.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import celery
import psutil
from pytest_celery import CeleryTestWorker

from tests.processes import ROOT, Process


class WorkerProcess:
    """`celery -A <app> worker` where pytest-celery expects a container."""

    def __init__(
        self,
        app: str,
        *arguments: str,
        directory: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = ROOT,
        mingle: bool = False,
    ) -> None:
        """`app`: what `celery -A` takes. `arguments`: further ones, for example `-P threads -c 4`.

        `directory`: for the log. `env` is added to this process's environment. `mingle`: ask the other
        workers for what they know (revoked ids) at the start, which takes a second.
        """
        self.id = uuid4().hex[:12]
        self.name = f"worker-{self.id}"
        self._command = [
            *(sys.executable, "-m", "celery", "-A", app, "worker"),
            *("-n", f"{self.worker_name()}@{self.id}", "-l", self.log_level()),
            *([] if mingle else ["--without-mingle"]),
            *arguments,
        ]
        self._log = directory / f"{self.name}.log"
        self._env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(cwd)]), **(env or {})}
        self._cwd = cwd
        self.process = self._start()

    def _start(self) -> Process:
        return Process(self._command, log=self._log, env=self._env, cwd=self._cwd)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def status(self) -> str:
        return "running" if self.process.returncode is None else "exited"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {}

    def children(self) -> list[psutil.Process]:
        """The processes of a prefork pool."""
        return self.process.children()

    def ready(self) -> bool:
        self.process.wait_for(rf"{self.worker_name()}@{self.id} ready\.$", timeout=60.0)
        return True

    def logs(self) -> str:
        """Everything it has written, also before a restart."""
        return self._log.read_text(errors="replace")

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Sends the signal to the worker's main process. Its children are left to their own devices."""
        self.process.signal(_number(signal))
        if _number(signal) == _number("SIGKILL"):
            self.process.wait()

    def restart(self, timeout: float = 30.0) -> None:
        """SIGTERM, which lets running tasks end, and a new process with the same name."""
        self.process.stop(timeout)
        self.process = self._start()

    def reload(self) -> None:
        """A container's attributes are a snapshot; these are not."""

    def teardown(self) -> None:
        self.process.kill()

    @staticmethod
    def version() -> str:
        return celery.__version__

    @staticmethod
    def log_level() -> str:
        return "INFO"

    @staticmethod
    def worker_name() -> str:
        return "worker"

    @staticmethod
    def worker_queue() -> str:
        return "celery"


class WorkerNode(CeleryTestWorker):
    """A pytest-celery worker whose `container` is a `WorkerProcess`."""

    container: WorkerProcess


def _number(name: str | int) -> int:
    return signal.Signals[name] if isinstance(name, str) else name
