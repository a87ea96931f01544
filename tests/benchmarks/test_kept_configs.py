"""What a profile for an engine keeps, by complete tables: as good as the 40 configs of before."""

from rampwrap.cli.profile_request import ENGINE_CONFIGS, ProfileRequest


def test_as_good_as_more(script, capsys, monkeypatch):
    kept = script("kept_configs")
    monkeypatch.setattr(kept, "KEPT", (ENGINE_CONFIGS, 40))
    monkeypatch.setattr("sys.argv", ["kept_configs.py", "--tables", "h200-alpha_moe-qwen3-30b-fp8"])
    kept.main()
    (few, many) = [float(its.split()[-1]) for its in capsys.readouterr().out.splitlines()[0].split(": ")[1].split(", ")]
    assert 1 <= few < many + 2e-3 < 1.02


def test_an_engine_asks_for_less():
    engine, table, timed = (
        ProfileRequest(engine=name, budget=budget) for name, budget in (("vllm", None), (None, None), ("vllm", 60.0))
    )
    assert (engine.rounds, table.rounds, timed.rounds) == (3, 4, 4)
    rows = [len(its.eval_batch_size) * len(its.eval_routing) for its in (engine, table)]
    assert rows == [15, 55] and engine.batch_size == table.batch_size
