"""From where on drift is said: beyond a tenth of the range, of 32 observed launches."""

from typing import Any

import pytest

from rampwrap.observe import registry


class Served:
    """A dispatcher whose plan names its remedy."""

    kernel = "the kernel"

    def __init__(self) -> None:
        self.plan = self

    def remedy(self, kernel: str) -> str:
        return f"profile {kernel}"


def layer(drift: float | None, observed: int = 32, name: str = "") -> dict[str, Any]:
    numbers = {"num_tokens": 64, "active_experts": 8.0, "concentration": 0.125}
    return {"layer": name, "drift": drift, "observed": observed, **numbers}


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([layer(0.11)], "a layer at 64 tokens has 8.0 active experts and concentration 0.1250, drift 0.11"),
        ([layer(0.1)], None),
        ([layer(None)], None),
        ([layer(9.0, observed=31)], None),
        ([layer(0.2, name="a"), layer(0.5, name="b"), layer(9.0, 31, "c"), layer(0.4, name="d")], "b at 64 tokens"),
        ([], None),
    ],
)
def test_once_and_of_the_worst(
    layers: list[dict[str, Any]], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    served, other = Served(), Served()
    quiet = (other, {"shape": "E=2", "layers": [layer(0.0)]})
    for _ in range(2):
        registry.say_drift([quiet, (served, {"shape": "E=8", "layers": layers})])
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == (said is not None)
    if said is not None:
        assert (
            said in texts[0] and "its plan for E=8" in texts[0] and "'profile the kernel --recorded FILE'" in texts[0]
        )
