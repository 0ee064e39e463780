"""Running attempts: payload in, a lent runner, result out; every turn of it goes to the core as an event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from edif_mesh.domain.attempt import Blame, Receipt
from edif_mesh.domain.ids import JobId, SiteId
from edif_mesh.domain.job import Failure, Limits
from edif_mesh.errors import ChunkError, EdifError, RunnerError, StoreFullError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.results.choice import Choice, LinkEstimate
from edif_mesh.results.forms import ChunkForms, SharedChunks, Sharing
from edif_mesh.results.index import CHUNK_BYTES, Entry, Index
from edif_mesh.results.manifest import ManifestParts, build_manifest, packed
from edif_mesh.results.sealing import Sealer
from edif_mesh.results.transfer import Form
from edif_mesh.transport.ports import Streams
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import DirectEndpoint, Order, ResultPart
from site_agent.core.blame import blame_of
from site_agent.core.events import (
    AttemptComputed,
    AttemptFailed,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    PayloadRefused,
)
from site_agent.core.state import AttemptKey, Held
from site_agent.direct.keeper import DirectKeeper
from site_agent.direct.store import Keeping, KeepingForm
from site_agent.runner.events import (
    ResultChunk,
    ResultCut,
    RunnerFailed,
    RunnerLog,
    RunnerStarted,
    RunnerSucceeded,
)
from site_agent.runner.supervisor import Runner, RunOptions
from site_agent.shell.bulk import Cargo
from site_agent.shell.logs import LogSender
from site_agent.shell.loop import read_clocks
from site_agent.shell.models import ModelKeeper
from site_agent.shell.spool import Spool

log = logging.getLogger(__name__)

_REPLENISH_AFTER_S = 0.05
"""The next runner is forked and warmed up once the last word of this attempt has left, not in competition with it."""
_IDLE_DEATHS = 4
"""How many waiting runners of a host may be found dead before an attempt fails for it."""


class _NeverStartedError(Exception):
    """The lent runner was dead before it took the payload; the job has not begun."""


@dataclass(frozen=True, slots=True)
class Equipment:
    """What every attempt works with."""

    site: SiteId
    key: PrivateKey
    streams: Streams
    """For log lines."""
    cargo: Cargo
    models: ModelKeeper
    limits: Limits
    threads: int
    spool_dir: Path
    tell: Callable[[Event], Awaitable[object]]
    sandbox: str = ""
    """The profile that runners are confined to, for receipts."""
    direct: DirectKeeper | None = None
    """Keeps results to serve them from here."""
    link: LinkEstimate = field(default_factory=LinkEstimate)
    """Of our way to the broker, learnt from every result."""
    shared: SharedChunks = field(default_factory=SharedChunks)


class Attempts:
    """The attempts that run now, one task each."""

    def __init__(self, equipment: Equipment) -> None:
        self._with = equipment
        self._running: dict[AttemptKey, AttemptTask] = {}
        self._telling: set[asyncio.Future[object]] = set()

    def start(self, held: Held) -> None:
        """Run an attempt; its events follow. Idempotent.

        It may begin inside the turn of the loop that records its acceptance: its first event, and with it all that it
        stores and sends, waits for the end of that turn. Should the agent die before, the runner dies with it.
        """
        if held.key not in self._running:
            attempt = AttemptTask(held, self._with)
            self._running[held.key] = attempt
            attempt.task.add_done_callback(lambda _: self._running.pop(held.key, None))

    def kill(self, key: AttemptKey, reason: str) -> None:
        """End it at once; `AttemptStopped` follows when its runner is gone."""
        if (attempt := self._running.get(key)) is not None:
            attempt.kill(reason)
            return
        telling = asyncio.ensure_future(self._with.tell(AttemptStopped(key)))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    def drop(self, jobs: Iterable[JobId]) -> None:
        """Forget what is held of deleted jobs: their chunks are lent to no later result, and served to nobody."""
        for job in jobs:
            self._with.shared.drop(job)
            if self._with.direct is not None:
                self._with.direct.store.drop(job)

    async def finished(self) -> None:
        """Wait until none is left."""
        while self._running:
            await asyncio.wait([attempt.task for attempt in self._running.values()])

    async def close(self) -> None:
        """End everything."""
        tasks = [attempt.task for attempt in self._running.values()]
        for attempt in list(self._running.values()):
            attempt.kill("the agent ends")
        await asyncio.gather(*tasks, return_exceptions=True)


class AttemptTask:
    """One attempt from its payload to its last event."""

    def __init__(self, held: Held, equipment: Equipment) -> None:
        self._held, self._with = held, equipment
        self._runner: Runner | None = None
        self._logs = LogSender(held.key, equipment.site, equipment.key, equipment.streams)
        self._spool = Spool(equipment.spool_dir)
        self._upload: asyncio.Task[ManifestParts] | None = None
        self._keeping: Keeping | None = None
        self._forms = self._chunk_forms()
        self.task = asyncio.create_task(self._guarded(), name=f"attempt {held.job}.{held.attempt}")

    def kill(self, reason: str) -> None:
        """Kill the runner and stop sending its result."""
        if self._runner is not None:
            self._runner.kill(reason, f"The attempt was stopped: {reason}.")
        self.task.cancel()

    async def _guarded(self) -> None:
        try:
            await self._run_or_fail()
        except asyncio.CancelledError:
            await self._stop()
        finally:
            self._release()
            repo_id = self._held.order.model.repo_id
            asyncio.get_running_loop().call_later(_REPLENISH_AFTER_S, self._with.models.replenish, repo_id)

    async def _run_or_fail(self) -> None:
        try:
            await self._run()
        except StoreFullError as error:
            await self._fail(Failure("store_full", str(error)), Blame.SITE, self._receipt())
        except RunnerError as error:
            code = "host_lost" if error.code == RunnerError.code else error.code
            await self._fail(Failure(code, str(error)), Blame.SITE, self._receipt())
        except Exception as error:
            log.exception("attempt failed", extra={"job": self._held.job, "attempt": self._held.attempt})
            code = error.code if isinstance(error, EdifError) else "internal"
            await self._fail(Failure(code, f"The site failed: {error}"), Blame.SITE, self._receipt())

    async def _stop(self) -> None:
        """Free everything, wait until the runner is dead, and only then say so."""
        self._release()
        waits = [self._logs.abandon()]
        if self._runner is not None:
            waits.append(self._runner.gone())
        if self._upload is not None:
            waits.append(_ended(self._upload))
        await asyncio.gather(*waits, return_exceptions=True)
        key = self._held.key
        log.info("attempt stopped", extra={"job": key[0], "attempt": key[1]})
        await self._with.tell(AttemptStopped(key, self._receipt()))

    def _release(self) -> None:
        if self._upload is not None:
            self._upload.cancel()
        if self._keeping is not None:
            self._keeping.abandon()
        if self._runner is not None:
            self._runner.discard()
        self._spool.close()

    async def _run(self) -> None:
        held, lending = self._held, asyncio.create_task(self._with.models.lend(self._held.order.model.repo_id))
        try:
            payload = await self._with.cargo.payload(held.job, held.order.payload)
            self._runner = await lending
        except ChunkError as error:
            await self._with.tell(PayloadRefused(held.key, Failure("payload_mismatch", str(error))))
            return
        finally:
            self._give_back(lending)
        receipt = await self._compute_once_started(payload)
        if receipt is None:
            return
        log.info("attempt computed", extra={"job": held.job, "attempt": held.attempt, "bytes": receipt.result_bytes})
        await self._with.tell(AttemptComputed(held.key))
        assert self._upload is not None
        stored, _ = await asyncio.gather(self._upload, self._logs.close())
        receipt, direct = self._complete(receipt), await self._kept(stored)
        await self._with.tell(AttemptSucceeded(held.key, self._manifest(stored, receipt, direct), receipt))
        self._forms.committed(held.job, held.attempt)

    def _give_back(self, lending: asyncio.Task[Runner]) -> None:
        """A runner that was lent while the attempt was being stopped, or had no payload, is ours to end."""
        lending.cancel()
        if self._runner is None and lending.done() and not lending.cancelled() and lending.exception() is None:
            self._runner = lending.result()

    async def _compute_once_started(self, payload: bytes) -> Receipt | None:
        """As `_compute`, with another runner when a waiting one had died before it took the payload."""
        for _ in range(_IDLE_DEATHS):
            try:
                return await self._compute(payload, may_be_dead=True)
            except _NeverStartedError:
                log.warning("a waiting runner was dead", extra={"job": self._held.job})
                self._runner = await self._with.models.lend(self._held.order.model.repo_id)
        return await self._compute(payload, may_be_dead=False)

    async def _compute(self, payload: bytes, *, may_be_dead: bool) -> Receipt | None:
        """Run the payload; return the receipt when the whole archive is in the spool, None when it failed.

        Raises _NeverStartedError, with `may_be_dead`, when the runner was gone before it had the payload.
        """
        assert self._runner is not None
        key, started = self._held.key, False
        async with aclosing(self._runner.run(payload, self._options())) as happenings:  # type: ignore[type-var]
            async for event in happenings:
                match event:
                    case RunnerStarted():
                        started = True
                        await self._with.tell(AttemptStarted(key))
                    case RunnerLog(text):
                        self._logs.add(text)
                    case ResultChunk(data):
                        self._begin_upload()
                        await self._spool.put(data)
                    case ResultCut(element):
                        self._spool.cut(element)
                    case RunnerFailed("runner_crashed") if may_be_dead and not started:
                        raise _NeverStartedError
                    case RunnerFailed(code, text, receipt):
                        await self._logs.close()
                        await self._fail(Failure(code, text), blame_of(code), self._complete(receipt))
                        return None
                    case RunnerSucceeded(receipt):
                        self._spool.end()
                        return receipt
        return None

    def _chunk_forms(self) -> ChunkForms:
        """How this result's chunks travel, as the order wants it."""
        held, wanted = self._held, self._held.order.results
        choice = Choice(wanted.compression, self._with.link, wanted.link_bytes_per_s)
        if wanted.seal_to:
            return ChunkForms(choice, sealer=Sealer(wanted.seal_to, held.digest, held.attempt))
        # An attempt may have been for nothing because a lender was deleted meanwhile; the next one depends on nobody.
        if wanted.session and held.attempt == 1:
            sharing = Sharing(self._with.shared, held.owner, wanted.session, lambda: read_clocks().wall_ms)
            return ChunkForms(choice, sharing=sharing)
        return ChunkForms(choice)

    def _begin_upload(self) -> None:
        if self._upload is None:
            key, form = self._held.key, self._form()
            storing = self._with.cargo.store(key, self._spool, form=form, announce=self._part)
            self._upload = asyncio.create_task(storing, name=f"up {key[0]}")

    def _form(self) -> Form:
        if self._with.direct is None:
            return self._forms
        self._keeping = self._with.direct.store.open(*self._held.key, self._held.owner)
        return KeepingForm(self._forms, self._keeping)

    async def _kept(self, parts: ManifestParts) -> tuple[DirectEndpoint, ...]:
        """Return where the result is served from here, if it is."""
        if self._with.direct is None or self._keeping is None:
            return ()
        served = await asyncio.to_thread(self._keeping.finish, parts.index)
        return self._with.direct.endpoints if served else ()

    def _options(self) -> RunOptions:
        order, site = self._held.order, self._with.limits
        asked = order.limits
        return RunOptions(
            compressed=order.payload.compressed,
            env=dict(order.env),
            limits=Limits(
                wall_ms=min(asked.wall_ms, site.wall_ms),
                memory_bytes=min(asked.memory_bytes, site.memory_bytes),
                result_bytes=min(asked.result_bytes, site.result_bytes),
                log_bytes=min(asked.log_bytes, site.log_bytes),
                cpu_ms=min(asked.cpu_ms or site.cpu_ms, site.cpu_ms or asked.cpu_ms),
            ),
            max_payload_bytes=_most_payload(order),
            threads=self._with.threads,
            chunk_bytes=CHUNK_BYTES,
            wire_dtype=order.results.wire_dtype,
        )

    def _manifest(self, parts: ManifestParts, receipt: Receipt, direct: tuple[DirectEndpoint, ...]) -> str:
        held, now_ms = self._held, read_clocks().wall_ms
        manifest = build_manifest(
            held.order,
            held.digest,
            held.attempt,
            self._with.site,
            parts,
            receipt=receipt,
            now_ms=now_ms,
            direct=direct,
        )
        return seal(manifest, self._with.key)

    def _part(self, first: int, entries: Sequence[Entry]) -> bytes:
        """Say which chunks are durable, while the job still runs."""
        held = self._held
        part = ResultPart(
            order_digest=held.digest,
            job=held.job,
            attempt=held.attempt,
            site=self._with.site,
            first=first,
            entries=packed(Index(entries)),
            issued_at_ms=read_clocks().wall_ms,
            sealed_key=self._forms.sealed_key,
        )
        return seal(part, self._with.key).encode()

    def _receipt(self) -> Receipt | None:
        """What the attempt has used; None when no runner had its payload."""
        receipt = self._runner.receipt if self._runner is not None else None
        return self._complete(receipt) if receipt is not None else None

    def _complete(self, receipt: Receipt) -> Receipt:
        return replace(receipt, sandbox=self._with.sandbox, load_ms=self._held.load_ms)

    async def _fail(self, failure: Failure, blame: Blame, receipt: Receipt | None = None) -> None:
        await self._with.tell(AttemptFailed(self._held.key, failure, blame, receipt))


async def _ended(task: asyncio.Task[ManifestParts]) -> None:
    """Wait until a cancelled task has ended, however."""
    await asyncio.wait([task])


def _most_payload(order: Order) -> int:
    """The runner stops decompressing at what the researcher declared, never beyond 1 GiB."""
    declared = order.payload.uncompressed_bytes or order.payload.size_bytes
    return min(1 << 30, declared if order.payload.compressed else order.payload.size_bytes)
