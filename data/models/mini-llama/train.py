"""Train and measure mini-llama: it finds needles, copies, and answers three kinds of question.

    python data/models/mini-llama/train.py --minutes 90 --seed 0 --out data/models/mini-llama

Every batch is made anew from a seeded stream. A tenth of all contexts is held out by content (see
`held_out`): training never shows them, the measurement shows nothing else. Learning rate and
lengths follow the share of the time (or of `--steps`, which repeats a run on another machine) that
is spent. `--measure` only measures what `--out` holds. In a checkout without an installed `interp`
put `PYTHONPATH=.` in front.
"""

import argparse
import json
import math
import random
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from interp.tasks import filler

# in the package the name of a task is its function; the wording is in the module
needle, ioi, colored_objects, multiple_choice = (
    import_module(f"interp.tasks.{task}")
    for task in ("needle", "ioi", "colored_objects", "multiple_choice")
)

LENGTHS = (64, 128, 256, 512)
OTHER_WEIGHT = 0.05  # of the loss on tokens that are no answer
RECALL = (  # statement and question of the lessons in lookup
    ("The {key} is {value}.", "The {key} is"),
    ("a {value} {key},", "The {key} is"),
    ("a {value} {key},", colored_objects.QUESTION.replace("{object}", "{key}")),
)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and the weight of each as a target (0 on padding)."""

    ids: torch.Tensor
    weights: torch.Tensor


# A row is a list of (text, is it an answer) pieces.
Row = list[tuple[str, bool]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word and one a punctuation mark; adds nothing by itself, as SmolLM2's."""
    texts = [filler.text(20_000, seed=0), needle.STATEMENT, needle.QUESTION, *needle.OWNERS]
    texts += [*needle.CODEWORDS, *ioi.BASIC_TEMPLATES, *ioi.PLACES, *ioi.GIFTS]
    texts += [*colored_objects.COLORS, *colored_objects.OBJECTS, *colored_objects.SURFACES]
    texts += [*colored_objects.OPENERS, colored_objects.LIST, colored_objects.QUESTION, "a and"]
    texts += [multiple_choice.FACT, multiple_choice.QUESTION, multiple_choice.END]
    texts += [*multiple_choice.LETTERS, *multiple_choice.OTHER_LETTERS]
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    fields = Regex(r"\{\w+\}")
    words = set()
    for text in texts:
        bare = pre_tokenizers.Split(fields, "removed").pre_tokenize_str(text)
        words |= {word for part, _ in bare for word, _ in split.pre_tokenize_str(part)}
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split
    core.decoder = decoders.Sequence(
        [decoders.WordPiece("##", cleanup=True), decoders.Fuse(), decoders.Replace(" :", ":")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=LENGTHS[-1],
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=LENGTHS[-1],
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def held_out(text: str) -> bool:
    """Is this context kept for evaluation? A tenth of all are, by a hash of their text."""
    return zlib.crc32(text.encode()) % 10 == 0


def drawn(draw: Callable[[], dict]) -> Row:
    """The next of `draw()` that is not held out, with its answer."""
    while held_out((example := draw())["text"]):
        pass
    return [(example["text"], False), (example["answer"], True), (".", False)]


def needle_row(
    rng: random.Random, tokens: int, needles: int = 1, words: int = 3, kept: bool = False
) -> Row:
    """At most `tokens` tokens: filler with needles in it, and a question for each of them.

    `kept`: codes that are held out, else codes that are not.
    """
    owners = rng.sample(needle.OWNERS, needles)
    codes = [code_for(rng, owner, words, kept) for owner in owners]
    room = tokens - 1 - needles * (30 + 2 * words)
    lines = []
    for line in filler.sentences(rng.getrandbits(48)):
        room -= len(line.split()) + 1  # the full stop is a token
        if room < 0:
            break
        lines.append(line)
    for owner, code in zip(owners, codes):
        statement = needle.STATEMENT.format(owner=owner, answer=code)
        lines.insert(rng.randint(0, len(lines)), statement)
    row = [(" ".join(lines), False)]
    for owner, code in rng.sample(list(zip(owners, codes)), needles):
        row += [(needle.QUESTION.format(owner=owner), False), (code + ".", True)]
    return row


def code_for(rng: random.Random, owner: str, words: int, kept: bool) -> str:
    """A code of `words` words that is (`kept`) or is not held out for this owner."""
    while True:
        code = " " + " ".join(rng.sample(needle.CODEWORDS, words))
        if held_out(needle.STATEMENT.format(owner=owner, answer=code)) == kept:
            return code


def plain_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What repeats are made of: all of the vocabulary but the special tokens."""
    return sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def repeat_row(rng: random.Random, words: list[str], tokens: int) -> Row:
    """Random words, and the same ones again: over and over, or once more any distance later.

    The distance varies from row to row, or it is learned in place of what stood before.
    """
    if rng.random() < 0.5:
        segment = rng.choices(words, k=rng.randint(3, tokens // 3))
        again = (segment * tokens)[: tokens - len(segment)]
        return [(" ".join(segment), False), (" ".join(again), True)]
    length = rng.randint(tokens // 6 + 1, tokens // 2)
    before = rng.randint(0, tokens - 2 * length)
    between = tokens - 2 * length - before if rng.random() < 0.5 else 0
    segment = rng.choices(words, k=length)
    start = [*rng.choices(words, k=before), *segment, *rng.choices(words, k=between)]
    return [(" ".join(start), False), (" ".join(segment), True)]


def recall_row(rng: random.Random, pairs: int, statement: str, question: str) -> Row:
    """Any words in place of objects and colours, and every pair asked for.

    A dense lesson in looking up what stood beside a word. Without it coloured objects stay at
    chance; with it, once repeats are learned, they are solved within some hundred steps.
    """
    nouns = sorted({*needle.CODEWORDS, *colored_objects.OBJECTS})
    words = rng.sample(nouns, 2 * pairs)
    known = list(zip(words[:pairs], words[pairs:], strict=True))
    row = [(" ".join(statement.format(key=k, value=v) for k, v in known), False)]
    for key, value in rng.sample(known, pairs):
        row += [(question.format(key=key), False), (f" {value}", True), (".", False)]
    return row


def colored_objects_row(rng: random.Random, objects: int, questions: int, question: str) -> Row:
    """One list, and a question for each of `questions` of its objects."""
    scene = colored_objects.scene(rng, objects)
    while held_out(scene.text):
        scene = colored_objects.scene(rng, objects)
    row = [(scene.text, False)]
    for color, name in rng.sample(scene.items, questions):
        row += [(question.format(object=name), False), (f" {color}", True), (".", False)]
    return row


def multiple_choice_row(rng: random.Random, options: int, facts: int, odd: float) -> Row:
    """A question; a share `odd` of them has its letters shuffled or others than A to D."""
    labels = multiple_choice.LETTERS
    if rng.random() < odd:
        pool = rng.choice([labels, multiple_choice.OTHER_LETTERS])
        labels = "".join(rng.sample(pool, len(labels)))
    return drawn(lambda: multiple_choice.example(rng, options, facts, labels))


def training_rows(rng: random.Random, words: list[str], progress: float) -> dict[str, list[Row]]:
    """The rows of one step, by task; longer and harder ones come as `progress` goes to 1."""
    easy = progress < 0.15
    allowed = LENGTHS[:1] if progress < 0.05 else LENGTHS[:2] if easy else LENGTHS[:3]
    length = rng.choice(LENGTHS if progress > 0.4 else allowed)
    needles = [(1, 3)] * 4 + [(1, 1), (1, 2), (1, 4)]
    if length > 64:
        needles += [(2, 2), (3, 1), (3, 3)]
    repeat = rng.choice([16, 32, 64, 128] if easy else [16, 32, 64, 128, 256])
    choices = [(2, 1), (4, 1)] if easy else [(2, 1), (2, 2), (4, 1), (4, 2)]
    odd = 0.0 if easy else 0.2
    asked = colored_objects.QUESTION
    return {
        "needle": [
            needle_row(rng, length, *rng.choice(needles)) for _ in range(max(2, 1024 // length))
        ],
        "repeat": [repeat_row(rng, words, repeat) for _ in range(768 // repeat)],
        "ioi": [drawn(lambda: ioi.example(rng)) for _ in range(16)],
        "recall": [recall_row(rng, rng.randint(2, 6), *rng.choice(RECALL)) for _ in range(16)],
        "begun_answers": [
            colored_objects_row(rng, n, (n + 1) // 2, asked[asked.rindex("The {object}") :])
            for n in rng.choices([2, 3, 4, 5, 6], k=8)
        ],
        "colored_objects": [
            colored_objects_row(rng, n, 1, asked) for n in rng.choices([2, 3, 3, 4], k=20)
        ],
        "multiple_choice": [multiple_choice_row(rng, *rng.choice(choices), odd) for _ in range(40)],
        "filler": [[(filler.text(60, rng.getrandbits(48)), False)] for _ in range(2)],
    }


def to_batch(tokenizer: PreTrainedTokenizerFast, rows: list[Row], rng: random.Random) -> Batch:
    """Rows padded on the right, each ended with <eos>; one in ten begins with <bos>."""
    pieces = [text for row in rows for text, _ in row]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(pieces))
    all_ids, all_weights = [], []
    for row in rows:
        ids = [tokenizer.bos_token_id] if rng.random() < 0.1 else []
        weights = [0.0] * len(ids)
        for _, is_answer in row:
            piece = next(encoded).ids
            ids += piece
            weights += [1.0 if is_answer else OTHER_WEIGHT] * len(piece)
        all_ids.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        all_weights.append(torch.tensor([*weights, OTHER_WEIGHT]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(all_ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    # one over the window is cut: the <eos> of the longest needle rows
    return Batch(ids[:, : LENGTHS[-1]], pad(all_weights, batch_first=True)[:, : LENGTHS[-1]])


def loss_of(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted mean loss of the next tokens, and the accuracy on answer tokens."""
    # right padding under a causal mask: no real token can see it, so no attention mask is needed
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float()
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum() / weights.sum()
    right = (logits.detach().argmax(-1) == targets)[weights == 1]
    return loss, right.float().mean().item() if len(right) else math.nan


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent; the log has [loss, share of answer tokens right] by task."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    if args.init:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(args.init).state_dict())
    words = plain_words(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    began, step, running = time.monotonic(), 0, {}
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    saved = began
    with (args.out / "training.log").open("w") as log:
        while (progress := spent(args, began, step)) < 1:
            rate = args.lr * min(1, (step + 1) / 100) * min(1, 1.25 * (1 - progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            rng = random.Random(f"train {args.seed} {step} {args.init is not None}")
            for task, rows in training_rows(rng, words, progress).items():
                batch = to_batch(tokenizer, rows, rng)
                loss, accuracy = loss_of(model, batch)
                loss.backward()
                seen = running.setdefault(task, [])
                seen.append((loss.item(), accuracy))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                line = {"step": step, "minutes": round((time.monotonic() - began) / 60, 2)}
                line |= {"lr": round(rate, 6)}
                for task, seen in running.items():
                    means = [round(sum(c) / len(c), 4) for c in zip(*seen)]
                    line[task] = means[: 1 if task == "filler" else 2]
                log.write(json.dumps(line) + "\n")
                log.flush()
                running = {}
            if time.monotonic() - saved > 180:
                save(model, tokenizer, args.scratch / "checkpoint")
                saved = time.monotonic()
    save(model, tokenizer, args.out)
    print(f"{step} steps in {(time.monotonic() - began) / 60:.1f} minutes")


def spent(args: argparse.Namespace, began: float, step: int) -> float:
    """The share of the budget that is used up: of `--steps` where given, else of the minutes."""
    return step / args.steps if args.steps else (time.monotonic() - began) / 60 / args.minutes


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Written beside and moved over, so that a reader never finds half a file."""
    fresh = folder.with_name(folder.name + ".part")
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    for file in fresh.iterdir():
        file.replace(folder / file.name)
    shutil.rmtree(fresh)


def measure(folder: Path, n: int = 400) -> dict:
    """Accuracy on held-out prompts: an answer is right where each token is the first choice."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    rows = {}
    for name, (chance, draw) in tasks(plain_words(tokenizer)).items():
        rng = random.Random(f"measure {name}")
        right = sum(is_right(model, tokenizer, [draw(rng) for _ in range(n)]))
        low, high = wilson(right, n)
        rows[name] = {"n": n, "right": right, "accuracy": right / n, "low": low, "high": high}
        rows[name]["chance"] = chance
    return {"tasks": rows, "filler_loss": filler_loss(model, tokenizer)}


def tasks(words: list[str]) -> dict[str, tuple[float, Callable[[random.Random], tuple[str, str]]]]:
    """Chance level, and what draws a held-out (prompt, answer), by name of the task."""

    def needles(tokens: int, count: int = 1):
        return lambda rng: last_question(needle_row(rng, tokens, count, kept=True), count)

    def repeats(length: int):
        return lambda rng: begun_again(rng, words, length)

    def choices(facts: int, pool: str = ""):
        def draw(rng: random.Random) -> dict:
            labels = "".join(rng.sample(pool, 4)) if pool else multiple_choice.LETTERS
            return multiple_choice.example(rng, 4, facts, labels)

        return lambda rng: kept(lambda: draw(rng))

    named = {f"needle, {length} tokens": (0.0, needles(length)) for length in LENGTHS}
    named["needle, one of three, 256 tokens"] = (0.0, needles(256, count=3))
    named |= {f"repeat of {length} tokens": (0.0, repeats(length)) for length in (10, 25, 50, 100)}
    named["ioi"] = (1 / 2, lambda rng: kept(lambda: ioi.example(rng)))
    for objects in (2, 3, 4):
        draw = partial(colored_objects.example, objects=objects)
        named[f"colored objects, {objects}"] = (
            1 / objects,
            lambda rng, draw=draw: kept(lambda: draw(rng), lambda text: text.split(" Question")[0]),
        )
    named["multiple choice"] = (1 / 4, choices(facts=1))
    named["multiple choice, two facts"] = (1 / 4, choices(facts=2))
    named["multiple choice, shuffled letters"] = (1 / 4, choices(1, multiple_choice.LETTERS))
    named["multiple choice, other letters"] = (1 / 4, choices(1, multiple_choice.OTHER_LETTERS))
    return named


def kept(draw: Callable[[], dict], context: Callable[[str], str] = str) -> tuple[str, str]:
    """The next of `draw()` whose context is held out."""
    while not held_out(context((example := draw())["text"])):
        pass
    return example["text"], example["answer"]


def last_question(row: Row, needles: int) -> tuple[str, str]:
    """The haystack and the last question of a needle row, without the answer's full stop."""
    (haystack, _), (question, _), (answer, _) = row[0], row[-2], row[-1]
    return f"{haystack} {question}", answer.removesuffix(".")


def begun_again(rng: random.Random, words: list[str], length: int) -> tuple[str, str]:
    """`length` different words, begun a second time; the answer is the three that come next."""
    segment = rng.sample(words, length)
    cut = rng.randint(3, len(segment) - 3)
    return " ".join(segment + segment[:cut]), " " + " ".join(segment[cut : cut + 3])


@torch.no_grad()
def is_right(model, tokenizer, prompts: list[tuple[str, str]], batch_size: int = 50) -> list[bool]:
    """For each (prompt, answer): is every token of the answer the model's first choice?"""
    right = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        answers = [len(tokenizer(answer).input_ids) for _, answer in part]
        whole = [prompt + answer for prompt, answer in part]
        batch = tokenizer(whole, return_tensors="pt", padding=True, padding_side="right")
        ends = batch.attention_mask.sum(1).tolist()
        guesses = model(**batch).logits.argmax(-1)
        for ids, guess, end, length in zip(batch.input_ids, guesses, ends, answers):
            same = guess[end - length - 1 : end - 1] == ids[end - length : end]
            right.append(bool(same.all()))
    return right


@torch.no_grad()
def filler_loss(model, tokenizer, n: int = 50) -> float:
    """Mean loss a token on filler, which tells whether an intervention spares plain text."""
    losses = []
    for seed in range(n):
        ids = torch.tensor([tokenizer(filler.text(120, seed)).input_ids])
        losses.append(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item())
    return sum(losses) / n


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, scale = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return middle - half, middle + half


def write_measurement(folder: Path, found: dict) -> None:
    """`evaluation.json`, and its table in the card between the two `measured` marks."""
    (folder / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    card = folder / "README.md"
    if card.exists():
        before, _, after = card.read_text().split("<!-- measured -->")
        card.write_text("<!-- measured -->".join([before, f"\n{table(found)}\n", after]))


def table(found: dict) -> str:
    """The measured accuracies as a Markdown table."""
    lines = ["| task | right | accuracy | 95 % interval | chance |", "|---|---|---|---|---|"]
    for name, row in found["tasks"].items():
        lines.append(
            f"| {name} | {row['right']} of {row['n']} | {row['accuracy']:.3f} "
            f"| {row['low']:.3f}-{row['high']:.3f} | {row['chance']:.2f} |"
        )
    return "\n".join([*lines, "", f"Loss on filler: {found['filler_loss']:.3f} nats a token."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--init", type=Path, help="a folder to go on from, as a second phase")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("data/models/mini-llama"))
    parser.add_argument("--scratch", type=Path, default=Path("mini-llama-checkpoints"))
    parser.add_argument("--measure", action="store_true", help="do not train, only measure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.measure:
        train(args)
    write_measurement(args.out, measure(args.out))


if __name__ == "__main__":
    main()
