"""Draws where a translating run looks while it writes: a shade for each word it writes (down) and reads (across).

python experiments/translation/alignment.py --workdir=runs/translate_lstm --source='A man rides.' --out=man.png
"""

import argparse
from pathlib import Path

import gptjax
from gptjax.interpret import alignment


def main() -> None:
    """Draws one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a run of an encoder-decoder")
    parser.add_argument("--source", required=True, help="what it reads")
    parser.add_argument("--target", help="what it is to write; default: what it writes itself, greedily")
    parser.add_argument("--layers", action="store_true", help="a picture of each layer, not of their mean")
    parser.add_argument("--out", type=Path, required=True, help="a PNG file")
    flags = parser.parse_args()
    found = alignment.alignment(gptjax.load(flags.workdir), flags.source, flags.target)
    alignment.plot(found, flags.out, flags.layers)
    print(" ".join("".join(found.target).removesuffix("end").split()))
    print(f"drawn to {flags.out}")


if __name__ == "__main__":
    main()
