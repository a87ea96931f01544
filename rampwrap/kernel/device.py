"""`Device`: the hardware constants that predictions depend on, and how to read them off a GPU."""

import os
import re

import attrs

from rampwrap.errors import InputError
from rampwrap.schema import LARGEST, OMIT, between

SAME_MEMORY = 0.01
"""Part by which the memory of one kind of GPU differs: drivers keep some of it. An H100 NVL and a GH200 of as many
multiprocessors are 1.5 % apart."""
_known = attrs.validators.optional(between(0, 1e9, InputError, whole=False))


@attrs.frozen
class Device:
    """A GPU as the cost model sees it.

    `copy_gbps` counts bytes read plus bytes written by a large device-to-device copy; the TFLOP/s are dense
    matrix rates. `capability` is that of its multiprocessors, ``9.0``; `memory_bytes` what torch finds on it. None where
    nobody measured or stated them.
    """

    name: str
    num_sms: int = attrs.field(validator=between(1, 1 << 16, InputError))
    l2_bytes: int = attrs.field(default=0, validator=between(0, LARGEST, InputError))
    copy_gbps: float | None = attrs.field(default=None, validator=_known, metadata=OMIT)
    smem_bytes_per_sm: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(between(0, LARGEST, InputError)), metadata=OMIT
    )
    bf16_tflops: float | None = attrs.field(default=None, validator=_known, metadata=OMIT)
    fp8_tflops: float | None = attrs.field(default=None, validator=_known, metadata=OMIT)
    capability: str | None = attrs.field(default=None, metadata=OMIT)
    memory_bytes: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(between(1, LARGEST, InputError)), metadata=OMIT
    )

    @property
    def label(self) -> str:
        """What tells GPUs apart, whose timings do not mix: ``NVIDIA H200 (132 SMs)``. A part of a GPU has its name."""
        return f"{self.name} ({self.num_sms} SMs)"

    def same_kind(self, other: "Device") -> bool:
        """Whether what was measured on the other holds here: it has the same label, or every property of this one.

        Drivers and vendors of machines name one GPU differently. A property that either does not state decides against
        it, and so does a part of a GPU (MIG), which shares its memory with others.
        """
        if self.label == other.label:
            return True
        mine, its = (
            (one.num_sms, one.capability, one.l2_bytes, one.smem_bytes_per_sm, one.memory_bytes)
            for one in (self, other)
        )
        if not all(mine) or not all(its) or "MIG" in f"{self.name} {other.name}".split():
            return False
        return mine[:-1] == its[:-1] and abs(1 - mine[-1] / its[-1]) < SAME_MEMORY  # type: ignore[operator]

    @classmethod
    def current(cls) -> "Device":
        """The GPU that torch uses now; the simulated device where there is none."""
        import torch

        if not torch.cuda.is_available():
            return SIMULATED
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        stated = DEVICES.get("-".join(found.name.lower().split()))
        return cls(
            name=found.name,
            num_sms=found.multi_processor_count,
            l2_bytes=found.L2_cache_size,
            copy_gbps=stated.copy_gbps if stated else None,
            smem_bytes_per_sm=getattr(found, "shared_memory_per_multiprocessor", None),
            bf16_tflops=stated.bf16_tflops if stated else None,
            fp8_tflops=stated.fp8_tflops if stated else None,
            capability=f"{found.major}.{found.minor}",
            memory_bytes=found.total_memory,
        )


# copy_gbps and bf16_tflops of the H200: measured (8.6 GB copy, 8192^3 product on random data); the others are
# the vendor's figures times the shares that the H200 reaches (0.90 of the bandwidth, 0.80 of the matrix rate).
DEVICES = {
    "nvidia-h200": Device("NVIDIA H200", 132, 62_914_560, 4300.0, 233_472, 790.0, 1580.0),
    "nvidia-h100-80gb-hbm3": Device("NVIDIA H100 80GB HBM3", 132, 52_428_800, 3010.0, 233_472, 790.0, 1580.0),
    "nvidia-a100-sxm4-80gb": Device("NVIDIA A100-SXM4-80GB", 108, 41_943_040, 1830.0, 167_936, 250.0, None),
    "nvidia-b200": Device("NVIDIA B200", 148, 132_644_864, 7200.0, 233_472, 1800.0, 3600.0),
}
SIMULATED = Device("simulated", 132, 62_914_560, 4300.0, 233_472, 790.0, 1580.0)


def device_of(kernel: object) -> Device:
    """The device a kernel says it runs on (a simulated one does), else torch's GPU."""
    stated = getattr(kernel, "device", None)
    return stated if isinstance(stated, Device) else Device.current()


# How people name them, besides the vendor: the model, and words that say nothing else than what that device is.
_NAMES = {
    "nvidia-h200": ("h200", {"sxm", "sxm5", "141gb", "hbm3e"}),
    "nvidia-h100-80gb-hbm3": ("h100", {"sxm", "sxm5", "80gb", "hbm3"}),
    "nvidia-a100-sxm4-80gb": ("a100", {"sxm", "sxm4", "80gb", "hbm2e"}),
    "nvidia-b200": ("b200", {"sxm", "sxm6", "180gb", "192gb", "hbm3e"}),
}
_VENDOR = {"nvidia", "tesla", "gpu", "tensor", "core"}


def find_device(name: str) -> Device:
    """A device as people write it, in any spelling of its words: ``H200``, ``NVIDIA_H100``, ``A100 80GB``.

    Raises:
        InputError: no such device is known; one of the same family with other memory or form is another device.
    """
    joined = re.sub(r"(\d+)[\s_-]*gi?b?\b", r"\1gb", name.lower().replace("_", " "))
    words = set(re.findall(r"[a-z0-9]+", joined)) - _VENDOR
    for key, (model, also) in _NAMES.items():
        if model in words and words - {model} <= also:
            return DEVICES[key]
    raise InputError(f"device {name!r} is unknown; use one of {', '.join(DEVICES)}.")


def no_gpu() -> str | None:
    """Why torch has no GPU here, in words; None if it has one."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "no driver or device was found"
