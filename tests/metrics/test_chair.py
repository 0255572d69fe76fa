"""CHAIR against worked examples, a naive reference, and what must hold whatever the captions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.metrics import (
    MetricError,
    chair,
    cut_to_recall,
    differences,
    first_words,
    scenes,
    table_of,
    whole_sentences,
)
from tests.tiny import unchecked

COLORS = ("red", "blue", "green")
SCENES = scenes(COLORS, {"circle": ["disc"], "square": []})
OBJECTS = {"a": ["red circle", "blue square"], "b": ["green circle"], "c": ["red square"]}
CAPTIONS = {
    "a": "A red disc beside a blue square and a green circle.",  # 3 mentions, 1 wrong
    "b": "Green circle. Green circles!",  # 2 mentions of one object, none wrong
    "c": "A photo.",  # names nothing
}


def test_worked_out_by_hand():
    found = chair(CAPTIONS, OBJECTS, SCENES)
    assert found["chair_s"] == pytest.approx(1 / 3)
    assert found["chair_i"] == pytest.approx(1 / 5)
    assert found["chair_i_set"] == pytest.approx(1 / 4)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["precision"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx(3 / 4)
    # A, red disc, beside, a, blue square, and, a, green circle | two | A, photo
    assert found["words"] == pytest.approx((8 + 2 + 2) / 3)
    wrong = found.mentions[~found.mentions["right"]]
    assert [(r.row, r.object, CAPTIONS["a"][r.start : r.end]) for r in wrong.itertuples()] == [
        (0, "green circle", "green circle")
    ]
    assert found.table["hallucinated"].tolist() == [["green circle"], [], []]


def naive(captions, objects):
    """The definitions, in loops; a caption is a list of objects."""
    bad = mentions = wrong = named = right = there = 0
    for said, truth in zip(captions, objects, strict=True):
        hallucinated = [o for o in said if o not in truth]
        bad += 1 if hallucinated else 0
        mentions += len(said)
        wrong += len(hallucinated)
        named += len(set(said))
        right += len([o for o in set(said) if o in truth])
        there += len(set(truth))
    nan = math.nan
    recall = right / there if there else nan
    precision = right / named if named else nan
    f1 = 2 * recall * precision / (recall + precision) if right else (0.0 if named + there else nan)
    return {
        "chair_s": bad / len(captions),
        "chair_i": wrong / mentions if mentions else nan,
        "recall": recall,
        "precision": precision,
        "f1": f1,
    }


an_object = st.sampled_from(sorted(SCENES.objects))
some_objects = st.lists(an_object, max_size=4)


@given(st.lists(st.tuples(some_objects, some_objects), min_size=1, max_size=6))
def test_rates_are_those_of_the_definition(pairs):
    said, truth = zip(*pairs)
    found = chair([" and a ".join(names) for names in said], list(truth), SCENES)
    for name, value in naive(said, truth).items():
        assert found[name] == pytest.approx(value, nan_ok=True), name


@given(some_objects, st.lists(some_objects, max_size=3))
def test_invariants(truth, sentences):
    caption = " ".join("A " + ", a ".join(names) + "." for names in sentences if names)
    one = chair([caption], [truth], SCENES)
    # any object named: no wrong mention and no wrong caption are the same thing
    assert math.isnan(one["chair_i"]) or (one["chair_i"] == 0) == (one["chair_s"] == 0)
    twice = chair([f"{caption} {caption}"], [truth], SCENES)
    for name in ("chair_s", "chair_i", "recall", "precision"):
        assert twice[name] == pytest.approx(one[name], nan_ok=True)
    longer = chair([f"{caption} A red circle."], [truth], SCENES)
    assert longer["chair_s"] >= one["chair_s"]
    assert not truth or longer["recall"] >= one["recall"]
    perfect = chair([". ".join(truth)], [truth], SCENES)
    if truth:
        assert (perfect["chair_s"], perfect["recall"], perfect["precision"]) == (0, 1, 1)


def test_order_is_no_matter_and_a_caption_without_objects_dilutes_only_chair_s():
    rows = [{"image": i, "caption": c} for i, c in CAPTIONS.items()]
    found, turned = (chair(r, OBJECTS, SCENES) for r in (rows, rows[::-1]))
    assert found["chair_s"] == turned["chair_s"] and found["f1"] == turned["f1"]
    more = chair([*rows, {"image": "a", "caption": "Hm."}], OBJECTS, SCENES)
    assert more["chair_s"] < found["chair_s"] and more["chair_i"] == found["chair_i"]


def test_nothing_named_at_all_is_unknown_and_not_zero():
    found = chair(["A photo.", "Nice."], [["red circle"], []], SCENES)
    assert math.isnan(found["chair_i"]) and found["chair_s"] == 0
    rows = found.summary().set_index("metric")
    assert math.isnan(rows.loc["chair_i", "low"])
    assert found["recall"] == 0


def test_repeats_lower_the_mention_rate_only():
    objects = [["red circle"]]
    plain = chair(["A red circle and a blue square."], objects, SCENES)
    looping = chair(["A red circle and a blue square." + " A red circle." * 8], objects, SCENES)
    assert looping["chair_i"] < plain["chair_i"] == 0.5
    assert looping["chair_i_set"] == plain["chair_i_set"] == 0.5
    assert looping["distinct"] < plain["distinct"] == 1


def test_synonyms_are_understood_in_the_annotations_too():
    assert chair(["A red circle."], [["Red disc"]], SCENES)["chair_s"] == 0


def test_images_are_drawn_whole():
    """Ten captions of each image are no more evidence than one."""
    rng = np.random.default_rng(0)
    said = ["A red circle." if wrong else "A blue square." for wrong in rng.random(30) < 0.4]
    objects = {str(i): ["blue square"] for i in range(30)}
    once = chair({str(i): text for i, text in enumerate(said)}, objects, SCENES)
    often = chair({str(i): [text] * 10 for i, text in enumerate(said)}, objects, SCENES)
    one, ten = (r.summary().set_index("metric").loc["chair_s"] for r in (once, often))
    assert (one["value"], one["low"], one["high"]) == pytest.approx(
        (ten["value"], ten["low"], ten["high"])
    )
    assert (one["n"], ten["n"]) == (30, 300)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        wrong = rng.random(40) < 0.3
        said = ["A red circle." if w else "A blue square." for w in wrong]
        row = chair(said, [["blue square"]] * 40, SCENES).summary().iloc[0]
        held += row["low"] <= 0.3 <= row["high"]
    assert 50 <= held <= 60


def test_a_clean_run_still_has_an_upper_end():
    row = chair(["A blue square."] * 20, [["blue square"]] * 20, SCENES).summary().iloc[0]
    assert row["value"] == row["low"] == 0
    assert row["high"] == pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-3)  # Wilson's


def test_differences_are_paired_by_image():
    objects = {i: ["blue square"] for i in range(40)}
    base = {i: "A blue square." if i % 2 else "A red circle." for i in objects}
    better = {i: "A blue square." if i % 2 or i < 8 else "A red circle." for i in objects}
    results = {"none": chair(base, objects, SCENES), "edit": chair(better, objects, SCENES)}
    row = differences(results).set_index("metric").loc["chair_s"]
    assert row["value"] == pytest.approx(-0.1)
    assert -0.22 < row["low"] < row["high"] < 0  # unpaired, it would reach far above 0
    same = results["none"].minus(results["none"]).set_index("metric").drop("distinct")
    assert (same[["value", "low", "high"]] == 0).to_numpy().all()
    assert set(table_of(results)["condition"]) == {"none", "edit"}


def test_whole_sentences_and_first_words():
    assert whole_sentences('A cat. "A dog." And a b') == 'A cat. "A dog."'
    assert whole_sentences("Version 2.5 of a c") == ""
    assert whole_sentences("All of it!") == "All of it!"
    assert first_words("A red circle, and more.", 3) == "A red circle"
    assert first_words("A red", 5) == "A red" and first_words("A red", 0) == ""
    found = chair(["A red circle. A blue sq"], [["red circle"]], SCENES, cut=whole_sentences)
    assert found["words"] == 2


@given(st.lists(st.tuples(some_objects, some_objects), min_size=1, max_size=5), st.floats(0, 1))
def test_cutting_leaves_the_recall_asked_for(pairs, share):
    said = ["Look: a " + ", then a ".join(names) for names, _ in pairs]
    truth = [names for _, names in pairs]
    whole = chair(said, truth, SCENES)["recall"]
    if not whole > 0:
        return
    rows, k = cut_to_recall(said, truth, SCENES, share * whole)
    assert chair(rows, truth, SCENES)["recall"] >= share * whole - 1e-9
    if k:
        shorter = [first_words(text, k - 1) for text in said]
        assert chair(shorter, truth, SCENES)["recall"] < share * whole


def test_cutting_cannot_add():
    with pytest.raises(MetricError, match="reach 0.500"):
        cut_to_recall(["A red circle."], [["red circle", "blue square"]], SCENES, 0.8)


@pytest.mark.parametrize(
    ("captions", "objects", "words"),
    [
        ([], [], "captions: none"),
        ({"d": "A dog."}, OBJECTS, "the image d .*no annotations"),
        (["A dog."], OBJECTS, "which image"),
        (["A dog.", "A cat."], [["red circle"]], "1 for 2 captions"),
        ({"a": [3]}, OBJECTS, "0 is int"),
        ([{"image": "a"}], OBJECTS, "row 0 needs `image` and `caption`"),
        ("A dog.", OBJECTS, "one text"),
        (["A dog."], [["red cirle"]], "nearest: red circle"),
        (["A dog."], ["red circle"], "one text"),
    ],
)
def test_bad_input_is_named(captions, objects, words):
    with unchecked(), pytest.raises(MetricError, match=words):
        chair(captions, objects, SCENES)


def test_the_result_says_what_it_was_made_with():
    found = chair(CAPTIONS, OBJECTS, SCENES, prompt="Describe the image.", max_new_tokens=64)
    assert found.metadata["vocabulary"] == "interp scenes 1"
    assert found.metadata["prompt"] == "Describe the image." and found.metadata["n_images"] == 3
    assert "recall" in repr(found)
    with pytest.raises(MetricError, match="rate='chair'"):
        found["chair"]
