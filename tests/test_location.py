"""`Location`: the path of the status route of the same endpoints, wherever the two are mounted."""

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from async_endpoints_celery import AsyncEndpoints, AsyncRouter
from tests.web import TestClient, app_with, new_endpoints


@pytest.fixture
def endpoints() -> AsyncEndpoints:
    return new_endpoints()


def submitting(endpoints: AsyncEndpoints, path: str = "/job", **arguments: Any) -> AsyncRouter:
    router = AsyncRouter(endpoints, **arguments)
    router.async_post(path, "Elsewhere")
    return router


def status(endpoints: AsyncEndpoints, **arguments: Any) -> AsyncRouter:
    router = AsyncRouter(endpoints, **arguments)
    router.async_jobs()
    return router


def assert_location(app: Any, path: str, expected: str, *, stripped: str = "", **client: Any) -> None:
    """The Location is as expected, and leads to the record. `stripped`: what a proxy takes off the paths."""
    with TestClient(app, **client) as http:
        for _ in range(2):
            accepted = http.post(path)
            assert accepted.status_code == 202
            job_id = accepted.json()["id"]
            location = accepted.headers["location"]
            assert location == expected.format(id=job_id)
            assert http.get(location.removeprefix(stripped)).json()["id"] == job_id


def test_no_status_route_no_location(endpoints: AsyncEndpoints) -> None:
    with TestClient(app_with(submitting(endpoints))) as client:
        accepted = client.post("/job")
    assert accepted.status_code == 202
    assert "location" not in accepted.headers


def test_the_status_route_alone(endpoints: AsyncEndpoints) -> None:
    router = submitting(endpoints)
    router.async_get_job_details("/status/{job_id}/of-a-job")
    assert_location(app_with(router), "/job", "/status/{id}/of-a-job")


def test_default_path_of_the_status_route(endpoints: AsyncEndpoints) -> None:
    router = submitting(endpoints)
    router.async_get_job_details()
    assert_location(app_with(router), "/job", "/jobs/{id}")


def test_another_prefix(endpoints: AsyncEndpoints) -> None:
    router = submitting(endpoints)
    router.async_jobs("/runs")
    assert_location(app_with(router), "/job", "/runs/{id}")


def test_router_prefixes(endpoints: AsyncEndpoints) -> None:
    app = app_with(submitting(endpoints, prefix="/do"), status(endpoints, prefix="/see"))
    assert_location(app, "/do/job", "/see/jobs/{id}")


def test_include_router_prefixes_nested(endpoints: AsyncEndpoints) -> None:
    inner, app = APIRouter(), FastAPI()
    inner.include_router(status(endpoints), prefix="/in")
    app.include_router(submitting(endpoints))
    app.include_router(inner, prefix="/out")
    assert_location(app, "/job", "/out/in/jobs/{id}")


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
def test_root_path_of_the_application(endpoints: AsyncEndpoints) -> None:
    app = app_with(submitting(endpoints), status(endpoints), root_path="/proxied")
    assert_location(app, "/job", "/proxied/jobs/{id}", stripped="/proxied")


def test_root_path_of_the_server(endpoints: AsyncEndpoints) -> None:
    app = app_with(submitting(endpoints), status(endpoints))
    # By ASGI the path begins with the root path.
    assert_location(app, "/proxied/job", "/proxied/jobs/{id}", root_path="/proxied")


def test_both_in_a_mounted_application(endpoints: AsyncEndpoints) -> None:
    app = FastAPI()
    app.mount("/sub", app_with(submitting(endpoints), status(endpoints)))
    assert_location(app, "/sub/job", "/sub/jobs/{id}")


def test_both_in_a_mounted_application_behind_a_proxy(endpoints: AsyncEndpoints) -> None:
    app = FastAPI()
    app.mount("/sub", app_with(submitting(endpoints), status(endpoints)))
    assert_location(app, "/proxied/sub/job", "/proxied/sub/jobs/{id}", root_path="/proxied")


