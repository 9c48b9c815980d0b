"""The chaos harness: what its verdict would notice, and a short run of it."""

from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from chaos.ledger import Attempt, Ledger, judge
from chaos.run import Report, Run, table

KILLED = {7: (12.0, "worker")}


def run(pid: int, start: float, end: float | None = None, job: str = "job") -> Attempt:
    return Attempt(job, pid, start, end)


class TestTheVerdict:
    def test_one_attempt(self) -> None:
        verdict = judge([run(1, 10.0, 11.0)], {}, {})
        assert (verdict.attempts, verdict.interrupted, verdict.overlapping, verdict.recoveries) == (1, 0, 0, {})

    def test_attempts_in_a_row(self) -> None:
        verdict = judge([run(1, 10.0, 11.0), run(2, 11.0, 12.0), run(1, 13.0, 14.0)], {}, {})
        assert (verdict.attempts, verdict.overlapping) == (3, 0)

    def test_attempts_that_overlap(self) -> None:
        verdict = judge([run(1, 10.0, 12.0), run(2, 11.9, 13.0)], {}, {})
        assert verdict.overlapping == 1

    def test_one_within_the_other(self) -> None:
        verdict = judge([run(1, 10.0, 20.0), run(2, 11.0, 12.0)], {}, {})
        assert verdict.overlapping == 1

    def test_attempts_of_different_jobs_may_overlap(self) -> None:
        verdict = judge([run(1, 10.0, 12.0, "one"), run(2, 11.0, 13.0, "other")], {}, {})
        assert (verdict.attempts, verdict.overlapping) == (2, 0)

    def test_an_attempt_that_was_killed_has_ended_with_its_process(self) -> None:
        verdict = judge([run(7, 10.0), run(2, 12.5, 13.0)], KILLED, {})
        assert (verdict.interrupted, verdict.overlapping, verdict.recoveries) == (1, 0, {"worker": [0.5]})

    def test_the_next_attempt_began_before_the_kill(self) -> None:
        verdict = judge([run(7, 10.0), run(2, 11.5, 13.0)], KILLED, {})
        assert (verdict.interrupted, verdict.overlapping, verdict.recoveries) == (1, 1, {})

    def test_an_attempt_without_end_or_kill_may_still_run(self) -> None:
        verdict = judge([run(1, 10.0), run(2, 30.0, 31.0)], KILLED, {})
        assert (verdict.interrupted, verdict.overlapping) == (1, 1)

    def test_an_attempt_that_nobody_took_up_again(self) -> None:
        """A lost job: the records tell, see Report.lost."""
        verdict = judge([run(7, 10.0)], KILLED, {})
        assert (verdict.attempts, verdict.interrupted, verdict.overlapping, verdict.recoveries) == (1, 1, 0, {})

    def test_the_recovery_counts_until_the_job_waits_again(self) -> None:
        attempts = [run(7, 10.0), run(2, 40.0, 41.0)]
        verdict = judge(attempts, KILLED, {"job": [3.0, 15.5, 50.0], "other": [12.1]})
        assert verdict.recoveries == {"worker": [3.5]}


def test_the_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.read() == []
    job, other = uuid4(), uuid4()
    for event, job_id, name in (("start", job, "a"), ("start", other, "b"), ("end", job, "a")):
        ledger.write(event, job_id, name)
    first, second = ledger.read()
    assert (UUID(first.job), UUID(second.job)) == (job, other)
    assert first.end is not None
    assert first.start <= second.start <= first.end
    assert second.end is None


REPORT = Report(
    seed=1,
    jobs=2,
    accepted=2,
    ended={"Completed": 2, "Failed": 0, "Canceled": 0},
    lost=0,
    completed_twice=0,
    overlapping=0,
    attempts=3,
    interrupted=1,
    stale_writes_refused=0,
    kills={"kill child": 1},
    recovery={"pool process": {"n": 1, "p50": 1.0, "p99": 1.0, "max": 1.0}},
    seconds=9.0,
)


class TestTheReport:
    def test_passes(self) -> None:
        assert REPORT.passed

    @pytest.mark.parametrize("change", [{"lost": 1}, {"completed_twice": 1}, {"overlapping": 1}, {"accepted": 1}])
    def test_fails(self, change: dict[str, int]) -> None:
        assert not replace(REPORT, **change).passed  # type: ignore[arg-type]

    def test_as_a_table(self) -> None:
        lines = table([REPORT, replace(REPORT, seed=2, recovery={})]).splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert "| recovery after a killed pool process: p50 / p99 / max | 1.0 / 1.0 / 1.0 s | – |" in lines


@pytest.mark.slow
def test_a_short_run() -> None:
    report = Run(4711, jobs=150, clients=6, kill_seconds=8)()
    assert report.passed, report
    assert report.accepted == sum(report.ended.values()) == 150
    assert sum(report.kills.values()) >= 5
