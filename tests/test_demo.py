"""`make demo` as a person would use it."""

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import Process, is_running, process, wait_until

UP = "Ctrl-C ends it"


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Process]:
    """The demo, up and running."""
    command = [sys.executable, "-m", "demo"]
    with process(command, env={"TMPDIR": str(tmp_path)}, ready=UP, timeout=90) as running:
        yield running


def assert_gone(members: list[psutil.Process], directory: Path) -> None:
    wait_until(lambda: not [member for member in members if is_running(member.pid)])
    assert list(directory.iterdir()) == []


def test_once_shows_the_jobs_and_ends_well(tmp_path: Path) -> None:
    with process([sys.executable, "-m", "demo", "--once"], env={"TMPDIR": str(tmp_path)}) as running:
        assert running.wait(timeout=90) == 0, running.output
        assert re.search(r"202 Accepted, job [0-9a-f-]{36} \(ProcessData\)", running.output)
        for seen in ("Queued", "Queued -> InProgress", "InProgress -> Completed", "/docs", "/tasks"):
            assert seen in running.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_ends_everything(demo: Process, tmp_path: Path, number: int, status: int) -> None:
    members = demo.members()
    assert len(members) > 6
    demo.signal(number)
    assert demo.wait(timeout=30) == status, demo.output
    assert_gone(members, tmp_path)


def test_a_process_that_dies_is_named(demo: Process, tmp_path: Path) -> None:
    members = demo.members()
    beat = next(member for member in members if "beat" in member.cmdline())
    beat.kill()
    assert demo.wait(timeout=30) == 1
    assert "beat ended early" in demo.output
    assert "beat: Starting..." in demo.output
    assert_gone(members, tmp_path)
