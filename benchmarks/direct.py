"""How fast a finished result comes straight from a site: its real endpoint process, and a client to verified bytes.

Run from the repository: `python -m benchmarks.direct [--sizes 300 2000] [--runs 5] [--links 1 2]`. Prints medians in MB/s
(1 MB = 10^6 bytes) with raw loopback TCP in the same run. The clock runs from the first request to the last chunk that was
checked against its SHA-256 and placed in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.transfer import loop_run, raw_tcp, show
from edif_mesh.domain.ids import JobId
from edif_mesh.results.direct_source import DirectSource
from edif_mesh.results.index import Entry, Index
from edif_mesh.results.manifest import ManifestParts
from edif_mesh.results.transfer import AsIs
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import BufferSink
from edif_mesh.transport.memory import MemoryBroker
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import FetchResult
from tests.builders_transfer import a_manifest
from tests.direct_rig import ONE, SITE, DirectSite, now_ms
from site_agent.direct.store import KeepingForm
