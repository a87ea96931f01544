"""Arrays that hold ids, and arrays that hold counts: told apart by their shape and kind alone."""

import numpy as np
import pytest

from rampwrap.routing.dumps import _by_step, _of_array

E = 8


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_ids_of_every_top_k(top_k: int) -> None:
    """[tokens, layers, top_k], of any integers, as [layers, tokens, top_k]."""
    for kind in (np.int16, np.int64, np.uint8):
        array = np.arange(5 * 3 * top_k).reshape(5, 3, top_k).astype(kind) % E
        found = _of_array(array, E, "key")
        assert found.ids and found.request and found.where == "key"
        np.testing.assert_array_equal(found.values, array.transpose(1, 0, 2))


@pytest.mark.parametrize("shape", [(E,), (3, E), (4, 3, E), (2, 4, 3, E), (5, 2, 0, 3, E)])
@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.float32])
def test_counts_have_the_experts_last(shape: tuple[int, ...], kind: type) -> None:
    """[steps, layers, experts], whatever stands before them."""
    array = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    found = _of_array(array, E, "")
    assert not found.ids and not found.request
    assert found.values.shape == (
        array.size // E // (shape[-2] if len(shape) > 1 else 1) if array.size else 0,
        shape[-2] if len(shape) > 1 and array.size else 1,
        E,
    )
    np.testing.assert_array_equal(found.values.ravel(), array.ravel())
    assert _by_step(array).shape == found.values.shape


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 3, 2)),  # floats are no ids
        np.zeros((5, 3, 0), dtype=int),
        np.zeros((5, 3, E + 1), dtype=int),
        np.zeros((5, 2), dtype=int),
        np.zeros((5, 3, 1, 2), dtype=int),
        np.zeros((), dtype=int),
        np.zeros((3, E), dtype=bool),
        np.zeros((3, E), dtype="U1"),
    ],
)
def test_anything_else_is_neither(array: np.ndarray) -> None:
    assert _of_array(array, E, "") is None
