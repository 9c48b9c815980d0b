"""Real processes for tests: each in a group of its own, watched through its output, killed as a group."""

import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).resolve().parent.parent

# Below the range that the kernel takes client ports from. A server that restarts must find its port free, and
# a client that keeps redialling a stopped server on its own machine could otherwise connect to itself.
_PORTS = range(15_000, 32_000)
# Hypothesis seeds `random`: two pytest workers would draw the same ports.
_random = random.SystemRandom()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on."""
    for port in _random.sample(_PORTS, k=200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"No free port in {_PORTS}")


def wait_until(condition: Callable[[], Any], timeout: float = 10.0, message: str = "", interval: float = 0.02) -> Any:
    """Polls `condition` until it is true and returns its value; TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(message or f"Not true within {timeout} s: {condition}")
        time.sleep(interval)
    return value


def is_running(pid: int) -> bool:
    """Whether the process exists and is not merely waiting to be reaped."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


class ProcessDied(RuntimeError):
    """The process ended while somebody waited for it to say something."""


class Process:
    """One process in its own session and process group. Its output, both streams, goes to the file `log`."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = ROOT,
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else f"ended with {self.returncode}"
        return f"<{Path(self.command[0]).name} pid={self.pid} {state}>"

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit status (negative: the signal that ended it), or None while it runs."""
        return self._popen.poll()

    @property
    def output(self) -> str:
        """What it has written so far."""
        with self.log.open("rb") as output:
            output.seek(self._log_start)
            return output.read().decode(errors="replace")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.output.splitlines()[-lines:])

    def members(self) -> list[psutil.Process]:
        """Everything alive that it has started, itself included: its group and its descendants."""
        found: dict[int, psutil.Process] = {}
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.pid)
            found = {process.pid: process for process in [leader, *leader.children(recursive=True)]}
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == self.pid:
                    found[process.pid] = process
        return [process for process in found.values() if is_running(process.pid)]

    def children(self) -> list[psutil.Process]:
        """The members without the process itself, for example the children of a prefork pool."""
        return [process for process in self.members() if process.pid != self.pid]

    def wait_for(self, ready: str | Callable[[], Any], timeout: float = 30.0) -> Any:
        """Waits for a regular expression in the output (returns the match) or for a condition to hold."""
        condition: Callable[[], Any]
        if isinstance(ready, str):
            pattern = re.compile(ready, re.MULTILINE)
            condition = lambda: pattern.search(self.output)  # noqa: E731
        else:
            condition = ready

        def ready_or_dead() -> Any:
            died = self.returncode is not None  # asked first: it may say the last word and exit
            if value := condition():
                return value
            if died:
                raise ProcessDied(f"{self} before {ready!r} was seen:\n{self.tail()}")
            return None

        try:
            return wait_until(ready_or_dead, timeout)
        except TimeoutError:
            raise TimeoutError(f"{self} did not show {ready!r} in {timeout} s:\n{self.tail()}") from None

    def wait(self, timeout: float = 30.0) -> int:
        """Waits for its end and returns the exit status."""
        return self._popen.wait(timeout)

    def signal(self, number: int) -> None:
        """Sends a signal to the process alone, not to its group."""
        self._popen.send_signal(number)

    def pause(self) -> None:
        """Stops the whole group, as a machine that hangs would."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGCONT)

    def stop(self, timeout: float = 10.0) -> int:
        """Ends it politely (SIGTERM to the process), and what is left after `timeout` seconds by force."""
        if self.returncode is None:
            self.resume()
            self.signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.wait(timeout)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL for everything it has started; returns when all of it is gone."""
        known: dict[int, psutil.Process] = {}

        def all_gone() -> bool:
            # Asked again each time: a process may have started another one while this was looking.
            known.update({process.pid: process for process in self.members()})
            alive = [process for process in known.values() if is_running(process.pid)]
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()  # psutil checks that the id still means the same process
            return not alive

        wait_until(all_gone, message=f"{self} could not be killed")
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


@contextmanager
def process(
    command: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
    ready: str | Callable[[], Any] | None = None,
    timeout: float = 30.0,
) -> Iterator[Process]:
    """Runs a command until the block ends.

    `ready`: a regular expression in its output, or a condition, to wait for (`timeout` in seconds).
    `env` is added to this process's environment.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ae-process-") as directory,
        Process(command, log=Path(directory) / "output.log", env=env, cwd=cwd) as running,
    ):
        if ready is not None:
            running.wait_for(ready, timeout)
        yield running
