"""How words are read: double words, plurals, several words for one object."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.metrics import MetricError, Vocabulary, coco, scenes
from interp.metrics.vocabulary import COCO_PHRASES, COCO_UNLESS, singulars
from interp.tasks.pictures import OBJECTS
from interp.tasks.scenes import draw_scene

SHAPES = {"circle": ["disc", "disk"], "square": ["box"], "star": []}
SCENES = scenes(["red", "blue"], SHAPES)
TABLE = (
    "person, man, woman, baby\n"
    "train, locomotive\n"
    "elephant\n"
    "chair, seat, stool\n"
    "toilet\n"
    "tie, bow tie\n"
    "dining table, table\n"
    "hot dog\n"
    "dog, puppy\n"
    "knife\n"
    "mouse\n"
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(TABLE)
    return Vocabulary.read(path)


def named(vocabulary, text):
    return [mention.object for mention in vocabulary.mentions(text)]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A man and a woman.", ["person", "person"]),
        ("two babies", ["person"]),
        ("a baby elephant", ["elephant"]),
        ("baby elephants", ["elephant"]),
        ("a baby, elephant in hand", ["person", "elephant"]),  # a comma ends a phrase
        ("a passenger train", ["train"]),
        ("on the train tracks", []),
        ("sliding into home plate", []),
        ("a toilet seat", ["toilet"]),
        ("the seat of the toilet", ["toilet"]),
        ("a seat at the table", ["chair", "dining table"]),
        ("a bow tie", ["tie"]),
        ("hot dogs, hot-dogs and dogs", ["hot dog", "hot dog", "dog"]),
        ("HOT DOG", ["hot dog"]),
        ("a dog-eared page", []),
        ("knives and mice", ["knife", "mouse"]),
        ("the dog's tail", ["dog"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_captions_worked_out_by_hand(table, text, objects):
    assert named(table, text) == objects


def test_mentions_say_where_they_are(table):
    text = "Two Hot  dogs near a puppy"
    places = [(m.word, m.object, text[m.start : m.end]) for m in table.mentions(text)]
    assert places == [("hot  dogs", "hot dog", "Hot  dogs"), ("puppy", "dog", "puppy")]


def test_words_are_counted_after_phrases_are_one_and_without_punctuation(table):
    assert table.n_words("A hot dog, please - and a baby elephant!") == 6
    assert table.n_words("") == 0


def test_scenes_have_colours_synonyms_and_plurals():
    text = "A red circle, two blue discs, a red box; a circle and a green star. Blue stars!"
    assert named(SCENES, text) == ["red circle", "blue circle", "red square", "blue star"]
    assert len(SCENES.objects) == 6


def test_the_scenes_we_draw_are_read_as_they_are_written():
    vocabulary = scenes()
    assert sorted(vocabulary.objects) == sorted(OBJECTS)
    for seed in range(20):
        scene = draw_scene(random.Random(seed))
        assert sorted(named(vocabulary, scene.caption)) == sorted(scene.objects)
    text = "Two red crosses, a blue plus and a green ball."
    assert named(vocabulary, text) == ["red cross", "blue cross", "green circle"]


@pytest.mark.parametrize(
    "word", ["frisbee", "skis", "scissors", "hair drier", "wine glass", "tv", "potted plant"]
)
def test_every_class_of_coco_stands_for_itself_in_singular_and_plural(word):
    assert named(coco(), f"a {word}") == [word]
    plural = word if word.endswith("s") and word != "wine glass" else word + "s"
    assert named(coco(), "wine glasses" if word == "wine glass" else plural) == [word]


def test_the_coco_table_is_whole():
    assert len(coco().objects) == 80
    assert all(coco().object_of(name) == name for name in coco().objects)
    assert all(named(coco(), word) == [name] for word, name in coco().words.items())


@given(st.lists(st.sampled_from(sorted(coco().words)), max_size=8))
def test_a_text_of_entries_names_each_of_them(words):
    # sentences, since two words may be a phrase; "seat" is none beside a toilet
    text = ". ".join(words)
    wanted = [coco().object_of(word) for word in words if word != "seat" or "toilet" not in words]
    assert named(coco(), text) == wanted


def naive(words, table, pairs):
    """The card's algorithm on words that are singular already: pairs, toilets, look-up."""
    merged, at = [], 0
    while at < len(words):
        pair = " ".join(words[at : at + 2])
        if pair in pairs:
            merged.append(pairs[pair])
            at += 2
        else:
            merged.append(words[at])
            at += 1
    if "toilet" in merged and "seat" in merged:
        merged = [word for word in merged if word != "seat"]
    return [table[word] for word in merged if word in table]


