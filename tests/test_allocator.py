"""Memory that is freed stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from cvdd.support.allocator import keep_freed_memory
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


@pytest.mark.skipif(sys.platform != "linux", reason="the parameter is glibc's")
def test_what_was_kept_is_given_back_when_told() -> None:
    program = (
        "from pathlib import Path\n"
        "from cvdd.support.allocator import give_back_memory, keep_freed_memory\n"
        "def held(): return int(Path('/proc/self/statm').read_text().split()[1])\n"
        "assert keep_freed_memory()\n"
        "before = held()\n"
        "b'x' * (256 << 20)\n"
        "assert held() > before + 10_000\n"
        "assert give_back_memory()\n"
        "assert held() < before + 10_000\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
