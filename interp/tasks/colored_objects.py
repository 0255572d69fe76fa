"""Coloured objects: a list of objects, each with its colour, and a question for one of them.

    plain  On the table there is a red pen, a blue cup and a green ring.
           Question: What color is the cup? Answer: The cup is -> " blue"

    paper  Q: On the desk, I see a black key, a white hat, and a brown bell. What color is the hat?
           A: White
           Q: On the table, there is a red pen, a blue cup, and a green ring. What color is the cup?
           A: -> " Blue"

Source: Merullo et al. 2024, "Circuit Component Reuse Across Tasks in Transformer Language Models"
(arXiv 2310.08744), after BIG-bench's "reasoning about colored objects" (arXiv 2206.04615). Their
prompt is the form `paper`: one worked example first, whose colours and objects do not come again,
and a capitalised answer; the words in the lists are our own. In the form `plain` the sentence of
the answer is begun instead. The corrupted partner is theirs in both: the same list, another of its
objects asked for.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Dataset

from interp.tasks.aligned import fill, from_paired_examples
from interp.tasks.prompts import PromptError

COLORS = ("black", "blue", "brown", "green", "purple", "red", "white", "yellow")
OBJECTS = (
    "ball", "bell", "book", "bottle", "bowl", "box", "chair", "cup", "hat", "key", "lamp", "pen",
    "plate", "ring", "spoon",
)  # fmt: skip
SURFACES = ("table", "floor", "desk", "shelf")
OPENERS = ("there is", "you see", "I see")
LIST = "On the {surface} {opener} {items}."
QUESTION = "Question: What color is the {object}? Answer: The {object} is"
PAPER_LIST = "On the {surface}, {opener} {items}."
PAPER_QUESTION = "What color is the {object}?"
FORMS = ("plain", "paper")


def colored_objects(
    model,
    n: int = 64,
    seed: int = 0,
    *,
    objects: int = 3,
    form: str = "plain",
    data: str | Path | None = None,
) -> Dataset:
    """`n` pairs; answers are the asked object's colour and that of the one asked for in its place.

    Positions, and spans of the same names (a position is a span's last token):

    - `color`, `object`: the asked object's colour and name in the list;
    - `corrupted_color`, `corrupted_object`: those of the object that the corrupted prompt asks for;
    - `color_1`, ...: all colours of the list, in its order;
    - `wrong_1`, ...: the colours of the list that are wrong (`corrupted_color` is one of them);
    - `asked`: the object in the question; in the plain form again in the begun answer, `begun`;
    - in the form of the paper `shot_answer`, the worked example's answer, and the other colours of
      its list, `shot_wrong_1`, ...;
    - `end`.

    Args:
        model: A `HookedModel` or a tokenizer. Draws that don't line up are skipped and counted.
        objects: How many there are in a list.
        form: "plain" (which mini-llama knows), or "paper".
        data: BIG-bench's `task.json` of reasoning_about_colored_objects, or a file of that shape
            ({"examples": [{"input": ..., "target_scores": {...}}]}), to take lists and questions
            from, as many objects as they have. Only questions "What color is the X?" are taken
            whose list names X once, with its colour; the others are counted as skipped.
    """
    if form not in FORMS:
        raise PromptError(f"form={form!r}: one of {', '.join(FORMS)}.")
    rng, skipped = random.Random(f"colored objects {objects} {seed}"), Counter()
    about = {"n": n, "seed": seed, "objects": objects, "form": form}
    if data is None:
        _check(objects, form)
        draw = _draws(rng, objects, form)
    else:
        about |= {"data": str(data), "objects": None}
        draw = _draws_from(rng, read(data, skipped), form, skipped)
    return from_paired_examples(
        model, draw, n, task="colored_objects", parameters=about, skipped=skipped
    )


def examples(n: int, seed: int, objects: int = 3, form: str = "plain") -> list[dict]:
    """`n` prompts with `objects` objects, all of different colours; `choices` are those colours.

    `char_spans` gives [start, end) in characters under the names of `colored_objects`.
    """
    _check(objects, form)
    rng = random.Random(f"colored objects {objects} {seed}")
    return [example(rng, objects, form) for _ in range(n)]


def example(rng: random.Random, objects: int, form: str = "plain") -> dict:
    """One prompt, drawn with `rng`."""
    listing = LIST if form == "plain" else PAPER_LIST
    listed = scene(rng, objects, listing)
    shot = None
    if form == "paper":
        used = {word for item in listed.items for word in item}
        left = [[word for word in words if word not in used] for words in (COLORS, OBJECTS)]
        shot = Question(scene(rng, objects, listing, *left), rng.randrange(objects))
    right, other = rng.sample(range(objects), 2)
    return _example(Question(listed, right), other, shot)


@dataclass(frozen=True)
class Scene:
    """A list as a sentence with the fields `{color_1}`, `{object_1}`, ..., and its items."""

    template: str
    items: tuple[tuple[str, str], ...]  # (colour, object) in the order of the list

    @cached_property
    def words(self) -> dict[str, str]:
        """What stands in the fields."""
        numbered = list(enumerate(self.items, 1))
        return {f"color_{i}": color for i, (color, _) in numbered} | {
            f"object_{i}": name for i, (_, name) in numbered
        }

    @cached_property
    def text(self) -> str:
        """The sentence."""
        return fill(self.template, self.words)[0]


@dataclass(frozen=True)
class Question:
    """A list, and which of its items (from 0) is asked for."""

    scene: Scene
    right: int

    @property
    def item(self) -> tuple[str, str]:
        """(colour, object) of the one asked for."""
        return self.scene.items[self.right]

    @property
    def wrong(self) -> list[int]:
        """The items of another colour."""
        items = self.scene.items
        return [i for i, (color, _) in enumerate(items) if color != self.item[0]]


def scene(
    rng: random.Random,
    objects: int,
    listing: str = LIST,
    colors: Sequence[str] = COLORS,
    names: Sequence[str] = OBJECTS,
) -> Scene:
    """A list of `objects` objects, all of different colours."""
    items = tuple(zip(rng.sample(colors, objects), rng.sample(names, objects)))
    named = [f"a {{color_{i}}} {{object_{i}}}" for i in range(1, objects + 1)]
    comma = "," if listing == PAPER_LIST and objects > 2 else ""
    listed = f"{', '.join(named[:-1])}{comma} and {named[-1]}"
    surface, opener = rng.choice(SURFACES), rng.choice(OPENERS)
    return Scene(listing.format(surface=surface, opener=opener, items=listed), items)


def read(path: str | Path, skipped: Counter) -> list[Question]:
    """The questions of a BIG-bench task file; those of other kinds are counted in `skipped`.

    Raises `PromptError` where the file has another shape.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))["examples"]
        texts = [(str(row["input"]), dict(row["target_scores"])) for row in given]
    except OSError as error:
        raise PromptError(f"data={str(path)!r}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise PromptError(
            f"data={str(path)!r}: not a BIG-bench task, which is JSON like "
            '{"examples": [{"input": "...", "target_scores": {"red": 1, "blue": 0}}]}.'
        ) from None
    found = []
    for text, scores in texts:
        question = _parsed(text, scores)
        if isinstance(question, str):
            skipped[question] += 1
        else:
            found.append(question)
    return found


