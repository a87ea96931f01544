"""Engines' tuned files: what their names and entries say, what a table has of them, and what is told of the rest."""

import json
import os
import pathlib
import random
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.cli.main import main
from rampwrap.compare import evaluate as compare
from rampwrap.compare import report
from rampwrap.errors import InputError, RampwrapError
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.measure.timings import Timings
from rampwrap.plan.make import make_plan
from rampwrap.policy.static import StaticTable, read_measured, read_static
from rampwrap.policy.tuned_file import KERNELS, LayerName, TunedFile

KEYS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
ROWS = ((16, 64, 64, 1, 4, 3), (32, 64, 128, 1, 4, 3), (64, 128, 128, 16, 4, 3), (128, 128, 64, 16, 8, 4))
CONFIGS: tuple[Config, ...] = tuple(dict(zip(KEYS, row, strict=True)) for row in ROWS)
OURS: Config = {
    "block_m": 16,
    "block_n": 64,
    "block_k": 64,
    "group_m": 1,
    "num_warps": 4,
    "num_stages": 3,
    "swap_ab": False,
}
BF16, FP8 = MoEShape(64, 8, 2048, 1024), MoEShape(64, 8, 2048, 1024, "fp8")
NAME = "E=64,N=1024,device_name=NVIDIA_H200.json"


def written(path: pathlib.Path, entries: dict[str, Any]) -> pathlib.Path:
    path.write_text(json.dumps(entries))
    return path


def entries(*tokens: int) -> dict[str, Any]:
    """The configs in turn."""
    return {str(count): dict(CONFIGS[place % len(CONFIGS)]) for place, count in enumerate(tokens)}


@pytest.fixture
def engine_table(sim_timings: Timings) -> Timings:
    """The simulated table as if it were vLLM's kernel's on an H200."""
    return attrs.evolve(
        sim_timings.take(range(len(sim_timings.us))),
        us=sim_timings.us[:, : len(CONFIGS)],
        configs=CONFIGS,
        grids=sim_timings.grids[: len(CONFIGS)],
        kernel="vllm_fused_moe",
        device=attrs.evolve(sim_timings.device, name="NVIDIA H200"),
    )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (NAME, LayerName(64, 1024, "NVIDIA_H200")),
        (
            "E=256,N=128,device_name=NVIDIA_H20-3e,dtype=fp8_w8a8,block_shape=[128, 128]_down.json",
            LayerName(256, 128, "NVIDIA_H20-3e", "fp8_w8a8", (128, 128), down=True),
        ),
        (
            "E=16,N=1024,device_name=NVIDIA_B200,dtype=fp8_w8a8,per_channel_quant=True.json",
            LayerName(16, 1024, "NVIDIA_B200", "fp8_w8a8"),
        ),
        ("E=384,N=128,device_name=,dtype=int4_w4a16.json", LayerName(384, 128, "", "int4_w4a16")),
        (
            "E=8,N=256,device_name=Intel(R)_Arc(TM)_Pro_B60_Graphics_down.json",
            LayerName(8, 256, "Intel(R)_Arc(TM)_Pro_B60_Graphics", down=True),
        ),
        ("tuned.json", None),
    ],
)
def test_what_a_name_says(name: str, layer: LayerName | None) -> None:
    assert LayerName.parse(f"configs/triton_3_5_1/{name}") == layer


