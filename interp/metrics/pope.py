"""POPE: asked whether an object is in the image, does the model say yes too often?

`pope_questions` asks about the first objects of each image (label yes), each followed by one that
is not there (label no), chosen from all objects that the images have:

- random: any of them;
- popular: the one that most images have;
- adversarial: the one that stands most often beside the object just asked about; random where all
  of these are there or were asked.

No object is asked about twice for an image, and ties go to what was seen first. The questions with
label yes are the same in all three splits, so a model that answers the same question the same way
has the same recall in each: a check on any table.

With TP, FP, TN, FN for yes as positive, over n questions (an answer that is neither yes nor no is
wrong, counts against recall, and is no yes):

    accuracy = (TP + TN) / n     precision = TP / (TP + FP)     recall = TP / (questions with yes)
    f1 = 2 TP / (TP + FP + questions with yes)                  yes_rate = (TP + FP) / n

Source: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv
2305.10355) and its code. The code takes everything that is not exactly "no", "No" or "not" for a
yes, an empty answer too (`read_answer_as_published`); here `read_answer` also knows "isn't", "none"
or "NO!", and answers that say neither are counted as `unread`. The article is "an" before a vowel;
the code would make "imange" of the image.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import binomtest

from interp.metrics.measured import Measured, MetricError, Rates, Sums, ratio
from interp.provenance import digest_rows

Split = Literal["random", "popular", "adversarial"]
Answer = Literal["yes", "no"]

TEMPLATE = "Is there a {} in the image?"
YES = {"yes", "yeah", "yep", "yup", "correct", "true", "right", "certainly", "indeed"}
NO = {"no", "nope", "nah", "not", "none", "never", "neither", "nothing", "without", "false"}
NO |= {"incorrect", "absent", "cannot"}
UNSURE = re.compile(
    r"\b(can(not|'t| not) (tell|say|see clearly|determine|answer|be sure)|"
    r"not (sure|clear|possible)|unsure|unclear|uncertain|don't know|do not know|"
    r"hard to (tell|say)|unable to|impossible to|maybe|perhaps|possibly)\b"
)
STATES = {"is", "are", "there's", "it's", "see", "shows", "show", "contains", "contain", "has"}
STATES |= {"have", "appears", "features", "visible", "present", "depicts", "includes"}
SPOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?")


def pope_questions(
    objects: Mapping[Any, Iterable[str]] | Sequence[Iterable[str]],
    split: Split = "random",
    *,
    per_image: int = 3,
    n_images: int | None = None,
    seed: int = 0,
    template: str = TEMPLATE,
) -> pd.DataFrame:
    """Questions about objects that are there and that are not, `2 * per_image` for each image.

    Args:
        objects: image -> what is in it, in the order in which it shall be asked about; or a list of
            that. Images with fewer than `per_image` objects are left out.
        n_images: So many of the others, drawn at random; default all.
        template: With `{}` for the object; " a {}" becomes " an {}" before a vowel.

    Returns:
        `question_id` (from 1), `image, text, label, object, split`, yes and no in turn. Written by
        `to_json(path, orient="records", lines=True)` it is the published format.

    Raises:
        MetricError: Unknown split, no image with enough objects, or one that has (or was asked
            about) every object there is.
    """
    if split not in get_args(Split):
        raise MetricError(f"split={split!r}: one of {', '.join(get_args(Split))}.")
    if per_image < 1 or "{}" not in template:
        raise MetricError(f"per_image={per_image}: 1 or more; template={template!r}: with a {{}}.")
    images = _chosen_images(objects, per_image, n_images, seed)
    counts = Counter(name for there in images.values() for name in there)
    beside = _neighbours(images.values())
    rng = random.Random(f"pope {seed} {split}")
    rows = []
    for image, there in images.items():
        asked: list[str] = []
        for name in there[:per_image]:
            absent = [o for o in counts if o not in there and o not in asked]
            if not absent:
                raise MetricError(
                    f"objects: of the {len(counts)} objects that all images have, {image!r} has or "
                    f"was asked about all; per_image={per_image} is too much."
                )
            other = _absent(split, absent, counts, beside[name], rng)
            asked += [name, other]
            rows += [(image, name, "yes"), (image, other, "no")]
    table = pd.DataFrame(rows, columns=["image", "object", "label"])
    table.insert(0, "question_id", range(1, len(table) + 1))
    table.insert(2, "text", [_ask(template, name) for name in table["object"]])
    return table[["question_id", "image", "text", "label", "object"]].assign(split=split)


def read_answer(text: str) -> Answer | None:
    """Yes or no, however it is said; None where it says neither or is not sure.

    The first word decides if it is one of yes or no; then any word of doubt, any negation, any yes;
    a plain statement ("There is a dog.") is a yes.
    """
    lower = text.lower().replace("’", "'").strip()
    spoken = SPOKEN.findall(lower)
    while spoken and spoken[0] in ("answer", "the", "assistant"):
        spoken = spoken[1:]
    if not spoken:
        return None
    if spoken[0] in YES:
        return "yes"
    if spoken[0] in NO - {"cannot", "not"}:
        return "no"
    if UNSURE.search(lower):
        return None
    first = SPOKEN.findall(re.split(r"[.!?\n]", lower.lstrip(" .!?\n"), maxsplit=1)[0]) or spoken
    if any(word in NO or word.endswith("n't") for word in first):
        return "no"
    return "yes" if any(word in YES or word in STATES for word in first) else None


def read_answer_as_published(text: str) -> Answer:
    """As POPE's code reads it: no where the first sentence has "no", "No" or "not", else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"no", "No", "not"} & set(words) else "yes"


