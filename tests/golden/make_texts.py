"""Makes texts.json: what transformers' BART, Marian and T5 of hf_encoders/ write, greedy and by beam search.

    python tests/golden/make_texts.py        (needs the parity extra: torch and transformers)

`written` is also what the live tests use, with other parameters.
"""

import json
from pathlib import Path

from make_beam import cut

FOLDER, GOLDEN = Path(__file__).with_name("hf_encoders"), Path(__file__).with_name("texts.json")
FAMILIES = ("bart", "marian", "t5")
SOURCES = [[5, 9, 14, 22, 7, 2], [11], [29, 3, 3, 17, 25, 8, 8, 12, 19, 2, 4], [6, 27, 10]]
ENDS = list(range(4, 31, 5))  # many, so that random models end at all
FORCED = {"bart": 0}  # what a family's targets always say first
MAX_TOKENS = 12
CASES = [(1, 1.0, False), (4, 1.0, False), (4, 0.0, True), (3, 2.0, "never")]  # beams, length_penalty, early_stopping


def written(model, start, forced, never, beams, penalty, stopping):
    """[(ids, score)] for each source, best first; a greedy text has no score.

    Args:
      model: of transformers.
      start, forced: what a target begins with, and what comes next, or None; neither is in the ids.
      never: ids that it may not say.
      beams, penalty, stopping: how to search.
    """
    import torch

    longest = max(map(len, SOURCES))
    ids = torch.tensor([source + [0] * (longest - len(source)) for source in SOURCES])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in SOURCES])
    options = {} if beams == 1 else dict(length_penalty=penalty, early_stopping=stopping, num_return_sequences=beams)
    before = 1 if forced is None else 2
    found = model.generate(
        ids, attention_mask=mask, num_beams=beams, do_sample=False, max_new_tokens=MAX_TOKENS + before - 1,
        eos_token_id=ENDS, pad_token_id=0, decoder_start_token_id=start, forced_bos_token_id=forced,
        forced_eos_token_id=None, bad_words_ids=[[token] for token in never] or None, use_cache=False,
        output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    new = [cut(row, ENDS) for row in found.sequences[:, before:].tolist()]
    scores = [None] * len(new) if beams == 1 else found.sequences_scores.tolist()
    each = list(zip(new, scores, strict=True))
    return [each[i : i + beams] for i in range(0, len(each), beams)]


def main():
    """Makes the file anew."""
    import transformers
    from ml_collections import ConfigDict

    from gptjax.interop import convert_run

    golden = {}
    for family in FAMILIES:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(FOLDER / family).eval()
        c = ConfigDict(convert_run.read_model(FOLDER / family)[1])
        golden[family] = [written(model, c.start, FORCED.get(family), c.suppress_tokens, *case) for case in CASES]
    GOLDEN.write_text(json.dumps(golden) + "\n")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
