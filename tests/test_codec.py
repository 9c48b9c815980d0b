"""Between Python and what Redis and the message hold: nothing is lost on the way, and nothing is interpreted."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from async_endpoints_celery.codec import (
    CapturedRequest,
    canonical_json,
    decode_record,
    encode_error,
    encode_progress,
    fingerprint,
    milliseconds,
    moment,
)
from async_endpoints_celery.errors import AsyncEndpointError
from async_endpoints_celery.jobs import JobStatus, Progress

deterministic = settings(derandomize=True, database=None, deadline=None)
#: Also surrogates: JSON may escape half a character, and Python then holds one.
any_text = st.text(st.characters(codec=None))
JOB_ID = "5b7e0e4a-8f8b-4c8a-9f1f-8d8f8e8f8e8f"

#: Bodies that a serializer on the way might be tempted to understand.
AWKWARD = {
    "kombu's datetime": '{"__type__": "datetime", "__value__": "x"}',
    "kombu's uuid": '{"__type__": "uuid", "__value__": {"hex": "not hex"}}',
    "kombu's bytes": '{"bytes": "aGk=", "__base64__": true}',
    "a lone surrogate": '"\\ud800"',
    "a real lone surrogate": '"\ud800"',
    "unicode": '{"Größe": "🦄 \\u0000 \u2028"}',
    "big integers": json.dumps({"n": 2**64, "m": -(10**400)}),
    "more digits than Python reads": "1" * 5_000,
    "exact decimals": "[1.10, 1e400, 0.1000000000000000055511151231257827]",
    "no number": "[NaN, Infinity]",
    "repeated names": '{"a": 1, "a": 2}',
    "white space": ' {\n "a" :1 }\r\n',
    "deep": "[" * 100_000 + "]" * 100_000,
    "null": "null",
    "empty": "",
}


class TestCapturedRequest:
    @pytest.mark.parametrize("body", AWKWARD.values(), ids=AWKWARD)
    def test_the_body_is_never_looked_into(self, body: str) -> None:
        captured = CapturedRequest(payload=body)
        assert CapturedRequest.decode(captured.encode()) == captured

    @pytest.mark.parametrize("body", AWKWARD.values(), ids=AWKWARD)
    def test_nor_by_celerys_serializer(self, body: str) -> None:
        arguments = [1, CapturedRequest(payload=body).encode(), 0]
        assert kombu_json.loads(kombu_json.dumps(arguments)) == arguments

    def test_it_fits_into_utf_8_whatever_it_holds(self) -> None:
        CapturedRequest("\ud800", (("a", "\udfff"),), {"\ud800": "\udfff"}, "\ud800").encode().encode()

    def test_nothing_at_all(self) -> None:
        assert CapturedRequest.decode(CapturedRequest().encode()) == CapturedRequest()

    def test_no_body_is_not_null(self) -> None:
        assert CapturedRequest.decode(CapturedRequest(payload=None).encode()).payload is None
        assert CapturedRequest.decode(CapturedRequest(payload="null").encode()).payload == "null"

    def test_headers_keep_order_repetition_and_case(self) -> None:
        headers = (("Via", "one"), ("x", "é"), ("via", "two"), ("Via", "one"))
        assert CapturedRequest.decode(CapturedRequest(headers=headers).encode()).headers == headers

    def test_route_params_keep_their_json_types(self) -> None:
        params: dict[str, Any] = {"n": 7, "x": 1.5, "ok": True, "path": "a/b", "id": UUID(JOB_ID)}
        decoded = CapturedRequest.decode(CapturedRequest(route_params=params).encode())
        assert decoded.route_params == {**params, "id": JOB_ID}

    @deterministic
    @given(
        payload=st.none() | any_text,
        headers=st.lists(st.tuples(any_text, any_text)).map(tuple),
        route_params=st.dictionaries(
            any_text, any_text | st.integers() | st.booleans() | st.floats(allow_nan=False) | st.none()
        ),
        query=any_text,
        by_name=st.booleans(),
    )
    def test_round_trip(self, **fields: Any) -> None:
        captured = CapturedRequest(**fields)
        assert CapturedRequest.decode(captured.encode()) == captured

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "null",
            "5",
            "[]",
            '"text"',
            "{}",
            '{"payload":null,"headers":[],"routeParams":{},"query":""}',
            '{"payload":null,"headers":[["a"]],"routeParams":{},"query":"","byName":false}',
            '{"payload":null,"headers":null,"routeParams":{},"query":"","byName":false}',
            '{"payload":5,"headers":[],"routeParams":{},"query":"","byName":false}',
            '{"payload":null,"headers":[["a",5]],"routeParams":{},"query":"","byName":false}',
            '{"payload":null,"headers":[],"routeParams":"","query":"","byName":false}',
            '{"payload":null,"headers":[],"routeParams":{},"query":null,"byName":false}',
            "[" * 100_000,
            None,
            5,
        ],
        ids=lambda text: str(text)[:70],
    )
    def test_what_it_did_not_encode(self, text: Any) -> None:
        """A message of another version, or of somebody else: its job fails with PAYLOAD_INVALID for this."""
        with pytest.raises(ValueError, match="captured request is not readable"):
            CapturedRequest.decode(text)


class TestFingerprint:
    def test_equal_values_have_one(self) -> None:
        one = fingerprint({"a": 1, "b": [1, {"x": None}]}, {"id": 1, "n": 2}, [("q", "1")])
        assert one == fingerprint({"b": [1, {"x": None}], "a": 1}, {"n": 2, "id": 1}, [("q", "1")])
        assert len(one) == 32

    @pytest.mark.parametrize(
        "other",
        [
            ({"a": 2}, {}, []),
            ({"a": "1"}, {}, []),
            ({"a": 1, "b": None}, {}, []),
            ({"a": 1}, {"a": 1}, []),
            ({"a": 1}, {}, [("a", "1")]),
            (None, {}, []),
        ],
    )
    def test_other_ones_have_others(self, other: tuple[Any, dict[str, Any], list[tuple[str, str]]]) -> None:
        assert fingerprint({"a": 1}, {}, []) != fingerprint(*other)

    def test_query_parameters_have_an_order(self) -> None:
        assert fingerprint(1, {}, [("a", "1"), ("b", "2")]) != fingerprint(1, {}, [("b", "2"), ("a", "1")])

    def test_awkward_values(self) -> None:
        value = {"n": 10**400, "s": "\ud800", "id": UUID(JOB_ID), "x": 1.5}
        assert fingerprint(value, value, [("\ud800", "")]) == fingerprint(dict(value), value, [("\ud800", "")])

    def test_canonical_json(self) -> None:
        assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,null]}'


def fields(**changes: str) -> dict[str, str]:
    return {
        "name": "Report",
        "status": "InProgress",
        "retries": "1",
        "max_retries": "3",
        "created": "1760437800123",
        "updated": "1760437800456",
        "version": "4",
        **changes,
    }


class TestDecodeRecord:
    def test_what_every_record_has(self) -> None:
        job = decode_record(JOB_ID, fields())
        assert (job.id, job.name, job.status) == (UUID(JOB_ID), "Report", JobStatus.IN_PROGRESS)
        assert (job.retry_count, job.max_retries, job.version) == (1, 3, 4)
        assert job.created_at == datetime(2025, 10, 14, 10, 30, 0, 123_000, UTC)
        assert job.last_updated_at == datetime(2025, 10, 14, 10, 30, 0, 456_000, UTC)
        assert (job.started_at, job.completed_at, job.result, job.error, job.progress, job.owner) == (None,) * 6

    def test_what_some_have(self) -> None:
        error = AsyncEndpointError(code="CODE", message="é")
        job = decode_record(
            JOB_ID,
            fields(
                started="1760437800000",
                completed="1760437801000",
                result='{"n":[1,2.5,null]}',
                error=encode_error(error),
                progress=encode_progress(50, "half"),
                owner="ada",
            ),
        )
        assert (job.started_at, job.completed_at) == (moment("1760437800000"), moment("1760437801000"))
        assert (job.result, job.error, job.owner) == ({"n": [1, 2.5, None]}, error, "ada")
        assert job.progress == Progress(percent=50.0, message="half")

    def test_the_wire_form_hides_what_is_not_the_clients(self) -> None:
        wire = json.loads(decode_record(JOB_ID, fields(owner="ada")).model_dump_json(by_alias=True))
        assert set(wire) == {
            *("id", "name", "status", "retryCount", "maxRetries", "createdAt", "startedAt", "completedAt"),
            *("lastUpdatedAt", "result", "error", "progress"),
        }
        assert (wire["status"], wire["createdAt"]) == ("InProgress", "2025-10-14T10:30:00.123Z")

    @pytest.mark.parametrize("result", ["null", "0", '""', "false", "[]"])
    def test_an_empty_result_is_a_result(self, result: str) -> None:
        assert decode_record(JOB_ID, fields(result=result)).result == json.loads(result)

    @pytest.mark.parametrize("message", ["\ud800", "a file called \udcff", "é\u2028", "\x00", None])
    def test_any_progress_message_can_be_read_again(self, message: str | None) -> None:
        """One that cannot be makes the record unreadable, and every list that it is part of."""
        progress = decode_record(JOB_ID, fields(progress=encode_progress(5, message))).progress
        assert progress is not None
        assert progress.percent == 5


class TestTimes:
    @pytest.mark.parametrize(("seconds", "expected"), [(0, 0), (1, 1000), (0.0015, 2), (86_400.0, 86_400_000)])
    def test_milliseconds(self, seconds: float, expected: int) -> None:
        assert milliseconds(seconds) == expected

    def test_moment(self) -> None:
        assert moment(None) is None
        found = moment("1760437800123")
        assert found is not None
        assert found.isoformat() == "2025-10-14T10:30:00.123000+00:00"
