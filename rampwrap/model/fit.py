"""How cost models are fitted to measured times. With `correction` all that needs scipy: nothing that serves a plan imports either."""

from collections.abc import Callable

import attrs
import numpy as np

from rampwrap.errors import FitError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.measure.timings import Timings
from rampwrap.model.base import COEF_UNIT, MOST_WEIGHT, WEIGHT_UNIT, CostModel
from rampwrap.model.correction import fit_local
from rampwrap.model.cost import model_class
from rampwrap.model.features import Geometry, pass_over
from rampwrap.model.ramp4 import Ramp4
from rampwrap.model.wave import Wave

#: Distinct workloads below which neither a model nor its error can be told from chance.
MIN_WORKLOADS = 4
#: Configs within this factor of a workload's best: the ones whose error decides a choice.
NEAR = 1.1


def fit(timings: Timings, model: str = "wave", rows: IntArray | None = None) -> CostModel:
    """Fits a model to measured times.

    Args:
        timings: the table; NaN cells are left out.
        model: a key of `MODELS`.
        rows: workloads to fit on; None takes all, whatever their split.

    Raises:
        FitError: an unknown model, or too few workloads or cells for it.
    """
    name = model_class(model, "choose").name
    chosen = np.arange(len(timings.us)) if rows is None else np.asarray(rows, dtype=np.int64)
    if not len(chosen):
        raise FitError("rows is empty, so there is nothing to fit; give workloads or leave it out.")
    return FITS[name](timings, chosen)


def fitted_us(table: Timings) -> FloatArray:
    """Microseconds [W, C] that the wave model, fitted to a table's known cells, expects of all of them."""
    return fit(table).predict(table.counts)


def _wave(timings: Timings, rows: IntArray) -> Wave:
    """Fits the trend and its correction, and chooses CTAs per SM, by held-out error on `rows` alone."""
    us, counts, tokens = distinct(timings.us[rows], timings.counts[rows], timings.num_tokens[rows])
    geometry = Geometry.of(timings.grids, timings.device.num_sms)
    block_ms = np.unique(geometry.block_m)
    slots, active, heights = pass_over(counts, block_ms)
    support = np.concatenate([slots[:, None], active[:, None], heights], axis=1).astype(np.int64)
    fitted = fit_local(us, support, block_ms, geometry, [grid.ctas_per_sm for grid in timings.grids], tokens)
    weights = np.rint(fitted.weights / WEIGHT_UNIT)
    # Times that jump at random between workloads that are nearly alike: no correction is known, the trend alone serves.
    weights[(np.abs(weights) > MOST_WEIGHT).any(axis=1)] = 0
    return Wave(
        attrs.evolve(geometry, resident=fitted.resident),
        span_of(us, counts),
        *ratio_errors(us, fitted.errors, support[:, 0]),
        np.rint(fitted.coef / COEF_UNIT).astype(np.int64),
        weights.astype(np.int64),
        support[fitted.support],
        block_ms,
    )


def _ramp4(timings: Timings, rows: IntArray) -> Ramp4:
    """Ordinary least squares for each config, on the cells that ran."""
    import scipy.linalg  # here and in `correction` when called: the command line need not wait half a second for it

    geometry = Geometry.of(timings.grids, timings.device.num_sms)
    us, counts = timings.us[rows], timings.counts[rows]
    design = Ramp4.design(geometry, counts)
    coef = np.full((us.shape[1], 4), np.nan)
    errors = np.full(us.shape, np.nan)
    for config in range(us.shape[1]):
        ran = np.flatnonzero(np.isfinite(us[:, config]))
        if len(ran):
            coef[config] = scipy.linalg.lstsq(design[ran, config], us[ran, config])[0]
            orthogonal = scipy.linalg.orth(design[ran, config])
            leverage = np.minimum((orthogonal**2).sum(axis=1), 1.0 - 1e-6)
            residual = design[ran, config] @ coef[config] - us[ran, config]
            errors[ran, config] = residual / (1.0 - leverage) / us[ran, config]
    if np.isnan(coef).all():
        raise FitError("no config ran on any of the workloads to fit; profile them again.")
    return Ramp4(geometry, span_of(us, counts), *ratio_errors(us, errors, counts.sum(axis=1)), coef)


FITS: dict[str, Callable[[Timings, IntArray], CostModel]] = {Wave.name: _wave, Ramp4.name: _ramp4}
"How each of `MODELS` is fitted to the workloads `rows` of a table."


def distinct(us: FloatArray, counts: IntArray, tokens: IntArray) -> tuple[FloatArray, IntArray, IntArray]:
    """Workloads that send a token anywhere, repeated histograms averaged into one."""
    busy = np.flatnonzero(counts.any(axis=1))
    _, first, which = np.unique(counts[busy], axis=0, return_index=True, return_inverse=True)
    if len(first) < MIN_WORKLOADS:
        raise FitError(
            f"{len(first)} distinct non-empty workloads are too few to fit a model; profile {MIN_WORKLOADS} or more."
        )
    ran = np.isfinite(us[busy])
    total, number = np.zeros((2, len(first), us.shape[1]))
    np.add.at(total, which.ravel(), np.where(ran, us[busy], 0.0))
    np.add.at(number, which.ravel(), ran)
    with np.errstate(invalid="ignore"):
        mean = total / number
    order = np.argsort(first)
    return mean[order], counts[busy][first][order], tokens[busy][first][order]


def span_of(us: FloatArray, counts: IntArray) -> IntArray:
    """Least and most slots of the workloads that each config ran on; (0, 0) where it never ran."""
    slots, ran = counts.sum(axis=1)[:, None], np.isfinite(us)
    most = np.where(ran, slots, 0).max(axis=0)
    least = np.where(ran, slots, np.iinfo(np.int64).max).min(axis=0)
    return np.stack([np.minimum(least, most), most], axis=1)


def ratio_errors(us: FloatArray, errors: FloatArray, slots: IntArray) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Standard deviation of the log ratio of two configs, overall and around each number of slots.

    Args:
        us: float64 [W, C], NaN where not measured.
        errors: float64 [W, C], relative errors of predictions, NaN where unknown.
        slots: int64 [W].
    """
    known = np.isfinite(errors) & np.isfinite(us)
    fastest = np.where(known, us, np.inf).min(axis=1, keepdims=True)
    near = known & (us <= NEAR * fastest)
    number = near.sum(axis=1)
    logs = np.where(near, np.log1p(np.maximum(np.where(near, errors, 0.0), -0.9)), 0.0)
    # What a workload does to all configs alike does not change a choice.
    mean = logs.sum(axis=1, keepdims=True) / np.maximum(number, 1)[:, None]
    apart = 2.0 * np.where(near, (logs - mean) ** 2, 0.0).sum(axis=1)
    freedom = np.maximum(number - 1, 0)

    def deviation(weight: FloatArray) -> float:
        total = float((weight * freedom).sum())
        return float(f"{np.sqrt((weight * apart).sum() / total):.4g}") if total else 0.0

    around = np.unique(slots[slots > 0])
    far = np.log2(np.maximum(slots, 1)) - np.log2(around)[:, None]
    # A token count twice as large still has half a say: 5 workloads alone are too few for a deviation.
    local = tuple((int(center), deviation(weight)) for center, weight in zip(around, 1.0 / (1.0 + far**2), strict=True))
    return deviation(np.ones(len(us))), local
