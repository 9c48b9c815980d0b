"""The README and the documents keep to what the package is: examples run, tables agree, links lead somewhere."""

import asyncio
import gc
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from async_endpoints_celery import JobStatus, Settings
from async_endpoints_celery.jobs import TRANSITIONS
from tests.processes import ROOT

README = ROOT / "README.md"
DOCUMENTS = [
    README,
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "compose").rglob("*.md")),
]
PACKAGE = ROOT / "async_endpoints_celery"
OVER = {"Completed", "Failed", "Canceled"}


def blocks(language: str, document: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def table(header: str, document: Path = README) -> dict[str, list[str]]:
    """The rows of the table whose first line begins with `header`, by their first cell."""
    lines = iter(document.read_text().splitlines())
    next(line for line in lines if line.startswith(header))
    next(lines)
    rows: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = others
    return rows


def words(cell: str) -> list[str]:
    """What a cell has between backticks."""
    return re.findall(r"`([^`]+)`", cell)


# Examples.


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_compile(document: Path) -> None:
    for number, block in enumerate(blocks("python", document), 1):
        compile(block, f"{document.name}, block {number}", "exec")


def example(**substitutes: str) -> dict[str, Any]:
    """The one-file example, executed as a module."""
    source = next(block for block in blocks("python") if "AsyncRouter(endpoints)" in block)
    for old, new in substitutes.items():
        assert source.count(old) == 1, f"the example has no {old!r}"
        source = source.replace(old, new)
    namespace: dict[str, Any] = {"__name__": "shop"}
    exec(compile(source, "README.md", "exec"), namespace)
    return namespace


async def test_the_one_file_example_runs() -> None:
    names = example(
        **{
            "redis://localhost:6379/0": "memory://",
            "AsyncEndpoints(celery_app)": 'AsyncEndpoints(celery_app, store="memory://")',
            "lifespan=endpoints.lifespan": "lifespan=endpoints.lifespan(embedded_worker=True)",
        }
    )
    app: FastAPI = names["app"]
    transport = httpx.ASGITransport(app)
    async with (
        asyncio.timeout(30),
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as http,
    ):
        response = await http.post("/api/process-data", json={"data": "hello", "processingPriority": 2})
        assert response.status_code == 202
        for header in ("Location", "Retry-After", "Async-Job-Id"):
            assert header in response.headers
        record = response.json()
        while record["status"] not in OVER:
            await asyncio.sleep(0.01)
            record = (await http.get(response.headers["Location"])).json()
        assert record["status"] == "Completed", record
        assert record["result"] == {"processed_data": "Processed: HELLO", "character_count": 5}
    gc.collect()  # a connection that the lifespan left open complains now, and not in another test


# Tables.


def test_the_settings_table_has_every_option_and_its_default() -> None:
    documented = {words(option)[0]: words(default) for option, (default, _) in table("| option | default").items()}
    expected = {}
    for name, field in Settings.model_fields.items():
        default = field.default
        expected[name] = sorted(default) if isinstance(default, frozenset) else [str(default)]
    assert documented == expected


def test_the_states_table_has_every_state_and_move() -> None:
    rows = table("| state | number")
    assert [words(state)[0] for state in rows] == [str(status) for status in JobStatus]
    for status in JobStatus:
        number, _, leaves_for = rows[f"`{status}`"]
        assert int(number) == status.value
        named = {other for other in JobStatus if str(other) in leaves_for}
        # Queued → Scheduled is a delayed submission: one step, in which nobody sees the job Queued.
        assert named == TRANSITIONS[status] - ({JobStatus.SCHEDULED} if status is JobStatus.QUEUED else set())


def test_the_error_tables_have_every_code() -> None:
    source = (PACKAGE / "responses.py").read_text()
    problems = table("| code | status | situation")
    titles = re.search(r"^_TITLES = {(.*?)^}", source, re.MULTILINE | re.DOTALL)
    assert titles is not None
    assert {words(code)[0] for code in problems} == set(re.findall(r'^    "(\w+)":', titles[1], re.MULTILINE))

    errors = (PACKAGE / "errors.py").read_text()
    codes = set(re.findall(r'^([A-Z_]+) = "\1"$', errors, re.MULTILINE))
    failures = table("| code | the job failed because")
    assert {words(code)[0] for code in failures if "capitals" not in code and "own" not in code} == codes


def test_the_house_has_every_module_in_the_order_of_the_contract() -> None:
    document = (ROOT / "docs" / "architecture.md").read_text()
    house = document[document.index("| layer | modules") : document.index("`redis` is imported")]
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    named = [name for name in re.findall(r"`(\w+)`", house) if name in modules]
    assert sorted(named) == sorted(modules)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    level = {
        name: number for number, layer in enumerate(contract["layers"]) for name in re.findall(r"\((\w+)\)", layer)
    }
    levels = [level[name] for name in named]
    assert levels == sorted(levels)


def test_the_key_schema_has_every_field_and_key() -> None:
    document = ROOT / "docs" / "redis-keys.md"
    fields = {words(field)[0] for field in re.findall(r"^\| (`\w+`) \|.*$", document.read_text(), re.MULTILINE)}
    written: set[str] = set()
    for script in (PACKAGE / "scripts").glob("*.lua"):
        source = re.sub(r"--.*", "", script.read_text())
        for arguments in re.findall(
            r"'(?:HSET|HINCRBY|HDEL|HMGET|HGET)', (?:JOB|KEYS\[n\]),?([^\n]*(?:\n  '[^\n]*)?)", source
        ):
            written |= set(re.findall(r"'([a-z_]+)'", arguments))
        for arguments in re.findall(r"(?:change|finish|wait)\(([^\n]*(?:\n  '[^\n]*)?)", source):
            written |= set(re.findall(r"'([a-z_]+)',", arguments))
    assert written - {"0", "1"} == fields
    keys = {words(key)[0] for key in table("| key | type", document)}
    schema = (PACKAGE / "keys.py").read_text()
    assert keys == set(re.findall(r"^    (ae:\S+)", schema, re.MULTILINE))


# Commands and links.


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    text = document.read_text()
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *blocks("console", document)])
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert named <= make_targets()
    if document == README:
        assert {"demo", "test"} <= named


