"""`Idempotency-Key`: however often a request is repeated, by whom and where, there is one job, and it runs once."""

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any
from uuid import UUID

import httpx
import pytest
import redis
from fastapi import Header

from async_endpoints_celery import AsyncRouter
from tests.deployment import Deployment
from tests.processes import wait_until
from tests.servers import valkey_server
from tests.streaming import many
from tests.web import (
    BODY,
    TestClient,
    add_process_data,
    add_seen,
    app_with,
    assert_no_jobs,
    assert_problem,
    assert_record,
    new_endpoints,
    request_id,
    shop,
)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two web processes and a worker."""
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("keys"), server.url) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "4")
        yield deployed


@pytest.fixture(scope="module")
def other_web(deployed: Deployment) -> httpx.Client:
    first, web = deployed.http, deployed.web
    deployed.start_web()
    other = deployed.http
    deployed.http, deployed.web = first, web
    return other


@pytest.fixture
def client(redis_url: str) -> Iterator[TestClient]:
    """No worker."""
    with TestClient(shop(new_endpoints(redis_url))) as client:
        yield client


def key(text: str | None = None) -> dict[str, str]:
    return {"Idempotency-Key": f'"{request_id()}"' if text is None else text}


def assert_replayed(response: Any, accepted: Any) -> None:
    assert response.status_code == 202, response.text
    assert response.json()["id"] == accepted.json()["id"]
    assert response.headers["idempotent-replayed"] == "true"
    assert response.headers["location"] == accepted.headers["location"]
    assert response.headers["async-job-id"] == accepted.headers["async-job-id"]


def assert_new(response: Any, *others: Any) -> None:
    assert response.status_code == 202, response.text
    assert "idempotent-replayed" not in response.headers
    assert response.json()["id"] not in {other.json()["id"] for other in others}


class TestKey:
    def test_the_same_request_is_the_same_job(self, deployed: Deployment) -> None:
        headers = key()
        first = deployed.post("Echo", headers, text="once")
        assert_new(first)
        assert_record(first.json(), status="Queued")
        assert_replayed(deployed.post("Echo", headers, text="once"), first)
        record = deployed.wait(first.json()["id"])
        # In whatever state it is.
        later = deployed.post("Echo", headers, text="once")
        assert_replayed(later, first)
        assert later.json() == record
        assert len(deployed.runs(record["id"])) == 1

    @pytest.mark.parametrize(
        "value",
        [
            *('"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324", '"a b"', "~!#$%&'()*+"),
            *('"say \\"hi\\" \\\\ twice"', '"' + "k" * 255 + '"', "k", '"k,l"', ' "k" '),
        ],
    )
    def test_well_formed(self, client: TestClient, value: str) -> None:
        first = client.post("/process", json=BODY, headers=key(value))
        assert_new(first)
        assert_replayed(client.post("/process", json=BODY, headers=key(value)), first)

    def test_quoted_or_bare_it_is_the_same_key(self, client: TestClient) -> None:
        first = client.post("/process", json=BODY, headers=key('"abc-123"'))
        assert_replayed(client.post("/process", json=BODY, headers=key("abc-123")), first)

    def test_other_keys_are_other_jobs(self, client: TestClient) -> None:
        values = ['"a"', '"A"', '" a"', '"a "', '"aa"', '"a\\\\"']
        ids = {client.post("/process", json=BODY, headers=key(value)).json()["id"] for value in values}
        assert len(ids) == len(values)

    @pytest.mark.parametrize(
        "value",
        [
            *("", '""', '"', '"a', 'a"', '"a"b', '"a" "b"', '"a\\"', '"a\\b"', "a b", "a,b", '"a", "b"', '"a";q=1'),
            *('"' + "k" * 256 + '"', "k" * 256, "ü".encode(), '"ü"'.encode(), b"\xff", '"a\tb"'),
        ],
    )
    def test_malformed(self, redis_url: str, value: str | bytes) -> None:
        endpoints = new_endpoints(redis_url)
        with TestClient(shop(endpoints)) as client:
            headers: Any = {"Idempotency-Key": value}
            problem = assert_problem(client.post("/process", json=BODY, headers=headers), 400)
            assert problem["code"] == "IDEMPOTENCY_KEY_INVALID"
            assert_no_jobs(endpoints)

    def test_sent_twice(self, client: TestClient) -> None:
        response = client.post("/process", json=BODY, headers=[("Idempotency-Key", '"a"'), ("Idempotency-Key", '"a"')])
        assert_problem(response, 400, code="IDEMPOTENCY_KEY_INVALID")

    def test_the_id_cannot_be_guessed_from_the_key(self, redis_url: str) -> None:
        """The same request to two deployments: nothing that the client knows makes the id."""
        ids = []
        for _ in range(2):
            with redis.Redis.from_url(redis_url) as store:
                store.flushall()
            with TestClient(shop(new_endpoints(redis_url))) as client:
                ids.append(client.post("/process", json=BODY, headers=key('"a"')).json()["id"])
        assert ids[0] != ids[1]
        for job_id in ids:
            assert UUID(job_id).version == 4

    def test_the_key_is_in_no_response(self, client: TestClient) -> None:
        response = client.post("/process", json=BODY, headers=key('"key-5f1e"'))
        assert "key-5f1e" not in response.text + str(response.headers)


class TestPayload:
    def test_another_payload(self, client: TestClient) -> None:
        headers = key()
        first = client.post("/process", json=BODY, headers=headers)
        problem = assert_problem(client.post("/process", json={"data": "other"}, headers=headers), 422)
        assert problem["code"] == "JOB_CONFLICT"
        assert_replayed(client.post("/process", json=BODY, headers=headers), first)

    def test_the_canonical_body_counts(self, client: TestClient) -> None:
        headers = {**key(), "Content-Type": "application/json"}
        first = client.post("/process", content=b'{"data": "hello"}', headers=headers)
        for body in (
            b'{"processing_priority":1,"data":"hello"}',
            b'{ "data" : "hel\\u006co", "processingPriority": 1 }',
            b'{"data": "hello", "unknown": true}',
        ):
            assert_replayed(client.post("/process", content=body, headers=headers), first)
        changed = client.post("/process", content=b'{"data": "hello", "processingPriority": 2}', headers=headers)
        assert_problem(changed, 422)

    def test_query_parameters_are_part_of_it(self, client: TestClient) -> None:
        headers = key()
        first = client.post("/process?tag=a&tag=b", json=BODY, headers=headers)
        assert_replayed(client.post("/process?tag=a&tag=b", json=BODY, headers=headers), first)
        for other in ("", "?tag=b&tag=a", "?tag=a"):
            assert_problem(client.post(f"/process{other}", json=BODY, headers=headers), 422)

    def test_headers_are_not(self, client: TestClient) -> None:
        headers = key()
        first = client.post("/process", json=BODY, headers={**headers, "X-Trace": "1"})
        assert_replayed(client.post("/process", json=BODY, headers={**headers, "X-Trace": "2"}), first)

    def test_a_refused_request_does_not_use_the_key_up(self, client: TestClient) -> None:
        headers = key()
        assert_problem(client.post("/process", json={"data": 5}, headers=headers), 422, code="BODY_INVALID")
        assert_new(client.post("/process", json=BODY, headers=headers))


class TestScope:
    @pytest.fixture
    def everywhere(self, redis_url: str) -> Iterator[TestClient]:
        """One handler on many routes, and callers."""

        async def user(x_user: Annotated[str | None, Header()] = None) -> str | None:
            return x_user

        endpoints = new_endpoints(redis_url, owner=user)
        router = AsyncRouter(endpoints)
        seen = add_seen(endpoints)
        for add in (router.async_post, router.async_put, router.async_patch, router.async_delete):
            add("/things/{thing}", seen)
        router.async_post("/process", add_process_data(endpoints))
        router.async_jobs()
        with TestClient(app_with(router, lifespan=endpoints.lifespan), headers={"X-User": "ann"}) as client:
            yield client

    def test_owner_method_and_path(self, everywhere: TestClient) -> None:
        headers = key()
        scopes = [
            *((method, "/things/1", "ann") for method in ("POST", "PUT", "PATCH", "DELETE")),
            *(("POST", "/things/2", "ann"), ("POST", "/things/1", "bob"), ("POST", "/things/1", "ann\u00fc")),
        ]

        def send(method: str, path: str, user: str) -> Any:
            more: Any = {**headers, "X-User": user.encode()}
            return everywhere.request(method, path, headers=more)

        accepted = [send(*scope) for scope in scopes]
        for response in accepted:
            assert_new(response)
        assert len({response.json()["id"] for response in accepted}) == len(scopes)
        for scope, response in zip(scopes, accepted, strict=True):
            assert_replayed(send(*scope), response)

    def test_nobody_learns_of_another_ones_key(self, everywhere: TestClient) -> None:
        headers = key()
        everywhere.post("/process", json=BODY, headers=headers)
        other = everywhere.post("/process", json={"data": "other"}, headers={**headers, "X-User": "bob"})
        assert_new(other)


class TestRace:
    async def test_identical_requests_at_the_same_instant(self, deployed: Deployment, other_web: httpx.Client) -> None:
        headers = key()
        async with many(deployed.http.base_url, 10) as one, many(other_web.base_url, 10) as other:
            requests = [http.post("/run/Echo", json={"text": "x"}, headers=headers) for http in [one, other] * 10]
            responses = await asyncio.gather(*requests)
        assert {response.status_code for response in responses} == {202}
        [job_id] = {response.json()["id"] for response in responses}
        assert sum("idempotent-replayed" not in response.headers for response in responses) == 1
        assert deployed.wait(job_id)["status"] == "Completed"
        # Whatever else is in the queue has been looked at once this one is done.
        for _ in range(4):
            deployed.finish("Echo")
        assert len(deployed.runs(job_id)) == 1

    async def test_different_payloads_at_the_same_instant(self, deployed: Deployment) -> None:
        headers = key()
        async with many(deployed.http.base_url, 10) as http:
            requests = [http.post("/run/Echo", json={"text": str(n)}, headers=headers) for n in range(10)]
            responses = await asyncio.gather(*requests)
        statuses = sorted(response.status_code for response in responses)
        assert statuses == [202] + [422] * 9


class TestLimits:
    def test_a_replay_succeeds_with_a_full_queue(self, redis_url: str) -> None:
        with TestClient(shop(new_endpoints(redis_url, maximum_queue_size=1))) as client:
            headers = key()
            first = client.post("/process", json=BODY, headers=headers)
            assert_problem(client.post("/process", json=BODY, headers=key()), 503, code="QUEUE_FULL")
            assert_replayed(client.post("/process", json=BODY, headers=headers), first)
            assert_problem(client.post("/process", json={"data": "x"}, headers=headers), 422)

    def test_it_lives_as_long_as_the_record(self, client: TestClient, redis_url: str) -> None:
        headers = key()
        first = client.post("/process", json=BODY, headers=headers)
        with redis.Redis.from_url(redis_url) as store:
            store.delete(f"ae:job:{first.json()['id']}")  # its retention has ended
        again = client.post("/process", json={"data": "other"}, headers=headers)
        assert again.status_code == 202
        assert "idempotent-replayed" not in again.headers


class TestBesideARequestId:
    def test_the_request_id_is_the_job_id(self, client: TestClient) -> None:
        job_id = request_id()
        headers = {**key(), "X-Async-Request-Id": job_id}
        first = client.post("/process", json=BODY, headers=headers)
        assert_new(first)
        assert first.json()["id"] == job_id
        assert_replayed(client.post("/process", json=BODY, headers=headers), first)
        # Two rules are broken; either of them may be named.
        assert client.post("/process", json={"data": "other"}, headers=headers).status_code in (409, 422)

    def test_either_of_them_malformed(self, client: TestClient) -> None:
        both = {**key(), "X-Async-Request-Id": "no-uuid"}
        assert_problem(client.post("/process", json=BODY, headers=both), 400, code="REQUEST_ID_INVALID")
        both = {**key('"'), "X-Async-Request-Id": request_id()}
        assert_problem(client.post("/process", json=BODY, headers=both), 400, code="IDEMPOTENCY_KEY_INVALID")


class TestWebProcesses:
    def test_they_agree(self, deployed: Deployment, other_web: httpx.Client) -> None:
        headers = key()
        first = deployed.http.post("/run/Echo", json={}, headers=headers)
        assert_replayed(other_web.post("/run/Echo", json={}, headers=headers), first)
        assert_problem(other_web.post("/run/Echo", json={"text": "x"}, headers=headers), 422)

    def test_a_restart_changes_nothing(self, redis_url: str) -> None:
        headers, responses = key(), []
        for _ in range(2):
            with TestClient(shop(new_endpoints(redis_url))) as client:
                responses.append(client.post("/process", json=BODY, headers=headers))
        assert_replayed(responses[1], responses[0])

    def test_after_flushall_a_key_still_gives_one_job(self, redis_url: str) -> None:
        """The jobs are gone, and keys with them: new ones work, on each process that was there."""
        with (
            redis.Redis.from_url(redis_url) as store,
            TestClient(shop(new_endpoints(redis_url))) as one,
            TestClient(shop(new_endpoints(redis_url))) as other,
        ):
            headers = key()
            for client in (one, other):
                client.post("/process", json=BODY, headers=headers)
            store.flushall()
            first = one.post("/process", json={"data": "new"}, headers=headers)
            assert_new(first)
            for client in (other, one):
                assert_replayed(client.post("/process", json={"data": "new"}, headers=headers), first)

    def test_a_process_that_starts_after_flushall_agrees_with_the_others(self, redis_url: str) -> None:
        headers = key()
        with redis.Redis.from_url(redis_url) as store, TestClient(shop(new_endpoints(redis_url))) as one:
            one.post("/process", json=BODY, headers=key())
            store.flushall()
            first = one.post("/process", json=BODY, headers=headers)
            assert_new(first)
            with TestClient(shop(new_endpoints(redis_url))) as other:
                assert_replayed(other.post("/process", json=BODY, headers=headers), first)


def test_together_with_prefer_wait(deployed: Deployment) -> None:
    headers = {**key(), "Prefer": "wait=10"}
    first = deployed.post("Echo", headers)
    again = deployed.post("Echo", headers)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    wait_until(lambda: len(deployed.runs(first.json()["id"])) == 1)
