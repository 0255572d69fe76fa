"""Scenes: pictures of one to three coloured shapes, and what can be asked about them.

    <image> Describe the image.  ->  The image shows a red circle, a white star and a blue square.

A picture (48 x 48 pixels by default) is a grid of 3 x 3 cells, and a shape lies anywhere inside its
cell. No two objects of a scene are alike: an object is one of 8 colours x 5 shapes, written "red
circle". `objects` lists what is there, row by row, which is all that CHAIR and POPE want to know.

Training scenes are *biased*: each object of `PARTNERS` comes with its partner 19 times out of 20.
Scenes of `bias="broken"` have one of these objects and never its partner, so a model that names the
partner all the same tells what it has learned, not what it sees. A tenth of all sets of objects is
held out: training never shows them, and prompts of `scenes` have no others.

Source: our own, after the made-up scenes of CLEVR (Johnson et al. 2017, arXiv 1612.06890); the
questions of `polls` follow POPE (Li et al. 2023, arXiv 2305.10355).
"""

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations

from datasets import Dataset

from interp.tasks.pictured import pictured
from interp.tasks.pictures import COLORS, OBJECTS, SHAPES, Scene, Shape, article
from interp.tasks.prompts import PromptError

PARTNERS = {
    "red circle": "blue square",
    "green star": "yellow triangle",
    "white cross": "purple circle",
    "orange square": "pink star",
}
FAITHFUL = 0.95  # how often a training scene gives an object its partner
CUED = 0.4  # how many training scenes have such an object at all
BIASES = ("training", "even", "broken")
NUMBERS = ("zero", "one", "two", "three")
QUESTIONS = {
    "caption": "Describe the image.",
    "exists": "Is there {article} {target} in the image?",
    "color": "What color is the {target}?",
    "count": "How many {plural} are in the image?",
    "detail": "What color is the dot on the {target}?",
}
NEGATIVES = ("random", "popular", "adversarial")


# Drawing scenes by lot


def draw_scene(
    rng: random.Random, bias: str = "even", *, dots: bool = False, held_out: bool | None = None
) -> Scene:
    """A scene of one to three objects.

    Args:
        bias: "training", as a model is trained; "even", all objects equally often; or "broken", an
            object of `PARTNERS` without its partner.
        dots: Put a dot of another colour on each object.
        held_out: Only scenes that are held out, or only such that are not; default: any.
    """
    while True:
        scene = _placed(rng, _objects(rng, bias), dots)
        if held_out is None or scene.held_out == held_out:
            return scene


def _objects(rng: random.Random, bias: str) -> list[str]:
    n = rng.randint(1, 3)
    if bias == "even":
        return rng.sample(OBJECTS, n)
    plain = [name for name in OBJECTS if name not in PARTNERS]
    if bias == "training" and rng.random() >= CUED:
        return rng.sample(plain, n)
    cue = rng.choice(list(PARTNERS))
    chosen, partner = [cue], PARTNERS[cue]
    if bias == "training" and rng.random() < FAITHFUL:
        chosen, n = [cue, partner], max(n, 2)
    rest = [name for name in plain if name != partner]
    return chosen + rng.sample(rest, n - len(chosen))


