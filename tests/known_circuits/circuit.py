"""A circuit that is known: how to build the model, what is true of it, and pairs that show it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from tempfile import TemporaryDirectory

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from interp.heads import Head
from interp.model.hooked import HookedModel, load
from interp.tasks import pairs

SPECIAL = ("<pad>", "<s>", "</s>")
FOLDER = TemporaryDirectory(prefix="known-circuits-")

Edge = tuple[str, str]


@dataclass(frozen=True)
class Pair:
    """A prompt, the same task with another answer, and both answers."""

    clean: str
    corrupted: str
    right: str
    wrong: str


@dataclass(frozen=True, eq=False)
class KnownCircuit:
    """What is true of `build()`, as pairs from `draw(seed)` show it.

    Edges are (writer, reader) by name: `embed`, `L0H3`, `MLP1`; `L1H5.q`, `L1H5.k`, `MLP1`,
    `logits` (`k` and `v` are those of key-value heads).
    """

    name: str
    build: Callable[[], PreTrainedModel]
    words: tuple[str, ...]
    heads: frozenset[Head]
    mlps: frozenset[int]
    edges: frozenset[Edge]
    draw: Callable[[int], Iterator[Pair]]

    def pairs(self, model: HookedModel, n: int = 32, seed: int = 0) -> Dataset:
        """`n` pairs of different lengths."""
        drawn = list(islice(self.draw(seed), n))
        return pairs(
            model,
            clean=[pair.clean for pair in drawn],
            corrupted=[pair.corrupted for pair in drawn],
            answers=[(f" {pair.right}", f" {pair.wrong}") for pair in drawn],
            corrupted_answers=[f" {pair.wrong}" for pair in drawn],
            task=self.name,
        )

    def fresh(self) -> HookedModel:
        """The model, hooked; a test may spoil it."""
        return hooked(self.build(), self.words)


def hooked(model: PreTrainedModel, words: tuple[str, ...]) -> HookedModel:
    """`interp.load` of a model made in memory, with a tokenizer of `words` that begins with <s>."""
    model.config.architectures = [type(model).__name__]
    return load(model.eval(), tokenizer=tokenizer(words))


def tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """One token a word, behind <s>. In a folder: the bridge reads a tokenizer a second time."""
    made = Tokenizer(models.WordLevel(dict(zip(words, range(len(words)))), unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words.index("<s>"))]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    folder = f"{FOLDER.name}/{'-'.join(words[3:5])}"
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
