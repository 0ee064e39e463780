"""The researcher's way into the mesh: submit, find, list. One `Mesh` holds one connection and may serve many jobs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from edif_mesh.client.job import Job, now_ms, refused_by
from edif_mesh.client.outbox import Outbox
from edif_mesh.config import ClientConfig, home, load_config, read_password
from edif_mesh.domain.ids import Digest, JobId, is_job_id, job_id
from edif_mesh.domain.job import JobClass, Limits
from edif_mesh.domain.site import ModelRef, Versions
from edif_mesh.errors import (
    ConfigError,
    EdifError,
    NoReplyError,
    NotConnectedError,
    NotFoundError,
    TransportError,
    WrongRoleError,
)
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.results.chunks import ChunkCache
from edif_mesh.results.paths import Paths
from edif_mesh.results.payloads import put_payload
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.nats_bus import Connection, connect
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import Opened, envelope_digest, kind_of, open_envelope, seal
from edif_mesh.wire.messages import (
    COMPRESSIONS,
    WIRE_DTYPES,
    AskJobs,
    AskMesh,
    Audience,
    JobList,
    JobSnapshot,
    MeshView,
    Message,
    Order,
    PayloadRef,
    Refusal,
    ResultOptions,
    Role,
)

if TYPE_CHECKING:
    from edif_mesh.client.backend import MeshBackend

log = logging.getLogger(__name__)
M = TypeVar("M")

DEFAULT_VALID_MS = 24 * 3_600_000
_ASK_TIMEOUT_MS = 3_000
_APPEND_TIMEOUT_MS = 30_000


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What to run, besides the payload's bytes."""

    model: ModelRef
    compressed: bool = False
    uncompressed_bytes: int = 0
    env: dict[str, str | None] | None = None
    client: Versions = Versions()
    limits: Limits | None = None
    """None: the `[limits]` of the client's settings."""
    audience: Audience = Audience()
    name: str = ""
    job_class: JobClass = JobClass.INTERACTIVE
    max_attempts: int = 8
    valid_ms: int = DEFAULT_VALID_MS
    sandbox: str = ""
    """The least sandbox profile; empty: what the client's settings demand."""
    compression: str | None = None
    """`auto`, `off`, `fast`, `best`; None, as for the next two: what the client's settings say."""
    wire_dtype: str | None = None
    """`float16`, `bfloat16`, `int8`: floating tensors travel in it and come back in their own dtype, rounded."""
    sealed: bool | None = None
    """Only this key can open the result."""


