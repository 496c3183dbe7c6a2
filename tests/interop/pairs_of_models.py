"""Pairs of a tiny random model as a gptjax run and as a transformers model, for tests; needs transformers.

Each family has a tokenizer of its kind: WordPiece (BERT), byte-level BPE (BART), unigrams (Marian, T5).
"""

import json
import sys

from conftest import ROOT
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as library

from gptjax.interop import convert_run

sys.path.append(str(ROOT / "tests" / "golden"))
import make_hf_encoders

TEXT = ["the cat sat on the mat", "a dog ran over the grey hill and back again", "where is it? here, it is!"] * 3
SIZE = 90


def _wordpiece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(library.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=special))
    around = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=around
    )
    return made, {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}


def _byte_level():
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made = Tokenizer(library.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXT, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return made, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}


def _unigrams(special, last=()):
    made = Tokenizer(library.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=special, unk_token="<unk>", shrinking_factor=0.8, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    made.add_special_tokens(list(last))
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    return made, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


TOKENIZERS = {
    "bert": _wordpiece,
    "bart": _byte_level,
    "marian": lambda: _unigrams(["</s>", "<unk>"], ["<pad>"]),
    "t5": lambda: _unigrams(["<pad>", "</s>", "<unk>"], ["<extra_id_0>", "<extra_id_1>"]),
}


def write_tokenizer(family, folder):
    """Writes the files of a family's tokenizer with transformers and returns the tokenizer."""
    made, settings = TOKENIZERS[family]()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def pair(family, case, directory, seed=0, **changes):
    """Returns a run directory and the transformers model that it was converted from.

    Args:
      family, case: of make_hf_encoders.CASES.
      directory: in which `hf`, transformers' folder, and `run` are made.
      seed: of the parameters.
      **changes: of transformers' config. Not `bad_words_ids` where beams are compared: transformers takes them out
        after the softmax, gptjax before it, so that what is left adds up to one.
    """
    made = write_tokenizer(family, directory / "hf")
    architecture, settings = make_hf_encoders.CASES[family][case]
    size = made.get_vocab_size()
    if family != "t5":
        changes = dict(max_position_embeddings=64) | changes
    if family == "marian":
        changes = dict(pad_token_id=size - 1, decoder_start_token_id=size - 1) | changes
    settings = settings | dict(vocab_size=size) | changes
    model = make_hf_encoders.random_model(architecture, family, settings, seed)
    model.save_pretrained(directory / "hf")
    convert_run.import_run(str(directory / "hf"), directory / "run")
    return directory / "run", model
