"""How the default model is fitted: the trend, CTAs per SM, and the local correction.

The correction is what a config's trend leaves over, interpolated between profiled workloads.

Ridge regression with the kernel ``k(u, v) = 1 / (1 + sum_i |u_i - v_i| / scale_i)``. It is positive definite (a
completely monotone function of the L1 distance), needs nothing but additions, magnitudes and a division, and its
held-out error hardly depends on the scales: halving or doubling all of them moves the cross-validated regret by
under 0.1 points on two kernels. The usual exp kernels are no better and are not the same on host and GPU.
"""

from collections.abc import Sequence

import attrs
import numpy as np

from rampwrap.errors import FitError
from rampwrap.kernel.grid import FloatArray, IntArray
from rampwrap.model.features import Geometry, float_log2, support_features

#: Ridge strengths among which a fit chooses by held-out error; noise variance over that of the correction.
RIDGES = (0.02, 0.1, 0.5)
#: CTAs per SM that a fit tries.
RESIDENT = (1, 2, 3, 4, 5, 6, 7, 8)
#: A known number of CTAs per SM is believed unless another one's squared error is below this share of its own.
BELIEF = 0.8
#: Cells below which a config is not fitted: a config measured so rarely was given up by the profiler.
MIN_CELLS = 4
#: Configs within this factor of a workload's best share its surprise.
ALIKE = 1.3
#: Most workloads that a correction interpolates between: it bounds the plan file and the time of a choice.
MAX_SUPPORT = 96


def nearness(queries: FloatArray, support: FloatArray) -> FloatArray:
    """Kernel matrix [..., S] of scaled features [..., 5] against [S, 5], without the rounding of `predict`."""
    distance = np.abs(queries[..., None, :] - support).sum(axis=-1)
    out: FloatArray = 1.0 / (1.0 + distance)
    return out


def spread_out(features: FloatArray, size: int) -> IntArray:
    """Indices, ascending, of at most `size` rows that cover the rest: each next one farthest from those taken."""
    if len(features) <= size:
        return np.arange(len(features))
    taken = [int(np.abs(features - np.median(features, axis=0)).sum(axis=1).argmax())]
    away = np.abs(features - features[taken[0]]).sum(axis=1)
    while len(taken) < size and away.max() > 0:
        taken.append(int(away.argmax()))
        away = np.minimum(away, np.abs(features - features[taken[-1]]).sum(axis=1))
    return np.sort(np.array(taken))


@attrs.frozen(eq=False)
class Smoother:
    """The ridge regression for one geometry: everything that does not depend on the times.

    Attributes:
        solve: float64 [S, W], residuals at the profiled workloads -> weights of the support points.
        hat: float64 [W, W], residuals -> fitted residuals.
    """

    solve: FloatArray
    hat: FloatArray

    @classmethod
    def make(cls, cross: FloatArray, prior: FloatArray, ridge: float) -> "Smoother":
        """From the kernel matrices [W, S] and [S, S].

        With fewer support points than workloads this is the subset-of-regressors form: no workload is lost.
        """
        import scipy.linalg

        normal = cross.T @ cross + ridge * prior
        # Support points that coincide for one geometry make the matrix singular; the jitter is 1e-10 of its scale.
        normal[np.diag_indices_from(normal)] += 1e-10 * np.trace(normal)
        solve: FloatArray = scipy.linalg.solve(normal, cross.T, assume_a="pos", check_finite=False)
        return cls(solve, cross @ solve)

    def held_out(self, residuals: FloatArray) -> FloatArray:
        """Leave-one-out errors [W, n] of residuals [W, n], in closed form."""
        own = np.minimum(np.diag(self.hat), 1.0 - 1e-6)[:, None]
        out: FloatArray = (residuals - self.hat @ residuals) / (1.0 - own)
        return out

    def held_out_groups(self, residuals: FloatArray, groups: IntArray) -> FloatArray:
        """The same with whole groups of workloads left out: what an unseen token count costs."""
        out = residuals - self.hat @ residuals
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            block = np.eye(len(rows)) * (1.0 + 1e-9) - self.hat[np.ix_(rows, rows)]
            out[rows] = np.linalg.solve(block, out[rows])
        return out


@attrs.frozen(eq=False)
class Fitted:
    """Coefficients of the default model, not yet rounded.

    Attributes:
        resident: int64 [C], CTAs per SM.
        coef: float64 [C, 5], microseconds.
        weights: float64 [C, S].
        support: int64 [S], workloads that became support points.
        errors: float64 [W, C], relative errors with the workload's token count left out; NaN where not measured.
    """

    resident: IntArray
    coef: FloatArray
    weights: FloatArray
    support: IntArray
    errors: FloatArray


def fit_local(
    us: FloatArray,
    points: IntArray,
    block_ms: IntArray,
    geometry: Geometry,
    known: Sequence[int | None],
    groups: IntArray,
) -> Fitted:
    """Fits every config, twice: the second time to times freed of each workload's common surprise.

    What a workload does to all its fast configs alike and that no other workload foretells (the order in which
    experts meet SMs and memory channels is our guess; 1-2 % standard deviation) cannot change a choice, but each config would interpolate it
    with weights of its own. It is the mean leave-one-out error over configs within `ALIKE` of the best. Averaged
    over four held-out splits of two kernels it takes the mean regret from 0.66 to 0.63 %, all of it from vLLM's
    kernel; with token counts left out of the training rows alone it changes nothing.

    Args, Raises: see `_fit_once`.
    """
    first = _fit_once(us, points, block_ms, geometry, known, np.arange(len(us)))
    surprise = -np.log1p(np.maximum(first.errors, -0.9))
    fastest = np.where(np.isfinite(us), us, np.inf).min(axis=1, keepdims=True)
    alike = np.isfinite(surprise) & (us <= ALIKE * fastest)
    number = alike.sum(axis=1)
    common = np.where(alike, surprise, 0.0).sum(axis=1) / np.maximum(number, 1)
    # Of one or two configs the surprise is as much their own.
    common[number < 3] = 0.0
    return _fit_once(us * np.exp(-common)[:, None], points, block_ms, geometry, known, groups)


