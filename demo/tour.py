"""The client of the demo: submits the quick start's jobs and prints every state they go through."""

import argparse
import json
import os
import sys
import threading
import time

import httpx

OVER = {"Completed", "Failed", "Canceled"}
PATIENCE = 60.0  # seconds


class TourError(Exception):
    """What was expected did not happen; the message says what."""


def wait_for(url: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            httpx.get(url, timeout=5).raise_for_status()
        except httpx.HTTPError as error:
            if time.monotonic() > deadline:
                raise TourError(f"{url} did not come up in {PATIENCE:.0f} s: {error}") from error
            time.sleep(0.1)
        else:
            return


def run_job(api: httpx.Client, path: str, body: dict[str, object]) -> str:
    """Submits one job, follows it to its end, and returns its status URL."""
    response = api.post(path, json=body)
    if response.status_code != 202:
        raise TourError(f"POST {path} answered {response.status_code}, not 202: {response.text}")
    job = response.json()
    url = str(api.base_url.join(response.headers["Location"]))
    print(f"\nPOST {path} {json.dumps(body)}  ->  202 Accepted, job {job['id']} ({job['name']})")

    start, seen = time.monotonic(), None
    while True:
        if job["status"] != seen:
            move = job["status"] if seen is None else f"{seen} -> {job['status']}"
            print(f"  {time.monotonic() - start:4.1f} s  {job['id']}  {move}")
            seen = job["status"]
        if seen in OVER:
            break
        if time.monotonic() - start > PATIENCE:
            raise TourError(f"Job {job['id']} ({job['name']}) is still {seen} after {PATIENCE:.0f} s")
        time.sleep(0.05)
        job = api.get(url).raise_for_status().json()

    if seen != "Completed":
        raise TourError(f"Job {job['id']} ({job['name']}) ended {seen}: {json.dumps(job['error'])}")
    retries = f", after {job['retryCount']} retry" if job["retryCount"] else ""
    print(f"  result: {json.dumps(job['result'])}{retries}")
    return url


def tour(api_url: str, flower_url: str) -> None:
    wait_for(f"{api_url}/openapi.json")
    with httpx.Client(base_url=api_url, timeout=10) as api:
        job_url = run_job(api, "/api/process-data", {"data": "hello, world"})
        run_job(api, "/api/orders", {"item": "a teapot"})
    wait_for(f"{flower_url}/")
    print(f"\n  API docs   {api_url}/docs")
    print(f"  the job    {job_url}")
    print(f"  Flower     {flower_url}/tasks\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="exit when the jobs are done")
    once = parser.parse_args().once
    try:
        tour(os.environ["DEMO_API_URL"], os.environ["DEMO_FLOWER_URL"])
    except (TourError, httpx.HTTPError) as error:
        print(f"\nThe demo failed: {error}")
        return 1
    if not once:
        print("Everything keeps running. Ctrl-C ends it.")
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
