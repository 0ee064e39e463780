"""Which device a model goes to, and what of a device's memory is a job's."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_mesh.config import ModelConfig, SiteConfig, load_config
from edif_mesh.domain.attempt import Blame
from edif_mesh.errors import ConfigError
from site_agent import hardware
from site_agent.core.blame import blame_of
from site_agent.runner.device_usage import DeviceMeter
from site_agent.runner.devices import cuda_has_started, fault_note
from site_agent.shell.catalogue import catalogue, place
from tests import models

SITE = 'federation = "f"\nsite = "s"\nkey_file = "k"\ntrust_file = "t"\nstate_dir = "."\n'


@pytest.mark.parametrize(
    ("site", "model", "gpus", "expected"),
    [
        ("auto", None, 0, "cpu"),
        ("auto", None, 2, "cuda:0"),
        ("cpu", None, 2, "cpu"),
        ("cuda", None, 2, "cuda:0"),
        ("cuda:1", None, 2, "cuda:1"),
        ("cuda:1", "cpu", 2, "cpu"),
        ("cpu", "cuda:1", 2, "cuda:1"),
        ("cuda", "auto", 0, "cpu"),
    ],
)
def test_a_models_own_device_goes_before_the_sites(site: str, model: str | None, gpus: int, expected: str) -> None:
    assert place(ModelConfig("a/b", device=model), site, gpus) == (expected, "")


@pytest.mark.parametrize(
    ("wanted", "gpus", "words"), [("cuda", 0, "there is no GPU"), ("cuda:2", 2, "there are 2 of them")]
)
def test_a_device_that_is_not_there_is_said_before_anything_is_loaded(wanted: str, gpus: int, words: str) -> None:
    _, problem = place(ModelConfig("a/b", device=wanted), "auto", gpus)
    assert words in problem
    assert "edif-site check" in problem


def the_site(tmp_path: Path, text: str) -> SiteConfig:
    file = tmp_path / "site.toml"
    file.write_text(SITE + text)
    return load_config(SiteConfig, file)


def test_the_catalogue_offers_and_loads_a_model_where_the_settings_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f'[[models]]\nrepo_id = "{models.tiny_gpt2()}"\n'
    text = f'hf_cache = "{models.cache()}"\n{model}{model}device_map = "auto"\n{model}device = "cpu"\ndevice_map = "auto"\n'
    text += f'{model}[models.device_map]\n"transformer" = 0\n"lm_head" = "cuda:1"\n'
    monkeypatch.setattr(hardware, "cuda_devices", lambda: 2)
    one, spread, on_cpu, by_hand = catalogue(the_site(tmp_path, text))
    assert (one.offer.device, one.spec.device, one.spec.device_map, one.spec.sharing) == (
        "cuda:0",
        "cuda:0",
        None,
        "cuda",
    )
    assert (spread.offer.device, spread.spec.device_map, spread.spec.sharing) == ("auto", "auto", "cuda")
    assert (on_cpu.offer.device, on_cpu.spec.device_map, on_cpu.spec.sharing) == ("cpu", None, "")
    assert (by_hand.offer.device, by_hand.spec.device_map) == ("cuda:0,cuda:1", {"transformer": 0, "lm_head": "cuda:1"})
    monkeypatch.setattr(hardware, "cuda_devices", lambda: 0)
    assert {entry.offer.device for entry in catalogue(the_site(tmp_path, text))} == {"cpu"}


def test_a_device_that_nobody_has_is_refused_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device"):
        the_site(tmp_path, 'device = "tpu"\nmodels = []\n')


def test_a_jobs_device_memory_is_what_came_after_it_began() -> None:
    counts = iter([500, 700, 2_500, None, 900])
    meter = DeviceMeter(7, lambda pid: next(counts) if pid == 7 else 0)
    meter.start()
    for expected in (200, 2_000, 2_000, 400):
        meter.read()
        assert meter.memory_bytes == expected
    assert meter.peak_bytes == 2_000


def test_a_job_that_runs_while_weights_change_may_do_so_once_more_and_is_then_quarantined() -> None:
    assert blame_of("weights_changed") is Blame.RUNNER


def test_a_driver_that_says_nothing_counts_nothing() -> None:
    meter = DeviceMeter(7, lambda pid: None)
    meter.start()
    meter.read()
    assert (meter.memory_bytes, meter.peak_bytes) == (0, 0)
    assert hardware.GpuProcesses()(1) in (None, 0)


def test_only_a_refused_access_gets_the_note_about_weights() -> None:
    assert "read-only" in fault_note(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert fault_note(RuntimeError("CUDA error: device-side assert triggered")) == ""
    assert fault_note(ValueError("illegal memory access")) == ""


def test_a_process_without_cuda_has_not_started_it() -> None:
    import os

    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    try:
        assert cuda_has_started(proc) is False
    finally:
        os.close(proc)
