"""Questions to the mesh."""

from __future__ import annotations

from typing import Any

import nnsight
from nnsight import CONFIG

from tests.contract.constructs.construct import PROMPT, Values, construct


@construct(
    "which models there are, and whether one runs",
    "remote/status-and-availability",
    'state = nnsight.status()[model.repo_id]["state"]',
)
def status(model: Any, remote: Any) -> Values:
    if not remote:
        return {"state": "RUNNING"}
    state = nnsight.status()[model.repo_id]["state"]
    return {"state": str(getattr(state, "value", state))}


@construct(
    "the service as a whole, and each model's entry",
    "remote/status-and-availability",
    's = nnsight.status()\nnnsight.status(raw=True)["deployments"]',
)
def status_entries(model: Any, remote: Any) -> Values:
    if not remote:
        return {"up": "UP", "entry": ("text-generation", "main", "HOT", 1), "listed": True}
    s = nnsight.status()
    info = s[model.repo_id]
    listed = [one["repo_id"] for one in nnsight.status(raw=True)["deployments"].values()]
    return {
        "up": s.status.value,
        "entry": (info["task"], info["revision"], info["level"], info["hot_replicas"]),
        "listed": sorted(listed) == sorted(s.keys()) and "RUNNING" in str(s),
    }


@construct("status under its older name", "reference/migrating-to-0.8", "nnsight.ndif_status()[model.repo_id]")
def older_status(model: Any, remote: Any) -> Values:
    return {"task": nnsight.ndif_status()[model.repo_id]["task"] if remote else "text-generation"}


@construct(
    "where your versions and the site's differ",
    "remote/env-comparison",
    "compared = nnsight.compare()\ncompared.critical_mismatches",
)
def compared_fields(model: Any, remote: Any) -> Values:
    if not remote:
        return {"python": True, "critical": {}, "torch": True}
    compared = nnsight.compare()
    return {
        "python": compared.python_matches,
        "critical": compared.critical_mismatches,
        "torch": compared.packages["torch"]["match"],
    }


@construct(
    "your versions beside the site's",
    "remote/env-comparison",
    'packages = nnsight.ndif.get_remote_env(force_refresh=True)["packages"]\nnnsight.compare()',
)
def versions(model: Any, remote: Any) -> Values:
    packages = nnsight.ndif.get_local_env()["packages"]
    if remote:
        packages = nnsight.ndif.get_remote_env(force_refresh=True)["packages"]
        nnsight.compare()
    return {"nnsight": packages["nnsight"], "transformers": packages["transformers"]}


@construct(
    "who you are to the mesh",
    "remote/api-key-and-config",
    "nnsight.whoami()",
    note="the gateway signs with your key; an API key is not needed",
)
def identity(model: Any, remote: Any) -> Values:
    return {"known": "@" in nnsight.whoami()["email"] if remote else True}


@construct("an API key", "remote/api-key-and-config", 'CONFIG.API.APIKEY = "mine"', note="accepted and not needed")
def api_key(model: Any, remote: Any) -> Values:
    before = CONFIG.API.APIKEY
    CONFIG.API.APIKEY = "mine"
    try:
        with model.trace(PROMPT, remote=remote):
            logits = model.lm_head.output.save()
    finally:
        CONFIG.API.APIKEY = before
    return {"logits": logits}
