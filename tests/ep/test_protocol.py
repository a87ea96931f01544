"""The protocol of low latency and of bulk as a model: ranks whose stores become visible to others in any order that no release forbids.

A rank runs launches one after the other; CTAs of a launch run at any speed, its tail runs when all of them are done (what comes
after the launch). A store into a peer's memory stays on its way for as long as it likes, but for two rules: stores of a rank to one
address arrive in order, and a release arrives after what it covers, the stores of its CTA and of launches before. Each read knows of
which round its value must be. CTAs that push and those that sum are of one launch here, for the second kind may start early. Steps of many tokens go source by source, with a flag each, on two streams of a rank. Random schedules search large cases; the smallest is searched whole. Then the protocol is broken, once each way.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import pytest

from rampwrap.ep.mover import groups, in_order_of_arrival

Op = tuple[Any, ...]
State = tuple[Any, ...]


@attrs.frozen
class Rules:
    """The protocol, and what breaks it."""

    release: str = "own"
    "What a flag arrives after: the stores of its own CTA, of launches before, and of streams before an event that it waited for; or not of those; or none."
    combine_waits_for: str = "every rank"
    "Or the ranks that own experts of this rank's tokens."
    dispatch_waits_for: str = "every rank"
    "Or the ranks that sent a row."
    epoch_read: str = "by the launch"
    "Or early: by the start of the next launch, which overlaps the one before."
    epoch_bumped: str = "by the push"
    "Which reads another word; or by the dispatch itself."
    push_reads: str = "its own copy"
    "Of ids, by source; or those that the layer reads, which the next step may overwrite elsewhere."
    outputs: str = "apart"
    "From the rows that the layer was given; or over them."
    sum_waits_for: str = "the CTAs of its number"
    "Of every rank; or the first ones; or no cells, where sums are their own flags."
    buffers: int = 1
    "Sets of rows and sums, taken in turn."
    parity: bool = False
    "Whether flags hold the epoch's last bit alone."
    by_source_from: int = 3
    "Tokens of a rank from which on a step goes source by source."
    layer_waits: bool = True
    "For the flag of a source."
    sums_wait: bool = True
    "For the layer of their source."
    ctas: str = "of the most tokens"
    "Of a dispatch: of the rank that has most; or of the rank's own, which then wait for those further on too."
    resident: int = 1 << 20
    "CTAs of a launch of low latency that are on the GPU at once; the next begins, in order, when one has ended."
    marked_to: int = 0
    "Tokens of a rank up to which sums of a launch are their own flags, in places of their own that are marked where none is."
    marks: str = "are put back"
    "By who read the sum; or left, or put back behind the next dispatch, which has told."
    flags_follow: bool = True
    "The rows of the same peer; or go ahead of them."
    sums_told: str = "after the layer"
    "Or each source of its own, while rows of others are still read: it may then go on to a step in which its rows lie there."


@attrs.frozen
class Launch:
    """Programs of the CTAs of one launch, and of its tail."""

    ctas: tuple[tuple[Op, ...], ...]
    tail: tuple[Op, ...] = ()
    resident: int = 1 << 20


Routing = list[list[list[set[int]]]]
"[round][rank][token]: the ranks that own its experts."


def programs(routing: Routing, num_ranks: int, rules: Rules) -> list[list[Launch]]:
    """Of each rank, its launches of all rounds."""
    return [
        [launch for step in range(len(routing)) for launch in any_round(routing, step, rank, num_ranks, rules)]
        for rank in range(num_ranks)
    ]


def any_round(routing: Routing, step: int, rank: int, num_ranks: int, rules: Rules) -> list[Launch]:
    """By the most tokens of a rank, which all know."""
    bulk = max(map(len, routing[step])) >= rules.by_source_from
    return (by_source if bulk else one_round)(routing, step, rank, num_ranks, rules)


def any_marked(routing: Routing, step: int, rules: Rules) -> bool:
    """By the most tokens of a rank too."""
    return max(map(len, routing[step])) <= min(rules.marked_to, rules.by_source_from - 1)


def places(routing: list[list[set[int]]]) -> list[range]:
    """Of each rank, where its rows lie at every rank: behind those of the ranks before it."""
    sums = [0]
    for its in routing:
        sums.append(sums[-1] + len(its))
    return [range(*its) for its in itertools.pairwise(sums)]


def as_they_come(routing: list[list[set[int]]], receiver: int) -> dict[int, range]:
    """Where the rows of each source lie at a rank in a step by source: its own, then those of the rank before it, and so on."""
    found, first = {}, 0
    for source in in_order_of_arrival(receiver, len(routing)):
        found[source] = range(first, first := first + len(routing[source]))
    return found


def by_source(routing: Routing, step: int, rank: int, num_ranks: int, rules: Rules) -> list[Launch]:
    """One launch whose CTAs stand for two streams, one that sends and one that runs the layer; its tail sums, after both.

    Where the layer has one source at a time, it stores sums in the memory of that source."""
    buffer, lies = step % rules.buffers, [as_they_come(routing[step], receiver) for receiver in range(num_ranks)]
    mine = routing[step][rank]
    own: list[Any] = [(name, buffer, at) for at in lies[rank][rank] for name in ("ids", "row")]
    layer: list[Op] = [("epoch", "layer"), *(("put", its, step) for its in own)]
    side: list[Op] = [("after", (step, "sent")), ("epoch", "side")]
    peers = [(rank + at) % num_ranks for at in range(1, num_ranks)]
    side += [("store", to, ("ids", buffer, place), step) for to in peers for place in lies[to][rank]]
    for to in peers:
        flag = ("flag", to, ("dispatch", rank, 0), "side")
        rows: list[Op] = [("read", ("row", buffer, at), step) for at in lies[rank][rank]]
        rows += [("store", to, ("row", buffer, place), step) for place in lies[to][rank]]
        side += [*rows, flag] if rules.flags_follow else [flag, *rows]
    layer.append(("event", (step, "sent")))
    told: list[Op] = []
    for number, sources in enumerate(groups(rank, num_ranks)):
        if number and rules.layer_waits:
            layer += [("wait", ("dispatch", source, 0), "layer") for source in sources]
        sums: list[Op] = []
        for source in sources:
            theirs = list(zip(lies[rank][source], routing[step][source], strict=True))
            layer += [("read", ("ids", buffer, place), step) for place, _ in theirs]
            layer += [("read", ("row", buffer, place), step) for place, its in theirs if rank in its]
            sums += [("store", source, ("part", buffer, rank, token), step) for token in range(len(theirs))]
        layer += [*(sums if len(sources) == 1 else []), ("event", (step, number))]
        side += [("after", (step, number))] if rules.sums_wait else []
        side += sums if len(sources) > 1 else []
        flags: list[Op] = [("flag", source, ("combine", rank, 0), "side") for source in sources]
        (told if rules.sums_told == "after the layer" else side).extend(flags)
    side += told
    owners = set().union(*mine) if mine else set()
    awaited = range(num_ranks) if rules.combine_waits_for == "every rank" else sorted(owners)
    tail = (
        ("epoch", "sum"),
        *(("wait", ("combine", other, 0), "sum") for other in awaited),
        *(("read", ("part", buffer, owner, token), step) for token, its in enumerate(mine) for owner in sorted(its)),
        ("bump", "epoch", "sum"),
    )
    return [Launch((tuple(side), tuple(layer)), tail)]


def one_round(routing: Routing, step: int, rank: int, num_ranks: int, rules: Rules) -> list[Launch]:
    everyone, mine, buffer = range(num_ranks), routing[step][rank], step % rules.buffers
    lies, telling = places(routing[step]), [max(1, len(its)) for its in routing[step]]
    senders = {other for other in everyone if any(rank in its for its in routing[step][other])}
    awaited = everyone if rules.dispatch_waits_for == "every rank" else sorted(senders)
    early, bumps_early = rules.epoch_read != "by the launch", rules.epoch_bumped != "by the push"
    marked = any_marked(routing, step, rules)
    puts_late: list[Op] = []
    if rules.marks == "behind the next dispatch" and step and any_marked(routing, step - 1, rules):
        before = enumerate(routing[step - 1][rank])
        puts_late = [("put", ("marked", owner, token), None) for token, its in before for owner in sorted(its)]

    ctas = max(telling) if rules.ctas == "of the most tokens" else telling[rank]

    def sends(number: int) -> tuple[Op, ...]:
        """What a CTA of the dispatch stores."""
        if number >= len(mine):
            return ()
        place = lies[rank][number]
        return (
            *(("store", to, ("row", buffer, place), step) for to in sorted(mine[number])),
            *(("store", to, ("ids", buffer, place), step) for to in everyone),
            *(("store", to, ("copy", rank, number), step) for to in everyone),
        )

    dispatch = Launch(
        ctas=tuple(
            (
                *([] if early and step else [("epoch", f"dispatch {number}")]),
                *([("bump", "epoch", "dispatch 0")] if bumps_early and not number else []),
                *sends(number),
                *(
                    ("flag", to, ("dispatch", rank, number), f"dispatch {number}")
                    for to in everyone
                    if number < telling[rank]
                ),
                *([] if number else [("bump", "step", "dispatch 0")]),
                *(
                    ("wait", ("dispatch", other, its), f"dispatch {number}")
                    for its in range(number, max(telling), ctas)
                    for other in awaited
                    if its < telling[other]
                ),
            )
            for number in range(ctas)
        ),
        # The layer: all ids, and the rows that are for this rank.
        tail=(
            *puts_late,
            *(("read", ("ids", buffer, place), step) for other in awaited for place in lies[other]),
            *(
                ("read", ("row", buffer, place), step)
                for other in everyone
                for place, its in zip(lies[other], routing[step][other], strict=True)
                if rank in its
            ),
        ),
        resident=rules.resident,
    )

    def pushes(source: int, number: int) -> tuple[Op, ...]:
        """What a CTA does for a token of a source; one that has none is told so too."""
        reads: list[Op] = []
        if number < len(lies[source]):
            own = rules.push_reads == "its own copy"
            copy = ("copy", source, number) if own else ("ids", buffer, lies[source][number])
            reads = [("read", copy, step)]
            if rank in routing[step][source][number]:
                if rules.outputs != "apart":
                    reads.append(("read", ("row", buffer, lies[source][number]), step))
                part = ("marked", rank, number) if marked else ("part", buffer, rank, number)
                reads.append(("store", source, part, step))
        register = f"push {source} {number}"
        first = not bumps_early and not number and source == rank
        return (
            ("step", register),
            *reads,
            ("note" if marked else "flag", source, ("combine", rank, number), register),
            *([("bump", "epoch", register)] if first else []),
        )

    def takes(number: int, its: set[int]) -> tuple[Op, ...]:
        """What a CTA does for a token of this rank, where sums are their own flags."""
        places = [("marked", owner, number) for owner in sorted(its)]
        awaited = adds if rules.sum_waits_for != "sums alone" else []
        return (
            ("step", f"sum {number}"),
            *(("wait", ("combine", other, number), f"sum {number}") for other in awaited),
            *(("until", place) for place in places),
            *(("read", place, step) for place in places),
            *(("put", place, None) for place in places if rules.marks == "are put back"),
        )

    push = tuple(pushes(source, number) for source in everyone for number in range(telling[source]))
    owners = set().union(*mine) if mine else set()
    adds = everyone if rules.combine_waits_for == "every rank" else sorted(owners)
    sums = tuple(
        (
            ("step", f"sum {number}"),
            *(
                (
                    "wait",
                    ("combine", other, number if rules.sum_waits_for == "the CTAs of its number" else 0),
                    f"sum {number}",
                )
                for other in adds
            ),
            *(("read", ("part", buffer, owner, number), step) for owner in sorted(its)),
        )
        for number, its in enumerate(mine or [set()])
    )
    if marked:
        sums = tuple(takes(number, its) for number, its in enumerate(mine or [set()]))
    # The next dispatch's first lines, where that launch does not wait for this one.
    prologue: list[tuple[Op, ...]] = []
    if early and step + 1 < len(routing):
        following = max(1, *map(len, routing[step + 1]))
        prologue = [tuple(("epoch", f"dispatch {its}") for its in range(following))]
    return [dispatch, Launch((*push, *sums, *prologue), resident=rules.resident)]


@attrs.frozen
class Model:
    """All ranks' programs, and the steps that lead from a state to the next.

    A state is: for each rank its launch and the places of its CTAs and tail, registers, memory; and the stores on their way.
    """

    launches: list[list[Launch]]
    rules: Rules

    def start(self) -> State:
        ranks = tuple((0, self._places(rank, 0), (), (("epoch", 0), ("step", 0))) for rank in range(len(self.launches)))
        return ranks, ()

    def _places(self, rank: int, launch: int) -> tuple[int, ...]:
        if launch == len(self.launches[rank]):
            return ()
        return (0,) * (len(self.launches[rank][launch].ctas) + 1)

    def done(self, state: State) -> bool:
        return all(launch == len(self.launches[rank]) for rank, (launch, *_) in enumerate(state[0]))

    def steps(self, state: State) -> Iterator[tuple[int, Any]]:
        """What may happen next: (rank, CTA of it), or (-1, a store that arrives)."""
        ranks, flying = state
        for rank, (launch, places, _, _) in enumerate(ranks):
            if launch == len(self.launches[rank]):
                continue
            its = self.launches[rank][launch]
            left = [at for at, cta in enumerate(its.ctas) if places[at] < len(cta)]
            ended, resident = not left, left[: its.resident]
            for number, (place, program) in enumerate(zip(places, (*its.ctas, its.tail), strict=True)):
                is_tail = number == len(its.ctas)
                if not is_tail and number not in resident:
                    continue
                if place < len(program) and (ended or not is_tail) and self._may(ranks[rank], program[place]):
                    yield rank, number
        for index, (_, to, address, _, after) in enumerate(flying):
            first = not any((at[1], at[2]) == (to, address) for at in flying[:index])
            if first and not any(at[0] in after for at in flying):
                yield -1, index

    def _may(self, its: Any, op: Op) -> bool:
        _, _, registers, memory = its
        if op[0] == "after":
            return op[1] in dict(registers)
        if op[0] == "until":
            return dict(memory).get(op[1]) is not None
        if op[0] != "wait":
            return True
        return dict(memory).get(op[1], 0) == self._flag(dict(registers)[op[2]])

    def _flag(self, epoch: int) -> int:
        return (epoch + 1) % 2 if self.rules.parity else epoch + 1

    def step(self, state: State, choice: tuple[int, Any]) -> State | str:
        """The next state, or what went wrong."""
        ranks, flying = state
        who, which = choice
        if who < 0:
            _, to, address, value, _ = flying[which]
            launch, places, registers, memory = ranks[to]
            written = (launch, places, registers, _put(memory, address, value))
            return self._with(ranks, to, written), flying[:which] + flying[which + 1 :]
        launch, places, registers, memory = ranks[who]
        its = self.launches[who][launch]
        op = (*its.ctas, its.tail)[which][places[which]]
        kind = op[0]
        if kind == "read" and dict(memory).get(op[1]) != op[2]:
            return f"rank {who} reads {op[1]} of round {dict(memory).get(op[1])} in round {op[2]}"
        if kind == "epoch":
            registers = _put(registers, op[1], dict(memory)["epoch"])
        elif kind == "step":  # the step in progress is the one after the epoch
            registers = _put(registers, op[1], dict(memory)["step"] - 1)
        elif kind == "event":
            registers = _put(registers, op[1], True)
        elif kind == "put":
            memory = _put(memory, op[1], op[2])
        elif kind == "bump":
            memory = _put(memory, op[1], dict(registers)[op[2]] + 1)
        elif kind in ("store", "flag", "note"):
            name = (who, launch, which, places[which])
            after: frozenset[Any] = frozenset()
            value = op[3] if kind == "store" else self._flag(dict(registers)[op[3]])
            if kind == "flag":
                after = self._covered(flying, who, launch, which)
                after |= self._covered_by_events(flying, who, launch, which, places[which])
            flying = (*flying, (name, op[1], op[2], value, after))
        places = (*places[:which], places[which] + 1, *places[which + 1 :])
        if all(place == len(program) for place, program in zip(places, (*its.ctas, its.tail), strict=True)):
            launch, places = launch + 1, self._places(who, launch + 1)
        return self._with(ranks, who, (launch, places, registers, memory)), flying

    def _covered(self, flying: Any, rank: int, launch: int, cta: int) -> frozenset[Any]:
        """Stores that a flag arrives after."""
        if self.rules.release == "none":
            return frozenset()
        return frozenset(
            name for name, *_ in flying if name[0] == rank and (name[1] < launch or (name[1], name[2]) == (launch, cta))
        )

    def _covered_by_events(self, flying: Any, rank: int, launch: int, cta: int, place: int) -> frozenset[Any]:
        """Stores of other streams, before events that this one waited for."""
        ctas = self.launches[rank][launch].ctas
        if self.rules.release != "own" or cta == len(ctas):
            return frozenset()
        awaited = {its[1] for its in ctas[cta][:place] if its[0] == "after"}
        return frozenset(
            name
            for name, *_ in flying
            if name[:2] == (rank, launch)
            and any(its[0] == "event" and its[1] in awaited for its in ctas[name[2]][name[3] :])
        )

    @staticmethod
    def _with(ranks: Any, rank: int, its: Any) -> Any:
        return (*ranks[:rank], its, *ranks[rank + 1 :])


def _put(pairs: Any, key: Any, value: Any) -> Any:
    return tuple(sorted({**dict(pairs), key: value}.items(), key=str))


def at_random(model: Model, rng: random.Random) -> str | None:
    """One schedule, some ranks and some stores slower than others; what went wrong."""
    state, patience = model.start(), [rng.choice((1, 1, 5, 20)) for _ in model.launches]
    lazy = rng.choice((0.02, 0.3, 1.0, 5.0))
    while not model.done(state):
        choices = list(model.steps(state))
        if not choices:
            return "all wait for each other"
        weights = [lazy if who < 0 else 1 / patience[who] for who, _ in choices]
        after = model.step(state, rng.choices(choices, weights)[0])
        if isinstance(after, str):
            return after
        state = after
    return None


def in_every_order(model: Model) -> tuple[str | None, int]:
    """All schedules: what goes wrong in one of them, and how many states there are."""
    seen, waiting = {model.start()}, [model.start()]
    while waiting:
        state = waiting.pop()
        choices = list(model.steps(state))
        if not choices and not model.done(state):
            return "all wait for each other", len(seen)
        # Sending a store changes nothing that others see, and it may arrive late: one order is as good as any. So with events.
        sends = [
            its for its in choices if its[0] >= 0 and _op(model, state, its)[0] in ("store", "flag", "note", "event")
        ]
        for choice in sends[:1] or choices:
            after = model.step(state, choice)
            if isinstance(after, str):
                return after, len(seen)
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return None, len(seen)


def _op(model: Model, state: State, choice: tuple[int, Any]) -> Op:
    rank, number = choice
    launch, places, _, _ = state[0][rank]
    its = model.launches[rank][launch]
    return (*its.ctas, its.tail)[number][places[number]]


def drawn(rng: random.Random, num_ranks: int, rounds: int = 3) -> Routing:
    """Few tokens, none on some ranks; a token has up to two owners, or none."""
    return [
        [
            [set(rng.choices(range(num_ranks), k=rng.randrange(3))) for _ in range(rng.randrange(3))]
            for _ in range(num_ranks)
        ]
        for _ in range(rounds)
    ]


def failures(rules: Rules, runs: int, ranks: Sequence[int] = (2, 3), seed: int = 0) -> list[str]:
    found = []
    for run in range(runs):
        rng = random.Random(1000 * seed + run)
        num_ranks = ranks[run % len(ranks)]
        reason = at_random(Model(programs(drawn(rng, num_ranks), num_ranks, rules), rules), rng)
        found += [] if reason is None else [reason]
    return found


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(buffers=2),
        Rules(by_source_from=1, parity=True),
        Rules(by_source_from=2),
        Rules(resident=1),
        Rules(resident=2),
        Rules(marked_to=2),
        Rules(marked_to=1),
        Rules(marked_to=1, by_source_from=2),
        Rules(marked_to=2, resident=1),
    ],
    ids=[
        "low latency",
        "two buffers",
        "by source, its parity",
        "both kinds",
        "a CTA at once",
        "two CTAs at once",
        "own flags",
        "own flags and cells",
        "own flags and by source",
        "own flags, a CTA at once",
    ],
)
def test_the_protocol_holds(rules: Rules) -> None:
    """One buffer is enough, for steps of both kinds that follow each other too; one bit of the epoch only for those by source."""
    assert failures(rules, 60, (2, 3, 4)) == []


MUTANTS = {
    "one bit of the epoch, which a cell that was left out a step has too": (Rules(parity=True), "reads"),
    "flags without release": (Rules(release="none"), "reads"),
    "push reads what the layer reads": (Rules(push_reads="the layer's"), "reads"),
    "sums wait for the first CTAs": (Rules(sum_waits_for="the first"), "reads"),
    "combine waits for owners only": (Rules(combine_waits_for="owners"), "reads|wait"),
    "dispatch waits for senders only": (Rules(dispatch_waits_for="senders"), "reads|wait"),
    "the epoch is read early": (Rules(epoch_read="early"), "reads|wait"),
    "the epoch is bumped by the dispatch": (Rules(epoch_bumped="by the dispatch"), "wait"),
    "own flags, left after they were read": (Rules(marked_to=2, marks="are left"), "reads"),
    "own flags, put back behind the next dispatch": (
        Rules(marked_to=2, marks="behind the next dispatch"),
        "reads|wait",
    ),
    "own flags and no cells": (Rules(marked_to=2, sum_waits_for="sums alone"), "reads|wait"),
    "own flags, cells of owners only": (Rules(marked_to=2, combine_waits_for="owners"), "reads|wait"),
    "own flags, push reads what the layer reads": (Rules(marked_to=2, push_reads="the layer's"), "reads"),
    "own flags, the epoch is read early": (Rules(marked_to=2, epoch_read="early"), "reads|wait"),
    "by source, flags without release": (Rules(release="none", by_source_from=1), "reads"),
    "by source, flags do not cover the other stream": (Rules(release="of its stream", by_source_from=1), "reads"),
    "by source, flags ahead of rows": (Rules(flags_follow=False, by_source_from=2), "reads|wait"),
    "by source, the layer does not wait": (Rules(layer_waits=False, by_source_from=2), "reads|wait"),
    "by source, sums do not wait for the layer": (Rules(sums_wait=False, by_source_from=1), "reads|wait"),
    "by source, combine waits for owners only": (Rules(combine_waits_for="owners", by_source_from=2), "reads|wait"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_protocols_are_seen(name: str) -> None:

    rules, said = MUTANTS[name]
    found = failures(rules, 90)
    assert len(found) >= 3 and all(re.search(said, reason) for reason in found), found[:3]


FEW, MANY = 2, 5
"Tokens of two ranks."


@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("ctas", ["of the most tokens", "of its own tokens"])
def test_no_cta_keeps_from_beginning_what_another_waits_for(ctas: str, resident: int) -> None:
    """Where few CTAs of a launch fit at once, beside other kernels or by a limit: those of one number meet, in order. A rank of few
    tokens whose CTAs waited for those further on would wait for one that cannot begin before it is told by one that cannot begin."""
    rules = Rules(ctas=ctas, resident=resident, by_source_from=1 << 20)
    routing: Routing = [[[{0}] * FEW, [{1}] * MANY]] * 2
    found = {at_random(Model(programs(routing, 2, rules), rules), random.Random(run)) for run in range(20)}
    holds = ctas == "of the most tokens" or 2 * resident > FEW
    assert found == {None if holds else "all wait for each other"}


SHIFTED: Routing = [[[{2}] * 4, [{2}], []], [[], [{2}] * 2, []]]
"Tokens of the first two of three ranks; then of the second alone, whose rows lie where those of the first lay."


def test_sums_are_told_when_no_row_is_read_any_more() -> None:
    """A rank that heard sooner would overwrite rows of another: at a third rank, and only where counts change."""

    def found(told: str) -> list[str | None]:
        rules = Rules(sums_told=told, by_source_from=1)
        return [at_random(Model(programs(SHIFTED, 3, rules), rules), random.Random(run)) for run in range(100)]

    assert not any(found("after the layer"))
    reasons = [its for its in found("each") if its is not None]
    assert len(reasons) >= 5 and all("of round 1 in round 0" in its for its in reasons), reasons[:3]


GROWING: Routing = [[[{2}], [{2}] * 4, []], [[{2}] * 4, [], []]]
"Tokens of three ranks; then more of the first, whose rows lie where those of the second lay."


def test_outputs_do_not_lie_over_the_rows() -> None:
    """A rank that has its sums sends the next rows, and where counts change these lie where others are still pushed from."""

    def found(outputs: str, runs: int) -> list[str | None]:
        rules = Rules(outputs=outputs, by_source_from=1 << 20)
        return [at_random(Model(programs(GROWING, 3, rules), rules), random.Random(run)) for run in range(runs)]

    assert not any(found("apart", 20))
    reasons = [its for its in found("over the rows", 90) if its is not None]
    assert len(reasons) >= 3 and all("of round 1 in round 0" in its for its in reasons), reasons[:3]


SMALLEST: Routing = [[[{1}], []], [[{1}], []], [[{0}], []]]
"Two ranks, one token of the first, which goes to the other, twice, and then stays."


@pytest.mark.parametrize(("first", "marked"), [(1, 0), (3, 0), (3, 1)], ids=["by source", "low latency", "own flags"])
def test_the_smallest_case_in_every_order(first: int, marked: int) -> None:
    rules, case = Rules(by_source_from=first, marked_to=marked), SMALLEST[: 2 if first == 1 or marked else 3]
    reason, states = in_every_order(Model(programs(case, 2, rules), rules))
    assert reason is None and states > 200


@pytest.mark.parametrize(
    "rules",
    [
        Rules(release="none"),
        Rules(combine_waits_for="owners"),
        Rules(epoch_read="early"),
        Rules(marked_to=1, marks="are left"),
        Rules(marked_to=1, combine_waits_for="owners"),
    ],
    ids=str,
)
def test_broken_protocols_fail_in_the_smallest_case(rules: Rules) -> None:
    reason, _ = in_every_order(Model(programs(SMALLEST, 2, rules), rules))
    assert reason is not None