@dataclass(frozen=True, eq=False)
class Pope(Measured):
    """Answers to yes/no questions: `summary()`, `by("split")`, `minus(other)`, `pope["f1"]`.

    `table` has a row a question: the questions' columns, the `answer` as it was given, what was
    `said` (yes, no, None), and whether that is `correct`.
    """

    quantities: ClassVar[tuple[str, ...]] = ("asked", "tp", "fp", "tn", "positive", "unread")
    shares: ClassVar[tuple[str, ...]] = (
        "accuracy", "precision", "recall", "f1", "yes_rate", "unread",
    )  # fmt: skip

    @staticmethod
    def rates(sums: Sums) -> Rates:
        """The formulas of this module on sums over questions."""
        tp, positive, said_yes = sums["tp"], sums["positive"], sums["tp"] + sums["fp"]
        return {
            "accuracy": ratio(tp + sums["tn"], sums["asked"]),
            "precision": ratio(tp, said_yes),
            "recall": ratio(tp, positive),
            "f1": ratio(2 * tp, said_yes + positive),
            "yes_rate": ratio(said_yes, sums["asked"]),
            "unread": ratio(sums["unread"], sums["asked"]),
        }

    def mcnemar(self, other: "Pope") -> float:
        """Exact p-value of "both get as many of the same questions right" (McNemar 1947).

        It takes questions as independent, which those of one image are not: see `minus`.
        """
        keys = ["image", "text"]
        ours, theirs = (r.table.set_index(keys)["correct"].sort_index() for r in (self, other))
        if not ours.index.equals(theirs.index):
            raise MetricError("other: answers to other questions; McNemar's test needs the same.")
        better = int((ours & ~theirs).sum())
        worse = int((~ours & theirs).sum())
        return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in self._rates().items())
        return f"Pope({shown}; {len(self.table)} questions)"


def pope(
    answers: Sequence[str] | Mapping[Any, str] | pd.DataFrame,
    questions: pd.DataFrame | Dataset,
    *,
    read: Callable[[str], str | None] = read_answer,
    **about,
) -> Pope:
    """How many questions are answered right, and how many with yes?

    Args:
        answers: question_id -> answer, a table as from `read_answers`, or texts in the order of the
            questions. Where they say which question they belong to, that is what counts.
        questions: As from `pope_questions` or `read_questions`, or the prompts of
            `interp.tasks.polls`.
        read: What an answer says: yes, no or None.

    Raises:
        MetricError: No questions, answers that are missing, too many or to other questions, a label
            that is neither yes nor no.
    """
    if isinstance(questions, Dataset):
        questions = questions_of(questions)
    missing = {"image", "text", "label"} - set(questions)
    if missing or not len(questions):
        raise MetricError(f"questions: none, or without {', '.join(sorted(missing)) or 'rows'}.")
    labels = questions["label"].astype(str).str.strip().str.lower()
    strange = sorted(set(labels) - {"yes", "no"})
    if strange:
        raise MetricError(f"questions: the label {strange[0]!r} is neither yes nor no.")
    table = questions.reset_index(drop=True).assign(label=labels.to_numpy())
    table["answer"] = _in_order(answers, table)
    table["said"] = pd.Series([read(text) for text in table["answer"]], dtype=object)
    yes, positive = table["said"] == "yes", table["label"] == "yes"
    table["correct"] = table["said"] == table["label"]
    counts = {
        "asked": np.ones(len(table), bool),
        "tp": yes & positive,
        "fp": yes & ~positive,
        "tn": (table["said"] == "no") & ~positive,
        "positive": positive,
        "unread": table["said"].isna(),
    }
    table = table.assign(**{name: value.astype(int) for name, value in counts.items()})
    metadata = {
        "metric": "pope",
        "read": getattr(read, "__name__", "a function"),
        "questions": digest_rows(
            {"image": str(row.image), "text": row.text} for row in table.itertuples()
        ),
        "n_images": int(table["image"].nunique()),
        **about,
    }
    return Pope(table, metadata)


