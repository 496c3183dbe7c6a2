"""Makes switches.json: arrays of choices in which every two values of two switches meet, but for refused ones.

python tests/golden/make_switches.py [switches|tuning]        (pip install allpairspy)
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


def array_of(array, refusal):
    """[{switch: value}, ...], and the pairs that are in none of them."""
    table = switches.ARRAYS[array]
    values = {name: [(name, value) for value in own] for name, own in table.items()}
    every = switches.every_pair(array)
    allowed = {pair for pair in every if not refusal(dict(pair))}
    print(f"{array}: {len(every)} pairs, {len(allowed)} allowed", flush=True)

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
        tries = (completed(pair, values, allowed, missing, rng, chance=i / 10) for i in range(TRIES))
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


def completed(pair, values, allowed, missing, rng, chance):
    """A choice with this pair, of values that may meet, with many pairs that are missing, fewer the more is left to
    chance; None: none found.
    """
    row = dict(pair)
    for name in rng.sample(sorted(values), len(values)):
        if name in row:
            continue
        fitting = [
            value for value in values[name] if all(tuple(sorted((value, other))) in allowed for other in row.items())
        ]
        if not fitting:
            return None
        gain = lambda value: (
            sum(tuple(sorted((value, other))) in missing for other in row.items()) + chance * rng.random()
        )
        row[name] = max(fitting, key=gain)[1]
    return {name: row[name] for name in values}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        folder = switches.written(Path(place))
        made = {
            array: array_of(array, lambda chosen, array=array: switches.refusal(folder, array, chosen))
            for array in sys.argv[1:] or switches.ARRAYS
        }
    made = json.loads((HERE / "switches.json").read_text()) | made
    lines = {array: ",\n".join(f"  {json.dumps(row)}" for row in rows) for array, rows in made.items()}
    text = ",\n".join(f' "{array}": [\n{rows}\n ]' for array, rows in lines.items())
    (HERE / "switches.json").write_text(f"{{\n{text}\n}}\n")
