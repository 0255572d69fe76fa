"""Published files are read as they are, and what is broken in them is named."""

import json

import pytest

from interp.metrics import (
    MetricError,
    coco,
    coco_objects,
    pope,
    pope_questions,
    read_answers,
    read_captions,
    read_objects,
    read_questions,
)

ROWS = [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A cat."}]
WANTED = [{"image": "1", "caption": "A dog."}, {"image": "2", "caption": "A cat."}]


def written(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(map(json.dumps, ROWS)),
        json.dumps(ROWS),
        "\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n\n",
        json.dumps({"overall": {}, "imgToEval": {"1": ROWS[0], "2": ROWS[1]}}),
        json.dumps({"overall_metrics": {}, "sentences": ROWS}),
    ],
)
def test_captions_of_every_layout(tmp_path, text):
    assert read_captions(written(tmp_path / "captions.json", text)) == WANTED


def test_a_single_caption_is_one(tmp_path):
    assert read_captions(written(tmp_path / "c.jsonl", ROWS[0])) == WANTED[:1]


def test_objects_and_questions_go_round(tmp_path):
    rows = [{"image": "a.jpg", "objects": ["dog", "cat"]}, {"image": "b.jpg", "objects": ["owl"]}]
    path = written(tmp_path / "objects.json", "\n".join(map(json.dumps, rows)))
    objects = read_objects(path)
    assert objects == {"a.jpg": ["dog", "cat"], "b.jpg": ["owl"]}
    questions = pope_questions(objects, per_image=1)
    questions.to_json(tmp_path / "questions.json", orient="records", lines=True)
    read = read_questions(tmp_path / "questions.json")
    assert read[["question_id", "text", "label"]].equals(
        questions[["question_id", "text", "label"]]
    )


def test_questions_of_popev2_and_of_conversations(tmp_path):
    second = [{"image_id": 7, "image_name": "7.jpg", "target_object": "dog", "label": "Yes",
               "query": "Is there a dog in the image?"}]  # fmt: skip
    read = read_questions(written(tmp_path / "v2.json", second))
    assert read.iloc[0].to_dict() == {
        "question_id": 1, "image": "7", "text": "Is there a dog in the image?", "label": "yes",
        "object": "dog",
    }  # fmt: skip
    turns = [{"image": n, "text": ["Is it?", "Or that?"], "label": ["yes", "no"]} for n in "ab"]
    read = read_questions(written(tmp_path / "turns.jsonl", turns))
    assert read["question_id"].tolist() == [1, 2, 3, 4] and read["turn"].tolist() == [0, 1, 0, 1]
    assert read["label"].tolist() == ["yes", "no"] * 2


def test_answers_of_both_kinds(tmp_path):
    questions = pope_questions({"a": ["dog"], "b": ["cat"]}, per_image=1)
    texts, labels = questions["text"].tolist(), questions["label"].tolist()
    plain = [{"question": t.lower(), "answer": a} for t, a in zip(texts, labels)]
    read = read_answers(written(tmp_path / "answers.json", "\n".join(map(json.dumps, plain))))
    assert pope(read, questions)["accuracy"] == 1
    llava = [{"question_id": n, "prompt": t + "\nOne word.", "text": a}
             for n, t, a in zip(questions["question_id"], texts, labels)]  # fmt: skip
    read = read_answers(written(tmp_path / "llava.jsonl", llava[::-1]))
    assert pope(read, questions)["accuracy"] == 1


def test_a_scene_file_with_a_missing_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    good, lost = {"image": "a.png", "objects": ["dog"]}, {"image": "lost.png", "objects": ["dog"]}
    path = written(tmp_path / "scenes.jsonl", [good, lost])
    assert set(read_objects(path)) == {"a.png", "lost.png"}
    with pytest.raises(MetricError, match=r"row 1 has the image lost.png, and .* has not"):
        read_objects(path, folder=tmp_path)
    path = written(tmp_path / "scenes.jsonl", [good, {"objects": ["dog"]}])
    with pytest.raises(MetricError, match="row 1 has no image"):
        read_objects(path)


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (read_objects, '{"image": "a"}', "row 0 .a. needs `objects`"),
        (read_objects, '[{"image": "a", "objects": []}, {"image": "a", "objects": []}]', "a again"),
        (read_objects, "", "is empty"),
        (read_objects, "[]", "is empty"),
        (read_objects, '{"image": "a", "objects": []}\n{"ima', "from line 2 on"),
        (read_captions, '{"image_id": 1}', "row 0 has no text"),
        (read_captions, "[3]", "row 0 has no image"),
        (read_questions, '{"image": "a", "text": "?", "label": "maybe"}', "yes or no"),
        (read_questions, '{"image": "a", "text": ["?"], "label": ["yes", "no"]}', "a label for"),
        (read_answers, '{"question": "?"}', "row 0 has no text"),
        (read_answers, "3", "row 0 is no object"),
    ],
)
def test_broken_files_are_named_by_row(tmp_path, read, text, words):
    with pytest.raises(MetricError, match=words):
        read(written(tmp_path / "file.json", text))


def test_a_file_that_is_not_there():
    with pytest.raises(MetricError, match=r"nowhere.json: cannot be read"):
        read_objects("nowhere.json")


def test_coco_takes_instances_and_captions_together(tmp_path):
    instances = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 62, "name": "chair"}],
        "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 1, "category_id": 18},
                        {"image_id": 2, "category_id": 62}],
    }  # fmt: skip
    captions = {"annotations": [{"image_id": 1, "caption": "Two puppies on a sofa."}]}
    paths = [written(tmp_path / "i.json", instances)], [written(tmp_path / "c.json", captions)]
    assert coco_objects(*paths, coco()) == {"1": ["dog", "couch"], "2": ["chair"], "3": []}
    assert coco_objects(*paths, coco(), images=[2]) == {"2": ["chair"]}
    with pytest.raises(MetricError, match="images: 9"):
        coco_objects(*paths, coco(), images=[1, 9])
    with pytest.raises(MetricError, match="annotations and categories"):
        coco_objects(paths[1], [], coco())