def _fit_once(
    us: FloatArray,
    points: IntArray,
    block_ms: IntArray,
    geometry: Geometry,
    known: Sequence[int | None],
    groups: IntArray,
) -> Fitted:
    """Fits every config.

    CTAs per SM are chosen for each config, and the ridge for all together, by leave-one-out error.

    Args:
        us: float64 [W, C], NaN where not measured.
        points: int64 [W, 2 + B], slots, active experts and blocks at each of `block_ms`.
        known: [C], CTAs per SM where the kernel can say.
        groups: int64 [W], token counts; workloads of one group are left out together for `errors`.

    Raises:
        FitError: no config has enough cells.
    """
    workloads, configs = us.shape
    ran = np.isfinite(us)
    usable: list[int] = np.flatnonzero(ran.sum(axis=0) >= min(MIN_CELLS, workloads)).tolist()
    if not usable:
        raise FitError(
            f"no config ran on {MIN_CELLS} distinct workloads, the most is {ran.sum(axis=0).max()}; profile more cells."
        )
    height_of = np.searchsorted(block_ms, geometry.block_m)
    # Distances that all configs share; an average height stands for the rest.
    shared = float_log2(np.ascontiguousarray(points[:, [0, 1, 2 + len(block_ms) // 2]], dtype=np.float64))
    support = spread_out(shared, MAX_SUPPORT)
    batches: dict[bytes, list[int]] = {}
    for config in usable:
        key = (geometry.block_m[config], *geometry.launches[config])
        batches.setdefault(np.array(key).tobytes() + ran[:, config].tobytes(), []).append(config)
    tried = [
        _try(us, points, support, height_of, attrs.evolve(geometry, resident=np.full(configs, resident)), batch)
        for batch in batches.values()
        for resident in RESIDENT
    ]
    best: dict[float, dict[int, tuple[float, _Trial, int]]] = {ridge: {} for ridge in RIDGES}
    for trial in tried:
        for ridge in RIDGES:
            for place, config in enumerate(trial.batch):
                score = float(trial.scores[ridge][place])
                if known[config] == trial.resident:
                    score *= BELIEF
                if config not in best[ridge] or score < best[ridge][config][0]:
                    best[ridge][config] = (score, trial, place)
    total = {ridge: sum(np.log(score + 1e-12) for score, _, _ in best[ridge].values()) for ridge in RIDGES}
    ridge = min(RIDGES, key=lambda value: total[value])
    out = Fitted(
        geometry.resident.copy(),
        np.zeros((configs, 5)),
        np.zeros((configs, len(support))),
        support,
        np.full(us.shape, np.nan),
    )
    for config, (_, trial, place) in best[ridge].items():
        residuals, smoother = trial.residuals[:, place : place + 1], trial.smoothers[ridge]
        out.resident[config] = trial.resident
        out.coef[config] = trial.coef[place]
        out.weights[config] = (smoother.solve @ residuals)[:, 0]
        rows = np.flatnonzero(ran[:, config])
        split = groups[rows] if len(np.unique(groups[rows])) > 1 else np.arange(len(rows))
        trend = us[rows, config] / (1.0 + residuals[:, 0])
        out.errors[rows, config] = -smoother.held_out_groups(residuals, split)[:, 0] * trend / us[rows, config]
    return out


@attrs.frozen(eq=False)
class _Trial:
    """Configs of one geometry, fitted with one number of CTAs per SM and every ridge."""

    resident: int
    batch: list[int]
    coef: FloatArray
    residuals: FloatArray
    smoothers: dict[float, Smoother]
    scores: dict[float, FloatArray]


def _try(
    us: FloatArray, points: IntArray, support: IntArray, height_of: IntArray, geometry: Geometry, batch: list[int]
) -> _Trial:
    first = batch[:1]
    rows = np.flatnonzero(np.isfinite(us[:, batch[0]]))
    cut = geometry.take(np.array(first))
    features = support_features(points, height_of[first], cut)[:, :, 0].T
    blocks = points[rows, 2 + height_of[first[0]]].astype(np.float64)[:, None]
    ctas = blocks * cut.ctas_per_block
    design = np.concatenate(
        [np.ones_like(ctas), cut.waves(blocks)[0], ctas, points[rows, 1:2], points[rows, :1]], axis=1
    )
    coef = np.array([_non_negative(design, us[rows, config]) for config in batch])
    residuals = us[rows][:, batch] / (design @ coef.T) - 1.0
    cross, prior = nearness(features[rows], features[support]), nearness(features[support], features[support])
    smoothers = {ridge: Smoother.make(cross, prior, ridge) for ridge in RIDGES}
    scores = {ridge: (smoothers[ridge].held_out(residuals) ** 2).mean(axis=0) for ridge in RIDGES}
    return _Trial(int(cut.resident[0]), batch, coef, residuals, smoothers, scores)


def _non_negative(design: FloatArray, us: FloatArray) -> FloatArray:
    """Coefficients >= 0 of least squared relative error (Lawson-Hanson)."""
    import scipy.optimize

    relative = design / us[:, None]
    size = np.sqrt((relative**2).sum(axis=0))
    solution: FloatArray = scipy.optimize.nnls(relative / size, np.ones(len(us)))[0] / size
    return solution