@pytest.mark.parametrize(
    "name",
    [
        "N=1536,K=1536,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
        "provider=x,E=256,N1=256,N2=2048,K=2048,device_name=NVIDIA_H200.json",
        "E=sixty,N=1024.json",
    ],
)
def test_files_that_are_no_moe_layers_are_refused_by_name(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(InputError, match=r"E=\.\.,N="):
        read_static(written(tmp_path / name, entries(1)), CONFIGS)


@pytest.mark.parametrize(
    ("name", "shape", "kernel", "says"),
    [
        ("E=1,N=7168,device_name=NVIDIA_H200", BF16, "", "E=1, N=7168 where the table has E=64, N=1024"),
        ("E=64,N=1024,device_name=NVIDIA_H200,dtype=int8_w8a16", BF16, "", "dtype int8_w8a16 where the table has dtype bf16"),
        ("E=64,N=1024,device_name=NVIDIA_H200", FP8, "", "dtype bf16 where the table has dtype fp8"),
        ("E=64,N=1024,device_name=NVIDIA_H200_down", BF16, "", "without _down"),
        ("E=64,N=1024,device_name=NVIDIA_A100-SXM4-80GB", BF16, "", "note: tuned on another GPU, NVIDIA_A100-SXM4-80GB, where the table is of NVIDIA H200"),
        ("E=64,N=1024,device_name=NVIDIA_H200_NVL", BF16, "", "note: tuned on another GPU"),
        ("E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8", FP8, "", "note: tuned with FP8 scales, one a tensor or channel"),
        ("E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8", FP8, "vllm_fused_moe_per_tensor", ""),
        ("E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128]", FP8, "vllm_fused_moe", ""),
        ("E=64,N=1024,device_name=NVIDIA_H200", attrs.evolve(BF16, dtype="fp16"), "vllm_fused_moe", ""),
        ("E=8,N=1024,device_name=NVIDIA_H200", attrs.evolve(BF16, num_local_experts=8), "", ""),
    ],
)  # fmt: skip
def test_a_file_for_something_else_is_refused_or_told(
    tmp_path: pathlib.Path, name: str, shape: MoEShape, kernel: str, says: str
) -> None:
    path = written(tmp_path / f"{name}.json", entries(1, 64))
    try:
        table = read_static(path, CONFIGS, kernel=kernel, device="NVIDIA H200", shape=shape)
    except InputError as error:
        assert says and says in str(error) and "note:" not in says
        return
    assert table.file is not None and table.indices == (0, 1)
    assert bool(says) == bool(table.file.notes) and all(
        says.removeprefix("note: ") in note for note in table.file.notes
    )


def test_the_h200s_file_is_every_h200s(tmp_path: pathlib.Path) -> None:
    """As vLLM reads it; SGLang has files of their own."""
    path = written(tmp_path / NAME, entries(1))
    for device in ("NVIDIA H200", "NVIDIA H200 NVL"):
        table = read_static(path, CONFIGS, device=device)
        assert table.file is not None and not table.file.notes


def test_what_is_left_out_is_counted_and_refused_where_it_is_most(tmp_path: pathlib.Path) -> None:
    strange = {**CONFIGS[0], "BLOCK_SIZE_M": 256}
    path = written(tmp_path / NAME, entries(1, 8, 64) | {"4096": strange, "triton_version": "3.6.0"})
    table = read_static(path, CONFIGS, kernel="vllm_fused_moe", num_tokens=[1, 16, 48, 3000])
    assert table.token_counts == (1, 8, 64) and table.indices == (0, 1, 2)
    assert table.file is not None and (table.file.entries, table.file.left_out) == (4, (4096,))
    assert "1 of 4 entries (4096 tokens)" in table.file.notes[0] and "1 of 4 workloads" in table.file.notes[0]
    # One entry of four, but what serves most of the workloads.
    with pytest.raises(InputError, match=r"1 of 4 entries .* 3 of 4 workloads .*VLLM_TUNED_CONFIG_FOLDER"):
        read_static(path, CONFIGS, kernel="vllm_fused_moe", num_tokens=[1, 3000, 4096, 9000])
    written(path, entries(1) | {"8": strange, "64": strange})
    with pytest.raises(InputError, match=r"2 of 3 entries \(8, 64 tokens\).* add them"):
        read_static(path, CONFIGS)


def test_entries_without_warps_run_what_the_engine_runs(tmp_path: pathlib.Path) -> None:
    """Triton's defaults, 4 warps and 3 stages: the first config; told."""
    bare = {key: value for key, value in CONFIGS[0].items() if key not in ("num_warps", "num_stages")}
    table = read_static(written(tmp_path / NAME, {"1": bare, "64": dict(CONFIGS[1])}), CONFIGS)
    assert table.indices == (0, 1) and table.file is not None and table.file.completed == (1,)
    assert "1 of 2 entries (1 tokens) lack one of" in table.file.notes[0]


def test_keys_that_the_table_does_not_have_are_told_where_they_say_something(tmp_path: pathlib.Path) -> None:
    own = {**CONFIGS[0], "SPLIT_K": 1, "USE_TMA": False, "num_ctas": 1}
    table = read_static(written(tmp_path / NAME, {"1": own}), CONFIGS)
    assert table.file is not None and not table.file.notes
    table = read_static(
        written(tmp_path / NAME, {"1": {**own, "USE_TMA": True}, "2": {**own, "waves_per_eu": 2}}), CONFIGS
    )
    assert table.file is not None and len(table.file.notes) == 2 and "1 entries set USE_TMA" in table.file.notes[0]


def test_tiles_deeper_than_a_scale_block_are_cut_as_in_the_engine(tmp_path: pathlib.Path) -> None:
    deep = {**CONFIGS[1], "BLOCK_SIZE_K": 256}
    name = "E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    assert read_static(written(tmp_path / name, {"1": deep}), CONFIGS, shape=FP8).indices == (1,)
    with pytest.raises(InputError, match="1 of 1 entries"):
        read_static(written(tmp_path / NAME, {"1": deep}), CONFIGS, shape=BF16)


def test_entries_that_do_not_ascend_are_told_where_it_matters(tmp_path: pathlib.Path) -> None:
    """The engines take the first of two equally near; 48 is halfway between 32 and 64, nothing is between 1 and 32."""
    table = read_static(written(tmp_path / NAME, entries(1, 64, 32)), CONFIGS)
    assert table.file is not None and "at 48 tokens, halfway" in table.file.notes[0]
    table = read_static(written(tmp_path / NAME, entries(32, 64, 1)), CONFIGS)
    assert table.file is not None and not table.file.notes


def test_the_second_gemms_own_file_is_told(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / NAME, entries(1))
    written(tmp_path / NAME.replace(".json", "_down.json"), entries(1))
    table = read_static(path, CONFIGS)
    assert table.file is not None and "_down.json in the second GEMM" in table.file.notes[0]


@pytest.mark.parametrize(
    ("entry", "configs", "kernel", "says"),
    [
        (dict(CONFIGS[0]), [OURS], "triton_fused_moe", "swap_ab too; judge it on a table of vllm_fused_moe"),
        ({"block_m": 8, "block_n": 32, "warp_n": 8, "stages": 4}, CONFIGS, "vllm_fused_moe", "judge it on a table of alpha_moe"),
        (dict.fromkeys(KERNELS["cute_moe"], 8), [{"block_m": 8, "block_n": 8, "warp_n": 8, "stages": 8}], "alpha_moe", "configs of cute_moe"),
        (dict(CONFIGS[0]), [{"sort": "stable"}], "torch_grouped_mm", "have sort too"),
        (dict(CONFIGS[0]), [{}], "mine", "share no key"),
        ({"tile": 3}, CONFIGS, "vllm_fused_moe", "give a file of this kernel's configs"),
    ],
)  # fmt: skip
def test_another_kernels_file_says_where_it_can_be_judged(
    tmp_path: pathlib.Path, entry: dict[str, Any], configs: list[Config], kernel: str, says: str
) -> None:
    with pytest.raises(InputError, match=f"of another kernel than {kernel}.*{says}"):
        read_static(written(tmp_path / "tuned.json", {"64": entry}), configs, kernel=kernel)


def test_our_own_kernels_file_is_read_in_either_spelling(tmp_path: pathlib.Path) -> None:
    theirs = {key: OURS[name] for key, name in zip(KEYS, OURS, strict=False)} | {"swap_ab": False}
    for entry in (dict(OURS), theirs):
        path = written(tmp_path / NAME, {"64": entry})
        assert read_static(path, [OURS], kernel="triton_fused_moe").indices == (0,)
        assert TunedFile.read(path).kernel == "triton_fused_moe"


@pytest.mark.parametrize(
    "content",
    [
        b'{"1": {"BLOCK_SIZE_M": 16}, "1": {"BLOCK_SIZE_M": 32}}',
        b'{"1": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_M": 32}}',
        b'{"1": {"BLOCK_SIZE_M": 16}, "01": {"BLOCK_SIZE_M": 32}}',
        b'{"1": {"BLOCK_SIZE_M": [16]}}',
        b'{"1": {"BLOCK_SIZE_M": 16.0}}',
        b'{"0": {"BLOCK_SIZE_M": 16}}',
        b'{"-1": {"BLOCK_SIZE_M": 16}}',
        '{"\u00b2": {"BLOCK_SIZE_M": 16}}'.encode(),
        b'{"1": {}}',
        b'{"triton_version": "3.6.0"}',
        b'{"' + b"9" * 5000 + b'": {"BLOCK_SIZE_M": 16}}',
        b"[" * 100_000,
        b"\xff\xfe",
        b" " * (1 << 22) + b" ",
    ],
)
def test_damage_is_one_sentence(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "tuned.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a tuned config file") as caught:
        read_static(path, CONFIGS)
    assert len(str(caught.value)) < 600


def test_a_byte_order_mark_is_no_damage(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(entries(1, 64)).encode())
    assert read_static(path, CONFIGS).indices == (0, 1)


def test_a_comparison_says_what_of_a_file_does_not_count(
    tmp_path: pathlib.Path, engine_table: Timings, capsys: pytest.CaptureFixture[str]
) -> None:
    """In text and in JSON, by replay and by fit; a file of the same name in another folder is a policy of its own."""
    engine_table.save(tmp_path / "t.npz")
    strange = {**CONFIGS[0], "BLOCK_SIZE_M": 256}
    for folder in ("triton_3_4_0", "triton_3_5_1"):
        (tmp_path / folder).mkdir()
    old = written(tmp_path / "triton_3_4_0" / NAME, entries(1, 64))
    new = written(tmp_path / "triton_3_5_1" / NAME, entries(1, 64) | {"9000": strange})
    replay = ["replay", str(tmp_path / "t.npz"), "--static-file", str(old), str(new), str(old)]
    assert main(replay) == 0
    text = capsys.readouterr().out
    stem = NAME.removesuffix(".json")
    assert f"note: static triton_3_5_1/{stem}: 1 of 3 entries (9000 tokens)" in text and text.count("note:") == 1
    assert main([*replay, "--json"]) == 0
    policies = json.loads(capsys.readouterr().out)["policies"]
    assert policies[f"static triton_3_5_1/{stem}"]["file"]["left_out"] == [9000]
    assert policies[f"static {stem}"]["file"]["notes"] == []
    assert main(["fit", str(tmp_path / "t.npz"), "--static", str(new), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["static_file"]["left_out"] == [9000]
    with pytest.raises(InputError, match="unifrom is not a tuned config file"):
        make_plan(engine_table, static="unifrom")


def test_a_baseline_is_what_its_name_says(engine_table: Timings) -> None:
    """Tables without uniform rows: told in replay and in a plan."""
    skewed = engine_table.take([row for row, uniform in enumerate(engine_table.is_uniform) if not uniform])
    result = compare.replay(skewed)
    assert "no 'train' row is uniform" in report.text(result) and result.to_dict()["notes"]
    assert "no 'train' row is uniform" in make_plan(skewed).provenance["static"]
    assert not compare.replay(engine_table).notes and "static" not in make_plan(engine_table).provenance


def test_the_live_baseline_has_the_name_of_what_the_plan_serves(
    tmp_path: pathlib.Path, sim_timings: Timings, capsys: pytest.CaptureFixture[str]
) -> None:
    sim_timings.save(tmp_path / "t.npz")
    tuned = written(tmp_path / "mine.json", {"64": dict(sim_timings.configs[3])})
    plan = tmp_path / "p.plan.json"
    for static, named in (("averaged", "static-averaged"), (str(tuned), "static mine.json")):
        assert main(["fit", str(tmp_path / "t.npz"), "--static", static, "--out", str(plan)]) == 0
        capsys.readouterr()
        live = ["compare", str(plan), "--batch-size", "48", "--routing", "hot:2", "--quiet", "--json"]
        assert main([*live, "--static-file", str(tuned)]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["baseline"] == named and {named, "static mine"} <= set(result["policies"])


tokens = st.lists(st.integers(1, 9000), min_size=1, max_size=12, unique=True)


@given(tokens, st.data())
def test_every_known_entry_serves_as_in_the_engine(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], data: st.DataObject
) -> None:
    """The engines take the entry with the nearest number of tokens."""
    picked = {count: data.draw(st.sampled_from(CONFIGS)) for count in counts}
    path = written(tmp_path_factory.getbasetemp() / "random.json", {str(k): dict(v) for k, v in picked.items()})
    table = read_static(path, CONFIGS)
    wanted = data.draw(st.integers(1, 10_000))
    nearest = picked[min(sorted(picked), key=lambda count: abs(count - wanted))]
    assert CONFIGS[table.index(wanted)] == nearest and table.file is not None
    assert all("do not ascend" in note for note in table.file.notes)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Damage as disks, editors and tools make it: bytes, cuts, repeats, and values of JSON."""
    kind = rng.randrange(8)
    place, length = rng.randrange(len(content)), rng.randrange(1, 40)
    if kind == 0:
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + content[place + length :]
    if kind == 3:
        return content[:place] + content[place : place + length] + content[place:]
    if kind == 4:
        return (
            content[:place]
            + rng.choice([b"[" * 20_000, b"9" * 6000, b"\x00", b"NaN", b"null", b'"', b"\xff"])
            + content[place:]
        )
    raw = json.loads(content)
    count = rng.choice([key for key in raw if key.isdigit()])
    if kind == 5:
        raw[rng.choice(["", "-1", "0", "1e3", "64 ", "\u0663", "9" * 30, "x"])] = raw.pop(count)
    else:
        value: Any = rng.choice([None, -1, 0, 2**70, 1.5, "16", True, [], {}, 17, 64, 1e400])
        if kind == 6:
            raw[count] = value
        else:
            raw[count][rng.choice(list(raw[count]))] = value
    return json.dumps(raw).encode()


def meaning(content: bytes) -> dict[int, Config]:
    """The configs of CONFIGS by token count, as the engines' own reader sees them."""
    raw = json.loads(content.decode("utf-8"))
    found = {int(key): value for key, value in raw.items() if isinstance(value, dict)}
    return {count: config for count, config in sorted(found.items()) if json.dumps(config) in map(json.dumps, CONFIGS)}


@pytest.mark.slow
def test_a_thousand_mutated_files_keep_their_meaning_or_are_one_sentence(
    tmp_path: pathlib.Path, engine_table: Timings
) -> None:
    whole = json.dumps(entries(1, 2, 4, 8, 16, 64, 256, 1024, 4096) | {"triton_version": "3.6.0"}, indent=4).encode()
    path, refused = tmp_path / NAME, 0
    for seed in range(1000):
        content = mutated(whole, random.Random(seed))
        path.write_bytes(content)
        try:
            table: StaticTable = read_measured(path, engine_table)
        except RampwrapError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 800, seed
            continue
        read = {count: CONFIGS[index] for count, index in zip(table.token_counts, table.indices, strict=True)}
        assert table.file is not None
        stated, defaulted = meaning(content), set(table.file.completed)
        ignored = any("which no config" in note for note in table.file.notes)
        exact = {count: config for count, config in read.items() if count not in defaulted}
        assert exact == stated or (ignored and stated.items() <= exact.items()), seed
        assert len(read) + len(table.file.left_out) == table.file.entries, seed
        assert bool(table.file.left_out) == any("neighbours serve" in note for note in table.file.notes), seed
    assert 200 < refused < 900


def test_names_that_are_no_files(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "none.json", pathlib.Path(os.devnull)):
        with pytest.raises(InputError, match="is not a tuned config file"):
            read_static(path, CONFIGS)
