"""The OpenAPI document: what every mapped route says of itself, and that the document holds together."""

from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import Depends
from fastapi.openapi.models import OpenAPI
from pydantic import BaseModel

from async_endpoints_celery import AsyncContext, AsyncEndpoints, AsyncRouter, MethodResult
from tests.web import RECORD_KEYS, DataRequest, add_process_data, add_seen, app_with, new_endpoints

VERBS = ["post", "put", "patch", "delete"]


@pytest.fixture
def endpoints() -> AsyncEndpoints:
    return new_endpoints()


@pytest.fixture
def document(endpoints: AsyncEndpoints) -> dict[str, Any]:
    """Everything that can be mapped."""
    router = AsyncRouter(endpoints)
    process_data, seen = add_process_data(endpoints), add_seen(endpoints)
    for verb in VERBS:
        add = getattr(router, f"async_{verb}")
        add("/process/{shop}/{number:int}/{real:float}/{key:uuid}/{rest:path}", process_data)
        add("/seen", seen)
        add("/by-name", "Elsewhere", body=DataRequest)
    router.async_jobs(admin=True)
    router.async_get_job_details("/status/{job_id}")
    return app_with(router).openapi()


PROCESS = "/process/{shop}/{number}/{real}/{key}/{rest}"


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        assert schema["$ref"].startswith("#/")
        target: Any = document
        for part in schema["$ref"][2:].split("/"):
            target = target[part]
        schema = target
    return schema


def body_schema(document: dict[str, Any], message: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return resolve(document, message["content"][kind]["schema"])


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()]


def every_schema(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(found for entry in value.values() for found in every_schema(entry))]
    return [found for entry in value for found in every_schema(entry)] if isinstance(value, list) else []


def assert_document_is_sound(document: dict[str, Any]) -> None:
    OpenAPI.model_validate(document)
    assert document["openapi"].startswith("3.")
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids))
    for schema in every_schema(document):
        if isinstance(schema.get("$ref"), str):
            resolve(document, schema)
    for path, _, operation in operations(document):
        declared = {p["name"]: p for p in operation.get("parameters", []) if p["in"] == "path"}
        assert set(declared) == {part[1:-1] for part in path.split("/") if part.startswith("{")}, path
        assert all(parameter["required"] for parameter in declared.values())
        for status, response in operation["responses"].items():
            assert status.isdigit()
            assert response["description"]


def test_the_document_is_sound(document: dict[str, Any]) -> None:
    assert len(operations(document)) >= 4 * 3 + 5
    assert_document_is_sound(document)


@pytest.mark.parametrize("verb", VERBS)
def test_path_parameters(document: dict[str, Any], verb: str) -> None:
    parameters = document["paths"][PROCESS][verb]["parameters"]
    shown = {p["name"]: (p["schema"].get("type"), p["schema"].get("format")) for p in parameters if p["in"] == "path"}
    assert shown == {
        "shop": ("string", None),
        "number": ("integer", None),
        "real": ("number", None),
        "key": ("string", "uuid"),
        "rest": ("string", None),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_request_model(document: dict[str, Any], verb: str) -> None:
    for path in (PROCESS, "/by-name"):
        body = document["paths"][path][verb]["requestBody"]
        assert body["required"] is True
        assert body_schema(document, body)["required"] == ["data"]
        assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/DataRequest"}
    assert "requestBody" not in document["paths"]["/seen"][verb]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("path", [PROCESS, "/seen", "/by-name"])
def test_submission(document: dict[str, Any], verb: str, path: str) -> None:
    operation = document["paths"][path][verb]
    assert operation["tags"] == ["AsyncEndpoint"]
    responses = operation["responses"]
    accepted = responses["202"]
    assert set(body_schema(document, accepted)["properties"]) == set(RECORD_KEYS)
    assert {"Location", "Retry-After", "Async-Job-Id", "Idempotent-Replayed"} <= set(accepted["headers"])
    expected = {"400", "409", "500", "503"} | ({"413", "415", "422"} if path != "/seen" else set())
    assert expected <= set(responses)
    assert "201" not in responses
    assert "Retry-After" in responses["503"]["headers"]


def test_every_error_is_a_problem(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (path, method, status)
                properties = body_schema(document, response, "application/problem+json")["properties"]
                assert set(properties) >= {"type", "title", "status", "detail", "instance", "code", "jobId", "errors"}


def test_job_routes(document: dict[str, Any]) -> None:
    one = document["paths"]["/jobs/{job_id}"]
    assert set(one) >= {"get", "delete"}
    assert set(one["get"]["responses"]) >= {"200", "304", "404", "500", "503"}
    assert "ETag" in one["get"]["responses"]["200"]["headers"]
    assert set(one["delete"]["responses"]) >= {"200", "202", "404", "409", "500", "503"}
    assert set(document["paths"]["/jobs/{job_id}/retry"]["post"]["responses"]) >= {"202", "404", "409", "500", "503"}
    for status in ("200", "202"):
        properties = body_schema(document, one["delete"]["responses"][status])["properties"]
        assert set(properties) == set(RECORD_KEYS), status
    listing = document["paths"]["/jobs"]["get"]
    page = body_schema(document, listing["responses"]["200"])["properties"]
    assert set(page) == {"items", "nextCursor"}
    assert set(resolve(document, page["items"]["items"])["properties"]) == set(RECORD_KEYS)
    assert {p["name"] for p in listing["parameters"]} >= {"status", "name", "limit", "cursor"}
    for operation in (*one.values(), listing):
        assert operation["tags"] == ["AsyncEndpoint"]


def test_the_status_is_one_of_six_words(document: dict[str, Any]) -> None:
    record = body_schema(document, document["paths"]["/jobs/{job_id}"]["get"]["responses"]["200"])
    status = resolve(document, record["properties"]["status"])
    assert status["type"] == "string"
    assert status["enum"] == ["Queued", "Scheduled", "InProgress", "Completed", "Failed", "Canceled"]


# The result.


class Same:
    """Two models of one name."""

    class Result(BaseModel):
        one: int


class Result(BaseModel):
    two: str


@dataclass
class Point:
    x: int


def refs_or_types(document: dict[str, Any], schema: dict[str, Any]) -> list[Any]:
    """What a result may be, less null."""
    options = [resolve(document, option) for option in schema.get("anyOf", [schema])]
    return [option for option in options if option.get("type") != "null"]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        *((Result, {"two"}), (Same.Result, {"one"}), (Point, {"x"}), (MethodResult[Result], {"two"})),
        *((int, "integer"), (list[int], "array"), (dict[str, int], "object"), (Result | None, {"two"})),
    ],
    ids=str,
)
def test_the_result_is_typed_when_the_handler_is_known(
    endpoints: AsyncEndpoints, annotation: Any, expected: Any
) -> None:
    def handler(context: AsyncContext) -> Any:
        raise NotImplementedError

    handler.__annotations__["return"] = annotation
    endpoints.add_handler("Typed", handler)
    router = AsyncRouter(endpoints)
    router.async_post("/typed", handler)
    document = app_with(router).openapi()
    accepted = body_schema(document, document["paths"]["/typed"]["post"]["responses"]["202"])
    assert set(accepted["properties"]) == set(RECORD_KEYS)
    (shown,) = refs_or_types(document, accepted["properties"]["result"])
    if isinstance(expected, set):
        assert set(shown["properties"]) == expected
    else:
        assert shown["type"] == expected


