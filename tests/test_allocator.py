"""Memory that is freed stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from cvdd.allocator import keep_freed_memory
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parameter is glibc's")
def test_a_block_that_is_allocated_again_has_no_new_pages() -> None:
    def faults(call: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(call=call)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    # Pages may be small or huge.
    assert 4 * faults("assert keep_freed_memory()") < faults("")