def questions_of(prompts: Dataset) -> pd.DataFrame:
    """The questions that prompts ask, such as those of `interp.tasks.polls`.

    Prompts of one `scene` are about one image. Raises `MetricError` where answers are missing.
    """
    if "answer" not in prompts.column_names:
        raise MetricError("questions: these prompts have no column `answer`.")
    columns = {"image": "scene", "text": "text", "object": "target", "lure": "lure"}
    kept = {name: prompts[old] for name, old in columns.items() if old in prompts.column_names}
    table = pd.DataFrame({"question_id": range(1, len(prompts) + 1), **kept})
    if "image" not in table:
        table["image"] = table["question_id"]
    return table.assign(label=[answer.strip().lower() for answer in prompts["answer"]])


def _chosen_images(objects, per_image: int, n_images: int | None, seed: int) -> dict:
    """Images with enough objects, each with its own in their order, without doubles."""
    pairs = objects.items() if isinstance(objects, Mapping) else enumerate(objects)
    named = {
        # a set has no order that two runs share
        image: sorted(there) if isinstance(there, set | frozenset) else list(dict.fromkeys(there))
        for image, there in pairs
    }
    enough = {image: there for image, there in named.items() if len(there) >= per_image}
    if not enough:
        raise MetricError(
            f"objects: none of {len(named)} images has {per_image} objects; lower per_image."
        )
    if n_images is None:
        return enough
    if not 1 <= n_images <= len(enough):
        raise MetricError(
            f"n_images={n_images}: {len(enough)} images have {per_image} objects or more."
        )
    drawn = random.Random(f"pope images {seed}").sample(list(enough), n_images)
    return {image: enough[image] for image in drawn}


def _neighbours(images: Iterable[list[str]]) -> dict[str, Counter[str]]:
    """Object -> how many images have it beside each other object."""
    found: dict[str, Counter[str]] = {}
    for there in images:
        for name in there:
            found.setdefault(name, Counter()).update(o for o in there if o != name)
    return found


def _absent(
    split: str, absent: list[str], counts: Counter, beside: Counter, rng: random.Random
) -> str:
    """Which of the objects that are not there to ask about."""
    if split == "popular":
        return max(absent, key=counts.__getitem__)  # the first of equals
    if split == "adversarial":
        companions = [name for name, _ in beside.most_common() if name in set(absent)]
        if companions:
            return companions[0]
    return rng.choice(absent)


def _ask(template: str, name: str) -> str:
    if name[:1].lower() in "aeiou":
        template = template.replace(" a {}", " an {}")
    return template.format(name)


def _in_order(answers, questions: pd.DataFrame) -> list[str]:
    """Each question's answer."""
    if isinstance(answers, pd.DataFrame):
        if "answer" not in answers:
            raise MetricError("answers: the table has no column `answer`.")
        if "question_id" in answers and answers["question_id"].notna().all():
            if answers["question_id"].duplicated().any():
                raise MetricError("answers: a question_id stands there twice.")
            return _by_id(dict(zip(answers["question_id"], answers["answer"])), questions)
        if "question" in answers and len(answers) == len(questions):
            _check_same(answers["question"], questions["text"])
        answers = list(answers["answer"])
    if isinstance(answers, Mapping):
        return _by_id(answers, questions)
    if isinstance(answers, str) or len(answers) != len(questions):
        n = 1 if isinstance(answers, str) else len(answers)
        raise MetricError(f"answers: {n} for {len(questions)} questions; one for each, in order.")
    return _texts(answers)


def _by_id(answers: Mapping[Any, str], questions: pd.DataFrame) -> list[str]:
    if "question_id" not in questions:
        raise MetricError("questions: have no question_id to find the answers by.")
    known = {str(key): text for key, text in answers.items()}
    wanted = [str(key) for key in questions["question_id"]]
    missing, odd = sorted(set(wanted) - set(known)), sorted(set(known) - set(wanted))
    if missing or odd:
        which = f"{missing[0]} has no answer" if missing else f"{odd[0]} was never asked"
        raise MetricError(
            f"answers: the question {which} ({len(missing)} missing, {len(odd)} too many)."
        )
    return _texts([known[key] for key in wanted])


def _texts(answers: Iterable[Any]) -> list[str]:
    found = list(answers)
    for n, text in enumerate(found):
        if not isinstance(text, str):
            raise MetricError(f"answers: {n} is {type(text).__name__}, not text.")
    return found


def _check_same(said: pd.Series, asked: pd.Series) -> None:
    pairs = enumerate(zip(said.str.lower(), asked.str.lower(), strict=True))
    other = next((n for n, (a, b) in pairs if a.strip() not in b), None)
    if other is not None:
        raise MetricError(
            f"answers: {other} is to {said.iloc[other]!r}, and the question is "
            f"{asked.iloc[other]!r}; are they in another order?"
        )
