"""GPUs by the names that people, tools and tuned files give them."""

import attrs
import pytest

from rampwrap.errors import InputError
from rampwrap.kernel.device import DEVICES, SIMULATED, Device, device_of, find_device, no_gpu
from rampwrap.schema import dump, read


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


MIB = 1 << 20
# From the vendor's data sheets: SMs of the product, L2, shared memory of an SM (228 KB; 164 KB on sm_80), dense TFLOP/s.
SHEETS = {
    "NVIDIA H200": (132, 60 * MIB, 228, 4800, 989, 1979),
    "NVIDIA H100 80GB HBM3": (132, 50 * MIB, 228, 3350, 989, 1979),
    "NVIDIA A100-SXM4-80GB": (108, 40 * MIB, 164, 2039, 312, None),
    "NVIDIA B200": (148, 126.5 * MIB, 228, 8000, 2250, 4500),
}


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_constants_are_those_of_the_data_sheets(device):
    """Counts exactly; rates at the shares that the H200 reaches of its own, 0.90 and 0.80."""
    sms, l2, smem_kb, gbps, bf16, fp8 = SHEETS[device.name]
    assert (device.num_sms, device.l2_bytes, device.smem_bytes_per_sm) == (sms, l2, smem_kb * 1024)
    assert device.copy_gbps == pytest.approx(0.90 * gbps, rel=0.01)
    assert device.bf16_tflops == pytest.approx(0.80 * bf16, rel=0.01)
    if fp8 is None:
        assert device.fp8_tflops is None
    else:
        assert device.fp8_tflops == 2 * device.bf16_tflops == pytest.approx(0.80 * fp8, rel=0.01)


def test_keys_are_the_names_and_the_simulated_gpu_is_an_h200():
    assert list(DEVICES) == ["-".join(device.name.lower().split()) for device in DEVICES.values()]
    assert dump(SIMULATED) == dump(DEVICES["nvidia-h200"]) | {"name": "simulated"}
    assert SIMULATED.label == "simulated (132 SMs)"


def test_json_round_trip_and_refusals():
    device = Device("part", 16)
    assert dump(device) == {"name": "part", "num_sms": 16, "l2_bytes": 0}
    assert read(dump(device), Device, InputError) == device
    with pytest.raises(InputError, match="num_sms: it is missing"):
        read({"name": "x"}, Device, InputError)
    with pytest.raises(InputError, match=r"Device\.num_sms is 0; give a whole number from 1"):
        Device("x", 0)
    assert Device("x", 1).num_sms == 1


def test_the_device_of_a_kernel_is_what_it_says_else_torchs(monkeypatch):
    torch = pytest.importorskip("torch")
    part = Device("part", 16)
    assert device_of(type("Kernel", (), {"device": part})) is part
    properties = type(
        "Properties",
        (),
        {
            "name": "NVIDIA H200",
            "multi_processor_count": 16,
            "L2_cache_size": 7,
            "shared_memory_per_multiprocessor": 233_472,
            "major": 9,
            "minor": 0,
            "total_memory": 150 << 30,
        },
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = {"capability": "9.0", "memory_bytes": 150 << 30}
    assert device_of(object()) == Device("NVIDIA H200", 16, 7, 4300.0, 233_472, 790.0, 1580.0, **found)
    properties.name = "NVIDIA Unheard"
    assert device_of(object()) == Device("NVIDIA Unheard", 16, 7, None, 233_472, **found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(type("Kernel", (), {"device": "cuda"})) is SIMULATED


def test_why_there_is_no_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for cuda, hip, said in (
        (None, None, "this torch is built without CUDA"),
        ("13.0", None, "no driver or device was found"),
        (None, "7.0", "no driver or device was found"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert no_gpu() == said
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert no_gpu() == f"CUDA_VISIBLE_DEVICES is {hidden!r}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert no_gpu() is None


def test_numbers_that_no_device_has():
    """Each constant within its range, a share of a byte a second too; what nobody stated is None."""
    for name, most in (("num_sms", 1 << 16), ("copy_gbps", 1e9), ("bf16_tflops", 1e9), ("fp8_tflops", 1e9)):
        made = {"name": "x", "num_sms": 1}
        assert getattr(Device(**made | {name: most}), name) == most
        for wrong in (-1, most + 1, float("nan"), "1"):
            with pytest.raises(InputError, match=name):
                Device(**made | {name: wrong})
    for name in ("l2_bytes", "smem_bytes_per_sm"):
        assert getattr(Device("x", 1, **{name: 0}), name) == 0
        for wrong in (-1, 1.5):
            with pytest.raises(InputError, match=name):
                Device("x", 1, **{name: wrong})
    assert Device("x", 1, copy_gbps=0.5).copy_gbps == 0.5
    with pytest.raises(InputError, match="num_sms"):
        Device("x", 1.5)
    assert [
        getattr(Device("x", 1), name) for name in ("copy_gbps", "smem_bytes_per_sm", "bf16_tflops", "fp8_tflops")
    ] == [None] * 4


FOUND = Device("NVIDIA H100 80GB HBM3", 132, 50 << 20, 3010.0, 233_472, capability="9.0", memory_bytes=85_000_000_000)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"name": "NVIDIA H800"}, True),
        ({"name": "NVIDIA H800", "copy_gbps": None}, True),  # what a table says of it, not the GPU
        ({"name": "NVIDIA H800", "memory_bytes": 84_300_000_000}, True),
        ({"name": "NVIDIA H100 NVL", "memory_bytes": 99_900_000_000}, False),
        ({"name": "x", "memory_bytes": 86_000_000_000}, False),
        *(({"name": "x", name: value}, False) for name, value in (("num_sms", 114), ("capability", "10.0"), ("l2_bytes", 60 << 20), ("smem_bytes_per_sm", 1))),
        *(({"name": "x", name: None}, False) for name in ("capability", "memory_bytes", "smem_bytes_per_sm")),
        ({"name": "x", "l2_bytes": 0}, False),
        ({"name": "NVIDIA H100 80GB HBM3 MIG 7g.80gb"}, False),
        ({"memory_bytes": None, "l2_bytes": 0}, True),  # as files of earlier versions have it
        ({"num_sms": 131}, False),
    ],
)  # fmt: skip
def test_one_kind_of_gpu_under_several_names(change, same):
    other = attrs.evolve(FOUND, **change)
    assert FOUND.same_kind(other) is other.same_kind(FOUND) is same
