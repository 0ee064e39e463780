"""The fork server of a model whose weights lie in shared memory (on a GPU): forks runners ahead that map them.

Three roles, because no process may fork once it has started CUDA. This one has Python, torch, nnsight and the model's structure
without weights; it never starts CUDA, and reads no byte of a job. The weights owner (`owner`) is its first child. Each runner
confines itself, all but its system calls, maps the weights, warms up, gives up the rest, and waits for its one job: threads
that CUDA starts are then confined like the first one. To the agent it is a host like any other (`host`, `lender`).
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from dataclasses import asdict, replace
from typing import Any

from edif_mesh.errors import ModelLoadError, SandboxError
from site_agent.hosting import owner
from site_agent.hosting.cuda_driver import load_library
from site_agent.hosting.host import MAX_CONTROL_BYTES, capture_warm_up, load, say, sentence, serve_forks, settle
from site_agent.hosting.manifest import Manifest, bind
from site_agent.hosting.segments import Handle, block_storages
from site_agent.hosting.spec import HostFacts, ModelSpec
from site_agent.hosting.stores import CUDA, CUDA_IPC, CUDA_VMM, Stores
from site_agent.runner.child import address_space_bytes, execute, forget_warm_up, serve
from site_agent.runner.confine import settings_for
from site_agent.runner.devices import cuda_has_started, for_cuda, shown
from site_agent.runner.namespaces import Enclosure


def main(control: socket.socket, enclosure: Enclosure) -> None:
    """Start the owner, build the model's structure, then serve forks until either socket closes."""
    order = json.loads(control.recv(MAX_CONTROL_BYTES))
    spec = ModelSpec(**order["spec"])
    say(control, {"progress": "importing torch and nnsight"})
    importlib.import_module("nnsight.modeling.transformers")  # once for all three roles; importing does not start CUDA
    link = _start_owner(control, spec)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    on_cuda = spec.sharing in (CUDA, CUDA_VMM, CUDA_IPC)
    try:
        settings = settings_for(tuple(order["readable"]), namespaces=enclosure.active)
        if on_cuda:
            settings = for_cuda(settings)
            load_library()  # its folder may not be among those that runners read; loading it starts nothing
        model, _ = load(spec, None, device="meta")
        payload = capture_warm_up(model)
        _wake_libraries()
        facts, weights = _await_owner(control, link)
    except Exception as error:
        say(control, {"error": sentence(spec, error)})
        return
    settle()
    size = address_space_bytes() + sum(handle.size_bytes for handle in weights.handles)
    try:
        enclosure.close_off(shown(settings), settings.devices)
        if on_cuda and cuda_has_started(proc):
            raise SandboxError("Something has started CUDA in the fork server, whose runners could then not use it.")
    except SandboxError as error:
        say(control, {"error": str(error)})
        return
    say(control, {"facts": asdict(replace(facts, sandbox=enclosure.profile, pid=os.getpid()))})

    def start(sock: socket.socket, host: int, number: int) -> None:
        serve(
            sock, model, payload, settings, host, number=number, address_space=0 if on_cuda else size, proc=proc,
            prepare=lambda: weights.map_into(model, payload), borrowed=weights.borrowed, limited=not on_cuda,
        )  # fmt: skip

    serve_forks(control, enclosure, start, link=link)


class Weights:
    """What the owner has shared, as the fork server holds it and each runner maps it."""

    def __init__(
        self, manifest: Manifest, handles: list[Handle], descriptors: list[int], sharing: str,
        device_map: dict[str, int | str] | None,
    ) -> None:  # fmt: skip
        self.manifest, self.handles, self._descriptors, self._sharing = manifest, handles, descriptors, sharing
        self._device_map = device_map

    @property
    def borrowed(self) -> tuple[int, ...]:
        """The descriptors that a runner needs until it has mapped."""
        return tuple(descriptor for descriptor in self._descriptors if descriptor >= 0)

    def map_into(self, model: Any, payload: bytes | None) -> None:
        """In a runner: map, give `model` its tensors, run the warm-up. Raises ModelLoadError."""
        try:
            stores = Stores(self._sharing)
            mapped = [
                stores.attach(handle, descriptor)
                for handle, descriptor in zip(self.handles, self._descriptors, strict=True)
            ]
            bind(model._module, self.manifest, block_storages(self.manifest, mapped))
            spread(model, self._device_map)
        except Exception as error:
            raise ModelLoadError(f"A runner could not map the weights: {type(error).__name__}: {error}") from error
        if payload is not None:
            self._warm_up(model, payload)

    def _warm_up(self, model: Any, payload: bytes) -> None:
        try:
            execute(payload, model)
        except Exception as error:
            if self._sharing in (CUDA_VMM, CUDA_IPC) and "CU" in str(
                error
            ):  # CUDA, cuBLAS, cuDNN: no job would fare better
                raise ModelLoadError(
                    f"A confined runner cannot use its GPU: {type(error).__name__}: {error}"
                ) from error
            # Else as in a host that forks: there are models that our own small trace does not suit.
        forget_warm_up()


def spread(model: Any, device_map: dict[str, int | str] | None) -> None:
    """Have `model`, whose tensors have just got their memory, run where they lie: over several devices as the owner's does."""
    module = model._module
    if device_map is not None and len(set(map(str, device_map.values()))) > 1:
        pass_activations_on(model, device_map)
    first = next(module.parameters(), None)
    if model.pipeline is not None and first is not None:
        model.pipeline.device = first.device


def pass_activations_on(model: Any, device_map: dict[str, int | str]) -> None:
    """Add to `model` what moves activations from device to device, as a load with this map does. Its tensors stay where they are."""
    from accelerate import dispatch_model

    module = model._module
    skipped = getattr(module, "_skip_keys_device_placement", None)  # caches are spread themselves
    dispatch_model(module, device_map=device_map, skip_keys=skipped, force_hooks=True)
    model._update(module)  # nnsight's own place is around what was added


def _wake_libraries() -> None:
    """Have the CPU's numeric libraries look at the processor now: a runner may not read /sys, and they then round otherwise."""
    import torch

    square = torch.ones(1, 1, 64, 64)
    torch.nn.functional.scaled_dot_product_attention(square, square, square) @ square


def _start_owner(control: socket.socket, spec: ModelSpec) -> socket.socket:
    """Fork it now, while this process has one thread and has started nothing; return the link to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            control.close()
            ours.close()
            owner.main(theirs, spec)
        finally:
            os._exit(0)
    theirs.close()
    return ours


def _await_owner(control: socket.socket, link: socket.socket) -> tuple[HostFacts, Weights]:
    """Pass its progress on until it has shared the weights. Raises ModelLoadError with its own sentence."""
    while True:
        raw, descriptors, _, _ = socket.recv_fds(link, MAX_CONTROL_BYTES, 64, socket.MSG_CMSG_CLOEXEC)
        if not raw:
            raise ModelLoadError("the process that loads the weights died; not enough memory is the usual reason")
        message = json.loads(raw)
        if "facts" in message:
            facts = HostFacts(**message["facts"])
            manifest, sorted_descriptors = owner.received(link, message, list(descriptors))
            handles = [Handle(**item) for item in message["handles"]]
            return facts, Weights(manifest, handles, sorted_descriptors, facts.sharing, message["device_map"])
        if "error" in message:
            raise SandboxError(str(message["error"]))  # its sentence stands as it is
        say(control, message)