# One pair


def _draws(rng: random.Random, objects: int, form: str) -> Iterator[dict]:
    while True:
        yield example(rng, objects, form)


def _draws_from(
    rng: random.Random, questions: list[Question], form: str, skipped: Counter
) -> Iterator[dict]:
    """Each question once, in an order drawn with `rng`; another one is the worked example."""
    for asked in rng.sample(questions, len(questions)):
        if not asked.wrong:
            skipped["a list of one colour"] += 1
            continue
        shot = None
        if form == "paper":
            used = {word for item in asked.scene.items for word in item}
            free = [q for q in questions if not used & {w for i in q.scene.items for w in i}]
            if not free:
                skipped["no worked example without its colours and objects"] += 1
                continue
            shot = rng.choice(free)
        yield _example(asked, rng.choice(asked.wrong), shot)


def _example(asked: Question, other: int, shot: Question | None) -> dict:
    """The pair that asks for one of the items and, in the corrupted prompt, for item `other`."""
    items = asked.scene.items
    colors = [color if shot is None else color.capitalize() for color, _ in items]
    template, words = _written(asked, shot)
    text, places = fill(template, words | _asking(asked.item[1]))
    corrupted_text, corrupted_places = fill(template, words | _asking(items[other][1]))
    return {
        "text": text,
        "answer": f" {colors[asked.right]}",
        "wrong": f" {colors[other]}",
        "choices": [f" {color}" for color in dict.fromkeys(colors)],
        "corrupted_text": corrupted_text,
        "corrupted_answer": f" {colors[other]}",
        "place": asked.right,
        "char_spans": _named(places, asked, other, shot),
        "corrupted_char_spans": _named(corrupted_places, asked, other, shot),
    }