def test_results_of_the_same_name_do_not_mix(endpoints: AsyncEndpoints) -> None:
    @endpoints.handler()
    def one(context: AsyncContext) -> Same.Result:
        raise NotImplementedError

    @endpoints.handler()
    def two(context: AsyncContext) -> Result:
        raise NotImplementedError

    @endpoints.handler()
    def numbers(context: AsyncContext) -> list[int]:
        raise NotImplementedError

    @endpoints.handler()
    def words(context: AsyncContext) -> list[str]:
        raise NotImplementedError

    router = AsyncRouter(endpoints)
    for handler in (one, two, numbers, words):
        router.async_post(f"/{handler.__name__}", handler)
    document = app_with(router).openapi()
    assert_document_is_sound(document)

    def result(path: str) -> dict[str, Any]:
        record = body_schema(document, document["paths"][path]["post"]["responses"]["202"])
        (shown,) = refs_or_types(document, record["properties"]["result"])
        return shown

    assert set(result("/one")["properties"]) == {"one"}
    assert set(result("/two")["properties"]) == {"two"}
    assert result("/numbers")["items"] == {"type": "integer"}
    assert result("/words")["items"] == {"type": "string"}


class NoSchema:
    pass


def test_a_result_that_has_no_schema_is_untyped(endpoints: AsyncEndpoints) -> None:
    @endpoints.handler()
    def odd(context: AsyncContext) -> NoSchema:
        raise NotImplementedError

    router = AsyncRouter(endpoints)
    router.async_post("/odd", odd)
    assert "202" in app_with(router).openapi()["paths"]["/odd"]["post"]["responses"]


# Route arguments.


def test_route_arguments_are_fastapis(endpoints: AsyncEndpoints) -> None:
    router = AsyncRouter(endpoints, tags=["router"], deprecated=True)
    router.async_post(
        "/one",
        "Elsewhere",
        tags=["mine"],
        summary="A summary",
        description="Words",
        operation_id="unique",
        responses={418: {"description": "teapot"}},
        dependencies=[Depends(lambda number: number)],
        openapi_extra={"x-extra": 1},
    )
    router.async_post("/hidden", "Elsewhere", include_in_schema=False)
    paths = app_with(router).openapi()["paths"]
    assert set(paths) == {"/one"}
    one = paths["/one"]["post"]
    assert (one["summary"], one["description"], one["operationId"]) == ("A summary", "Words", "unique")
    assert "mine" in one["tags"]
    assert "AsyncEndpoint" not in one["tags"]
    assert one["deprecated"] is True
    assert one["x-extra"] == 1
    assert {"202", "418", "503"} <= set(one["responses"])
    assert [p["name"] for p in one["parameters"] if p["in"] == "query"] == ["number"]


def test_the_prefixes_parameters_are_declared_too(endpoints: AsyncEndpoints) -> None:
    inner = AsyncRouter(endpoints, prefix="/shops/{shop}")
    inner.async_post("/items/{item:int}", "Elsewhere")
    inner.async_jobs()
    assert_document_is_sound(app_with(inner).openapi())
