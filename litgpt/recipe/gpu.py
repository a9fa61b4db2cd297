"""The published figures of GPUs: memory, peaks of matrix products, and bandwidths."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Le

from litgpt.recipe.bounds import check_numbers

Gibibytes = Annotated[float, Ge(0.1), Le(1e5)]
Teraflops = Annotated[float, Ge(1e-3), Le(1e6)]
Bandwidth = Annotated[float, Ge(1e-3), Le(1e6)]
GpuName = Literal[
    "A100-40GB",
    "A100-80GB",
    "A800-80GB",
    "H100-80GB",
    "H800-80GB",
    "H200",
    "B200",
    "L40S",
    "RTX-4090",
    "RTX-3090",
    "MI300X",
]

# Peak dense matmul TFLOP/s by a pattern of the device's name: bfloat16/float16, TF32, float32. Data sheets also give
# tensor core figures "with sparsity", which are twice these. The first match wins, so longer names come first.
#   NVIDIA data sheets: HGX B200, H200, H100, A100, A10, L40S, L40, L4; RTX: the Ada (AD102) and Ampere (GA102) white
#   papers, tensor cores with float32 accumulation. AMD data sheets: MI300X, MI325X (float32 through the matrix cores).
PEAK_TFLOPS: tuple[tuple[str, float, float, float], ...] = (
    ("B200", 2250.0, 1125.0, 75.0),
    ("H200 NVL", 835.5, 417.5, 60.0),
    ("H200", 989.4, 494.7, 66.9),
    ("H100 NVL", 835.5, 417.5, 60.0),
    ("H100 PCIe", 756.0, 378.0, 51.2),
    ("H100", 989.4, 494.7, 66.9),
    ("H800", 989.4, 494.7, 66.9),
    ("A100", 312.0, 156.0, 19.5),
    ("A800", 312.0, 156.0, 19.5),
    ("A10G", 70.0, 35.0, 35.0),
    ("A10", 125.0, 62.5, 31.2),
    ("L40S", 362.0, 183.0, 91.6),
    ("L40", 181.0, 90.5, 90.5),
    ("L4", 121.0, 60.0, 30.3),
    ("RTX 4090$", 165.2, 82.6, 82.6),
    ("RTX 3090$", 71.0, 35.6, 35.6),
    ("MI325X", 1307.4, 653.7, 163.4),
    ("MI300X", 1307.4, 653.7, 163.4),
)


class PeakTflops(NamedTuple):
    """Peak dense matmul TFLOP/s by the type of the operands."""

    half: float
    tf32: float
    fp32: float


def find_peaks(device_name: str) -> PeakTflops | None:
    """The peaks of a device; None if the table does not have it.

    Args:
        device_name: as returned by `torch.cuda.get_device_name`.
    """
    rows = [row for row in PEAK_TFLOPS if re.search(rf"\b{row[0]}(?!\w)", device_name)]
    if not rows or "MIG" in device_name:  # an instance of MIG is a slice of the device
        return None
    return PeakTflops(*rows[0][1:])


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU; bandwidths are peaks in one direction."""

    memory: Gibibytes
    """GiB that a program can use, which is less than the size in the name."""
    bf16_tflops: Teraflops
    """Peak TFLOP/s of dense matrix products in bfloat16 and float16."""
    tf32_tflops: Teraflops
    """Peak TFLOP/s of dense matrix products of float32 numbers."""
    memory_bandwidth: Bandwidth
    """GB/s of the GPU's memory."""
    link_bandwidth: Bandwidth
    """GB/s that a GPU can send to the others of its node."""
    network_bandwidth: Bandwidth
    """GB/s that a GPU can send to other nodes."""
    fp8_tflops: Teraflops | None = None
    """Peak TFLOP/s of dense matrix products in FP8; null for a GPU without them."""

    def __post_init__(self) -> None:
        check_numbers(self)


# Usable GiB; dense FP8 TFLOP/s with float32 accumulation; GB/s of memory, to GPUs of the node, and to other nodes.
#   Data sheets as above. Half of NVLink's and Infinity Fabric's figures, which add up both directions; PCIe 4.0 x16
#   where there is no such link (the bridge of two RTX 3090 is not counted). The network is that of usual servers:
#   200 Gb/s per A100, 400 Gb/s per H100 and later ones, 100 Gb/s per L40S and 25 Gb/s for the RTX cards.
GPU_FIGURES: dict[GpuName, tuple[float, float | None, float, float, float]] = {
    "A100-40GB": (39.4, None, 1555, 300, 25),
    "A100-80GB": (79.2, None, 2039, 300, 25),
    "A800-80GB": (79.2, None, 2039, 200, 25),
    "H100-80GB": (79.1, 1978.9, 3350, 450, 50),
    "H800-80GB": (79.1, 1978.9, 3350, 200, 50),
    "H200": (139.8, 1978.9, 4800, 450, 50),
    "B200": (178.4, 4500, 8000, 900, 50),
    "L40S": (44.4, 733, 864, 32, 12.5),
    "RTX-4090": (23.6, 330.3, 1008, 32, 3.1),
    "RTX-3090": (23.7, None, 936, 32, 3.1),
    "MI300X": (191.5, 2614.9, 5300, 448, 50),
}


def build_gpu(name: GpuName) -> Gpu:
    """A GPU of the table by its name."""
    memory, fp8, bandwidth, link, network = GPU_FIGURES[name]
    peaks = find_peaks(name.replace("-", " "))
    assert peaks is not None
    return Gpu(memory, peaks.half, peaks.tf32, bandwidth, link, network, fp8)


def find_gpu(device_name: str, memory: float) -> Gpu | None:
    """The GPU of the table that a device is, by its name and its size; None if the table does not have it.

    Args:
        device_name: as returned by `torch.cuda.get_device_name`.
        memory: GiB.
    """
    if find_peaks(device_name) is None:
        return None
    for name, (usable, *_) in GPU_FIGURES.items():
        model = name.split("-")[-1 if name.startswith("RTX") else 0]
        if re.search(rf"\b{model}\b", device_name) and abs(memory - usable) < 0.1 * usable:
            return build_gpu(name)
    return None
