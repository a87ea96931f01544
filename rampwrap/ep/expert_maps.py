"""`ExpertMaps`: on which rank every expert of every layer stands, and under which number."""

import json
import os
import pathlib
from typing import Any, Self

import attrs
import numpy as np

from rampwrap.errors import InputError
from rampwrap.files import replacing
from rampwrap.kernel.grid import IntArray
from rampwrap.kernel.placement import Placement

KEY = "physical_to_logical_map"
"The one key of the file. SGLang hands all keys to a function that knows this one alone."


@attrs.frozen(eq=False)
class ExpertMaps:
    """The experts of all ranks, layer by layer.

    Every rank has as many slots as the others; slot s of all stands on rank ``s // slots_per_rank``. An expert that
    stands in several slots has replicas, which share its tokens evenly.

    Attributes:
        num_experts: of a layer, without replicas.
        ep_size: ranks.
        physical: int64 [num_layers, num_slots], the expert in each slot.
    """

    num_experts: int
    ep_size: int
    physical: IntArray = attrs.field()

    @physical.validator
    def _whole(self, attribute: "attrs.Attribute[IntArray]", value: IntArray) -> None:
        if value.ndim != 2 or value.dtype.kind not in "iu" or not value.size:
            raise InputError(
                f"an expert map has shape {value.shape} of {value.dtype}; give integers [num_layers, num_slots]."
            )
        if self.ep_size < 1 or value.shape[1] % self.ep_size:
            raise InputError(
                f"{value.shape[1]} slots cannot be shared by ep_size={self.ep_size} ranks; give a size that divides them."
            )
        if value.min() < 0 or value.max() >= self.num_experts:
            raise InputError(
                f"an expert map holds expert {value.max() if value.min() >= 0 else value.min()} of {self.num_experts}; "
                "give the map of a model with as many experts."
            )
        for layer, row in enumerate(value):
            absent = np.flatnonzero(np.bincount(row, minlength=self.num_experts) == 0)
            if len(absent):
                raise InputError(
                    f"layer {layer} of an expert map has no slot for expert {absent[0]}; give each expert one at least."
                )

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, ep_size: int, redundant: int = 0) -> Self:
        """What engines start with: experts in their order, then the first `redundant` of them once more.

        Raises:
            InputError: the slots cannot be shared evenly.
        """
        row = np.arange(num_experts + redundant) % num_experts
        return cls(num_experts, ep_size, np.tile(row, (num_layers, 1)))

    @property
    def slots_per_rank(self) -> int:
        """Experts that a rank holds, replicas included."""
        return int(self.physical.shape[1]) // self.ep_size

    def placement(self, layer: int, rank: int) -> Placement:
        """The experts of one rank, from which an engine's `expert_map` follows.

        Raises:
            InputError: the rank holds an expert twice, which no map from experts to slots can say.
        """
        here = self.physical[layer].reshape(self.ep_size, -1)[rank]
        if len(np.unique(here)) < len(here):
            raise InputError(
                f"rank {rank} holds an expert of layer {layer} twice, so there is no expert_map; place replicas on different ranks."
            )
        return Placement(self.num_experts, here)

    def counts(self, layer: int, expert_counts: IntArray) -> IntArray:
        """Tokens in every slot: int64 [..., num_experts] -> [..., ep_size, slots_per_rank].

        Replicas share evenly; what is left over goes to the first of them, one token each.
        """
        row = self.physical[layer]
        copies = np.bincount(row, minlength=self.num_experts)
        number = np.empty_like(row)  # of the replica in each slot, among those of its expert
        number[np.argsort(row, kind="stable")] = np.arange(row.size) - np.repeat(np.cumsum(copies) - copies, copies)
        here = expert_counts[..., row]
        shared: IntArray = here // copies[row] + (number < here % copies[row])
        return shared.reshape(*shared.shape[:-1], self.ep_size, self.slots_per_rank)

    def arrivals(self, before: Self) -> IntArray:
        """Experts that each rank must fetch when these maps replace others: int64 [num_layers, ep_size].

        Raises:
            InputError: they are not maps of the same model on as many ranks.
        """
        if (before.num_experts, before.ep_size, len(before.physical)) != (
            self.num_experts,
            self.ep_size,
            len(self.physical),
        ):
            raise InputError(
                f"expert maps of {len(before.physical)} layers on {before.ep_size} ranks cannot become maps of "
                f"{len(self.physical)} layers on {self.ep_size}; give maps of the same model and ranks."
            )
        pairs = zip(
            self.physical.reshape(len(self.physical), self.ep_size, -1),
            before.physical.reshape(len(self.physical), self.ep_size, -1),
            strict=True,
        )
        return np.array([[len(np.setdiff1d(*ranks)) for ranks in zip(*layers, strict=True)] for layers in pairs])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that SGLang's ``--init-expert-location`` takes: JSON, a layer a line."""
        rows = ",\n".join(json.dumps(row) for row in self.physical.tolist())
        with replacing(path) as stream:
            stream.write(f'{{"{KEY}": [\n{rows}\n]}}\n'.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], num_experts: int, ep_size: int) -> Self:
        """Reads such a file.

        Raises:
            InputError: it cannot be read, or holds no maps of `num_experts` experts for `ep_size` ranks.
        """
        try:
            raw: Any = json.loads(pathlib.Path(path).read_bytes())
            rows = np.array(raw[KEY])
        except OSError as error:
            raise InputError(
                f"{os.fspath(path)!r} cannot be read ({error.strerror}); give a file of expert maps."
            ) from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(
                f"{os.fspath(path)!r} holds no {KEY}; give a file that 'rampwrap place' wrote, or SGLang takes."
            ) from None
        return cls(num_experts, ep_size, rows)
