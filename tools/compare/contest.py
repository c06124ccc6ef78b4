"""Two programs in turn: outputs compared first, then rounds of measurements, medians and spread."""

import statistics
from dataclasses import dataclass, field
from typing import Callable

import machine

# Cores that others may keep busy before a measurement is marked.
QUIET = 0.1

SAME, BEST = "same algorithm", "ours at its best"


@dataclass
class Step:
    """One child of a side: a command, and how its answer becomes {test: ms}."""

    command: list
    read: Callable
    env: dict = field(default_factory=dict)
    # Servers that work for it.
    pids: tuple = ()


@dataclass
class Side:
    """One program under one setting."""

    name: str
    steps: list
    # Each returns an Agreement with the other side.
    checks: list = field(default_factory=list)
    # Why its texts are not compared token by token, where they are not.
    note: str = ""


@dataclass
class Contest:
    """`same` does what `other` does; `best` are ours at their best, each labelled by its name."""

    peer: str
    setting: str
    same: Side
    other: Side
    best: list = field(default_factory=list)
    # What a reader must know of these figures.
    notes: list = field(default_factory=list)


def measure(side, load):
    """{test: ms} of one round of a side, each of its steps a child of its own."""
    found = {}
    for step in side.steps:
        ran = machine.answer(step.command, env=step.env, pids=step.pids)
        load.append({"side": side.name, "seconds": round(ran.wall_s, 2), "foreign_cores": round(ran.foreign, 3), "stolen_cores": round(ran.stolen, 3)})
        found |= step.read(ran)
    return found


def spread(values):
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values), "rounds": values}


def agreements(side, said):
    """Runs a side's checks. Returns whether all agreed."""
    for check in side.checks:
        agreement = check()
        said.append({"side": side.name, **agreement.as_json(), "text": str(agreement)})
        if not agreement.agreed:
            return False
    return True


def run(contest, rounds, tell=lambda text: None):
    """The result as JSON has it. Nothing is timed where outputs differ."""
    result = {"peer": contest.peer, "setting": contest.setting, "notes": contest.notes, "agreements": [], "refused": [],
              "rows": [], "beside": {}, "left_out": [], "load": [], "sides": {}}
    said = result["agreements"]

    def refuse(side, why):
        result["refused"].append({"side": side.name, "why": why})
        tell(f"refused: {contest.peer}, {contest.setting}, {side.name}: {why}")

    tell(f"{contest.peer}, {contest.setting}: comparing outputs")
    try:
        if not agreements(contest.same, said):
            refuse(contest.same, f"outputs differ: {said[-1]['text']}; no speed is reported")
            return result
    except machine.Failed as error:
        refuse(contest.same, str(error))
        return result
    best = []
    for side in contest.best:
        try:
            if agreements(side, said):
                best.append(side)
            else:
                refuse(side, f"outputs differ: {said[-1]['text']}; no speed is reported")
        except machine.Failed as error:
            refuse(side, str(error))
    sides = [contest.same, contest.other, *best]
    times = {side.name: {} for side in sides}
    for number in range(rounds):
        # Another side begins each round, so that none always follows the same one.
        for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
            tell(f"{contest.peer}, {contest.setting}: round {number + 1} of {rounds}, {side.name}")
            try:
                found = measure(side, result["load"])
            except machine.Failed as error:
                refuse(side, str(error))
                return result
            for test, ms in found.items():
                times[side.name].setdefault(test, []).append(ms)
    table(result, contest, best, times)
    return result


def table(result, contest, best, times):
    """Rows of the result: all of the same algorithm first, then ours at its best."""
    theirs = times[contest.other.name]
    for label, side in [(SAME, contest.same)] + [(BEST, side) for side in best]:
        for test, values in times[side.name].items():
            if test not in theirs:
                result["left_out"].append(f"{test}: {side.name} has it, {contest.other.name} has not")
                continue
            ours, peer = spread(values), spread(theirs[test])
            result["rows"].append({"label": label, "test": test, "ours": side.name, "peer": contest.other.name, "ours_ms": ours,
                                   "peer_ms": peer, "peer_over_ours": peer["median"] / ours["median"]})
    result["beside"] = {test: spread(values) for test, values in theirs.items() if test not in times[contest.same.name]}
    result["sides"] = {side.name: side.note for side in [contest.same, contest.other, *best] if side.note}
    loud = [entry for entry in result["load"] if entry["foreign_cores"] > QUIET or entry["stolen_cores"] > QUIET]
    if loud:
        worst = max(entry["foreign_cores"] + entry["stolen_cores"] for entry in loud)
        result["warning"] = f"other processes were at work during {len(loud)} of {len(result['load'])} measurements, {worst:.2f} cores at most: not a quiet run"
