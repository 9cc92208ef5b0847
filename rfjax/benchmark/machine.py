"""Where the measurement was taken, what the device could do at best, and what memory was used."""

import dataclasses
import datetime
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import jax

PEAK_FLOPS = (
    (r"h100(?!.*pcie)|h200", 989e12),
    (r"a100", 312e12),
    (r"tpu v6 ?(lite|e)", 918e12),
    (r"tpu v5 ?(lite|e)", 197e12),
    (r"tpu v5p?$", 459e12),
)
"""Dense bfloat16 FLOP/s from the makers' data sheets, by what JAX calls the device."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Device, software and day of a measurement."""

    device: str
    platform: str
    devices: int
    """How many there are; one of them is measured."""
    cores: int
    jax: str
    date: str

    def __str__(self) -> str:
        more = f", one of {self.devices}" if self.devices > 1 else ""
        return f"{self.device}{more}; {self.cores} CPU cores; jax {self.jax}; {self.date}"


def this_machine() -> Machine:
    """Describe the device that JAX uses first."""
    device = jax.devices()[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    return Machine(
        device=kind,
        platform=device.platform,
        devices=jax.device_count() if device.platform != "cpu" else 1,
        cores=os.cpu_count() or 1,
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the device's best FLOP/s in that type, None where it is not known."""
    if dtype != "bfloat16":
        return None
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, device_kind.lower())), None)


def process_memory() -> dict[str, int]:
    """Return the most bytes that the process held so far, and that its device did where that is known."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        peak["device_peak_bytes"] = statistics["peak_bytes_in_use"]
    return peak


def program_memory(compiled: Any) -> dict[str, int] | None:
    """Return what a compiled program needs, in bytes, as the compiler planned it; None where it does not say."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    needs = {
        "argument_bytes": plan.argument_size_in_bytes,
        "output_bytes": plan.output_size_in_bytes,
        "reused_bytes": plan.alias_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
    }
    total = needs["argument_bytes"] + needs["output_bytes"] + needs["temporary_bytes"] - needs["reused_bytes"]
    return needs | {"total_bytes": total}
