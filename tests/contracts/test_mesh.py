"""The mesh as documented is the mesh as wired: every service's routers against the table behind the AsyncAPI document."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

import pytest

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_contracts.asyncapi import MESH, Part

SERVICES = [part for part in MESH if part.name != "clients"]


def routers(part: Part) -> list[MeshRouter]:
    """Those of the service's handler modules."""
    spec = find_spec(f"mojomesh_{part.name}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    names = [module.name for module in iter_modules(spec.submodule_search_locations) if module.name.endswith("handlers")]
    found = [getattr(import_module(f"{spec.name}.{name}"), "router", None) for name in names]
    return [router for router in found if isinstance(router, MeshRouter)]


@pytest.mark.parametrize("part", SERVICES, ids=lambda part: part.name)
def test_a_service_consumes_what_the_document_says(part: Part) -> None:
    if find_spec(f"mojomesh_{part.name}.app") is None:
        pytest.skip(f"{part.name} is not wired yet")
    subscriptions = [subscription for router in routers(part) for subscription in router.subscriptions]

    assert {subscription.service for subscription in subscriptions} == {part.name}
    assert {subscription.event for subscription in subscriptions if not subscription.broadcast} == set(part.work)
    assert {subscription.event for subscription in subscriptions if subscription.broadcast} == set(part.broadcast)