class Mesh:
    """An open way into the mesh: `async with await Mesh.connect() as mesh`. All methods belong to one event loop."""

    def __init__(self, config: ClientConfig, key: PrivateKey, trust: TrustStore, connection: Connection) -> None:
        self.config, self.key, self.trust = config, key, trust
        self.bus, self.streams = connection.bus, connection.streams
        self.bulk = NatsBulk.beside(connection)
        self.outbox = Outbox(config.outbox_dir)
        self.paths = Paths(self.bulk, lambda asked: seal(asked, key), direct=config.results.direct)
        self._connection = connection
        self._tasks: set[asyncio.Task[Any]] = set()
        self._handles: weakref.WeakSet[Job] = weakref.WeakSet()
        self._settling: set[JobId] = set()
        self.link_losses = 0
        self.session = secrets.token_hex(8)
        """Jobs of one session share what is the same in their results."""
        self.chunks = ChunkCache()
        self.link_bytes_per_s = 0.0
        """What our last large downloads came at; 0: not known."""
        self.bus.on_link(self._link_changed)

    @classmethod
    async def connect(cls, config: ClientConfig | Path | None = None, *, name: str = "client") -> Mesh:
        """Connect with `config` (default: `client.toml` in `$EDIF_HOME`). Raises ConfigError, NotConnectedError."""
        if not isinstance(config, ClientConfig):
            config = load_config(ClientConfig, config or home() / "client.toml")
        key, trust = PrivateKey.load(config.key_file), TrustStore.load(config.trust_file)
        connection = await connect(
            config.broker.url,
            name=f"{name}:{key.id[:8]}",
            user=config.broker.user,
            password=read_password(config.broker),
        )
        mesh = cls(config, key, trust, connection)
        await mesh.bulk.lane()
        return mesh

    @property
    def cache_dir(self) -> Path:
        """The folder of what was fetched in part, and may go on."""
        return self.config.outbox_dir.parent / "cache"

    async def __aenter__(self) -> Mesh:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; jobs go on without us."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(handle.close() for handle in list(self._handles)), return_exceptions=True)
        await self.bulk.close()
        await self._connection.close()

    # ------------------------------------------------------------------------------------------------------- jobs

    async def submit(self, payload: bytes, spec: JobSpec, *, follow: bool = True) -> Job:
        """Sign an order for `payload` and hand it to the mesh; returns once the broker keeps both durably.

        With `follow` the result's chunks are taken as soon as they are stored. The order waits in the outbox until the
        coordinator has recorded it; `Job.watch` tells when. Raises StoreFullError, TransportError (the order is then
        still in the outbox and `flush_outbox` sends it).
        """
        job = await self.prepare(payload, spec, follow=follow)
        try:
            await self.send(job)
        except BaseException:
            await job.close()
            raise
        return job

    async def prepare(
        self, payload: bytes, spec: JobSpec, *, follow: bool = True, on_line: Callable[[str], object] | None = None
    ) -> Job:
        """Sign an order, keep it in the outbox and listen for its news; only the payload leaves already. See `send`.

        `on_line` is called for every line that the job prints. Raises StoreFullError when this machine's disk is full.
        """
        now = now_ms()
        job = job_id(now, secrets.randbits(48))
        order = Order(
            federation=self.config.federation,
            job=job,
            nonce=secrets.token_hex(8),
            issued_at_ms=now,
            not_before_ms=now,
            expires_at_ms=now + spec.valid_ms,
            payload=PayloadRef(
                Digest(hashlib.sha256(payload).hexdigest()),
                len(payload),
                compressed=spec.compressed,
                uncompressed_bytes=spec.uncompressed_bytes,
            ),
            model=spec.model,
            client=spec.client,
            env=spec.env or {},
            audience=spec.audience,
            max_attempts=spec.max_attempts,
            limits=spec.limits or self.config.limits,
            job_class=spec.job_class,
            name=spec.name,
            sandbox=spec.sandbox or self.config.sandbox,
            results=self._result_options(job, spec),
        )
        envelope = seal(order, self.key)
        handle = self._handle(job, envelope)
        handle.storing = asyncio.ensure_future(put_payload(self.streams, job, payload))
        keeping = asyncio.to_thread(self.outbox.keep, job, envelope, payload)
        listening = [handle.start_watching()]
        listening += [handle.follow_result()] if follow else []
        listening += [_started(handle, on_line)] if on_line is not None else []
        try:
            await asyncio.gather(keeping, *listening)
        except BaseException:
            await handle.close()
            raise
        return handle

    def _result_options(self, job: JobId, spec: JobSpec) -> ResultOptions:
        """Return what an order says of its result; raises ConfigError for what there is not."""
        wanted = self.config.results
        options = ResultOptions(
            wire_dtype=wanted.wire_dtype if spec.wire_dtype is None else spec.wire_dtype,
            compression=spec.compression or wanted.compression,
            link_bytes_per_s=int(self.link_bytes_per_s),
            session=self.session,
        )
        if options.compression not in COMPRESSIONS:
            raise ConfigError(f"compression={options.compression!r}: choose one of {', '.join(COMPRESSIONS)}.")
        if options.wire_dtype not in WIRE_DTYPES:
            raise ConfigError(
                f"wire_dtype={options.wire_dtype!r}: choose one of {', '.join(filter(None, WIRE_DTYPES))}."
            )
        if wanted.sealed if spec.sealed is None else spec.sealed:
            public = self.key.sealing_key(job).public_key().public_bytes_raw()
            return replace(options, seal_to=public.hex(), session="")
        return options

    async def send(self, job: Job) -> None:
        """Hand a prepared order and its payload to the broker, durably; once. Raises StoreFullError, TransportError."""
        envelope = self.outbox.order(job.id)
        if envelope is None or job.storing is None:
            raise NotFoundError(f"There is no order of {job.id} that waits to be sent.")
        storing, job.storing = job.storing, None
        await self._send_order(job.id, envelope, storing)

    def job(self, job: str) -> Job:
        """Return the handle of a job that was submitted earlier, here or elsewhere; raises NotFoundError for a bad id."""
        if not is_job_id(job):
            raise NotFoundError(f"{job[:60]!r} is no job id; it looks like j0192f3c4d5e6a1b2c3d4e5f.")
        return self._handle(JobId(job), self.outbox.order(JobId(job)))

    def _handle(self, job: JobId, envelope: str | None) -> Job:
        """Return a handle that is closed with us."""
        handle = Job(self, job, envelope_digest(envelope) if envelope else None)
        self._handles.add(handle)
        return handle

    async def jobs(self, limit: int = 50) -> tuple[JobSnapshot, ...]:
        """Return this key's jobs, newest first."""
        return (await self.ask(AskJobs(now_ms(), limit), JobList)).jobs

    async def view(self) -> MeshView:
        """Return all sites and models."""
        return await self.ask(AskMesh(now_ms()), MeshView)

    async def flush_outbox(self) -> list[JobId]:
        """Send again what a crash left unrecorded, and see to it until it is recorded or refused; returns those jobs."""
        waiting = self.outbox.unrecorded()
        for job in waiting:
            self.settle(job)
        return waiting

    def settle(self, job: JobId) -> None:
        """Follow a job beside us until the coordinator has recorded or refused it."""
        if job not in self._settling:
            self._settling.add(job)
            self.spawn(self._settle(job)).add_done_callback(lambda _: self._settling.discard(job))

    async def _settle(self, job: JobId) -> None:
        with contextlib.suppress(EdifError):
            async for _ in self.job(job).watch():
                return

    async def resend(self, job: JobId) -> bool:
        """Publish a kept order again; returns whether there was one. Harmless when it had arrived."""
        envelope, payload = await asyncio.to_thread(lambda: (self.outbox.order(job), self.outbox.payload(job)))
        if envelope is None or payload is None:
            return False
        await self._send_order(job, envelope, put_payload(self.streams, job, payload), again=True)
        return True

    def backend(self, model: Any, **options: Any) -> MeshBackend:
        """Return an nnsight backend: `with model.trace(prompt, backend=mesh.backend(model)) as tracer: ...`."""
        from edif_mesh.client.backend import MeshBackend

        return MeshBackend(self, model, **options)

    # ------------------------------------------------------------------------------------------------------ messages

    async def ask(self, question: Message, expected: type[M]) -> M:
        """Ask the leading coordinator and return its verified answer.

        Raises RefusedError with the coordinator's sentence, NoReplyError when none leads at present.
        """
        try:
            raw = await self.bus.request(subjects.ask(), seal(question, self.key).encode(), timeout_ms=_ASK_TIMEOUT_MS)
        except NoReplyError as error:
            raise NoReplyError(
                "No coordinator answers at present. It may be restarting; your jobs are kept."
            ) from error
        if kind_of(raw) == "refusal":
            raise refused_by(self.open_refusal(raw).failure)
        return self.open(raw, expected).message

    def open(self, raw: bytes | str, expected: type[M]) -> Opened[M]:
        """Verify an envelope against our own trust store."""
        try:
            self.trust.refresh()
        except ConfigError as error:  # what was read before still holds
            log.warning("trust store not read", extra={"error": str(error)})
        return open_envelope(raw, expected, self.trust, now_ms())

    def open_refusal(self, raw: bytes | str) -> Refusal:
        """Return a refusal of the coordinator; a site may sign refusals too, but none that ends a researcher's job."""
        opened = self.open(raw, Refusal)
        if opened.identity.role is not Role.COORDINATOR:
            raise WrongRoleError(f"{opened.identity.name} may not refuse an order in the coordinator's place.")
        return opened.message

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run something beside us until `close`."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _link_changed(self, connected: bool) -> None:
        if not connected:
            self.link_losses += 1

    async def _send_order(self, job: JobId, envelope: str, storing: Awaitable[None], *, again: bool = False) -> None:
        try:
            await storing
            # A repeated order has another message id: the broker may have dropped the first one's effect long ago.
            message_id = f"{job}-{secrets.token_hex(4)}" if again else str(job)
            await self.streams.append(
                subjects.order(self.key.id), envelope.encode(), message_id=message_id, timeout_ms=_APPEND_TIMEOUT_MS
            )
        except NotConnectedError as error:
            raise TransportError(
                f"The broker is not reachable; the job {job} waits in the outbox. ({error})"
            ) from error


async def _started(job: Job, on_line: Callable[[str], object]) -> None:
    await job.listen(on_line, before_it_runs=True)


__all__ = ["EdifError", "JobSpec", "Mesh", "now_ms"]
