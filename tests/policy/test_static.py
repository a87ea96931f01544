"""Static tables: the baselines that routing-aware dispatch must beat."""

import json
import pathlib

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.errors import InputError, TableError
from rampwrap.kernel.protocol import Config
from rampwrap.measure.timings import Timings
from rampwrap.policy.static import StaticTable, default_table, read_static, tuned_averaged, tuned_uniform, write_static
from rampwrap.testing.sim import SimKernel

token_counts = st.lists(st.integers(1, 5000), min_size=1, max_size=12, unique=True).map(sorted)


@given(token_counts, st.integers(0, 9000))
def test_the_nearest_token_count_serves_and_the_lower_one_on_a_tie(tokens: list[int], wanted: int) -> None:
    table = StaticTable("test", tuple(tokens), tuple(range(len(tokens))))
    found = tokens[table.index(wanted)]
    assert found == min(tokens, key=lambda have: (abs(have - wanted), have))


@given(token_counts, st.data())
def test_spans_tile_all_token_counts(tokens: list[int], data: st.DataObject) -> None:
    table = StaticTable("test", tuple(tokens), tuple(range(len(tokens))))
    position = data.draw(st.integers(0, len(tokens) - 1))
    low, high = table.span(position)
    assert table.index(low) == table.index(min(high, 10_000)) == position
    assert low == 0 or table.index(low - 1) == position - 1
    assert table.used(low, high) == {position}


def test_uniform_and_averaged_tables_are_the_measured_best(sim_timings: Timings) -> None:
    rows = sim_timings.rows("train")
    table = tuned_uniform(sim_timings, rows)
    assert table.token_counts == (1, 4, 16, 64, 128, 256, 1024, 4096)
    for tokens, index in zip(table.token_counts, table.indices, strict=True):
        row = [i for i in rows if sim_timings.label[i] == f"M={tokens} uniform"]
        assert index == int(np.argmin(sim_timings.us[row[0]]))
    averaged = tuned_averaged(sim_timings, rows)
    for tokens, index in zip(averaged.token_counts, averaged.indices, strict=True):
        same = [i for i in rows if sim_timings.num_tokens[i] == tokens]
        assert index == int(np.argmin(sim_timings.us[same].sum(axis=0)))


def test_a_config_that_did_not_run_everywhere_is_passed_over(sim_timings: Timings) -> None:
    us = sim_timings.us.copy()
    rows = np.flatnonzero(sim_timings.num_tokens == 64)
    us[rows] = 10.0
    us[rows, 3] = 5.0
    us[rows[0], 3] = np.nan
    us[rows, 4] = 8.0
    table = tuned_averaged(attrs.evolve(sim_timings, us=us), sim_timings.rows("train"))
    assert table.index(64) == 4
    us[rows] = np.nan
    assert 64 not in tuned_averaged(attrs.evolve(sim_timings, us=us), sim_timings.rows("train")).token_counts


def test_no_uniform_rows_is_said(sim_timings: Timings) -> None:
    with pytest.raises(TableError, match="--routing uniform"):
        tuned_uniform(sim_timings, np.flatnonzero(~sim_timings.is_uniform))


CONFIGS: tuple[Config, ...] = (
    {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "num_warps": 4},
    {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "num_warps": 8},
)


def test_an_engines_file_round_trips_and_both_spellings_are_read(tmp_path: pathlib.Path) -> None:
    table = StaticTable("uniform", (1, 64), (0, 1))
    path = tmp_path / "E=64,N=1024,device_name=NVIDIA_H200.json"
    path.write_text(write_static(table, CONFIGS))
    assert read_static(path, CONFIGS).indices == (0, 1)
    ours: tuple[Config, ...] = (
        {"block_m": 64, "block_n": 128, "num_warps": 8},
        {"block_m": 16, "block_n": 64, "num_warps": 4},
    )
    assert read_static(path, ours).indices == (1, 0)
    assert json.loads(write_static(table, ours))["64"] == {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "num_warps": 4}


def test_unknown_entries_and_keys_of_an_engines_file_are_left_out(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tuned.json"
    known = {**CONFIGS[0], "SPLIT_K": 1}
    path.write_text(json.dumps({"triton_version": "3.6.0", "8": {**known, "BLOCK_SIZE_M": 256}, "1": known}))
    table = read_static(path, CONFIGS)
    assert table.token_counts == (1,) and "1 of 2 entries unknown" in table.source


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"64": 3}', '{"64": {"BLOCK_SIZE_M": 999}}', "{}"])
def test_a_foreign_file_is_one_sentence(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(InputError, match=r"tuned\.json"):
        read_static(tmp_path / "tuned.json", CONFIGS)


def test_a_default_that_cannot_run_here_is_told_and_the_nearest_serves(sim_kernel: SimKernel) -> None:
    assert default_table(sim_kernel).index(999) == 0

    class Chooses(SimKernel):
        def default_config(self, num_tokens: int) -> Config:
            return self.configs[5 if num_tokens > 100 else 2]

    table = default_table(Chooses(sim_kernel.shape))
    assert table.index(64) == 2 and table.index(128) == 5

    class Strays(SimKernel):
        def default_config(self, num_tokens: int) -> Config:
            return {"block_m": 7}

    found = default_table(Strays(sim_kernel.shape))
    assert "32 of 32 cannot run here" in found.source
    nearest = min(sim_kernel.configs[index]["block_m"] for index in found.indices)
    assert nearest == min(config["block_m"] for config in sim_kernel.configs)
