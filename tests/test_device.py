"""GPUs by the names that people, tools and tuned files give them."""

import pytest

from rampwrap.device import DEVICES, find_device
from rampwrap.errors import InputError


@pytest.mark.parametrize(
    ("written", "key"),
    [
        *((name, "nvidia-h200") for name in ("H200", "h200", "NVIDIA H200", "NVIDIA_H200", "nvidia-h200", "H200 SXM 141 GB", "H200-141G")),
        *((name, "nvidia-h100-80gb-hbm3") for name in ("H100", "NVIDIA H100", "NVIDIA_H100", "H100 80GB HBM3", "NVIDIA_H100_80GB_HBM3", "H100-SXM5-80GB", "h100 sxm")),
        *((name, "nvidia-a100-sxm4-80gb") for name in ("A100", "NVIDIA A100", "NVIDIA_A100-SXM4-80GB", "a100 80gb", "A100-80G", "A100 SXM")),
        *((name, "nvidia-b200") for name in ("B200", "NVIDIA B200", "NVIDIA_B200")),
        *((name, name) for name in DEVICES),
        *((device.name, key) for key, device in DEVICES.items()),
    ],
)  # fmt: skip
def test_names_as_people_write_them(written: str, key: str) -> None:
    assert find_device(written) is DEVICES[key]
    assert find_device(f"  {written.upper()} ") is DEVICES[key]


@pytest.mark.parametrize(
    "other",
    [
        *(
            "H100 PCIe",
            "NVIDIA_H100_PCIe",
            "H100 NVL",
            "NVIDIA H200 MIG 1g.18gb",
            "GH200",
            "H20",
            "H20-3e",
            "H800",
            "A800",
        ),
        *(
            "NVIDIA A100-SXM4-40GB",
            "A100 40GB",
            "A100-PCIE-80GB",
            "GB200",
            "H100 H200",
            "",
            "NVIDIA",
            "cuda:0",
            "80GB",
            "H",
        ),
    ],
)
def test_another_gpu_is_no_guess(other: str) -> None:
    """Other memory or another form has another bandwidth or number of SMs."""
    with pytest.raises(InputError, match="is unknown; use one of nvidia-h200"):
        find_device(other)
