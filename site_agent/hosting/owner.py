"""The weights owner: loads one model, moves its weights into memory that runners map, and checks that memory after each job.

Forked by the fork server (`zygote`) before anything is loaded, so that it alone starts CUDA. It reads no byte of a job and shares
no process with one; its words on the link are trusted. It ends with the fork server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from site_agent.hosting.checksum import Difference, WeightsChecksum
from site_agent.hosting.digest import weights_digest
from site_agent.hosting.host import MAX_CONTROL_BYTES, load, say, sentence
from site_agent.hosting.manifest import Manifest, bind, block_bytes, describe
from site_agent.hosting.segments import Mapped, block_storages, storage_at, words_of
from site_agent.hosting.spec import ModelSpec
from site_agent.hosting.stores import Stores, choose_sharing
from site_agent.runner.process import die_with_parent, harden_parent

log = logging.getLogger(__name__)

DIGEST, CHECK = b"digest", b"check"
"""What the fork server passes on: the weights' digest (SHA-256, slow), the weights check (after every job)."""
_DESCRIPTORS_A_MESSAGE = 64
_NAMED = 3


def main(link: socket.socket, spec: ModelSpec) -> None:
    """Load, share, then answer until the link closes."""
    die_with_parent()
    try:
        model, facts = load(spec, link)
        sharing = choose_sharing(spec, facts.device.split(","))
        say(link, {"progress": "sharing the weights"})
        shared = SharedWeights(model, sharing)
    except Exception as error:
        say(link, {"error": sentence(spec, error)})
        return
    harden_parent()
    _hand_over(link, shared, asdict(replace(facts, sharing=sharing)), getattr(model._module, "hf_device_map", None))
    while request := link.recv(MAX_CONTROL_BYTES):
        if request == CHECK:
            say(link, shared.check())
        elif request == DIGEST:
            say(link, _digest(model))


class SharedWeights:
    """The weights of one loaded model in shared memory, and what they were when they were put there."""

    def __init__(self, model: Any, sharing: str) -> None:
        """Move them there: storage by storage, so that no more than one segment is held twice. Raises ModelLoadError."""
        module = model._module
        stores = Stores(sharing)
        self.manifest, taken = describe(module)
        created: dict[int, Mapped] = {}
        for number, block in enumerate(self.manifest.blocks):
            if block.segment not in created:
                _empty_caches()
                created[block.segment] = stores.create(self.manifest.segments[block.segment])
            target = _bytes_at(created[block.segment], block.offset, block.size_bytes)
            target.copy_(block_bytes(taken[number], block.size_bytes))
            del target
            for item in taken[number]:
                item.tensor.data = item.tensor.data.new_empty(0)
        del created
        _empty_caches()
        self.published = stores.publish()
        self._mapped = [stores.attach(handle, descriptor) for handle, descriptor in self.published]
        bind(module, self.manifest, block_storages(self.manifest, self._mapped))
        self._checksum = WeightsChecksum()
        self._at_load = self._read()

    def check(self) -> dict[str, Any]:
        """Return the verdict for the agent: `changed` is empty when every word is what it was at load."""
        try:
            found = self._checksum.first_difference(self._at_load, self._read())
        except Exception as error:  # a device that has failed says nothing good of what is on it
            return {"checked": True, "changed": f"they could not be read: {type(error).__name__}: {error}"[:500]}
        return {"checked": True, "changed": self._where(found) if found is not None else ""}

    def _read(self) -> list[list[int]]:
        return [self._checksum.of(words_of(mapped)) for mapped in self._mapped]

    def _where(self, found: Difference) -> str:
        names = self.manifest.names_at(found.segment, found.start, found.end)
        more = f" or {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"in {', '.join(names[:_NAMED])}{more}" if names else "between two tensors"


def received(link: socket.socket, message: dict[str, Any], first: list[int]) -> tuple[Manifest, list[int]]:
    """The fork server's end of the hand-over: return the manifest and one descriptor (or -1) for each segment."""
    descriptors = list(first)
    while len(descriptors) < int(message["descriptors"]):
        _, more, _, _ = socket.recv_fds(link, 64, _DESCRIPTORS_A_MESSAGE, socket.MSG_CMSG_CLOEXEC)
        if not more:
            raise OSError("the descriptors of the weights did not arrive: this process has reached its limit of them")
        descriptors += more
    with open(descriptors[0], "rb") as file:
        manifest = Manifest.from_json(file.read())
    rest: Iterator[int] = iter(descriptors[1:])
    return manifest, [next(rest) if has else -1 for has in message["has_descriptor"]]


def _hand_over(
    link: socket.socket, shared: SharedWeights, facts: dict[str, Any], device_map: dict[str, Any] | None
) -> None:
    page = os.memfd_create("edif-manifest", os.MFD_CLOEXEC)
    with open(page, "wb", closefd=False) as file:
        file.write(shared.manifest.to_json())
    os.lseek(page, 0, os.SEEK_SET)
    own = [descriptor for _, descriptor in shared.published if descriptor >= 0]
    descriptors = [page, *own]
    message = {
        "facts": facts,
        "device_map": device_map and {name: _plain(device) for name, device in device_map.items()},
        "handles": [asdict(handle) for handle, _ in shared.published],
        "has_descriptor": [descriptor >= 0 for _, descriptor in shared.published],
        "descriptors": len(descriptors),
    }
    raw = json.dumps(message).encode()
    for start in range(0, len(descriptors), _DESCRIPTORS_A_MESSAGE):
        socket.send_fds(link, [raw if start == 0 else b"more"], descriptors[start : start + _DESCRIPTORS_A_MESSAGE])
    os.close(page)


def _plain(device: Any) -> int | str:
    return device if isinstance(device, int) else str(device)


def _digest(model: Any) -> dict[str, Any]:
    try:
        return {"digest": weights_digest(model)}
    except Exception as error:
        return {"digest": "", "why": f"{type(error).__name__}: {error}"[:500]}


def _bytes_at(mapped: Mapped, offset: int, size: int) -> Any:
    import torch

    return torch.empty(0, dtype=torch.uint8, device=mapped.device).set_(
        storage_at(mapped, offset, size), 0, (size,), (1,)
    )


def _empty_caches() -> None:
    """Give back to the devices what torch keeps of freed weights: the next segment needs that room."""
    import torch

    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
