"""Where a job's status route is, whichever router, prefix or sub-application has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

from starlette.routing import Mount, NoMatchFound

if TYPE_CHECKING:
    from async_endpoints_celery.app import AsyncEndpoints

#: What a path may hold as it is (RFC 3986, 3.3).
_SAFE = "/:@!$&'()*+,;=-._~"
_ZERO = str(UUID(int=0))


@dataclass(frozen=True, slots=True)
class StatusRoute:
    """A status route as seen from the outermost router, which it keeps alive: it is known by its id."""

    router: Any
    name: str
    #: Parameters of the route besides `job_id`, as prefixes have them ("/tenants/{tenant}").
    parameters: tuple[str, ...]
    #: The path with a zero id in place of the job's, where `job_id` is all that differs.
    template: str | None

    def path(self, job_id: UUID, path_params: Mapping[str, Any]) -> str:
        if self.template is not None:
            return quote(self.template.replace(_ZERO, str(job_id)), safe=_SAFE)
        values = {name: path_params[name] for name in self.parameters}
        return quote(str(self.router.url_path_for(self.name, job_id=str(job_id), **values)), safe=_SAFE)


def status_route_name(endpoints: AsyncEndpoints, any_owner: bool = False) -> str:
    kind = "any_job" if any_owner else "job"
    return f"async_endpoints_{kind}_{id(endpoints):x}"


def find_status_route(router: Any, endpoints: AsyncEndpoints, path_params: Mapping[str, Any]) -> StatusRoute | None:
    """The callers' own status route, or failing that the operators' (`any_owner`).

    Args:
        router: the outermost one that the request came through.
        endpoints: whose jobs.
        path_params: of the request; the status route's prefix may have some of them.
    """
    for any_owner in (False, True):
        for name in _names(router, status_route_name(endpoints, any_owner)):
            for parameters in _subsets(path_params):
                values = {parameter: path_params[parameter] for parameter in parameters}
                try:
                    path = str(router.url_path_for(name, job_id=_ZERO, **values))
                except (NoMatchFound, AssertionError):  # starlette asserts that a value fits its convertor
                    continue
                return StatusRoute(router, name, parameters, None if parameters else path)
    return None


def _subsets(path_params: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    others = [name for name in path_params if name != "job_id"]
    for count in range(len(others) + 1):
        yield from combinations(others, count)


def _names(router: Any, name: str) -> Iterator[str]:
    """The name, and what it is called from outside the mounts that have a name of their own."""
    yield name
    for route in getattr(router, "routes", None) or ():
        if isinstance(route, Mount):
            prefix = f"{route.name}:" if route.name else ""
            for inner in _names(route, name):
                if prefix or inner != name:
                    yield prefix + inner
