"""Routing: how tokens spread over experts. The histogram of real ids, and synthetic routings to profile with.

What an id means, on the host, in graphs, in every adapter and hook:

* A slot of ``topk_ids`` is one row for the expert that it names. A token that names an expert twice has two rows there,
  each with its own weight: every slot counts once.
* -1 and `num_experts` are padding, with which engines fill up captured batches: such a slot counts nothing and adds
  nothing, and a batch of nothing else has an empty histogram, for which the static config serves.
* Any other id out of range is a mistake: refused with `InputError` where the host reads ids. A GPU, which cannot raise,
  takes it as padding.

With an `expert_map` ids stay those of all ranks, and experts of other ranks (-1 in the map) count as padding does.
`rampwrap.testing.conformance.check` tests kernels for this.
"""

import pathlib
import re
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt

from rampwrap.errors import InputError
from rampwrap.kernel.grid import FloatArray
from rampwrap.routing.counts import check_counts
from rampwrap.routing.recorded import read_recording, read_trace, split_layer

# Each hot expert of `hot:n` is visited by this share of the tokens; the rest of the slots is uniform.
HOT_SHARE = 0.9


_SPEC = re.compile(r"^(uniform|zipf|dirichlet|hot|lognormal|trace)(?::?(.+))?$")
_DEFAULTS = {"uniform": "", "zipf": "1.2", "dirichlet": "0.3", "hot": "1", "lognormal": "1.0"}
_SHORT = {"dirichlet": "dir", "lognormal": "logn", "trace": "tr:"}