def _placed(rng: random.Random, names: list[str], dots: bool) -> Scene:
    cells = sorted(rng.sample(range(9), len(names)))
    rng.shuffle(names)
    shapes = []
    for cell, name in zip(cells, names, strict=True):
        color, shape = name.split()
        radius = rng.uniform(0.1, 0.135)
        slack = 0.16 - radius
        x, y = ((2 * place + 1) / 6 + rng.uniform(-slack, slack) for place in (cell % 3, cell // 3))
        dot = rng.choice([other for other in COLORS if other != color]) if dots else None
        shapes.append(Shape(color, shape, x, y, radius, dot))
    return Scene(tuple(shapes))


# What is asked


def ask(rng: random.Random, scene: Scene, kind: str, target: str | None = None) -> dict | None:
    """A question about a scene: `question`, `answer`, `choices`, `target`, and `lure`.

    `target` is what is asked about; default: drawn, for "exists" as often present as absent.
    `lure` says of an absent one how it was chosen: `partner` of an object that is there, `near` (a
    colour or shape that is there) or `random`. None where the scene does not allow the question.
    """
    lure, choices = "", []
    if kind == "caption":
        answer = scene.caption
    elif kind == "exists":
        if target is None:
            target, lure = _present_or_not(rng, scene)
        answer, choices = ("Yes" if target in scene.objects else "No"), ["Yes", "No"]
    elif kind == "color":
        kinds = Counter(shape.shape for shape in scene.shapes)
        single = [shape for shape in scene.shapes if kinds[shape.shape] == 1]
        if not single:
            return None
        chosen = rng.choice(single)
        target, answer, choices = chosen.shape, chosen.color, list(COLORS)
    elif kind == "count":
        target = rng.choice([*SHAPES, *(shape.shape for shape in scene.shapes)])
        answer, choices = NUMBERS[sum(s.shape == target for s in scene.shapes)], list(NUMBERS)
    elif kind == "detail":
        chosen = rng.choice(scene.shapes)
        target, answer, choices = chosen.name, chosen.dot, list(COLORS)
    else:
        raise PromptError(f"questions: {kind!r} is none of {', '.join(QUESTIONS)}.")
    words = {"target": target, "article": article(target or " ")}
    words["plural"] = f"{target}es" if target == "cross" else f"{target}s"
    return {
        "question": QUESTIONS[kind].format(**words),
        "answer": answer,
        "choices": choices,
        "target": target or "",
        "lure": lure,
    }


def _present_or_not(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """An object that is there, or, half of the time, one that is not and how it was chosen."""
    if rng.random() < 0.5:
        return rng.choice(scene.objects), ""
    absent = [name for name in OBJECTS if name not in scene.objects]
    partners = [PARTNERS[name] for name in scene.objects if PARTNERS.get(name) in absent]
    if partners and rng.random() < 0.5:
        return rng.choice(partners), "partner"
    seen = {word for name in scene.objects for word in name.split()}
    near = [name for name in absent if seen & set(name.split())]
    return (rng.choice(near), "near") if rng.random() < 0.5 else (rng.choice(absent), "random")


def scenes(
    model,
    n: int = 64,
    seed: int = 0,
    *,
    questions: tuple[str, ...] = ("caption", "exists", "color", "count"),
    bias: str = "even",
    size: int = 48,
    chat: bool | None = None,
    template: str | None = None,
) -> Dataset:
    """`n` prompts with images, each about a scene of its own, the kinds of questions in turn.

    Columns beside those of all prompts: `image`, `kind`, `objects` (in the order of the caption),
    `boxes` (where each is: left, top, right, bottom as parts of the picture's side), `target`,
    `lure` (see `ask`), `choices` (not of captions) and `scene` (which scene it is).

    Args:
        questions: Of `caption`, `exists`, `color`, `count` and `detail` (a dot on a shape).
        bias: See `draw_scene`.
        size: Pixels; the model's processor makes of it what the model takes.
        chat: Whether the question goes into the chat template; default: where there is one.
        template: How image and question stand together; default "{image}\\n{question}" in a chat
            and "{image} {question}" else.
    """
    _check(n, bias, questions)
    rng = random.Random(f"scenes {questions} {bias} {seed}")
    examples = []
    while len(examples) < n:
        kind = questions[len(examples) % len(questions)]
        scene = draw_scene(rng, bias, dots=kind == "detail", held_out=True)
        if asked := ask(rng, scene, kind):
            examples.append(_example(scene, len(examples), kind, asked, size))
    about = {"n": n, "seed": seed, "questions": list(questions), "bias": bias, "size": size}
    options = {"chat": chat, "template": template, "parameters": about}
    return pictured(model, examples, task="scenes", **options)


def polls(
    model,
    n: int = 64,
    seed: int = 0,
    *,
    negatives: str = "random",
    bias: str = "even",
    size: int = 48,
    chat: bool | None = None,
    template: str | None = None,
) -> Dataset:
    """`n` scenes polled as POPE does: "Is there a ...?" of each object, and of as many absent ones.

    `negatives`: "random"; "popular", the objects that most scenes of training have; "adversarial",
    those that go together in training with the object just asked about. All else as in `scenes`,
    whose columns these prompts have.
    """
    _check(n, bias, ("exists",))
    if negatives not in NEGATIVES:
        raise PromptError(f"negatives={negatives!r}: one of {', '.join(NEGATIVES)}.")
    rng = random.Random(f"polls {bias} {seed}")
    examples = []
    for number in range(n):
        scene, asked = draw_scene(rng, bias, held_out=True), list[str]()
        for name in scene.objects:
            absent = [o for o in OBJECTS if o not in scene.objects and o not in asked]
            other = _absent(rng, name, absent, negatives)
            asked.append(other)
            for target, lure in ((name, ""), (other, negatives)):
                question = {**(ask(rng, scene, "exists", target) or {}), "lure": lure}
                examples.append(_example(scene, number, "exists", question, size))
    about = {"n": n, "seed": seed, "negatives": negatives, "bias": bias, "size": size}
    options = {"chat": chat, "template": template, "parameters": about}
    return pictured(model, examples, task="polls", **options)


def _absent(rng: random.Random, name: str, absent: list[str], negatives: str) -> str:
    drawn = rng.choice(absent)  # always, so that scenes are the same whatever the negatives
    counts = {"random": Counter(), "popular": frequency(), "adversarial": company()[name]}
    found = counts[negatives]
    return max(absent, key=lambda other: (found[other], other == drawn))


@cache
def frequency() -> Counter:
    """How many of 4,000 training scenes have each object."""
    return Counter(name for objects in _sample() for name in objects)


@cache
def company() -> dict[str, Counter]:
    """How often each object goes together with each other one in them."""
    found: dict[str, Counter] = {name: Counter() for name in OBJECTS}
    for objects in _sample():
        for one, other in combinations(objects, 2):
            found[one][other] += 1
            found[other][one] += 1
    return found


def _sample() -> Iterator[list[str]]:
    rng = random.Random("co-occurrence")
    for _ in range(4000):
        yield draw_scene(rng, "training", held_out=False).objects


def _example(scene: Scene, number: int, kind: str, asked: dict, size: int) -> dict:
    return {
        **asked,
        "answer": f" {asked['answer']}",
        "choices": [f" {choice}" for choice in asked["choices"]],
        "image": scene.draw(size),
        "kind": kind,
        "objects": scene.objects,
        "boxes": [shape.box for shape in scene.shapes],
        "scene": number,
    }


def _check(n: int, bias: str, questions: tuple[str, ...]) -> None:
    if n < 1:
        raise PromptError(f"n={n}: at least 1.")
    if bias not in BIASES:
        raise PromptError(f"bias={bias!r}: one of {', '.join(BIASES)}.")
    unknown = [kind for kind in questions if kind not in QUESTIONS]
    if unknown or not questions:
        raise PromptError(f"questions={questions}: some of {', '.join(QUESTIONS)}.")
