"""A real agent with more models than memory: what it loads, evicts and refuses, and what it says of that meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.site import ModelOffer, ModelRef, ModelState
from edif_mesh.wire.messages import Advert, Order, Report
from tests import models, traces
from tests.played_coordinator import PlayedCoordinator, Site, a_site

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUDGET, RESIDENCY_S = 1_000_000_000, 8
FIRST, SECOND = "edif-test/first", "edif-test/second"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """The tiny model pinned, and memory for one more; the 124M shape fits only where nothing is pinned."""
    for name in (FIRST, SECOND):
        models.another_tiny(name.partition("/")[2])
    more = "pinned = true\n" + "".join(
        f'[[models]]\nrepo_id = "{name}"\npreload = false\nattn_implementation = "eager"\n'
        for name in (FIRST, SECOND, models.gpt2_shape())
    )
    settings = {"models_bytes": BUDGET, "min_residency_s": RESIDENCY_S, "ready_children": 1}
    async with a_site(tmp_path_factory.mktemp("site"), more, **settings) as site:
        yield site


async def asks(site: Site, repo_id: str, payload: bytes | None = None, **changes: Any) -> Order:
    """An order for the model, granted."""
    order = await site.coordinator.order(payload or traces.one_read(), model=ModelRef(repo_id), **changes)
    await site.coordinator.place(order)
    return order


def offer_in(advert: Advert, repo_id: str) -> ModelOffer:
    return next(offer for offer in advert.models if offer.repo_id == repo_id)


def offer(site: Site, repo_id: str) -> ModelOffer:
    return offer_in(site.coordinator.adverts[-1], repo_id)


async def declined(site: Site, repo_id: str) -> str:
    order = await asks(site, repo_id)
    report = await site.coordinator.ended(order)
    assert report.status is AttemptStatus.DECLINED, report
    assert report.failure is not None
    assert report.failure.code == "no_room", report
    return report.failure.text


def told_of(coordinator: PlayedCoordinator, order: Order) -> list[Report]:
    return coordinator.reports_of(order)


async def test_the_catalogue_says_what_is_loaded_and_what_can_never_be(site: Site) -> None:
    tiny, large = offer(site, models.TINY), offer(site, models.GPT2)
    assert (tiny.state, tiny.pinned, tiny.evictable_at_ms) == (ModelState.LOADED, True, 0)
    assert (large.state, large.attn_implementation) == (ModelState.FAILED, "eager")
    assert "gives 1.00 GB to models, of which 0.47 GB stay with edif-test/tiny-gpt2 (pinned)" in large.detail
    assert offer(site, FIRST).state is ModelState.LOADABLE
    advert = site.coordinator.adverts[-1]
    assert (advert.models_bytes, advert.evictable_bytes) == (BUDGET, 0)
    assert advert.free_models_bytes == BUDGET - tiny.memory_bytes
    order = await asks(site, models.GPT2)
    failure = (await site.coordinator.ended(order)).failure
    assert failure is not None
    assert failure.code == "model_failed"


async def test_models_come_and_go_as_they_are_asked_for(site: Site) -> None:
    coordinator = site.coordinator
    first = await asks(site, FIRST, traces.endless())
    await coordinator.running(first)
    details = [report.detail for report in told_of(coordinator, first) if report.status is AttemptStatus.LOADING]
    assert any(detail.startswith("loading weights, 0 % of 0.7 MB") for detail in details), details
    assert "warming up" in details[-1]

    assert f"{models.TINY} 0." in (text := await declined(site, SECOND))
    assert "(pinned)" in text
    assert "(in use)" in text
    await coordinator.stop(first)
    await coordinator.ended(first)
    assert "s more)" in await declined(site, SECOND)

    await coordinator.until(lambda: coordinator.adverts[-1].evictable_bytes > 0)
    seen = len(coordinator.adverts)
    second = await asks(site, SECOND, env={"attn_implementation": "sdpa"})  # for itself: the host's own is eager
    report = await coordinator.ended(second)
    assert report.status is AttemptStatus.SUCCEEDED, report
    await coordinator.until(lambda: offer(site, SECOND).state is ModelState.LOADED)
    states = [(offer_in(a, FIRST).state, offer_in(a, SECOND).state) for a in coordinator.adverts[seen:]]
    kept = list(dict.fromkeys(states))
    assert kept[-1] == (ModelState.LOADABLE, ModelState.LOADED)
    assert (ModelState.LOADABLE, ModelState.LOADING) in kept
    assert offer(site, models.TINY).state is ModelState.LOADED, "the pinned one went"
    for advert in coordinator.adverts:
        held = [o for o in advert.models if o.state in (ModelState.LOADED, ModelState.EVICTING)]
        assert sum(o.memory_bytes for o in held) <= BUDGET
    assert offer(site, SECOND).attn_implementation == "eager"
    assert offer(site, SECOND).used_at_ms > 0
    assert offer(site, FIRST).evictable_at_ms == 0


@pytest.mark.slow
async def test_a_restarted_agent_has_only_its_pinned_model(site: Site) -> None:
    site.agent.kill()
    boot = site.coordinator.adverts[-1].boot
    site.agent.start()
    await site.agent.ready()
    await site.coordinator.until(lambda: site.coordinator.adverts[-1].boot != boot)
    await site.coordinator.loaded()
    assert offer(site, SECOND).state is ModelState.LOADABLE
    assert (await site.coordinator.ended(await asks(site, models.TINY))).status is AttemptStatus.SUCCEEDED
