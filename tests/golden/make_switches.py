"""Makes switches.json: arrays of choices in which every two values of two switches meet, but for refused ones.

python tests/golden/make_switches.py        (pip install allpairspy)
"""

import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, "tests")

import switches
from allpairspy import AllPairs

HERE = Path(__file__).resolve().parent
TRIES = 200


def array_of(refusal):
    """[{switch: value}, ...]."""
    values = {name: [(name, value) for value in own] for name, own in switches.SWITCHES.items()}
    every = switches.every_pair()
    allowed = {pair for pair in every if not refusal(dict(pair))}
    print(f"{len(every)} pairs, {len(allowed)} allowed", flush=True)

    def fits(row):
        return all(tuple(sorted((row[-1], other))) in allowed for other in row[:-1])

    rows = [dict(row) for row in AllPairs(list(values.values()), filter_func=fits)]
    print(f"{len(rows)} rows by allpairspy", flush=True)
    rows = [row for row in rows if not refusal(row)]
    missing = allowed.difference(*map(switches.pairs_of, rows))
    print(f"{len(rows)} allowed, {len(missing)} pairs missing", flush=True)
    rng, lost = random.Random(0), set()
    while missing - lost:
        pair = min(missing - lost)
        tries = (completed(pair, values, allowed, missing, rng) for _ in range(TRIES))
        row = next((row for row in tries if row and not refusal(row)), None)
        if row is None:
            lost.add(pair)
        else:
            rows.append(row)
            missing -= switches.pairs_of(row)
    for row in sorted(rows, key=lambda row: rng.random()):  # those whose pairs are in others too
        others = [switches.pairs_of(other) for other in rows if other is not row]
        if switches.pairs_of(row) <= set().union(*others):
            rows.remove(row)
    print(f"{len(rows)} rows; refused with anything else: {sorted(lost)}", flush=True)
    return rows


def completed(pair, values, allowed, missing, rng):
    """A choice with this pair, of values that may meet, with many pairs that are missing; None: none found."""
    row = dict(pair)
    for name in rng.sample(sorted(values), len(values)):
        if name in row:
            continue
        fitting = [
            value for value in values[name] if all(tuple(sorted((value, other))) in allowed for other in row.items())
        ]
        if not fitting:
            return None
        gain = lambda value: sum(tuple(sorted((value, other))) in missing for other in row.items()) + rng.random()
        row[name] = max(fitting, key=gain)[1]
    return {name: row[name] for name in values}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        rows = array_of(lambda chosen: switches.refusal(Path(place), chosen))
    lines = ",\n".join(f" {json.dumps(row)}" for row in rows)
    (HERE / "switches.json").write_text(f"[\n{lines}\n]\n")
