"""Questions to the mesh."""

from __future__ import annotations

from typing import Any

import nnsight
from nnsight import CONFIG

from tests.contract.constructs.construct import PROMPT, Values, construct


@construct(
    "which models there are, and whether one runs",
    "remote/status-and-availability",
    'state = nnsight.ndif_status()[model.repo_id]["state"]',
)
def status(model: Any, remote: Any) -> Values:
    if not remote:
        return {"state": "RUNNING"}
    state = nnsight.ndif_status()[model.repo_id]["state"]
    return {"state": str(getattr(state, "value", state))}


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
