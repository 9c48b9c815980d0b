"""The live page of a job: who gets it, what it may do, and what a browser makes of it."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import redis

from async_endpoints_celery import AsyncContext, AsyncRouter, JobFailed
from tests.browser import Tab, chromium
from tests.deployment import Deployment
from tests.processes import ROOT, wait_until
from tests.servers import valkey_server
from tests.streaming import listeners, tell
from tests.web import BODY, TestClient, app_with, assert_problem, new_endpoints, serving, shop, wait_for_status

SCREENSHOT = ROOT / "docs" / "images" / "job-page.png"
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$nonce"
CHROME = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8,"
    "application/signed-exchange;v=b3;q=0.7"
)
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
BROWSER = {"Accept": CHROME}


@pytest.fixture
def client(redis_url: str) -> Iterator[TestClient]:
    """No worker."""
    with TestClient(shop(new_endpoints(redis_url))) as client:
        yield client


@pytest.fixture
def location(client: TestClient) -> str:
    return str(client.post("/process", json=BODY).headers["location"])


class TestNegotiation:
    @pytest.mark.parametrize(
        "accept",
        [
            *(CHROME, FIREFOX, "text/html", "text/html, application/json;q=0.9", "Text/HTML"),
            *("application/json;q=0.5,text/html;q=0.6", "text/html ; q=1.0", "text/html;charset=utf-8"),
        ],
    )
    def test_a_page(self, client: TestClient, location: str, accept: str) -> None:
        response = client.get(location, headers={"Accept": accept})
        assert response.status_code == 200
        assert response.headers["content-type"].split(";")[0] == "text/html"
        assert response.text.startswith("<!doctype html>")

    @pytest.mark.parametrize(
        "accept",
        [
            *("*/*", "application/json", "application/json, text/html;q=0.9", "text/html;q=0.9, application/json"),
            *("text/html, application/json", "text/html;q=0", "text/html;q=0.5, */*", "application/json, */*;q=0.1"),
            *("text/plain", "application/problem+json", "", "text/html;q=x", "application/*, text/html;q=0.4"),
        ],
    )
    def test_json(self, client: TestClient, location: str, accept: str) -> None:
        response = client.get(location, headers={"Accept": accept})
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.json()["status"] == "Queued"

    def test_without_accept(self, client: TestClient, location: str) -> None:
        del client.headers["accept"]
        assert client.get(location).json()["status"] == "Queued"

    @pytest.mark.parametrize("accept", [CHROME, "application/json"])
    def test_caches_are_told_what_it_depends_on(self, client: TestClient, location: str, accept: str) -> None:
        response = client.get(location, headers={"Accept": accept})
        assert "accept" in response.headers["vary"].lower()
        assert response.headers["cache-control"] == "no-store"

    def test_a_tag_of_one_form_is_no_tag_of_the_other(self, client: TestClient, location: str) -> None:
        """RFC 9110, 8.8.3.3: a strong validator tells representations apart."""
        page = client.get(location, headers=BROWSER)
        as_json = client.get(location, headers={"If-None-Match": page.headers.get("etag", '"none"')})
        assert as_json.status_code == 200

    def test_everything_else_stays_json(self, client: TestClient, location: str) -> None:
        submitted = client.post("/process", json=BODY, headers=BROWSER)
        assert (submitted.status_code, submitted.json()["status"]) == (202, "Queued")
        assert_problem(client.get("/jobs/no-uuid", headers=BROWSER), 404)
        canceled = client.delete(location, headers=BROWSER)
        assert canceled.json()["status"] == "Canceled"
        assert client.post("/process", json=BODY, headers={**BROWSER, "Prefer": "wait=0"}).json()


class TestPolicy:
    def directives(self, response: Any) -> dict[str, list[str]]:
        policy = response.headers["content-security-policy"]
        parts = [part.split() for part in policy.split(";") if part.strip()]
        assert len({part[0] for part in parts}) == len(parts)
        return {part[0]: part[1:] for part in parts}

    def test_it_is_strict(self, client: TestClient, location: str) -> None:
        response = client.get(location, headers=BROWSER)
        found = self.directives(response)
        [nonce] = found["script-src"]
        assert re.fullmatch(r"'nonce-[\w-]{20,}'", nonce)
        assert found == {
            "default-src": ["'none'"],
            "script-src": [nonce],
            "style-src": [nonce],
            "connect-src": ["'self'"],
            "base-uri": ["'none'"],
            "form-action": ["'none'"],
            "frame-ancestors": ["'none'"],
        }
        value = nonce.removeprefix("'nonce-").removesuffix("'")
        assert len(re.findall(r"<(?:script|style)\b", response.text)) == response.text.count(f'nonce="{value}"') == 2
        assert not re.search(r"<[^>]*\s(?:on\w+|style)\s*=", response.text), "inline handlers and styles do not work"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"

    def test_its_nonce_is_used_once(self, client: TestClient, location: str) -> None:
        pages = [client.get(location, headers=BROWSER) for _ in range(3)]
        assert len({page.headers["content-security-policy"] for page in pages}) == 3

    def test_it_needs_no_other_host(self, client: TestClient, location: str) -> None:
        text = client.get(location, headers=BROWSER).text
        assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+|\b(?:src|href)\s*=", text)

    def test_it_works_without_a_script(self, client: TestClient, location: str) -> None:
        text = client.get(location, headers=BROWSER).text
        assert re.search(r'<noscript>\s*<meta http-equiv="refresh"', text)
        assert "Queued" in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_what_other_people_wrote_is_text(redis_url: str) -> None:
    endpoints = new_endpoints(redis_url, default_max_retries=0)
    router = AsyncRouter(endpoints)

    @endpoints.handler("Result")
    async def result(context: AsyncContext) -> Any:
        await context.report_progress(50, EVIL)
        return {EVIL: [EVIL]}

    @endpoints.handler("Error")
    def error(context: AsyncContext) -> None:
        raise JobFailed(EVIL, EVIL)

    for handler in (result, error):
        router.async_post(f"/{handler.__name__}", handler)
    router.async_jobs()
    with serving(endpoints, router) as client, redis.Redis.from_url(redis_url) as store:
        for path in ("/result", "/error"):
            location = client.post(path).headers["location"]
            record = wait_for_status(client, location, {"Completed", "Failed"})
            assert EVIL.replace('"', '\\"') in json.dumps(record, ensure_ascii=False)
            # A name that no handler can have, should the check of names ever be less strict.
            store.hset(f"ae:job:{record['id']}", "name", EVIL)
            page = client.get(location, headers=BROWSER).text
            assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=alert(2)&gt;" in page
            assert "<script>alert" not in page
            assert "<img" not in page
            assert page.count("<script") == page.count("</script>") == 1
            assert "&amp;$nonce" in page, "what looks like one of the template's own names is text too"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with valkey_server() as server, Deployment(tmp_path_factory.mktemp("page"), server.url) as deployed:
        deployed.start_web()
        deployed.start_worker("-P", "threads", "-c", "4")
        yield deployed


@pytest.fixture(scope="module")
def browser() -> Iterator[Tab]:
    with chromium() as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Iterator[Tab]:
    browser.prefer("light")
    browser.resize(800, 500)
    yield browser
    browser.open("about:blank")


@pytest.fixture
def running(deployed: Deployment) -> Iterator[str]:
    """A job that waits for orders."""
    job_id = deployed.submit("Instructed")
    deployed.wait(job_id, "InProgress")
    yield job_id
    tell(deployed.redis, job_id, result=None)


def watch(tab: Tab, deployed: Deployment, job_id: str) -> None:
    """Open the job's page and wait until it listens to the job's events."""
    tab.open(f"{str(deployed.http.base_url).rstrip('/')}/jobs/{job_id}")
    if deployed.job(job_id)["status"] not in ("Completed", "Failed", "Canceled"):
        wait_until(lambda: listeners(deployed.redis, job_id) == 1)


def wait_for_text(tab: Tab, selector: str, text: str) -> None:
    with suppress(TimeoutError):
        wait_until(lambda: text in tab.text(selector), 5)
    assert text in tab.text(selector)


class TestInABrowser:
    def test_it_follows_the_job(self, tab: Tab, deployed: Deployment, running: str) -> None:
        watch(tab, deployed, running)
        assert tab.text("#status") == "InProgress"
        assert not tab.is_visible("#progress")
        for percent in (20, 50):
            tell(deployed.redis, running, progress=[percent, f"{percent} of 100 rows"])
            wait_for_text(tab, "#message", f"{percent} % {percent} of 100 rows")
            assert tab.evaluate("document.querySelector('#bar').value") == percent
        assert tab.is_visible("#progress")
        assert not tab.is_visible("#outcome")
        tell(deployed.redis, running, result={"rows": 100, "by": "<script>alert(1)</script>"})
        wait_for_text(tab, "#status", "Completed")
        assert tab.evaluate("document.title") == "Instructed: Completed"
        assert json.loads(tab.text("#outcome-text")) == {"rows": 100, "by": "<script>alert(1)</script>"}
        assert tab.evaluate("document.scripts.length") == 1
        assert not tab.is_visible("#cancel")
        # One read, one stream; nothing from elsewhere, and nothing that its own policy forbids.
        base = str(deployed.http.base_url).rstrip("/")
        asked = [url.removeprefix(base) for url in tab.requested() if not url.endswith("/favicon.ico")]
        assert asked == [f"/jobs/{running}", f"/jobs/{running}", f"/jobs/{running}/events"]
        assert not [c for c in tab.complaints() if "favicon" not in json.dumps(c)]
        wait_until(lambda: listeners(deployed.redis, running) == 0)

    def test_a_failure_and_evil_texts(self, tab: Tab, deployed: Deployment, running: str) -> None:
        watch(tab, deployed, running)
        tell(deployed.redis, running, progress=[10, EVIL])
        wait_for_text(tab, "#message", EVIL)
        tell(deployed.redis, running, failure=[EVIL, EVIL])
        wait_for_text(tab, "#outcome-text", f"{EVIL}: {EVIL}")
        assert tab.text("#outcome-title") == "Error"
        # And as the server writes it.
        watch(tab, deployed, running)
        assert tab.text("#outcome-text") == f"{EVIL}: {EVIL}"
        assert tab.evaluate("document.images.length") == 0
        assert tab.evaluate("document.scripts.length") == 1
        assert not [c for c in tab.complaints() if "favicon" not in json.dumps(c)]

    def test_cancel_by_keyboard(self, tab: Tab, deployed: Deployment, running: str) -> None:
        watch(tab, deployed, running)
        wait_until(lambda: tab.is_visible("#cancel"))
        for _ in range(5):
            tab.press("Tab")
            if tab.evaluate("document.activeElement.id") == "cancel":
                break
        assert tab.evaluate("document.activeElement.matches('#cancel:focus-visible')")
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.press("Enter")
        wait_for_text(tab, "#status", "Canceled")
        assert not tab.is_visible("#cancel")
        assert tab.text("#note") == ""
        assert deployed.wait(running)["status"] == "Canceled"

    def test_screen_readers_hear_the_status(self, tab: Tab, deployed: Deployment, running: str) -> None:
        watch(tab, deployed, running)
        assert tab.evaluate("document.querySelector('#status').closest('[aria-live=polite]') !== null")
        assert tab.evaluate("document.querySelector('#bar').labels.length") == 1
        assert tab.evaluate("document.documentElement.lang") == "en"

    def test_light_and_dark(self, tab: Tab, deployed: Deployment, running: str) -> None:
        watch(tab, deployed, running)
        accents, brightness = set(), {}
        for scheme in ("light", "dark"):
            tab.prefer(scheme)
            accents.add(tab.color("#status"))
            text = tab.color("body")
            canvas = tab.evaluate(
                "(() => { const probe = document.createElement('div'); document.body.append(probe);"
                " probe.style.backgroundColor = 'Canvas'; const color = getComputedStyle(probe).backgroundColor;"
                " probe.remove(); return color; })()"
            )
            background = tuple(int(part) for part in re.findall(r"\d+", canvas)[:3])
            brightness[scheme] = (sum(text), sum(background))
            assert contrast(text, background) > 7
            for selector in ("#status", "#id"):
                assert contrast(tab.color(selector), background) > 4.5, (scheme, selector)
        assert len(accents) == 2
        assert brightness["light"][0] < brightness["light"][1]
        assert brightness["dark"][0] > brightness["dark"][1]

    def test_a_narrow_screen(self, tab: Tab, deployed: Deployment, running: str) -> None:
        tab.resize(320, 600)
        watch(tab, deployed, running)
        tell(deployed.redis, running, result="x" * 500)
        wait_for_text(tab, "#status", "Completed")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 320

    def test_the_picture_in_the_readme(self, tab: Tab, deployed: Deployment, running: str) -> None:
        """Is made here, when there is none: delete it to have it made anew."""
        tab.resize(800, 330)
        deployed.redis.hset(f"ae:job:{running}", "name", "ImportCatalog")
        watch(tab, deployed, running)
        tell(deployed.redis, running, progress=[50, "5 000 of 10 000 rows"])
        wait_for_text(tab, "#message", "50 %")
        picture = tab.screenshot()
        assert picture.startswith(b"\x89PNG")
        if not SCREENSHOT.exists():
            SCREENSHOT.parent.mkdir(exist_ok=True)
            SCREENSHOT.write_bytes(picture)
        assert "docs/images/job-page.png" in (ROOT / "README.md").read_text()


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG 2.2."""

    def luminance(color: tuple[int, ...]) -> float:
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_no_page_where_the_factories_are_ones_own(redis_url: str) -> None:
    """A job's own routes only: the page belongs to the default `job_status`."""
    endpoints = new_endpoints(redis_url)
    router = AsyncRouter(endpoints)
    router.async_get_job_details("/status/{job_id}")
    with TestClient(app_with(router, lifespan=endpoints.lifespan)) as client:
        assert_problem(client.get("/status/no-uuid", headers=BROWSER), 404)
