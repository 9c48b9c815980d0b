"""Any order of messages, runners, sweeps and people: the record does what a small model in Python does.

Messages are delivered twice, late and out of order; runners go on writing after their lease is gone; leases end and
jobs become due because time is edited into Redis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from async_endpoints_celery.errors import JobConflict, QueueFull
from async_endpoints_celery.jobs import TRANSITIONS, JobStatus
from async_endpoints_celery.store import MemoryServer, RedisServer, Server
from tests.jobs_in_redis import ACTIONS, FAILURE, LOST, OVERDUE, Jobs, Known

QUEUED, SCHEDULED, IN_PROGRESS = JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.IN_PROGRESS
COMPLETED, FAILED, CANCELED = JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELED

QUEUE_LIMIT = 3
RECOVERY_LIMIT = 2

#: What the writes of a runner make of a running job; a repeated one is heard with "OK" in these states.
ENDS_OF_AN_ATTEMPT: dict[str, tuple[JobStatus, set[JobStatus]]] = {
    "complete": (COMPLETED, {COMPLETED}),
    "fail": (FAILED, {FAILED}),
    "canceled": (CANCELED, {CANCELED}),
    "reschedule": (SCHEDULED, {SCHEDULED}),
    "release": (QUEUED, {QUEUED, SCHEDULED}),
}

picks = st.integers(min_value=0, max_value=1_000)


@dataclass
class Model:
    """What a job should be."""

    id: str
    status: JobStatus
    max_retries: int
    attempt: int = 1
    fence: int = 0
    retries: int = 0
    canceling: bool = False
    overdue: bool = False
    leased: bool = False
    due: bool = False
    error: str | None = None
    result: str | None = None
    runner: str = ""
    #: The whole record when it completed.
    final: Any = None
    history: list[JobStatus] = field(default_factory=list)

    def move(self, status: JobStatus) -> None:
        assert status is self.status or status in TRANSITIONS[self.status], f"{self.status} → {status}"
        if status is not IN_PROGRESS:
            self.canceling = self.overdue = self.leased = False
            self.runner = ""
        self.due = False
        self.status = status
        self.history.append(status)

    def claim(self, runner: str) -> None:
        self.move(IN_PROGRESS)
        self.fence += 1
        self.runner, self.leased = runner, True

    def end_attempt(self, script: str) -> None:
        target = ENDS_OF_AN_ATTEMPT[script][0]
        if script == "release" and self.canceling:
            target = CANCELED
        self.move(target)
        if script == "reschedule":
            self.attempt, self.retries, self.error = self.attempt + 1, self.retries + 1, FAILURE
        elif script == "fail":
            self.error = FAILURE
        elif script == "complete":
            self.result, self.error = "42", None

    def lose_worker(self) -> str:
        self.fence += 1
        failure = OVERDUE if self.overdue else LOST
        if self.canceling:
            self.move(CANCELED)
            return "CANCELED"
        self.error = failure
        if self.retries >= min(self.max_retries, RECOVERY_LIMIT):
            self.move(FAILED)
            return "FAILED"
        self.retries += 1
        self.move(QUEUED)
        return "QUEUED"

    def retry(self) -> None:
        self.move(QUEUED)
        self.attempt, self.retries = self.attempt + 1, 0
        self.error = self.result = None


class Lives(RuleBasedStateMachine):
    """Several jobs on one server."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.jobs = Jobs(self.server)
        self.jobs.client.flushdb()
        self.models: dict[str, Model] = {}
        #: Every message ever published, and every right to run ever handed out: nothing is forgotten.
        self.messages: list[tuple[str, int]] = []
        self.runners: list[Known] = []

    def teardown(self) -> None:
        self.jobs.store.close()

    # Choosing.

    def a_model(self, pick: int) -> Model:
        return list(self.models.values())[pick % len(self.models)]

    def a_runner(self, pick: int) -> tuple[Known, Model]:
        """The later ones more often."""
        runner = self.runners[-1 - pick % len(self.runners)]
        return runner, self.models[runner.id]

    def known(self, model: Model) -> Known:
        return Known(model.id, model.attempt, str(model.fence), model.runner)

    def waiting(self) -> int:
        return sum(model.status.is_waiting for model in self.models.values())

    def published(self, model: Model) -> None:
        self.messages.append((model.id, model.attempt))

    # What clients do.

    @initialize()
    def first(self) -> None:
        self.submit(max_retries=2, delayed=False)

    @rule(max_retries=st.integers(0, 3), delayed=st.booleans())
    def submit(self, max_retries: int, delayed: bool) -> None:
        model = Model(
            str(UUID(int=len(self.models) + 1)), SCHEDULED if delayed else QUEUED, max_retries=max_retries
        )
        full = self.waiting() >= QUEUE_LIMIT
        call = self.jobs.submit(
            model.id, queue_limit=QUEUE_LIMIT, max_retries=max_retries, delay_ms=60_000 if delayed else 0
        )
        try:
            self.jobs.run(call)
        except QueueFull:
            assert full
            return
        assert not full
        self.models[model.id] = model
        self.published(model)

    @rule(pick=picks)
    def submit_again(self, pick: int) -> None:
        model = self.a_model(pick)
        submitted = self.jobs.run(self.jobs.submit(model.id, queue_limit=QUEUE_LIMIT))
        assert submitted.replayed
        assert submitted.job is not None
        assert submitted.job.status is model.status

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        model = self.a_model(pick)
        try:
            at_once = self.jobs.run(self.jobs.operations.cancel(model.id))
        except JobConflict:
            assert model.status.is_over
            return
        assert at_once == model.status.is_waiting
        if at_once:
            model.move(CANCELED)
        else:
            assert model.status is IN_PROGRESS
            model.canceling = True

    @precondition(lambda self: any(model.status.is_over for model in self.models.values()))
    @rule(pick=picks, behind=st.sampled_from([0, 0, 0, 1]))
    def retry_by_hand(self, pick: int, behind: int) -> None:
        over = [model for model in self.models.values() if model.status.is_over]
        model = over[pick % len(over)]
        reply = self.jobs.reply(self.jobs.retry(self.known(model).but(attempt=model.attempt - behind)))
        if behind or model.status is COMPLETED:
            assert reply == ["NOT_OVER", str(model.status)]
        else:
            assert reply == ["OK"]
            model.retry()
            self.published(model)

    # What workers do.

    @precondition(lambda self: self.messages)
    @rule(pick=picks)
    def deliver(self, pick: int) -> None:
        """Any message that was ever published, however often it came already."""
        job_id, attempt = self.messages[-1 - pick % len(self.messages)]
        model = self.models[job_id]
        runner = f"runner {len(self.runners)}"
        claimed = self.jobs.run(self.jobs.claim(Known(job_id, attempt, runner=runner)))
        assert (claimed is not None) == (model.status.is_waiting and model.attempt == attempt)
        if claimed is not None:
            model.claim(runner)
            assert (claimed.fence, claimed.retries) == (str(model.fence), model.retries)
            self.runners.append(Known(job_id, attempt, claimed.fence, runner))

    @precondition(lambda self: self.runners)
    @rule(pick=picks, script=st.sampled_from(sorted(ENDS_OF_AN_ATTEMPT)))
    def end_attempt(self, pick: int, script: str) -> None:
        """Any runner there ever was, also one that lost its lease or has ended its attempt already."""
        runner, model = self.a_runner(pick)
        before = self.jobs.dump()
        accepted = self.jobs.reply(ACTIONS[script](self.jobs, runner))[0] == "OK"
        latest = runner.fence == str(model.fence)
        if latest and model.status is IN_PROGRESS:
            assert accepted
            model.end_attempt(script)
            if model.status.is_waiting:
                self.published(model)
        else:
            assert not accepted or (latest and model.status in ENDS_OF_AN_ATTEMPT[script][1])
            assert self.jobs.dump() == before

    @precondition(lambda self: self.runners)
    @rule(pick=picks)
    def report_progress(self, pick: int) -> None:
        runner, model = self.a_runner(pick)
        reply = self.jobs.run(ACTIONS["progress"](self.jobs, runner))
        mine = model.status is IN_PROGRESS and runner.fence == str(model.fence)
        assert reply == (model.canceling if mine else None)

    @precondition(lambda self: self.runners)
    @rule()
    def renew_all(self) -> None:
        for runner, reply in zip(self.runners, self.jobs.run(self.jobs.renew(*self.runners)), strict=True):
            model = self.models[runner.id]
            if model.status is IN_PROGRESS and model.runner == runner.runner:
                assert reply == ("CANCELING" if model.canceling else "RENEWED")
                model.leased = True
            else:
                assert reply == ("UNCLAIMED" if model.status.is_waiting else "LOST")

    @precondition(lambda self: self.runners)
    @rule(pick=picks)
    def process_dies(self, pick: int) -> None:
        runner, model = self.a_runner(pick)
        mine = model.status is IN_PROGRESS and model.runner == runner.runner
        expected = model.lose_worker() if mine else "NOT_LOST"
        self.recovered(model, runner, expected)

    # What time and the sweep do.

    @rule(pick=picks)
    def lease_ends(self, pick: int) -> None:
        model = self.a_model(pick)
        self.jobs.end_lease(self.known(model))
        model.leased = False

    @precondition(lambda self: any(model.status is IN_PROGRESS for model in self.models.values()))
    @rule(pick=picks)
    def deadline_passes(self, pick: int) -> None:
        running = [model for model in self.models.values() if model.status is IN_PROGRESS]
        model = running[pick % len(running)]
        # Long ago: renewing does not help any more.
        self.jobs.client.hset(self.jobs.keys.job(model.id), "deadline", str(self.jobs.now() - 60_000))
        self.jobs.end_lease(self.known(model))
        model.overdue, model.leased = True, False

    @rule(pick=picks)
    def becomes_due(self, pick: int) -> None:
        model = self.a_model(pick)
        self.jobs.make_due(self.known(model))
        model.due = model.status.is_waiting

    @rule()
    def sweep(self) -> None:
        waiting, running = self.jobs.run(self.jobs.operations.due(100))
        models = self.models.values()
        assert set(waiting) == {model.id for model in models if model.due}
        ended = {model.id for model in models if model.status is IN_PROGRESS and not self.is_leased(model)}
        assert set(running) == ended
        for model in models:
            done = self.jobs.run(self.jobs.redispatch(self.known(model)))
            assert done == model.due
            if done:
                model.move(QUEUED)
                self.published(model)
            expected = model.lose_worker() if model.id in ended else "NOT_LOST"
            self.recovered(model, self.known(model).but(runner=""), expected)

    def is_leased(self, model: Model) -> bool:
        return model.leased and not model.overdue

    def recovered(self, model: Model, known: Known, expected: str) -> None:
        assert self.jobs.run(self.jobs.recover(known, limit=RECOVERY_LIMIT)) == expected
        if expected == "QUEUED":
            self.published(model)

    # What always holds.

    @invariant()
    def records_are_as_the_model_says(self) -> None:
        for model in self.models.values():
            known = self.known(model)
            fields = self.jobs.fields(known)
            assert (fields["status"], fields["attempt"], fields["fence"], fields["retries"]) == (
                str(model.status),
                str(model.attempt),
                str(model.fence),
                str(model.retries),
            )
            assert (fields.get("error"), fields.get("result")) == (model.error, model.result)
            assert (fields.get("cancel") == "1") == model.canceling
            self.jobs.check(known)

    @invariant()
    def at_most_one_runner_may_write(self) -> None:
        if self.runners:
            pairs = [(runner.id, runner.fence) for runner in self.runners]
            unwanted = self.jobs.run(self.jobs.operations.is_unwanted(pairs))
            valid = [runner.id for runner, refused in zip(self.runners, unwanted, strict=True) if not refused]
            running = [m.id for m in self.models.values() if m.status is IN_PROGRESS and not m.canceling]
            assert sorted(valid) == sorted(running)

    @invariant()
    def completed_never_changes(self) -> None:
        for model in self.models.values():
            if model.status is COMPLETED:
                record = self.jobs.fields(self.known(model))
                model.final = model.final or record
                assert record == model.final
                assert model.history.count(COMPLETED) == 1

    @invariant()
    def every_stored_job_has_its_messages_and_no_more(self) -> None:
        assert self.jobs.messages() == len(self.messages)
        assert self.jobs.client.zcard(self.jobs.keys.jobs) == len(self.models)


def live(server: Server, *, examples: int, steps: int) -> None:
    machine = type("LivesThere", (Lives,), {"server": server})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_many_lives_in_memory() -> None:
    live(MemoryServer(), examples=60, steps=40)


@pytest.mark.parametrize("steps", [30])
def test_some_on_a_real_server(redis_url: str, steps: int) -> None:
    live(RedisServer.from_url(redis_url), examples=15, steps=steps)
