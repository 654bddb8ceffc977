"""Memory that is freed stays with the process."""

import subprocess
import sys

import pytest

RESIDENT = """
import sys
import psutil
import torch
from ordinalclip.memory import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
before = psutil.Process().memory_info().rss
torch.ones(50_000_000 // 4)  # 50 MB, as a layer of an encoder gives for a batch
print(kept, psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have other C libraries")
def test_freed_memory_stays_with_the_process():
    def resident(how):
        done = subprocess.run([sys.executable, "-c", RESIDENT, how], capture_output=True, text=True, check=True)
        kept, size = done.stdout.split()
        assert kept == str(how == "kept")
        return int(size)

    assert resident("given back") < 5e6  # bytes of 50e6
    assert resident("kept") > 45e6
