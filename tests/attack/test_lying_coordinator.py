"""A lying coordinator, broker or network: nothing starts, and the refusal is named.

Two kinds of no: what a sender may have altered is refused on the spot and changes nothing; what the coordinator itself
has signed and the site does not believe is reported as DECLINED.
"""

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
import pytest_asyncio

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import AttemptNumber, Digest, FederationId, SiteId
from edif_mesh.domain.job import Limits
from edif_mesh.domain.site import ModelRef
from edif_mesh.wire import subjects
from edif_mesh.wire.codec import encode
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import Audience, Order, PayloadRef, PlaceAttempt, Received, Refusal, StopAttempt
from tests import models, traces
from tests.played_coordinator import SITE, PlayedCoordinator, Site, a_site, now_ms

pytestmark = pytest.mark.asyncio(loop_scope="module")

DAY_MS = 86_400_000
Lie = Callable[[PlayedCoordinator], Awaitable[tuple[Order, Received | Refusal]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with a_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest_asyncio.fixture(loop_scope="module")
async def coordinator(site: Site) -> AsyncIterator[PlayedCoordinator]:
    """The played coordinator; afterwards the site still runs an honest order, and ran nothing else."""
    played = site.coordinator
    before = len(played.reports)
    yield played
    started = {report.job for report in played.reports[before:] if report.status is AttemptStatus.RUNNING}
    honest = await played.order(traces.one_read())
    await played.place(honest)
    assert (await played.ended(honest)).status is AttemptStatus.SUCCEEDED
    assert not started


def flip(envelope: str, *, field: str) -> str:
    """Change one byte inside the payload or the signature of an envelope."""
    value = json.loads(envelope)
    text = value["payload"] if field == "payload" else value["signatures"][0]["sig"]
    raw = bytearray(base64.b64decode(text))
    raw[len(raw) // 2] ^= 1
    changed = base64.b64encode(raw).decode()
    if field == "payload":
        value["payload"] = changed
    else:
        value["signatures"][0]["sig"] = changed
    return json.dumps(value, separators=(",", ":"))


async def refused(site: PlayedCoordinator, answer: Received | Refusal, code: str) -> None:
    """The answer is a refusal with `code`, and nothing is reported or held."""
    assert isinstance(answer, Refusal)
    assert answer.failure.code == code
    assert answer.failure.text
    await site.quiet()
    assert site.adverts[-1].attempts == ()


async def declined(
    site: PlayedCoordinator, order: Order, answer: Received | Refusal, code: str, attempt: int = 1
) -> None:
    """The attempt is reported as DECLINED with `code`, and nothing was started."""
    assert isinstance(answer, Received)
    report = await site.ended(order, attempt)
    assert report.status is AttemptStatus.DECLINED, report
    assert report.failure is not None
    assert report.failure.code == code
    assert [item.status for item in site.reports_of(order, attempt)] == [AttemptStatus.DECLINED]


# ------------------------------------------------------------------------------------------ altered on the way


@pytest.mark.parametrize("field", ["payload", "signature"])
async def test_a_byte_of_the_order_changed_on_the_way(coordinator: PlayedCoordinator, field: str) -> None:
    order = await coordinator.order()
    envelope = coordinator.sign_order(order)
    grant = seal(coordinator.grant(order, envelope), coordinator.keys.coordinator)
    answer = await coordinator.send(encode(PlaceAttempt(grant, flip(envelope, field=field))))
    await refused(coordinator, answer, "digest_mismatch")


@pytest.mark.parametrize("field", ["payload", "signature"])
async def test_a_byte_of_the_grant_changed(coordinator: PlayedCoordinator, field: str) -> None:
    order = await coordinator.order()
    envelope = coordinator.sign_order(order)
    grant = seal(coordinator.grant(order, envelope), coordinator.keys.coordinator)
    answer = await coordinator.send(encode(PlaceAttempt(flip(grant, field=field), envelope)))
    await refused(coordinator, answer, "bad_signature")


async def test_another_order_under_an_honest_grant(coordinator: PlayedCoordinator) -> None:
    order, other = await coordinator.order(), await coordinator.order()
    grant = seal(coordinator.grant(order, coordinator.sign_order(order)), coordinator.keys.coordinator)
    answer = await coordinator.send(encode(PlaceAttempt(grant, coordinator.sign_order(other))))
    await refused(coordinator, answer, "digest_mismatch")


# ------------------------------------------------------------------------------------------ a coordinator that lies


@pytest.mark.parametrize("field", ["payload", "signature"])
async def test_an_order_that_the_coordinator_altered(coordinator: PlayedCoordinator, field: str) -> None:
    order = await coordinator.order()
    altered = flip(coordinator.sign_order(order), field=field)
    await declined(coordinator, order, await coordinator.place(order, altered), "bad_signature")


async def test_an_order_that_the_coordinator_invented(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order()
    envelope = coordinator.sign_order(order, coordinator.keys.coordinator)
    await declined(coordinator, order, await coordinator.place(order, envelope), "wrong_role")


async def test_an_order_of_an_unknown_key(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order()
    envelope = coordinator.sign_order(order, coordinator.keys.stranger)
    await declined(coordinator, order, await coordinator.place(order, envelope), "unknown_key")


async def test_an_order_of_a_revoked_key(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order()
    envelope = coordinator.sign_order(order, coordinator.keys.revoked)
    await declined(coordinator, order, await coordinator.place(order, envelope), "revoked_key")


async def test_a_key_revoked_while_the_site_runs_counts_at_once(coordinator: PlayedCoordinator) -> None:
    trust, key = coordinator.keys.trust, coordinator.keys.researcher.id
    trust.revoke(key, now_ms())
    try:
        order = await coordinator.order()
        await declined(coordinator, order, await coordinator.place(order), "revoked_key")
    finally:
        identity = next(item for item in trust.identities() if item.key == key)
        trust.enrol(replace(identity, revoked_at_ms=None))


async def test_an_order_for_a_model_that_its_key_may_not_use(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order()
    envelope = coordinator.sign_order(order, coordinator.keys.gpt2_only)
    await declined(coordinator, order, await coordinator.place(order, envelope), "model_out_of_scope")


BAD_ORDERS: dict[str, tuple[str, Callable[[], dict[str, object]]]] = {
    "expired": ("order_expired", lambda: {"not_before_ms": now_ms() - DAY_MS, "expires_at_ms": now_ms() - 61_000}),
    "not yet valid": (
        "not_yet_valid",
        lambda: {"not_before_ms": now_ms() + 90_000, "expires_at_ms": now_ms() + DAY_MS},
    ),
    "valid for too long": ("window_too_long", lambda: {"expires_at_ms": now_ms() + 8 * DAY_MS}),
    "other sites only": ("not_in_audience", lambda: {"audience": Audience(sites=(SiteId("heilbronn"),))}),
    "other countries only": ("not_in_audience", lambda: {"audience": Audience(countries=("FR", "CH"))}),
    "another federation": ("wrong_federation", lambda: {"federation": FederationId("other")}),
    "a model that is not here": ("unknown_model", lambda: {"model": ModelRef("meta-llama/Llama-3.1-70B")}),
    "another revision": ("wrong_revision", lambda: {"model": ModelRef(models.TINY, revision="0" * 40)}),
    "another dtype": ("wrong_dtype", lambda: {"model": ModelRef(models.TINY, dtype="float16")}),
    "another task": ("wrong_task", lambda: {"model": ModelRef(models.TINY, task="fill-mask")}),
    "another codec": ("unsupported_codec", lambda: {"payload": PayloadRef(Digest("0" * 64), 1, codec="pickle")}),
    "more than the site allows": ("over_site_limits", lambda: {"limits": Limits(wall_ms=DAY_MS)}),
    "a stronger sandbox than there is": ("weak_sandbox", lambda: {"sandbox": "stricter"}),
    "negative limits": ("over_site_limits", lambda: {"limits": Limits(memory_bytes=-1)}),
}


@pytest.mark.parametrize("name", BAD_ORDERS)
async def test_a_signed_order_that_this_site_must_not_run(coordinator: PlayedCoordinator, name: str) -> None:
    code, changes = BAD_ORDERS[name]
    order = await coordinator.order(**changes())
    await declined(coordinator, order, await coordinator.place(order), code)


@pytest.mark.parametrize("attempt", [0, 5, -1])
async def test_an_attempt_outside_what_the_order_allows(coordinator: PlayedCoordinator, attempt: int) -> None:
    order = await coordinator.order()
    answer = await coordinator.place(order, attempt=AttemptNumber(attempt))
    await declined(coordinator, order, answer, "too_many_attempts", attempt)


async def test_an_expired_grant(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order()
    await declined(coordinator, order, await coordinator.place(order, expires_at_ms=now_ms() - 61_000), "grant_expired")


async def test_a_grant_for_another_job_than_its_order(coordinator: PlayedCoordinator) -> None:
    order, other = await coordinator.order(), await coordinator.order()
    await declined(coordinator, other, await coordinator.place(order, job=other.job), "job_mismatch")


async def test_a_grant_for_another_site(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order()
    await refused(coordinator, await coordinator.place(order, site=SiteId("heilbronn")), "wrong_site")


@pytest.mark.parametrize("signer", ["site", "researcher"])
async def test_a_grant_that_no_coordinator_signed(coordinator: PlayedCoordinator, signer: str) -> None:
    order = await coordinator.order()
    answer = await coordinator.place(order, key=getattr(coordinator.keys, signer))
    await refused(coordinator, answer, "wrong_role")


async def test_a_grant_of_an_unknown_key(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order()
    await refused(coordinator, await coordinator.place(order, key=coordinator.keys.stranger), "unknown_key")


# ------------------------------------------------------------------------------------------ a payload that is not it


async def test_a_payload_that_was_changed_in_the_store(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order(b"")
    honest, changed = traces.one_read(), bytearray(traces.one_read())
    changed[len(changed) // 2] ^= 1
    await coordinator.link.streams.append(subjects.payload_chunk(order.job, 0), bytes(changed), message_id=order.job)
    order = replace(order, payload=PayloadRef(Digest(hashlib.sha256(honest).hexdigest()), len(honest)))
    await declined(coordinator, order, await coordinator.place(order), "payload_mismatch")


async def test_a_payload_that_is_longer_than_its_order_says(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order(b"abcdef")
    order = replace(order, payload=PayloadRef(Digest(hashlib.sha256(b"abc").hexdigest()), 3))
    await declined(coordinator, order, await coordinator.place(order), "payload_mismatch")


async def test_a_payload_that_is_not_stored(coordinator: PlayedCoordinator) -> None:
    order = await coordinator.order(b"")
    order = replace(order, payload=PayloadRef(Digest("0" * 64), 3))
    await declined(coordinator, order, await coordinator.place(order), "payload_mismatch")


# ------------------------------------------------------------------------------------------ bytes that are nothing


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b'{"kind":"place_attempt"}',
        b'{"kind":"place_attempt","grant":"","order":""}',
        b'{"kind":"place_attempt","grant":"{}","order":"{}","grant":"x"}',
        b'{"payload":"","payloadType":"x","signatures":[]}',
        b"[" * 5_000,
        b'{"kind":"place_attempt","grant":"\\ud800","order":"\\ud800"}',
        b"9" * 100_000,
    ],
)
async def test_bytes_that_are_no_message_are_refused_and_stop_nothing(
    coordinator: PlayedCoordinator, raw: bytes
) -> None:
    answer = await coordinator.send(raw)
    assert isinstance(answer, Refusal)
    assert answer.failure.code in {"wire", "untrusted", "unknown_key", "version"}


# ------------------------------------------------------------------------------------------ replays and old epochs


async def test_a_grant_that_has_run_never_runs_again(site: Site) -> None:
    played = site.coordinator
    order = await played.order(traces.one_read())
    envelope = played.sign_order(order)
    bundle = encode(PlaceAttempt(seal(played.grant(order, envelope), played.keys.coordinator), envelope))
    assert isinstance(await played.send(bundle), Received)
    assert (await played.ended(order)).status is AttemptStatus.SUCCEEDED
    count = len(played.reports_of(order))
    await played.quiet()
    answer = await played.send(bundle)
    assert isinstance(answer, Refusal)
    assert answer.failure.code == "replay"
    site.agent.kill()
    site.agent.start()
    await site.agent.ready()
    await played.loaded()
    answer = await played.send(bundle)
    assert isinstance(answer, Refusal)
    assert answer.failure.code == "replay"
    assert len(played.reports_of(order)) == count


async def test_a_deposed_coordinator_is_refused_also_after_a_restart(site: Site) -> None:
    played = site.coordinator
    played.epoch = type(played.epoch)(7)
    order = await played.order(traces.one_read())
    await played.place(order)
    assert (await played.ended(order)).status is AttemptStatus.SUCCEEDED
    site.agent.kill()
    site.agent.start()
    await site.agent.ready()
    await played.loaded()
    late = await played.order()
    answer = await played.place(late, epoch=type(played.epoch)(6))
    assert isinstance(answer, Refusal)
    assert answer.failure.code == "stale_epoch"
    stop = StopAttempt(order.job, AttemptNumber(1), SITE, type(played.epoch)(6), now_ms(), "cancelled")
    answer = await played.send(seal(stop, played.keys.coordinator).encode())
    assert isinstance(answer, Refusal)
    assert answer.failure.code == "stale_epoch"