def test_make_variables_are_read() -> None:
    variables = set(re.findall(r"\b([A-Z]+)=", "\n".join(blocks("console") + words(README.read_text()))))
    makefile = (ROOT / "Makefile").read_text()
    assert "ONCE" in variables
    for variable in variables:
        assert re.search(rf"\$\(.*\b{variable}\b", makefile), variable


def links(document: Path) -> Iterator[tuple[str, str]]:
    """Path and fragment of each link that stays within the repository."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, fragment = target.partition("#")
            yield path, fragment


def anchors(document: Path) -> set[str]:
    """The fragments that headings can be reached by."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_internal_links_resolve(document: Path) -> None:
    broken = []
    for path, fragment in links(document):
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(f"{path}#{fragment}" if fragment else path)
    assert not broken


def test_the_console_commands_of_the_examples_name_what_is_there() -> None:
    """`uvicorn module:name` and `celery -A module:name` of the examples' READMEs."""
    for document in DOCUMENTS:
        if document.parent.parent != ROOT / "examples":
            continue
        named = re.findall(r"(?:uvicorn|celery -A) (\w+):(\w+)", "\n".join(blocks("console", document)))
        assert named
        for module, attribute in named:
            [source] = document.parent.rglob(f"{module}.py")
            assert re.search(rf"^{attribute} = ", source.read_text(), re.MULTILINE), (module, attribute)


def test_documents_say_nothing_of_this_machine() -> None:
    for document in DOCUMENTS:
        assert str(ROOT) not in document.read_text()
        assert sys.prefix not in document.read_text()
