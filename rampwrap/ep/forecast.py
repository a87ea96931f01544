"""`Forecast`: how long a rank's layer takes by a plan, for the tokens that its experts get."""

import attrs
import numpy as np
from scipy.optimize import nnls

from rampwrap.errors import FitError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.plan.plan import Plan
from rampwrap.policy.policies import WaveCost

HEIGHTS = (16, 64, 128)
"Rows of a block in the marginal cost: least, middle and largest `block_m` of the kernels here."


def _features(counts: IntArray) -> FloatArray:
    """Of each expert: active, tokens, blocks of each height. float64 [..., 2 + heights]."""
    parts = [counts > 0, counts, *(-(-counts // height) for height in HEIGHTS)]
    return np.stack(parts, axis=-1).astype(np.float64)


@attrs.frozen(eq=False)
class Marginal:
    """What an expert adds to the time of its rank, about: good enough to propose an exchange, not to judge it.

    Attributes:
        us: float64 [2 + heights], microseconds of an active expert, a token, a block of each of `HEIGHTS`.
    """

    us: FloatArray

    @classmethod
    def fit(cls, counts: IntArray, times_us: FloatArray) -> "Marginal":
        """Non-negative least squares of relative errors.

        Args:
            counts: int [samples, experts of a rank].
            times_us: float64 [samples]; those of 0, which a plan may predict for a rank without tokens, say nothing here.
        """
        timed = times_us > 0.0
        rows = np.concatenate([np.ones((len(counts), 1)), _features(counts).sum(axis=1)], axis=1)[timed]
        if not len(rows):
            return cls(np.zeros(rows.shape[1] - 1))
        found, _ = nnls(rows / times_us[timed, None], np.ones(len(rows)))
        return cls(found[1:])

    def of(self, counts: IntArray) -> FloatArray:
        """Microseconds of each expert, float64 like `counts`."""
        us: FloatArray = _features(counts) @ self.us
        return us


@attrs.frozen(eq=False)
class Forecast:
    """Predicted microseconds of the config that a plan would launch. The experts of a rank are alike: only their counts count.

    Attributes:
        policy: of a plan for a rank's shape.
    """

    policy: WaveCost

    @classmethod
    def by(cls, plan: Plan) -> "Forecast":
        """By a plan for a rank's shape."""
        return cls(plan.policy())

    def us(self, counts: IntArray, num_tokens: int) -> float:
        """One rank's layer.

        Args:
            counts: int64 [num_local_experts].
            num_tokens: of the whole step, by which engines choose where they see no histogram.

        Raises:
            FitError: the plan cannot predict any of its configs there.
        """
        times = self.policy.model.predict(counts)
        chosen = float(times[self.policy.index(counts, num_tokens)])
        found = chosen if np.isfinite(chosen) else float(times.min())
        if not np.isfinite(found):
            raise FitError("the plan has no config with a predicted time; profile it with more workloads.")
        return found

    def table(self, counts: IntArray, num_tokens: IntArray) -> FloatArray:
        """Several steps and ranks: int64 [steps, ranks, num_local_experts] and [steps] -> float64 [steps, ranks] us."""
        rows = [[self.us(rank, int(tokens)) for rank in step] for step, tokens in zip(counts, num_tokens, strict=True)]
        return np.array(rows, dtype=np.float64).reshape(counts.shape[:2])
