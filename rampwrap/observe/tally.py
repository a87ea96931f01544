"""`Telemetry`: what a layer of a `GraphDispatcher` chose so far, read from the GPU after any number of replays."""

from collections.abc import Sequence

import attrs


@attrs.frozen
class Telemetry:
    """Sums over the launches of one layer at the token counts of one bucket.

    Where histograms are known, launches without slots are left out: all their tokens were padding or other ranks'.

    Attributes:
        layer: its name; "" for launches that were made without one.
        num_tokens: of the plan's bucket.
        mode: how the choice was made; ``single`` where there was nothing to choose.
        counts: launches by index of the plan's configs.
        steps: launches, replays included; of mode ``single`` only those that the host made are known.
        static_us, chosen_us: predicted microseconds of the static config and of what was chosen.
        active_experts: experts with at least one token.
        concentration: sum_e (c_e / slots)^2: 1 / experts for even routing, 1 with all tokens on one expert.
        outside: launches with more or fewer slots than any candidate was profiled for, so that static served.
        on_device: whether the GPU did the counting; otherwise times are not known.
        seen: where the host counted, histograms that reached it; active_experts, concentration and outside are sums
            over these.
    """

    layer: str
    num_tokens: int
    mode: str
    counts: dict[int, int]
    steps: int
    static_us: float = 0.0
    chosen_us: float = 0.0
    active_experts: float = 0.0
    concentration: float = 0.0
    outside: int = 0
    on_device: bool = False
    seen: int = 0

    @property
    def observed(self) -> int:
        """Launches whose routing is in the sums."""
        return self.steps if self.on_device else self.seen

    @classmethod
    def of_tally(
        cls, layer: str, num_tokens: int, mode: str, candidates: Sequence[int], tally: Sequence[float]
    ) -> "Telemetry":
        """From the sums that the selecting kernel keeps (`rampwrap.model.in_graph.TALLY`).

        Args:
            layer, num_tokens, mode: as above.
            candidates: config of each place.
            tally: the sums.
        """
        counts = {index: int(count) for index, count in zip(candidates, tally, strict=False)}
        static_us, chosen_us, active, concentration, outside = tally[4:9]
        return cls(
            layer,
            num_tokens,
            mode,
            counts,
            sum(counts.values()),
            static_us,
            chosen_us,
            active,
            concentration,
            int(outside),
            True,
        )

    def __add__(self, other: "Telemetry") -> "Telemetry":
        """Both together, of one layer, bucket and mode."""
        counts = {key: self.counts.get(key, 0) + other.counts.get(key, 0) for key in {**self.counts, **other.counts}}
        names = ("steps", "static_us", "chosen_us", "active_experts", "concentration", "outside", "seen")
        return attrs.evolve(self, counts=counts, **{name: getattr(self, name) + getattr(other, name) for name in names})
