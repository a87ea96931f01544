"""One time a config out of rounds in which all were sampled in turn."""

from collections.abc import Mapping

import numpy as np

from rampwrap.measure.timer import Measurement

# A config this many times slower than the best of its workload in the survey is not measured again: it will not be
# chosen, and the slowest configs are where most of the time would go.
HOPELESS = 1.25
# Of so many leaders the median drift between two rounds is known better than the time of any one of them.
ENOUGH_FOR_DRIFT = 8


def summarise(samples: Mapping[int, list[list[float]]]) -> dict[int, Measurement]:
    """Median and spread of each config, after the drift that all leaders share is taken out of every round.

    Args:
        samples: by config, its microseconds round by round; the survey first, and alone for configs that were out.
    """
    leaders = {config: rounds[1:] for config, rounds in samples.items() if len(rounds) > 1}
    if len(leaders) < ENOUGH_FOR_DRIFT:
        return {
            config: Measurement.of(np.concatenate(rounds[1:] or rounds).tolist()) for config, rounds in samples.items()
        }
    middle = {config: float(np.median(np.concatenate(rounds))) for config, rounds in leaders.items()}

    def drift(number: int) -> float:
        """Of a round, against the medians of the leaders it holds."""
        shares = [np.median(samples[c][number]) / middle[c] for c in leaders if len(samples[c]) > number]
        return float(np.median(shares))

    drifts = [drift(number) for number in range(max(map(len, samples.values())))]
    return {
        config: Measurement.of(
            [us / drifts[n] for n, part in enumerate(rounds) for us in part if n or len(rounds) == 1]
        )
        for config, rounds in samples.items()
    }
