"""The chart that people read, the table in Python and the scripts tell the same story."""

import re
from importlib.resources import files

import pytest

from async_endpoints_celery import keys
from async_endpoints_celery.jobs import TRANSITIONS, JobStatus
from tests.processes import ROOT

CHART = (ROOT / "docs" / "state-chart.md").read_text()
STATES = "|".join(map(str, JobStatus))
TABLE = {(str(source), str(target)) for source, targets in TRANSITIONS.items() for target in targets}
SCRIPTS = {
    entry.name.removesuffix(".lua")
    for entry in (files("async_endpoints_celery") / "scripts").iterdir()
    if entry.name.endswith(".lua")
}


def diagram() -> list[tuple[str, str, str]]:
    """(from, to, label) of each arrow; "[*]" for the beginning and the end."""
    block = re.search(r"```mermaid\nstateDiagram-v2\n(.*?)```", CHART, re.DOTALL)
    assert block is not None
    arrows = [re.fullmatch(r"(\S+) --> (\S+?)(?:: (.+))?", line.strip()) for line in block[1].splitlines()]
    assert all(arrows), block[1]
    return [(arrow[1], arrow[2], arrow[3] or "") for arrow in arrows if arrow]


def test_every_legal_move_has_one_line_and_no_other_has() -> None:
    moves = [(source, target) for source, target, _ in diagram() if "[*]" not in (source, target)]
    assert sorted(moves) == sorted(TABLE)


def test_every_legal_move_has_a_sentence() -> None:
    sentences = re.findall(rf"^- \*\*({STATES}) → ({STATES})\*\*: \w.+", CHART, re.MULTILINE)
    assert sorted(sentences) == sorted(TABLE)


def test_a_job_begins_waiting_and_ends_over() -> None:
    begins = {target for source, target, _ in diagram() if source == "[*]"}
    ends = {source for source, target, _ in diagram() if target == "[*]"}
    assert begins == {str(status) for status in JobStatus if status.is_waiting}
    assert ends == {str(status) for status in JobStatus if status.is_over}


def test_every_label_names_scripts() -> None:
    for source, target, label in diagram():
        if target != "[*]":
            named = {part.split()[0] for part in label.split(", ")}
            assert named <= SCRIPTS, f"{source} → {target}: {label}"


def test_completed_never_changes() -> None:
    assert TRANSITIONS[JobStatus.COMPLETED] == frozenset()
    assert set(TRANSITIONS) == set(JobStatus)


def test_the_key_table_is_that_of_the_module() -> None:
    assert keys.__doc__ is not None
    documented = re.findall(r"^    (ae:\S+)\s+(hash|string|zset|channel)", keys.__doc__, re.MULTILINE)
    assert re.findall(r"^\| `(ae:\S+)` \| (\w+) \| \w.+ \|$", CHART, re.MULTILINE) == documented


def test_the_key_table_is_what_the_code_builds() -> None:
    built = keys.Keys()
    names = {getattr(built, name) for name, value in vars(keys.Keys).items() if isinstance(value, property)}
    names |= {built.job("<id>"), built.request("<id>"), built.changes("<id>")}
    assert set(re.findall(r"`(ae:\S+)`", CHART)) == names


class TestJobStatus:
    def test_the_words_and_numbers_of_the_wire(self) -> None:
        assert {str(status): int(status) for status in JobStatus} == {
            "Queued": 100,
            "Scheduled": 200,
            "InProgress": 300,
            "Completed": 400,
            "Failed": 500,
            "Canceled": 600,
        }

    @pytest.mark.parametrize("status", JobStatus, ids=str)
    def test_parse_takes_words_and_numbers(self, status: JobStatus) -> None:
        for value in (status, int(status), str(status), str(status).lower()):
            assert JobStatus.parse(value) is status

    @pytest.mark.parametrize("value", ["Running", "", 1, 101])
    def test_parse_refuses_the_rest(self, value: str | int) -> None:
        with pytest.raises(ValueError):
            JobStatus.parse(value)
