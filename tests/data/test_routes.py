from synermedgen_hf.data.phantom import PROTOCOLS
from synermedgen_hf.data.routes import MODALITIES, REGIONS, ROUTES, Route


def test_the_22_routes_are_distinct_and_named():
    assert len(ROUTES) == len(set(ROUTES)) == len({route.name for route in ROUTES}) == 22
    assert {route.region for route in ROUTES} == set(REGIONS)
    assert {route.source for route in ROUTES} == {route.target for route in ROUTES} == set(MODALITIES)
    assert ROUTES[0] == Route("brain", "MRI", "CT")
    assert ROUTES[0].name == "brain/MRI-CT" and str(ROUTES[0]) == "brain: MRI->CT"


def test_every_route_runs_both_ways():
    assert all(route.source != route.target for route in ROUTES)
    assert {Route(route.region, route.target, route.source) for route in ROUTES} == set(ROUTES)


def test_every_route_is_served_by_one_phantom_protocol():
    for route in ROUTES:
        serving = [
            protocol
            for (region, protocol), modalities in PROTOCOLS.items()
            if region == route.region and {route.source, route.target} <= set(modalities)
        ]
        assert len(serving) == 1, route
