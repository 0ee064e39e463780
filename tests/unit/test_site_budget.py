"""A site's memory is shared once: models and runners together never get more than the machine has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edif_mesh.config import ModelConfig, SiteConfig
from edif_mesh.domain.ids import FederationId, SiteId
from edif_mesh.domain.site import Device, ModelState
from edif_mesh.errors import ConfigError
from site_agent.hosting.spec import ModelSpec
from site_agent.shell.budget import share_gpus, share_memory, within
from site_agent.shell.catalogue import Entry, catalogue
from tests import models
from tests.builders_agent import an_offer

GB = 10**9


def a_config(**settings: Any) -> SiteConfig:
    name = Path("unused")
    return SiteConfig(FederationId("fed"), SiteId("ansbach"), name, name, name, (), **settings)


def entries(*sizes: int, pinned: int = 0) -> tuple[Entry, ...]:
    """Models of these sizes in GB, the first `pinned` of them pinned."""
    offers = [an_offer(f"m/{n}", size * GB, pinned=n < pinned) for n, size in enumerate(sizes)]
    return tuple(Entry(offer, ModelSpec(offer.repo_id), True) for offer in offers)


@pytest.mark.parametrize(
    ("settings", "sizes", "models_gb", "runners_gb"),
    [
        (
            {},
            (2, 2),
            5,
            11,
        ),  # 16 of the 20 free GB are shared out: the models what they need and more, runners the rest
        ({}, (7, 7), 8, 8),  # ... or half, when they need more
        ({}, (9, 9), 9, 7),  # ... and as much as the largest needs, as far as there is that much
        ({}, (18,), 16, 0),
        ({"models_bytes": 12 * GB}, (9, 9), 12, 4),
        ({"memory_bytes": 6 * GB}, (9, 9), 14, 6),
        ({"memory_bytes": 22 * GB}, (9, 9), 2, 22),
        ({"models_bytes": 12 * GB, "memory_bytes": 12 * GB}, (9,), 12, 12),
    ],
)
def test_what_the_settings_leave_open_is_a_share_of_what_is_free(
    settings: dict[str, int], sizes: tuple[int, ...], models_gb: int, runners_gb: int
) -> None:
    shares = share_memory(a_config(**settings), entries(*sizes), 20 * GB, 24 * GB)
    assert (shares.models_bytes, shares.runners_bytes) == (models_gb * GB, runners_gb * GB)


@pytest.mark.parametrize(
    ("settings", "pinned", "text"),
    [
        (
            {"models_bytes": 5 * GB},
            2,
            r"need 6.00 GB together \(m/0 3.00 GB \+ m/1 3.00 GB\), but models_bytes gives 5.00 GB",
        ),
        (
            {"models_bytes": 13 * GB, "memory_bytes": 12 * GB},
            0,
            r"13.00 GB \+ memory_bytes 12.00 GB .* this machine has 24.00 GB",
        ),
        ({"memory_bytes": 24 * GB}, 0, r"memory_bytes 24.00 GB leave no room: this machine has 24.00 GB"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_with_the_arithmetic(
    settings: dict[str, int], pinned: int, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        share_memory(a_config(**settings), entries(3, 3, pinned=pinned), 20 * GB, 24 * GB)


GPUS = (Device("cuda", "one", 80 * GB, 60 * GB), Device("cuda", "two", 80 * GB, 70 * GB))


@pytest.mark.parametrize(
    ("settings", "sizes", "models_gb", "runners_gb"),
    [
        ({}, (2, 2), 5, 16),  # a quarter more than they need; the machine's memory is the runners' alone
        ({}, (90, 90), 104, 16),  # 80 % of what the GPUs have free
        ({"models_bytes": 150 * GB, "memory_bytes": 20 * GB}, (90, 90), 150, 20),
    ],
)
def test_models_on_gpus_share_the_gpus_memory_not_the_machines(
    settings: dict[str, int], sizes: tuple[int, ...], models_gb: int, runners_gb: int
) -> None:
    shares = share_gpus(a_config(**settings), entries(*sizes), GPUS, 20 * GB, 24 * GB)
    assert (shares.models_bytes, shares.runners_bytes) == (models_gb * GB, runners_gb * GB)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"models_bytes": 161 * GB}, r"161.00 GB is more than the GPUs of this machine have: 160.00 GB"),
        ({"memory_bytes": 25 * GB}, r"memory_bytes 25.00 GB is more than this machine has: 24.00 GB"),
        ({"models_bytes": 2 * GB}, r"pinned models need 3.00 GB .* models_bytes gives 2.00 GB"),
    ],
)
def test_settings_that_gpus_cannot_keep_are_refused_with_the_arithmetic(settings: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        share_gpus(a_config(**settings), entries(3, 3, pinned=1), GPUS, 20 * GB, 24 * GB)


def test_a_model_beside_which_the_pinned_ones_leave_no_room_is_offered_as_failed() -> None:
    kept, fits, large = within(entries(2, 3, 4, pinned=1), 5 * GB, "ansbach")
    assert (kept.problem, fits.problem) == ("", "")
    assert large.offer.state is ModelState.FAILED
    assert not large.preload
    assert large.offer.detail == (
        "m/2 needs 4.00 GB; ansbach gives 5.00 GB to models, of which 2.00 GB stay with m/0 (pinned)."
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"quantization": "fp8"}, "fp8 needs a GPU"),
        ({"attn_implementation": "flash_attention_3"}, "pip install flash-attn-3"),
    ],
)
def test_a_setting_that_this_machine_cannot_follow_is_said_before_anything_is_loaded(
    settings: dict[str, Any], text: str
) -> None:
    config = replace(a_config(hf_cache=models.cache()), models=(ModelConfig(models.tiny_gpt2(), **settings),))
    (entry,) = catalogue(config)
    assert entry.offer.state is ModelState.FAILED
    assert text in entry.problem
