"""The header of each Lua script is its interface: what it says is what Python sends, and what the code answers."""

import ast
import inspect
import re
from importlib.resources import files

import pytest

from async_endpoints_celery import operations
from async_endpoints_celery.keys import Keys
from async_endpoints_celery.scripting import Script
from tests.jobs_in_redis import dispatches

FOLDER = files("async_endpoints_celery") / "scripts"
SOURCES = {
    entry.name.removesuffix(".lua"): entry.read_text()
    for entry in FOLDER.iterdir()
    if entry.name.endswith(".lua") and entry.name != "prelude.lua"
}
PRELUDE = (FOLDER / "prelude.lua").read_text()
#: Scripts of one job get the prelude and their arguments by name; the others count KEYS and ARGV.
OF_ONE_JOB = sorted(name for name, source in SOURCES.items() if "\n-- ARGS" in source)
OTHERS = sorted(SOURCES.keys() - OF_ONE_JOB)

#: A call with one more pair of parentheses inside at most.
REDIS_CALL = re.compile(r"redis\.call\(((?:[^()]|\([^()]*\))*)\)")


def header(name: str) -> list[str]:
    lines = SOURCES[name].splitlines()
    return [line[3:] for line in lines[: next(n for n, line in enumerate(lines) if not line.startswith("--"))]]


def stated(name: str, word: str) -> str | None:
    return next((line.removeprefix(word).strip() for line in header(name) if line.split()[:1] == [word]), None)


def code(source: str) -> str:
    """Without comments."""
    return re.sub(r"--.*$", "", source, flags=re.MULTILINE)


def stated_replies(name: str) -> dict[str, int]:
    """Each reply code in the header, with the number of values that come with it."""
    found: dict[str, int] = {}
    for reply in (stated(name, "REPLIES") or "").split("|"):
        word, *values = reply.split()
        found[word] = len(values)
    return found


def given_replies(name: str) -> dict[str, set[int]]:
    """The same of the code: what stands in `return {'CODE', value, …}`."""
    found: dict[str, set[int]] = {}
    for table in re.findall(r"return \{(.*)\}", code(SOURCES[name])):
        word, *values = REDIS_CALL.sub("value", table).split(",")
        found.setdefault(word.strip(" '"), set()).add(len(values))
    return found


def sent_arguments() -> dict[str, set[str]]:
    """The keyword arguments of each `self._call("script", …)` in operations.py."""
    calls = (node for node in ast.walk(ast.parse(inspect.getsource(operations))) if isinstance(node, ast.Call))
    return {
        call.args[0].value: {keyword.arg for keyword in call.keywords if keyword.arg}
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "_call"
        if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    }


def test_all_scripts_are_here() -> None:
    assert set(OTHERS) == {"due", "judge", "postpone", "prune", "renew"}
    assert len(OF_ONE_JOB) == 13


@pytest.mark.parametrize("name", SOURCES)
class TestTheHeader:
    def test_begins_with_the_name_and_a_sentence(self, name: str) -> None:
        text = " ".join(header(name))
        assert re.match(rf"{name}: [a-z].+?\. ", text)

    def test_names_arguments_and_replies(self, name: str) -> None:
        assert stated(name, "REPLIES")
        assert (stated(name, "ARGS") is None) == (name in OTHERS)
        assert bool(stated(name, "KEYS") and stated(name, "ARGV")) == (name in OTHERS)


@pytest.mark.parametrize("name", OF_ONE_JOB)
class TestScriptsOfOneJob:
    def test_python_sends_exactly_the_arguments_of_the_header(self, name: str) -> None:
        arguments = (stated(name, "ARGS") or "").split()
        assert sent_arguments()[name] == set(arguments)
        assert Script.load(name).arguments == tuple(arguments)

    def test_the_code_uses_each_of_them(self, name: str) -> None:
        for argument in (stated(name, "ARGS") or "").split():
            assert re.search(rf"\b{argument}\b", code(SOURCES[name])), argument

    def test_the_replies_are_those_of_the_header(self, name: str) -> None:
        assert given_replies(name) == {word: {count} for word, count in stated_replies(name).items()}

    def test_it_takes_a_message_if_it_says_so(self, name: str) -> None:
        method = getattr(operations.Operations, name)
        assert (
            dispatches(name)
            == ("dispatch(FIRST_COMMAND)" in code(SOURCES[name]))
            == ("publication" in inspect.signature(method).parameters)
        )

    def test_names_of_arguments_hide_nothing(self, name: str) -> None:
        taken = set(re.findall(r"\b(?:local (?:function )?)(\w+)", code(PRELUDE)))
        assert taken.isdisjoint((stated(name, "ARGS") or "").split())


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_scripts_answer_with_the_words_of_their_header(name: str) -> None:
    given = re.findall(r"'([A-Z]+)'", REDIS_CALL.sub("", code(SOURCES[name])))
    assert set(given) == set(re.findall(r"\b[A-Z]{2,}\b", stated(name, "REPLIES") or ""))


def test_python_reads_every_reply_code() -> None:
    """Where a refusal is an error, each code has its own; the others are OK or not."""
    for name in ("submit", "claim", "cancel", "retry"):
        source = inspect.getsource(getattr(operations.Operations, name))
        assert set(re.findall(r'\["([A-Z_]+)"', source)) == set(stated_replies(name)), name


def test_the_prelude_names_the_keys_that_python_sends() -> None:
    names = re.findall(r"^--\s+(?:KEYS\s+)?([1-9]) (\w+)", PRELUDE, re.MULTILINE)
    assert [int(number) for number, _ in names] == list(range(1, len(names) + 1))
    sent = Keys("p").of_job("x")
    assert [key.split(":")[1] for key in sent] == [name for _, name in names]


@pytest.mark.parametrize("name", [*SOURCES, "prelude"])
class TestKeys:
    def test_none_is_built_in_lua(self, name: str) -> None:
        source = code(SOURCES.get(name, PRELUDE))
        assert not re.search(r"\.\.\s*['\"][^'\"]*:|:[^'\"]*['\"]\s*\.\.", source)
        assert "'ae" not in source

    def test_none_is_written_down(self, name: str) -> None:
        known = r"JOB|REQUEST|WAITING|RUNNING|ENDED|JOBS|CLAIMED|KEYS\[\w+\]"
        for call in REDIS_CALL.findall(code(SOURCES.get(name, PRELUDE))):
            command, *arguments = [part.strip() for part in call.split(",")]
            if command == "'TIME'":
                continue
            key = "channel" if command == "'PUBLISH'" else known
            assert re.fullmatch(key, arguments[0]), f"{name}: redis.call({call})"

    def test_time_is_that_of_redis(self, name: str) -> None:
        assert not re.search(r"os\.(time|clock)", SOURCES.get(name, PRELUDE))
