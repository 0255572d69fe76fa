"""Small real tokenizers of every kind that cuts text differently, trained on our filler."""

from functools import cache

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from interp.tasks import filler
from interp.tasks.needle import CODEWORDS, OWNERS, QUESTION

TEXTS = [filler.text(4_000, seed=0), QUESTION, *OWNERS, *(f" {word}." for word in CODEWORDS)]
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def bytes_bpe(trim_offsets: bool):
    """Like GPT-2 (whose offsets leave the space out: `trim_offsets`) and SmolLM2."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", chat_template=CHAT
    )


def wordpiece():
    """Like BERT: lower case, [CLS] before and [SEP] after."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", sep_token="[SEP]")


def metaspace():
    """Like Llama's: no cut at punctuation, so "stone." may end in one token "e."; <s> and </s>."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


MADE = {
    "bytes": lambda: bytes_bpe(trim_offsets=False),
    "bytes, trimmed": lambda: bytes_bpe(trim_offsets=True),
    "wordpiece": wordpiece,
    "metaspace": metaspace,
    "without offsets": ByT5Tokenizer,
}


@cache
def tokenizer_named(name: str):
    """One of `MADE`, trained once."""
    return MADE[name]()


@pytest.fixture(params=[*MADE, "stories260k"])
def tokenizer(request):
    """Every kind of tokenizer in turn."""
    if request.param != "stories260k":
        return tokenizer_named(request.param)
    return AutoTokenizer.from_pretrained(request.getfixturevalue("stories260k"))


@pytest.fixture
def byte_tokenizer():
    """One tokenizer where the kind does not matter; it has a chat template."""
    return tokenizer_named("bytes")