def _asking(name: str) -> dict[str, str]:
    return {"asked": name, "begun": name}


def _written(asked: Question, shot: Question | None) -> tuple[str, dict[str, str]]:
    """The whole prompt with its fields, and what stands in all but `asked` and `begun`."""
    if shot is None:
        question = QUESTION.replace("{object}", "{asked}", 1).replace("{object}", "{begun}")
        return f"{asked.scene.template} {question}", asked.scene.words
    color, name = shot.item
    listed = re.sub(r"\{(color|object)_", r"{shot_\1_", shot.scene.template)
    template = (
        f"Q: {listed} {PAPER_QUESTION.replace('{object}', '{shot_asked}')}\nA: {{shot_answer}}\n"
        f"Q: {asked.scene.template} {PAPER_QUESTION.replace('{object}', '{asked}')}\nA:"
    )
    words = {f"shot_{field}": word for field, word in shot.scene.words.items()}
    words |= {"shot_asked": name, "shot_answer": color.capitalize()}
    return template, asked.scene.words | words


def _named(
    places: dict[str, list[int]], asked: Question, other: int, shot: Question | None
) -> dict[str, list[int]]:
    """The places of a prompt under the names of `colored_objects`."""
    found = {
        "color": places[f"color_{asked.right + 1}"],
        "object": places[f"object_{asked.right + 1}"],
        "corrupted_color": places[f"color_{other + 1}"],
        "corrupted_object": places[f"object_{other + 1}"],
        "asked": places["asked"],
    }
    found |= {name: place for name, place in places.items() if name.startswith("color_")}
    found |= {f"wrong_{k}": places[f"color_{i + 1}"] for k, i in enumerate(asked.wrong, 1)}
    if shot is None:
        return found | {"begun": places["begun"]}
    found["shot_answer"] = places["shot_answer"]
    return found | {
        f"shot_wrong_{k}": places[f"shot_color_{i + 1}"] for k, i in enumerate(shot.wrong, 1)
    }


def _parsed(text: str, scores: dict[str, float]) -> Question | str:
    """A question of BIG-bench, or the reason why it is none of ours."""
    asked = re.fullmatch(r"(.+\.) What color is the ([\w\s-]+)\?", text.strip())
    if asked is None:
        return "another kind of question"
    listed, name = asked.groups()
    colors = "|".join(re.escape(color) for color in sorted(scores, key=len, reverse=True))
    found = list(re.finditer(rf"\ban? ({colors}) ([\w\s-]+?)(?=,| and |\.)", listed))
    items = tuple((item[1], item[2]) for item in found)
    there = [i for i, (_, item) in enumerate(items) if item == name]
    if len(there) != 1 or scores[items[there[0]][0]] != max(scores.values()):
        return "an object that the list does not name once with its colour"
    template, at = "", 0
    for i, item in enumerate(found, 1):
        template += _literal(listed[at : item.start(1)]) + f"{{color_{i}}}"
        template += _literal(listed[item.end(1) : item.start(2)]) + f"{{object_{i}}}"
        at = item.end(2)
    return Question(Scene(template + _literal(listed[at:]), items), there[0])


def _literal(text: str) -> str:
    """Text as it stands in a template."""
    return text.replace("{", "{{").replace("}", "}}")


def _check(objects: int, form: str) -> None:
    most = len(COLORS) if form == "plain" else len(COLORS) // 2
    if not 2 <= objects <= most:
        why = "number of colours" if form == "plain" else "half of the colours, for two lists"
        raise PromptError(f"objects={objects}: from 2 to {most}, the {why}.")
