"""DailyDialog's lines as dialogues that gptjax reads: {train,val,test}.jsonl of messages, two speakers in turn.

python experiments/finetune/dialogues.py --dialogues=dailydialog --to=dialogues

The training part of the set is not among its public mirrors' files everywhere: where dialogues_train.txt is absent, the
first nine tenths of the validation part are learnt from.
"""

import argparse
import json
import sys
from pathlib import Path

END = "__eou__"
ROLES = ("user", "assistant")


def messages(line: str) -> list[dict[str, str]]:
    """The utterances of a line as messages; an odd last one, which nobody answers, is left out."""
    said = [one.strip() for one in line.split(END) if one.strip()]
    said = said[: len(said) // 2 * 2]
    return [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(said)]


def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dialogues", type=Path, required=True, help="a folder with dialogues_{train,validation,test}.txt"
    )
    parser.add_argument("--to", type=Path, required=True, help="a folder")
    flags = parser.parse_args()
    read = {}
    for split in ("train", "validation", "test"):
        path = flags.dialogues / f"dialogues_{split}.txt"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        read[split] = [found for line in lines if (found := messages(line))]
    if not read["validation"] or not read["test"]:
        print(f"{flags.dialogues} has no dialogues_validation.txt and dialogues_test.txt", file=sys.stderr)
        raise SystemExit(2)
    if not read["train"]:
        cut = len(read["validation"]) * 9 // 10
        read["train"], read["validation"] = read["validation"][:cut], read["validation"][cut:]
    flags.to.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        found = [json.dumps({"messages": one}, ensure_ascii=False) for one in read[split]]
        (flags.to / f"{name}.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")
        print(f"{name:10} {len(found):,} dialogues in {flags.to / f'{name}.jsonl'}")


if __name__ == "__main__":
    main()
