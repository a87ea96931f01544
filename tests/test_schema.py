"""What a file may hold: bounds of JSON, fields named in errors, checksums and how an edit is accepted."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rampwrap import Plan, Timings, schema
from rampwrap.cli.main import main
from rampwrap.errors import InputError, PlanError, TableError
from rampwrap.kernel.device import SIMULATED, Device
from rampwrap.kernel.shape import MoEShape


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 17 + "]" * 17, "nested more than 16 deep"),
        ("[" * 5000, "nested more than 16 deep"),
        ("[1e999]", "a number is 1e999"),
        ("[NaN]", "a number is NaN"),
        ('{"a": 1, "a": 2}', "'a' stands in it twice"),
        (r'["\ud800"]', "surrogates not allowed"),
        ("[1" + "0" * 5000 + "]", "digits"),
        (" " * (schema.MOST_BYTES + 1), "more than 16 MB"),
    ],
)
def test_json_out_of_bounds_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        schema.parse(text.encode())


def test_brackets_in_text_are_no_nesting() -> None:
    assert schema.parse(json.dumps(["[" * 50 + '"\\']).encode()) == ["[" * 50 + '"\\']


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_sms": 0}, r"Device.num_sms is 0; give a whole number from 1 to 65536"),
        ({"num_sms": True}, "num_sms: True is not a whole number"),
        ({"num_sms": 132.0}, "num_sms: 132.0 is not a whole number"),
        ({"name": None}, "name: None is not text"),
        ({"copy_gbps": "fast"}, "copy_gbps: 'fast' is not a finite number"),
        ({"cores": 4}, "the key 'cores' is unknown"),
    ],
)
def test_errors_name_the_field(change: dict[str, Any], said: str) -> None:
    raw = schema.dump(SIMULATED)
    assert schema.read(raw, Device, InputError) == SIMULATED
    with pytest.raises(InputError, match=said):
        schema.read(raw | change, Device, InputError)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InputError, match="top_k: it is missing"):
        schema.read({"num_experts": 8, "hidden_size": 1, "intermediate_size": 1}, MoEShape, InputError)


def test_whole_numbers_may_stand_for_others_and_are_made_so() -> None:
    read = schema.read({"name": "x", "num_sms": 1, "copy_gbps": 3}, Device, InputError)
    assert (
        type(read.copy_gbps) is float and schema.dump(read)["l2_bytes"] == 0 and "fp8_tflops" not in schema.dump(read)
    )


def test_a_checksum_is_of_the_content() -> None:
    sealed = schema.seal({"schema": 1, "a": [1, 2.5]})
    assert list(sealed) == ["schema", "checksum", "a"] and schema.unseal(sealed) == {"schema": 1, "a": [1, 2.5]}
    assert (
        schema.checksum({"a": [1, 2.5], "schema": 1})
        == sealed["checksum"]
        != schema.checksum({"schema": 1, "a": [1, 2]})
    )
    with pytest.raises(ValueError, match="checksum"):
        schema.unseal(sealed | {"a": [1, 2.6]})
    assert schema.unseal({"schema": 1}) == {"schema": 1}


def edited(plan: Plan, path: pathlib.Path, change: Callable[[Any], Any]) -> pathlib.Path:
    raw = json.loads(plan.to_json())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def test_an_edited_plan_is_refused_until_it_is_sealed(
    sim_plan: Plan, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(sim_plan, tmp_path / "p.json", lambda raw: raw.update(choosing_us=2.5))
    with pytest.raises(PlanError, match=r"rampwrap seal .*p\.json"):
        Plan.load(path)
    assert main(["seal", str(path)]) == 0 and "sealed" in capsys.readouterr().out
    assert Plan.load(path).choosing_us == 2.5
    path = edited(sim_plan, path, lambda raw: raw["grids"][0].update(block_m=48))
    before = path.read_bytes()
    assert main(["seal", str(path)]) == 1 and "contradicts" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_edited_table_is_refused_until_it_is_sealed(
    sim_timings: Timings, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.npz"
    sim_timings.save(path)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["us"][0, 0] *= 2
    np.savez(path, **arrays)
    with pytest.raises(TableError, match=r"rampwrap seal .*t\.npz"):
        Timings.load(path)
    assert main(["seal", str(path)]) == 0
    assert Timings.load(path).us[0, 0] == arrays["us"][0, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(kernel=None), "kernel: None is not text"),
        (lambda raw: raw["shape"].update(top_k=2.5), r"shape\.top_k: 2\.5"),
        (lambda raw: raw["model"].update(num_sms=66), "num_sms of the model contradicts"),
        (lambda raw: raw["model"]["resident"].__setitem__(0, 0), "resident holds 0"),
        (lambda raw: raw["model"]["launches"].pop(), "launches has shape"),
        (lambda raw: raw["model"]["support"][0].__setitem__(0, 0), "support holds 0"),
        (lambda raw: raw["configs"].__setitem__(0, [["a", 1]]), r"configs\[0\]: .* is not an object"),
        (lambda raw: raw["buckets"][0].update(why=3), r"buckets\[0\]\.why: 3 is not text"),
        (lambda raw: raw["buckets"].reverse(), "buckets of the plan is not ascending"),
        (lambda raw: raw["model"].update(notes=1), "model: the key 'notes' is unknown"),
        (lambda raw: raw["static"]["config"].update({"x": 0}), "static.*'x' is not a whole number"),
    ],
)
def test_fields_of_a_plan_are_checked_by_name(
    sim_plan: Plan, tmp_path: pathlib.Path, change: Callable[[Any], Any], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        Plan.load(edited(sim_plan, tmp_path / "p.json", lambda raw: (change(raw), raw.pop("checksum"))))


def test_files_are_known_by_their_content(
    sim_plan: Plan, sim_timings: Timings, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sim_plan.save(tmp_path / "plan.json")
    sim_timings.save(tmp_path / "t.npz")
    shutil.copy(tmp_path / "t.npz", tmp_path / "t.json")
    assert main(["show", str(tmp_path / "t.json")]) == 0
    assert main(["fit", str(tmp_path / "plan.json")]) == 1
    assert "JSON, a plan perhaps" in capsys.readouterr().err
    with pytest.raises(PlanError, match="it is a timing table"):
        Plan.load(tmp_path / "t.npz")
