"""Time and peak memory of one call, on the CPU or on a GPU.

On the CPU the time is this process's processor time, user and system, of all its threads: other
processes lengthen it far less than wall time. On a GPU it is wall time, with the device
synchronised before and after.

Peak memory is what the call adds to what the process held before, with the models loaded. On the
CPU it is the resident set's high-water mark, which Linux lets a process reset; the C library's heap
is trimmed before. On a GPU it is torch's largest allocation.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


@dataclass(frozen=True)
class Meter:
    """Measures calls on one device."""

    device: str

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def clock(self) -> str:
        """Which time is measured, in words."""
        return "wall time" if self.on_gpu else "processor time"

    def seconds(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """How long the call takes, and its result."""
        self._wait()
        now = time.perf_counter if self.on_gpu else time.process_time
        begin = now()
        result = call()
        self._wait()
        return now() - begin, result

    def peak(self, call: Callable[[], Any]) -> tuple[int | None, Any]:
        """The bytes that the call adds at its peak, and its result; None where nobody counts."""
        self.release()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call()
            self._wait()
            return torch.cuda.max_memory_allocated() - before, result
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        except OSError:
            return None, call()
        before = _status("VmRSS")
        result = call()
        return max(_status("VmHWM") - before, 0), result

    def release(self) -> None:
        """Give memory that nothing uses any more back to the system."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def free(self) -> int:
        """Free bytes of the device."""
        if self.on_gpu:
            return int(torch.cuda.mem_get_info()[0])
        import psutil

        return int(psutil.virtual_memory().available)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
