"""`Board`: where the ranks of a group tell each other a line before they move data, so that no rank waits for one that will not come.

It is the store that the process group was made with. A round of an exchange is decided once for all ranks: whoever first
sees every rank's line writes "go", whoever first runs out of time writes why not, and what stands there holds for all.
So no rank enters a collective that another has given up.
"""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rampwrap.errors import GroupError

_GO = "go"
_opened: dict[tuple[str, str], int] = {}
"How often boards of a kind were made for each group: the same on all its ranks, and so a name that they share."


class Board:
    """Lines of the ranks of one group.

    Args:
        store: a torch.distributed.Store, that of the group; keys are put below `name`.
        name: the same on all ranks, another for each board.
        rank: this one.
        num_ranks: that must write.
        timeout_s: seconds that a rank is waited for.
    """

    def __init__(self, store: Any, name: str, rank: int, num_ranks: int, timeout_s: float) -> None:
        self._store = dist.PrefixStore(f"rampwrap/{name}", store)  # type: ignore[attr-defined]
        self._rank, self._num_ranks = rank, num_ranks
        self.timeout_s = timeout_s
        self._generation, self._round = 0, 0

    @classmethod
    def of(cls, group: dist.ProcessGroup, kind: str, timeout_s: float) -> "Board":
        """A new one of a group; all ranks make it together."""
        key = kind, group.group_name
        number = _opened[key] = _opened.get(key, 0) + 1
        store, rank, ranks = group.get_group_store(), dist.get_rank(group), dist.get_world_size(group)
        return cls(store, f"{kind}/{number}", rank, ranks, timeout_s)

    def exchange(self, phase: str, line: Any) -> list[Any]:
        """Writes a line and returns those of all ranks, by rank.

        Args:
            phase: what the rank is about to do; all must do the same.
            line: anything that JSON holds.

        Raises:
            GroupError: a rank did not write in time, or is about to do something else. Every rank raises it.
        """
        at = self._round
        self._round += 1
        try:
            return self._exchange(at, phase, line)
        except dist.DistNetworkError as error:
            raise GroupError(
                f"the store of the group is gone at {phase} ({error!s:.80}); the process that holds it ended, start again."
            ) from None

    def _exchange(self, at: int, phase: str, line: Any) -> list[Any]:
        keys = [self._key(at, rank) for rank in range(self._num_ranks)]
        self._store.set(keys[self._rank], json.dumps([phase, line]))
        absent = self._absent(keys)
        verdict = self._decide(at, _GO if not absent else self._late(phase, absent))
        if verdict != _GO:
            raise GroupError(verdict)
        said = [json.loads(text) for text in self._store.multi_get(keys)]
        if at:
            # All have written this round, so all have read the one before.
            self._store.delete_key(self._key(at - 1, self._rank))
            if not self._rank:
                self._store.delete_key(self._key(at - 1, "verdict"))
        phases = {its for its, _ in said}
        if len(phases) > 1:
            where = ", ".join(f"rank {rank} is at {its}" for rank, (its, _) in enumerate(said))
            raise GroupError(f"ranks are out of step: {where}; let all make the same calls, then reset() on each.")
        return [its for _, its in said]

    def _absent(self, keys: Sequence[str]) -> list[int]:
        try:
            self._store.wait(list(keys), timedelta(seconds=self.timeout_s))
            return []
        except dist.DistStoreError:
            return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def _decide(self, at: int, wish: str) -> str:
        return self._store.compare_set(self._key(at, "verdict"), "", wish).decode()

    def _late(self, phase: str, absent: Sequence[int]) -> str:
        ranks = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
        return (
            f"{ranks} did not arrive at {phase} within {self.timeout_s:g} s; see what became of "
            f"{'them' if len(absent) > 1 else 'it'}, then call reset() on every rank."
        )

    def _key(self, at: int, who: int | str) -> str:
        return f"{self._generation}/{at}/{who}"

    def reset(self) -> None:
        """Starts anew, on a clean page; all ranks must.

        Raises:
            GroupError: as `exchange` does; call it once more on every rank then.
        """
        self._generation, self._round = self._generation + 1, 0
        self.exchange("reset", None)