@attrs.frozen
class Routing:
    """A distribution of tokens over experts.

    ``uniform``; ``zipf:S`` (popularity of rank r falls as r**-S); ``dirichlet:A`` (popularities drawn from a
    symmetric Dirichlet, smaller is more skewed); ``hot:N`` (N experts each visited by 90 % of the tokens);
    ``lognormal:S`` (log popularity is normal with deviation S); ``trace:FILE`` and ``trace:FILE:LAYER`` (popularities
    of recorded steps, in any of the formats of `rampwrap.routing.recorded`).
    """

    kind: str
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> "Routing":
        """Reads ``zipf:1.2``, ``zipf1.2``, ``dirichlet:0.3``, ``hot:2``, ``trace:loads.npz`` and the like.

        Raises:
            InputError: an unknown name, or a parameter that is not a positive number.
        """
        match = _SPEC.match(text.strip())
        if match is None or (match[1] == "uniform" and match[2]):
            raise InputError(
                f"routing {text!r} is unknown; use uniform, zipf:1.2, dirichlet:0.3, hot:1, lognormal:1.0 or trace:FILE."
            )
        kind, value = match[1], match[2] or _DEFAULTS.get(match[1], "")
        if kind == "trace":
            if not value:
                raise InputError("routing 'trace' names no file; write trace:FILE.")
        elif kind != "uniform":
            try:
                positive = (
                    float(value) > 0 and np.isfinite(float(value)) and (kind != "hot" or float(value).is_integer())
                )
            except ValueError:
                positive = False
            if not positive:
                raise InputError(
                    f"routing {text!r} has parameter {value!r}; give a positive number, as in {kind}:{_DEFAULTS[kind]}."
                )
        return cls(kind, value)

    def __str__(self) -> str:
        if self.kind == "trace":
            file, layer = split_layer(self.value)
            return _SHORT["trace"] + pathlib.Path(file).stem.replace(" ", "_") + ("" if layer is None else f":{layer}")
        return _SHORT.get(self.kind, self.kind) + self.value

    def popularity(self, num_experts: int, rng: np.random.Generator) -> FloatArray:
        """Relative load of each expert, float64 [num_experts], drawn anew at each call.

        Raises:
            InputError: more hot experts than experts, or a trace without a row for `num_experts` experts.
        """
        if self.kind == "uniform":
            return np.ones(num_experts)
        if self.kind == "zipf":
            return rng.permutation((np.arange(num_experts) + 1.0) ** -float(self.value))
        if self.kind == "dirichlet":
            return rng.dirichlet(np.full(num_experts, float(self.value)))
        if self.kind == "lognormal":
            logs = rng.normal(0.0, float(self.value), num_experts)
            # Loads are relative, and exp(710) is infinite.
            loads: FloatArray = np.exp(logs - max(logs.max() - 700.0, 0.0))
            return loads
        if self.kind == "hot":
            num_hot = int(float(self.value))
            if num_hot > num_experts:
                raise InputError(
                    f"routing hot:{num_hot} has more hot experts than there are experts ({num_experts}); lower it."
                )
            return rng.permutation(np.arange(num_experts) < num_hot).astype(np.float64)
        file, layer = split_layer(self.value)
        recorded = read_trace(file, num_experts, layer)
        return np.asarray(recorded[rng.integers(len(recorded))], dtype=np.float64)

    def sample(self, num_tokens: int, num_experts: int, top_k: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
        """Draws which experts each token visits: int32 [num_tokens, top_k], no expert twice in a row.

        Sampling without replacement by popularity is the Gumbel top-k trick: the k largest of log p + Gumbel noise.
        """
        popularity = self.popularity(num_experts, rng)
        noise = rng.gumbel(size=(num_tokens, num_experts))
        if self.kind == "hot":
            # A hot expert goes first where its coin says so; everything else is uniform.
            taken = (popularity > 0) & (rng.random((num_tokens, num_experts)) < HOT_SHARE)
            score = noise + np.where(taken, 1e6, 0.0)
        else:
            with np.errstate(divide="ignore"):
                # A popularity of 0 still has to fill up a token whose other experts are used up.
                score = noise + np.maximum(np.log(popularity / popularity.sum()), -80.0)
        order = np.argpartition(-score, min(top_k, num_experts) - 1, axis=1)[:, :top_k]
        return order.astype(np.int32)


def _parsed(routing: Routing | str) -> Routing:
    return Routing.parse(routing) if isinstance(routing, str) else routing


@attrs.frozen
class Workload:
    """One routing of one batch: what a row of a timing table was measured on; `routing` may be given as text."""

    num_tokens: int
    routing: Routing = attrs.field(converter=_parsed)
    split: str = "train"
    seed: int = 0

    @property
    def label(self) -> str:
        """``M=64 zipf1.2``: tokens, then the distribution, as timing tables spell it."""
        return f"M={self.num_tokens} {self.routing}"

    def topk_ids(self, num_experts: int, top_k: int) -> npt.NDArray[np.int32]:
        """The ids this workload stands for, int32 [num_tokens, top_k]; the same at every call."""
        spec = f"{self.label} {self.split} E={num_experts} k={top_k}".encode()
        rng = np.random.default_rng([self.seed, *spec])
        return self.routing.sample(self.num_tokens, num_experts, top_k, rng)


def workload_grid(
    token_counts: Sequence[int], routings: Sequence[Routing], split: str = "train", seed: int = 0
) -> list[Workload]:
    """Every token count with every routing, token counts outermost."""
    return [Workload(tokens, routing, split, seed) for tokens in token_counts for routing in routings]


@attrs.frozen
class RecordedWorkload(Workload):
    """A histogram that an engine recorded, with its own token count.

    Which tokens visit an expert is not in a histogram: they are drawn such that no token visits one twice.
    """

    counts: tuple[int, ...] = ()
    layer: int = 0
    step: int = 0

    @property
    def label(self) -> str:
        """``M=64 tr:dump:3@17``: tokens, file, layer and step."""
        return f"M={self.num_tokens} {self.routing}:{self.layer}@{self.step}"

    def topk_ids(self, num_experts: int, top_k: int) -> npt.NDArray[np.int32]:
        """Ids with exactly the recorded histogram, int32 [num_tokens, top_k]; the same at every call.

        Raises:
            InputError: the histogram is of another number of experts, or of another top_k.
        """
        counts = check_counts(self.counts, num_experts, self.num_tokens * top_k)
        # Slots in the order of experts, dealt to the tokens in turn: an expert with at most num_tokens slots meets
        # no token twice, and every token ends up with top_k of them.
        slots = np.repeat(np.arange(num_experts, dtype=np.int32), counts)
        rng = np.random.default_rng([self.seed, self.layer, self.step])
        return rng.permutation(slots.reshape(top_k, self.num_tokens).T)


def recorded_workloads(
    path: str, num_experts: int, top_k: int, *, limit: int = 24, split: str = "train", seed: int = 0
) -> list[Workload]:
    """At most `limit` recorded histograms that stand for all of a file, ``FILE`` or ``FILE:LAYER``.

    Raises:
        InputError: the file is none, records a model with another number of experts or top_k, one rank of several, or
            sums over steps.
    """
    file, layer = split_layer(path)
    recording, tokens = read_recording(file, num_experts, layer).batches(top_k)
    return [
        RecordedWorkload(
            num_tokens=int(tokens[row]),
            routing=Routing("trace", file),
            split=split,
            seed=seed,
            counts=tuple(recording.counts[row].tolist()),
            layer=int(recording.layer[row]),
            step=int(recording.step[row]),
        )
        for row in recording.pick(limit, top_k)
    ]
