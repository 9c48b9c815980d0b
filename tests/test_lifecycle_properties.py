"""Any order of messages, runners, sweeps and people: the record does what a small model in Python does.

Messages are delivered twice, late and out of order; runners go on writing after their lease is gone; leases end and
jobs become due because time is edited into Redis.
"""

from __future__ import annotations

from itertools import pairwise
from uuid import UUID, uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from async_endpoints_celery.errors import JobConflict, QueueFull
from async_endpoints_celery.jobs import TRANSITIONS, JobStatus
from async_endpoints_celery.operations import Claimed, Refused
from async_endpoints_celery.servers import MemoryServer, RedisServer, Server
from tests.job_model import (
    CANCELED,
    COMPLETED,
    ENDS_OF_AN_ATTEMPT,
    IN_PROGRESS,
    QUEUED,
    RECOVERY_LIMIT,
    SCHEDULED,
    Model,
)
from tests.jobs_in_redis import ACTIONS, Jobs, Known

QUEUE_LIMIT = 3

#: Of a list, from its end: small numbers come more often.
picks = st.integers(0, 20)


class Lives(RuleBasedStateMachine):
    """Several jobs on one server."""

    server: Server
    #: Every move that any example made.
    moves: set[tuple[JobStatus, JobStatus]]

    def __init__(self) -> None:
        super().__init__()
        self.jobs = Jobs(self.server)
        self.jobs.client.flushdb()
        self.models: dict[str, Model] = {}
        #: Every message ever published, and every right to run ever handed out: nothing is forgotten.
        self.messages: list[Known] = []
        self.runners: list[Known] = []

    def teardown(self) -> None:
        for model in self.models.values():
            self.moves.update(pairwise(model.history))
        self.jobs.store.close()

    # Choosing.

    def a_model(self, pick: int) -> Model:
        return list(self.models.values())[pick % len(self.models)]

    def a_runner(self, pick: int) -> tuple[Known, Model]:
        runner = self.runners[-1 - pick % len(self.runners)]
        return runner, self.models[runner.id]

    def known(self, model: Model) -> Known:
        return Known(model.id, model.attempt, str(model.fence), model.runner, model.copy)

    def waiting(self) -> int:
        return sum(model.status.is_waiting for model in self.models.values())

    def published(self, model: Model) -> None:
        self.messages.append(Known(model.id, model.attempt, copy=model.copy))

    # What clients do.

    @initialize()
    def first(self) -> None:
        """Two jobs run and one waits, so that every rule has something to do from the start."""
        for _ in range(3):
            self.submit(max_retries=2, delayed=False)
        self.deliver(pick=1)
        self.deliver(pick=2)

    @rule(max_retries=st.integers(0, 3), delayed=st.booleans())
    def submit(self, max_retries: int, delayed: bool) -> None:
        model = Model(str(UUID(int=len(self.models) + 1)), SCHEDULED if delayed else QUEUED, max_retries=max_retries)
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
            at_once = self.jobs.run(self.jobs.operations.cancel(model.id, nonce=uuid4().hex))
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
        message = self.messages[-1 - pick % len(self.messages)].but(runner=f"runner {len(self.runners)}")
        model = self.models[message.id]
        answer = self.jobs.run(self.jobs.claim(message))
        if model.status.is_waiting and model.attempt == message.attempt:
            model.claim(message.runner)
            assert answer == Claimed(str(model.fence), model.retries, model.max_retries, None)
            self.runners.append(message.but(fence=str(model.fence)))
        else:
            assert answer == Refused(model.status)

    @precondition(lambda self: self.runners)
    @rule(pick=picks)
    def complete(self, pick: int) -> None:
        self.end_attempt(pick, "complete")

    @precondition(lambda self: self.runners)
    @rule(pick=picks)
    def fail(self, pick: int) -> None:
        self.end_attempt(pick, "fail")

    @precondition(lambda self: self.runners)
    @rule(pick=picks)
    def reschedule(self, pick: int) -> None:
        self.end_attempt(pick, "reschedule")

    @precondition(lambda self: self.runners)
    @rule(pick=picks)
    def stop(self, pick: int) -> None:
        self.end_attempt(pick, "canceled")

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
            assert accepted == (latest and model.status is ENDS_OF_AN_ATTEMPT[script])
            assert self.jobs.dump() == before

    @precondition(lambda self: self.runners)
    @rule(pick=picks)
    def give_back(self, pick: int) -> None:
        """A worker stops; the message goes back to its queue by itself."""
        runner, model = self.a_runner(pick)
        mine = model.status is IN_PROGRESS and model.runner == runner.runner
        assert self.jobs.run(self.jobs.release(runner)) == mine
        if mine:
            model.release()

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
        replies: list[str] = self.jobs.run(self.jobs.renew(*self.runners))
        for runner, reply in zip(self.runners, replies, strict=True):
            model = self.models[runner.id]
            if model.status is IN_PROGRESS and model.runner == runner.runner:
                assert reply == ("CANCELING" if model.canceling else "RENEWED")
                model.leased = True
            else:
                assert reply == ("UNCLAIMED" if model.status.is_waiting else "LOST")

    @precondition(lambda self: self.runners)
    @rule(pick=picks)
    def process_dies(self, pick: int) -> None:
        """Its worker sees it; the message goes back to its queue by itself."""
        runner, model = self.a_runner(pick)
        mine = model.status is IN_PROGRESS and model.runner == runner.runner
        expected = model.lose_worker() if mine else "NOT_LOST"
        assert self.jobs.run(self.jobs.recover(runner, publication=(), limit=RECOVERY_LIMIT)) == expected

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

    @precondition(lambda self: self.waiting())
    @rule(pick=picks, published=st.booleans())
    def becomes_due(self, pick: int, published: bool) -> None:
        """Its turn should have come; perhaps its message never went out."""
        waiting = [model for model in self.models.values() if model.status.is_waiting]
        model = waiting[pick % len(waiting)]
        if published:
            self.jobs.make_due(self.known(model))
        else:
            self.jobs.forget_message(self.known(model))
            model.published = False
        model.due = True

    @precondition(lambda self: self.waiting())
    @rule(pick=picks, published=st.booleans())
    def becomes_due_and_is_swept(self, pick: int, published: bool) -> None:
        self.becomes_due(pick, published)
        self.sweep()

    @rule()
    def sweep(self) -> None:
        waiting, running = self.jobs.due()
        models = self.models.values()
        assert waiting == {model.id for model in models if model.due}
        ended = {model.id for model in models if model.status is IN_PROGRESS and not self.is_leased(model)}
        assert running == ended
        due = [self.models[job_id] for job_id in waiting]
        verdicts = self.jobs.run(self.jobs.judge(*map(self.known, due)))
        for model, verdict in zip(due, verdicts, strict=True):
            assert verdict == "DISPATCH" if not model.published else verdict in {"DISPATCH", "POSTPONED"}
            if verdict == "DISPATCH":
                self.redispatch(model)
            model.due = False
        for model in models:
            expected = model.lose_worker() if model.id in ended else "NOT_LOST"
            lost = self.known(model).but(runner="")
            assert self.jobs.run(self.jobs.recover(lost, limit=RECOVERY_LIMIT)) == expected
            if expected == "QUEUED":
                self.published(model)

    def redispatch(self, model: Model) -> None:
        model.copy += model.published
        for wrong in ({"copy": model.copy + 1}, {"attempt": model.attempt - 1}):
            assert not self.jobs.run(self.jobs.redispatch(self.known(model).but(**wrong)))
        assert self.jobs.run(self.jobs.redispatch(self.known(model)))
        model.move(QUEUED)
        model.published = True
        self.published(model)

    def is_leased(self, model: Model) -> bool:
        return model.leased and not model.overdue

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
            assert fields.get("copies") == (str(model.copy) if model.status.is_waiting else None)
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


def live(server: Server, *, examples: int, steps: int) -> set[tuple[JobStatus, JobStatus]]:
    """Every move that was made."""
    machine: type[Lives] = type("LivesThere", (Lives,), {"server": server, "moves": set()})
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
    return {(source, target) for source, target in machine.moves if source is not target}


def test_many_lives_in_memory() -> None:
    legal = {(source, target) for source, targets in TRANSITIONS.items() for target in targets}
    # A delayed submission is Scheduled from the start. Anything else that is missing: the lives were too tame.
    assert live(MemoryServer(), examples=80, steps=60) == legal - {(QUEUED, SCHEDULED)}


def test_some_on_a_real_server(redis_url: str) -> None:
    assert live(RedisServer.from_url(redis_url), examples=40, steps=40)
