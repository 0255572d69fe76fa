"""POPE: how questions are chosen, how answers are read, and what the numbers must satisfy."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from interp.metrics import (
    MetricError,
    differences,
    pope,
    pope_questions,
    read_answer,
    read_answer_as_published,
)
from tests.tiny import unchecked

# dog is in four images, cat in three, owl in two, ant and fox in one
OBJECTS = {
    "1.jpg": ["dog", "cat"],
    "2.jpg": ["dog", "cat", "owl"],
    "3.jpg": ["dog", "owl"],
    "4.jpg": ["dog", "ant"],
    "5.jpg": ["cat", "fox"],
}
SPLITS = ("random", "popular", "adversarial")


def asked(split, **settings):
    table = pope_questions(OBJECTS, split, per_image=2, **settings)
    return {
        image: list(zip(rows["object"], rows["label"]))
        for image, rows in table.groupby("image", sort=False)
    }


def test_popular_takes_what_most_images_have():
    found = asked("popular")
    assert found["1.jpg"] == [("dog", "yes"), ("owl", "no"), ("cat", "yes"), ("ant", "no")]
    assert found["4.jpg"] == [("dog", "yes"), ("cat", "no"), ("ant", "yes"), ("owl", "no")]
    assert found["5.jpg"] == [("cat", "yes"), ("dog", "no"), ("fox", "yes"), ("owl", "no")]


def test_adversarial_takes_what_stands_most_often_beside_the_object():
    found = asked("adversarial")
    # beside the dog: cat twice, owl twice, ant once; beside the cat: dog twice, owl, fox
    assert found["1.jpg"] == [("dog", "yes"), ("owl", "no"), ("cat", "yes"), ("fox", "no")]
    assert found["3.jpg"][:2] == [("dog", "yes"), ("cat", "no")]
    # beside the ant is only the dog, which is there: random among what is left
    assert found["4.jpg"][2][0] == "ant" and found["4.jpg"][3][0] in ("owl", "fox")


def naive(objects, split, there, name, used):
    """What the question after `name` may be about, from the description, in loops."""
    everything = list(dict.fromkeys(o for own in objects.values() for o in own))
    free = [o for o in everything if o not in there and o not in used]
    if split == "popular":
        counts = {o: sum(o in own for own in objects.values()) for o in free}
        return [o for o in free if counts[o] == max(counts.values())][:1]
    if split == "adversarial":
        counts = {o: sum(o in own and name in own for own in objects.values()) for o in free}
        if max(counts.values()):
            return [o for o in free if counts[o] == max(counts.values())]
    return free


images = st.dictionaries(
    st.integers(0, 9).map(lambda n: f"{n}.jpg"),
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=3, unique=True),
    min_size=3,
    max_size=8,
)


@given(images, st.sampled_from(SPLITS), st.integers(0, 5))
def test_negatives_are_those_of_the_definition(objects, split, seed):
    try:
        table = pope_questions(objects, split, per_image=2, seed=seed)
    except MetricError:
        everything = {o for there in objects.values() for o in there}
        assert any(len(everything) < len(there) + 2 for there in objects.values())
        return
    rows = list(table.itertuples())
    used: dict[str, list[str]] = {}
    for yes, no in zip(rows[::2], rows[1::2], strict=True):
        there, asked = objects[yes.image], used.setdefault(yes.image, [])
        assert (yes.label, no.label, no.image) == ("yes", "no", yes.image)
        assert yes.object == there[len(asked) // 2]
        assert no.object in naive(objects, split, there, yes.object, asked)
        asked += [yes.object, no.object]


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_balanced_and_reproducible(split):
    table = pope_questions(OBJECTS, split, per_image=2, seed=3)
    assert table["question_id"].tolist() == list(range(1, 21))
    assert table["label"].tolist() == ["yes", "no"] * 10
    assert not table.duplicated(["image", "text"]).any()
    for row in table.itertuples():
        assert (row.object in OBJECTS[row.image]) == (row.label == "yes")
    pd.testing.assert_frame_equal(table, pope_questions(OBJECTS, split, per_image=2, seed=3))


def test_the_splits_share_their_positives_and_the_seed_draws_images():
    tables = [pope_questions(OBJECTS, s, per_image=2, n_images=4, seed=1) for s in SPLITS]
    positives = [t[t["label"] == "yes"][["image", "text"]].to_numpy().tolist() for t in tables]
    assert positives[0] == positives[1] == positives[2]
    drawn = {
        tuple(pope_questions(OBJECTS, n_images=4, per_image=1, seed=s)["image"].unique())
        for s in range(9)
    }
    assert len(drawn) > 3


def test_random_negatives_are_spread_out():
    table = pd.concat([pope_questions(OBJECTS, per_image=1, seed=s) for s in range(60)])
    absent = Counter(table[(table["image"] == "1.jpg") & (table["label"] == "no")]["object"])
    assert set(absent) == {"owl", "ant", "fox"} and min(absent.values()) > 8


def test_the_article_fits_and_the_image_stays_an_image():
    texts = pope_questions(OBJECTS, "popular", per_image=2)["text"].tolist()
    assert "Is there an owl in the image?" in texts and "Is there a dog in the image?" in texts
    found = pope_questions([["owl"], ["dog"]], per_image=1, template="Can you see a {}?")
    assert found["text"].tolist()[0] == "Can you see an owl?"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "rare"}, "split='rare': one of random, popular, adversarial"),
        ({"per_image": 4}, "none of 5 images has 4 objects"),
        ({"per_image": 0}, "per_image=0"),
        ({"template": "Is it?"}, "with a {}"),
        ({"n_images": 9, "per_image": 2}, "n_images=9: 5 images"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, words):
    with unchecked(), pytest.raises(MetricError, match=words):
        pope_questions(OBJECTS, **settings)


def test_an_image_with_every_object_is_named():
    with pytest.raises(MetricError, match="'all.jpg' has or was asked about all"):
        pope_questions({"all.jpg": ["a", "b"], "b.jpg": ["a"]}, per_image=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("Yes, there is no doubt.", "yes"), ("YES!", "yes"),
        ("Answer: yes", "yes"), ("There is a dog.", "yes"), ("I see two dogs", "yes"),
        ("No", "no"), ("no\n", "no"), ("NO!", "no"), ("nope", "no"), ("There is no dog.", "no"),
        ("There isn't a dog", "no"), ("There isn’t one", "no"), ("None.", "no"),
        ("I do not see a dog.", "no"), ("The answer is no", "no"),
        ("Not that I can see. Yes, a cat.", "no"),
        ("", None), ("  ", None), ("I cannot tell.", None), ("I'm not sure.", None),
        ("A dog", None), ("It is unclear whether there is a dog", None), ("42", None),
    ],
)  # fmt: skip
def test_answers_are_read_leniently(text, said):
    assert read_answer(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [("No, it is not", "no"), ("no", "no"), ("Well, not here. Yes", "no"), ("NO", "yes"),
     ("no!", "yes"), ("isn't", "yes"), ("", "yes"), ("Yes. no", "yes")],
)  # fmt: skip
def test_the_published_reading_has_its_holes(text, said):
    assert read_answer_as_published(text) == said


def some_questions(n_images=4, per_image=3):
    objects = {
        f"{n}.jpg": [f"o{n * per_image + k}" for k in range(per_image)] for n in range(n_images)
    }
    return pope_questions(objects, "random", per_image=per_image)


def test_worked_out_by_hand():
    questions = some_questions(2, 2).assign(label=["yes", "yes", "no", "no"] * 2)
    answers = ["yes", "no", "yes", "no", "yes", "Hm", "no", "no"]  # TP 2, FP 1, TN 3
    found = pope(answers, questions)
    assert found["accuracy"] == 5 / 8
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == 2 / 4
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["yes_rate"] == 3 / 8
    assert found["unread"] == 1 / 8
    assert found.table["said"].tolist()[5] is None


@given(st.lists(st.booleans(), min_size=24, max_size=24))
def test_the_identities_of_balanced_questions_hold(says_yes):
    found = pope(["Yes" if yes else "No" for yes in says_yes], some_questions())
    recall, rate = found["recall"], found["yes_rate"]
    assert found["accuracy"] == pytest.approx(0.5 + recall - rate)
    assert found["f1"] == pytest.approx(2 * recall / (1 + 2 * rate))
    if rate:
        assert found["precision"] == pytest.approx(recall / (2 * rate))


def test_constant_answers():
    questions = some_questions()
    yes, no = (pope([word] * len(questions), questions) for word in ("yes", "no"))
    assert [yes[m] for m in ("accuracy", "precision", "recall", "yes_rate")] == [0.5, 0.5, 1, 1]
    assert yes["f1"] == pytest.approx(2 / 3)
    assert [no[m] for m in ("accuracy", "recall", "f1", "yes_rate")] == [0.5, 0, 0, 0]
    assert math.isnan(no["precision"])


def test_splits_apart():
    both = pd.concat([pope_questions(OBJECTS, s, per_image=2) for s in SPLITS], ignore_index=True)
    found = pope(["yes"] * len(both), both).by("split")
    assert found["split"].unique().tolist() == list(SPLITS)
    assert (found[found["metric"] == "accuracy"]["value"] == 0.5).all()
    assert (found["n"] == 20).all()


def test_images_are_drawn_whole():
    """Where all questions of an image fail together, they are one piece of evidence."""
    rng = np.random.default_rng(0)
    questions = some_questions(40, 3)
    fails = dict(zip(questions["image"].unique(), rng.random(40) < 0.3))
    flip = {"yes": "no", "no": "yes"}
    together = [flip[r.label] if fails[r.image] else r.label for r in questions.itertuples()]
    apart = [flip[r.label] if rng.random() < 0.3 else r.label for r in questions.itertuples()]
    wide, narrow = (pope(a, questions).summary().iloc[0] for a in (together, apart))
    assert wide["high"] - wide["low"] > 1.6 * (narrow["high"] - narrow["low"])


def test_answers_find_their_questions():
    questions = some_questions(2, 2)
    right = dict(zip(questions["question_id"], questions["label"]))
    mixed = pd.DataFrame({"question_id": list(right), "answer": list(right.values())}).iloc[::-1]
    assert pope(mixed, questions)["accuracy"] == pope(right, questions)["accuracy"] == 1
    told = pd.DataFrame({"question": questions["text"], "answer": questions["label"]})
    assert pope(told, questions)["accuracy"] == 1
    with pytest.raises(MetricError, match="another order"):
        pope(told.iloc[::-1], questions)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (["yes"] * 7, "7 for 8 questions"),
        ("yes", "1 for 8 questions"),
        ({1: "yes"}, "2 has no answer"),
        (dict.fromkeys(range(1, 10), "yes"), "9 was never asked"),
        ([None] * 8, "0 is NoneType"),
        (pd.DataFrame({"question_id": [1, 1], "answer": ["a", "b"]}), "twice"),
        (pd.DataFrame({"text": ["a"]}), "no column `answer`"),
    ],
)
def test_answers_that_do_not_fit_are_refused(answers, words):
    with unchecked(), pytest.raises(MetricError, match=words):
        pope(answers, some_questions(2, 2))


def test_questions_must_be_some():
    with pytest.raises(MetricError, match="questions: none"):
        pope([], some_questions()[:0])
    with pytest.raises(MetricError, match="label"):
        pope(["yes"], pd.DataFrame({"image": ["a"], "text": ["?"]}))
    with pytest.raises(MetricError, match="'maybe' is neither"):
        pope(["yes"], pd.DataFrame({"image": ["a"], "text": ["?"], "label": ["maybe"]}))


def test_prompts_are_questions_too():
    rows = {"text": ["<image> Is there a red star?", "<image> Is there a blue star?"] * 2,
            "answer": [" Yes", " No"] * 2, "scene": [0, 0, 1, 1],
            "target": ["red star", "blue star"] * 2, "lure": ["", "random"] * 2}  # fmt: skip
    found = pope(["Yes", "Yes", "No", "No"], Dataset.from_dict(rows))
    assert found["accuracy"] == 0.5 and found.metadata["n_images"] == 2
    assert found.table["object"].tolist() == ["red star", "blue star"] * 2
    alone = pope(["Yes"] * 4, Dataset.from_dict({k: rows[k] for k in ("text", "answer")}))
    assert alone.metadata["n_images"] == 4
    with pytest.raises(MetricError, match="no column `answer`"):
        pope(["Yes"], Dataset.from_dict({"text": ["?"]}))


def test_paired_tests_know_better_from_worse():
    questions = some_questions(30, 2)
    right = questions["label"].tolist()
    flip = {"yes": "no", "no": "yes"}
    luck = np.random.default_rng(0).random(len(right))
    base = pope([flip[x] if u < 0.3 else x for u, x in zip(luck, right)], questions)
    edit = pope([flip[x] if u < 0.1 else x for u, x in zip(luck, right)], questions)
    assert edit.mcnemar(base) < 1e-4 and base.mcnemar(base) == 1
    row = differences({"none": base, "edit": edit}).set_index("metric").loc["accuracy"]
    assert 0 < row["low"] < row["value"] < row["high"]
    with pytest.raises(MetricError, match="other questions"):
        base.mcnemar(pope(["yes"] * 12, some_questions(2, 3)))
    with pytest.raises(MetricError, match="other images"):
        base.minus(pope(["yes"] * 12, some_questions(2, 3)))
