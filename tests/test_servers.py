"""What other tests stand on: servers, processes and nodes start, come back, and leave nothing behind."""

import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from celery import Celery

from tests.nodes import WorkerNode
from tests.processes import Process, ProcessDied, free_port, is_running, process, wait_until
from tests.servers import RabbitMQServer, ValkeyServer, rabbitmq_server, valkey_server


def test_a_free_port_can_be_bound() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass


class TestProcess:
    def test_ready_when_its_output_says_so(self) -> None:
        script = "import time; print('listening'); time.sleep(60)"
        with process([sys.executable, "-c", script], ready="^listening$") as running:
            assert running.returncode is None
        assert running.returncode == -signal.SIGTERM

    def test_an_early_death_shows_the_last_words(self) -> None:
        with (
            pytest.raises(ProcessDied, match="the reason"),
            process([sys.executable, "-c", "raise SystemExit('the reason')"], ready="listening"),
        ):
            pass

    def test_a_process_that_is_never_ready(self) -> None:
        with (
            pytest.raises(TimeoutError, match="waiting for godot"),
            process(["sh", "-c", "echo waiting for godot; exec sleep 60"], ready="listening", timeout=0.3),
        ):
            pass

    def test_the_whole_group_goes_even_when_it_ignores_sigterm(self, tmp_path: Path) -> None:
        script = "trap '' TERM; sleep 60 & sleep 60 & echo started; wait"
        running = Process(["sh", "-c", script], log=tmp_path / "log")
        running.wait_for("started")
        wait_until(lambda: len(running.children()) == 2)
        members = running.members()
        running.stop(timeout=0.1)
        assert not [member for member in members if is_running(member.pid)]

    def test_orphans_of_a_dead_leader_go_too(self, tmp_path: Path) -> None:
        running = Process(["sh", "-c", "sleep 60 & echo $!"], log=tmp_path / "log")
        orphan = int(running.wait_for(r"^\d+$").group())
        running.wait()
        assert is_running(orphan)
        running.kill()
        assert not is_running(orphan)


class TestValkey:
    def test_data_survive_a_kill_with_the_append_only_file(self) -> None:
        with valkey_server(appendonly=True) as server:
            pid, port, directory = server.pid, server.port, server.directory
            with server.client() as client:
                client.set("key", "value")
            server.kill()
            assert not is_running(pid)
            with server.client() as client, pytest.raises(redis.ConnectionError):
                client.ping()

            server.start()
            assert server.port == port
            assert server.pid != pid
            with server.client() as client:
                assert client.get("key") == "value"
            server.restart()
            with server.client() as client:
                assert client.get("key") == "value"
        assert not is_running(server.pid)
        assert not directory.exists()

    def test_data_do_not_survive_without_it(self) -> None:
        with valkey_server() as server, server.client() as client:
            client.set("key", "value")
            server.restart()
            assert client.get("key") is None

    def test_a_paused_server_hangs_and_answers_again(self) -> None:
        with valkey_server() as server, server.client(socket_timeout=0.2, retry=None) as client:
            client.ping()
            server.pause()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            server.resume()
            wait_until(client.ping)
            server.pause()
        assert not is_running(server.pid)

    def test_extra_arguments_reach_the_server(self) -> None:
        with (
            valkey_server(extra_args=["--maxmemory-policy", "allkeys-lru"]) as server,
            server.client() as client,
        ):
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}

    def test_the_shared_server_is_given_out_empty(self, valkey: ValkeyServer, redis_url: str) -> None:
        with valkey.client() as client:
            assert client.dbsize() == 0
            client.set("left", "behind")
        assert redis_url == valkey.url

    @pytest.mark.parametrize("again", [1, 2])
    def test_and_empty_again(self, valkey: ValkeyServer, redis_url: str, again: int) -> None:
        with redis.Redis.from_url(redis_url) as client:
            assert client.dbsize() == 0
            client.set("left", "behind")


class TestRabbitMQ:
    def test_each_test_has_a_virtual_host_of_its_own(self, rabbitmq: RabbitMQServer, rabbitmq_url: str) -> None:
        with Celery(broker=rabbitmq_url, set_as_current=False).connection() as connection:
            queue = connection.SimpleQueue("hello")
            queue.put({"greeting": "hello"})
            assert queue.get(timeout=5).payload == {"greeting": "hello"}
            queue.close()
        vhost = rabbitmq_url.rpartition("/")[2]
        assert "hello" in rabbitmq.ctl("-q", "list_queues", "-p", vhost)
        assert "hello" not in rabbitmq.ctl("-q", "list_queues")

    def test_nothing_is_left_behind(self, rabbitmq: RabbitMQServer) -> None:
        # Beside the shared node: two nodes do not meet.
        with rabbitmq_server() as server:
            server.kill()
            server.start()
            directory, members = server.directory, server.members()
            assert {"beam.smp", "epmd"} <= {member.name() for member in members}
            assert rabbitmq.is_running()
        assert not [member for member in members if is_running(member.pid)]
        assert not directory.exists()


PLAIN_APP = """
import os, time
from celery import Celery

app = Celery("plain", broker=os.environ["BROKER_URL"])
app.conf.broker_connection_retry_on_startup = True

@app.task(name="say")
def say(word):
    print(f"said {word}")
"""


class TestWorkerNode:
    @pytest.fixture
    def start_plain(
        self, tmp_path: Path, redis_url: str, start_worker: Callable[..., WorkerNode]
    ) -> Callable[..., WorkerNode]:
        (tmp_path / "plain.py").write_text(PLAIN_APP)
        env = {"BROKER_URL": redis_url}
        return lambda *arguments: start_worker("plain:app", *arguments, cwd=tmp_path, env=env)

    def test_a_worker_as_a_local_process(self, start_plain: Callable[..., WorkerNode], redis_url: str) -> None:
        node = start_plain("-c", "1")
        app = Celery("plain", broker=redis_url, set_as_current=False)
        app.send_task("say", ["hello"])
        node.wait_for_log("said hello", timeout=20)
        assert [*app.control.ping(timeout=1)[0]] == [node.hostname()]

        pid = node.container.pid
        node.kill()
        assert node.container.status == "exited"
        assert not is_running(pid)
        node.restart()
        node.ready()
        app.send_task("say", ["hello again"])
        node.wait_for_log("said hello again", timeout=20)
        app.close()

    def test_teardown_takes_the_pool_along(self, start_plain: Callable[..., WorkerNode]) -> None:
        node = start_plain("-c", "2")
        members = node.container.process.members()
        assert len(members) == 3
        node.teardown()
        assert not [member for member in members if is_running(member.pid)]


def test_a_missing_server_fails_in_ci_and_skips_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.servers._rabbitmq_script", lambda: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="RabbitMQ"), rabbitmq_server():
        pass
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="RabbitMQ"), rabbitmq_server():
        pass