WORDS = [
    "baby",
    "adult",
    "elephant",
    "bear",
    "passenger",
    "train",
    "track",
    "toilet",
    "seat",
    "tie",
]
WORDS += ["bow", "home", "plate", "hot", "dog", "cat", "a", "traffic", "light", "teddy", "jet"]


@given(st.lists(st.sampled_from(WORDS), max_size=9))
def test_reading_is_the_greedy_merging_of_pairs(words):
    rows = {"person": ["baby", "adult", "passenger"], "elephant": [], "bear": [], "dog": [],
            "train": [], "toilet": [], "chair": ["seat"], "tie": ["bow", "bow tie"], "cat": [],
            "hot dog": [], "traffic light": [], "teddy bear": [], "airplane": ["jet"]}  # fmt: skip
    vocabulary = Vocabulary(rows, COCO_PHRASES, COCO_UNLESS)
    table = {word: name for name, others in rows.items() for word in (name, *others)}
    pairs = {word: word for word in table if " " in word} | COCO_PHRASES
    assert named(vocabulary, " ".join(words)) == naive(words, table, pairs)


def test_singulars_undo_the_usual_plurals():
    for plural, word in [("buses", "bus"), ("babies", "baby"), ("knives", "knife"),
                         ("wolves", "wolf"), ("people", "person"), ("cups", "cup")]:  # fmt: skip
        assert word in list(singulars(plural))


def test_published_formats_hold_the_same(tmp_path, table):
    (tmp_path / "chair.py").write_text(f"import nltk\n\nsynonyms_txt = '''\n{TABLE}'''\n1 / 0\n")
    (tmp_path / "a.json").write_text(json.dumps({"dog": ["puppy"], "cat": []}))
    (tmp_path / "b.json").write_text(json.dumps([["dog", "puppy"], ["cat"]]))
    assert Vocabulary.read(tmp_path / "chair.py").words == table.words
    json_tables = [Vocabulary.read(tmp_path / name).words for name in ("a.json", "b.json")]
    assert json_tables == [{"dog": "dog", "puppy": "dog", "cat": "cat"}] * 2
    assert "synonyms.txt" in table.version


def test_doubles_and_stray_spaces_of_the_published_list_do_no_harm(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("motorcycle, scooter,  motor bike, scooter\ncell phone, iPhone\n")
    read = Vocabulary.read(path)
    assert named(read, "a motor bike and an iPhone") == ["motorcycle", "cell phone"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", "{", "object -> list of words"),
        ("x.json", '{"dog": [1]}', "words must be text"),
        ("x.py", "def (", "no Python"),
        ("x.py", "a = 1", "no text"),
        ("x.txt", "\n", "none"),
        ("x.txt", "dog, pup\ncat, pup\n", "'pup' stands for 'dog' and for 'cat'"),
    ],
)
def test_broken_tables_say_what_is_wrong(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(MetricError, match=words):
        Vocabulary.read(tmp_path / name)


def test_a_missing_file_and_an_unknown_object_are_named(tmp_path):
    with pytest.raises(MetricError, match="nowhere.txt"):
        Vocabulary.read(tmp_path / "nowhere.txt")
    with pytest.raises(MetricError, match="'red cirle'.*nearest: red circle"):
        SCENES.object_of("red cirle")
