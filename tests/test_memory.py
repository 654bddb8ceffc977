"""Memory that is freed stays with the process."""

import subprocess
import sys

import pytest

RESIDENT = """
import psutil
import torch
from ordinalclip.memory import keep_freed_memory

def resident():
    before = psutil.Process().memory_info().rss
    torch.ones(50_000_000 // 4)  # 50 MB, as a layer of an encoder gives for a batch
    return psutil.Process().memory_info().rss - before

print(resident(), keep_freed_memory(), resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have other C libraries")
def test_freed_memory_stays_with_the_process():
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    given_back, is_kept, kept = done.stdout.split()
    assert int(given_back) < 5e6  # bytes of 50e6
    assert is_kept == "True"
    assert int(kept) > 45e6