def test_the_status_route_in_a_mounted_application(endpoints: AsyncEndpoints) -> None:
    app = app_with(submitting(endpoints))
    app.mount("/sub", app_with(status(endpoints)))
    assert_location(app, "/job", "/sub/jobs/{id}")


def test_the_submitting_route_in_a_mounted_application(endpoints: AsyncEndpoints) -> None:
    app = app_with(status(endpoints))
    app.mount("/sub", app_with(submitting(endpoints)))
    assert_location(app, "/sub/job", "/jobs/{id}")


def test_a_mount_with_a_name(endpoints: AsyncEndpoints) -> None:
    app = FastAPI()
    app.mount("/sub", app_with(submitting(endpoints), status(endpoints)), name="sub")
    assert_location(app, "/sub/job", "/sub/jobs/{id}")


def test_inside_a_starlette_application(endpoints: AsyncEndpoints) -> None:
    api = app_with(submitting(endpoints), status(endpoints))
    assert_location(Starlette(routes=[Mount("/api", app=api)]), "/api/job", "/api/jobs/{id}")


def test_an_application_that_is_mounted_twice(endpoints: AsyncEndpoints) -> None:
    api, app = app_with(submitting(endpoints), status(endpoints)), FastAPI()
    app.mount("/a", api)
    app.mount("/b", api)
    with TestClient(app) as client:
        for prefix in ("/a", "/b"):
            accepted = client.post(f"{prefix}/job")
            assert client.get(accepted.headers["location"]).json()["id"] == accepted.json()["id"]


def test_a_prefix_with_a_parameter(endpoints: AsyncEndpoints) -> None:
    router = submitting(endpoints, prefix="/tenants/{tenant}")
    router.async_jobs()
    app = app_with(router)
    assert_location(app, "/tenants/acme/job", "/tenants/acme/jobs/{id}")
    assert_location(app, "/tenants/other/job", "/tenants/other/jobs/{id}")


def test_an_include_prefix_with_a_parameter(endpoints: AsyncEndpoints) -> None:
    router, app = submitting(endpoints), FastAPI()
    router.async_jobs()
    app.include_router(router, prefix="/tenants/{tenant}")
    assert_location(app, "/tenants/acme/job", "/tenants/acme/jobs/{id}")
    assert_location(app, "/tenants/other/job", "/tenants/other/jobs/{id}")


def test_the_operators_routes_are_not_the_callers(endpoints: AsyncEndpoints) -> None:
    operators = AsyncRouter(endpoints, prefix="/operators")
    operators.async_jobs(admin=True, any_owner=True)
    assert_location(app_with(operators, submitting(endpoints), status(endpoints)), "/job", "/jobs/{id}")


def test_two_endpoints_in_one_application(endpoints: AsyncEndpoints) -> None:
    other = new_endpoints()
    app = app_with(
        submitting(endpoints, "/one"),
        submitting(other, "/two"),
        status(other, prefix="/second"),
        status(endpoints, prefix="/first"),
    )
    assert_location(app, "/one", "/first/jobs/{id}")
    assert_location(app, "/two", "/second/jobs/{id}")


def test_one_router_in_two_applications(endpoints: AsyncEndpoints) -> None:
    router = submitting(endpoints)
    router.async_jobs()
    first, second = FastAPI(), FastAPI()
    first.include_router(router, prefix="/v1")
    second.include_router(router, prefix="/v2")
    assert_location(first, "/v1/job", "/v1/jobs/{id}")
    assert_location(second, "/v2/job", "/v2/jobs/{id}")


def test_a_status_route_that_is_mapped_later(endpoints: AsyncEndpoints) -> None:
    app = app_with(submitting(endpoints))
    with TestClient(app) as client:
        assert "location" not in client.post("/job").headers
        app.include_router(status(endpoints))
        assert client.post("/job").headers["location"].startswith("/jobs/")
