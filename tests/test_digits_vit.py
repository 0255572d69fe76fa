"""The shipped image classifier: plain transformers loads it, and it does what its card says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoImageProcessor, ViTForImageClassification

from interp import zoo
from interp.model.hooked import load
from interp.tasks import digits

FOLDER = Path(__file__).parents[1] / "data" / "models" / "digits-vit"
RECORDED = json.loads((FOLDER / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def script():
    """train.py, which no package holds, as a module."""
    spec = importlib.util.spec_from_file_location("digits_vit_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return ViTForImageClassification.from_pretrained(FOLDER).eval()


def test_it_reads_what_was_recorded(script, model):
    for split in ("validation", "test"):
        row = RECORDED[split]
        assert script.right(model, *script.tensors(split)) == pytest.approx(row["right"], abs=1)
    assert RECORDED["test"]["low"] > 0.94


def test_the_card_gives_the_recorded_numbers(script):
    assert script.table(RECORDED) in (FOLDER / "README.md").read_text()
    for row in RECORDED.values():
        interval = binomtest(row["right"], row["n"]).proportion_ci(method="wilson")
        assert row["accuracy"] == row["right"] / row["n"]
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval), abs=1e-6)


def test_the_log_ends_where_the_card_does(script):
    lines = [json.loads(line) for line in (FOLDER / "training.log").read_text().splitlines()]
    last, row = lines[-1], RECORDED["validation"]
    assert last["validation"] == pytest.approx(row["accuracy"], abs=0.004)
    assert f"{last['epoch']} epochs" in (FOLDER / "README.md").read_text()


def test_it_is_small_and_whole(model):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2 * 2**20
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 139_722


def test_it_is_known_by_name_and_hooked_it_says_the_same(model):
    known = {m.name: m for m in zoo.models()}["digits-vit"]
    assert known.installed and "digits" in known.description
    hooked, images = load("digits-vit"), digits("test", 8)["image"]
    pixels = AutoImageProcessor.from_pretrained(FOLDER)(list(images), return_tensors="pt")
    with torch.no_grad():
        wanted = model(**pixels).logits
        torch.testing.assert_close(hooked(pixels.pixel_values), wanted, atol=1e-5, rtol=1e-4)
    assert hooked.lazy and hooked.processor is not None


def test_training_repeats_itself(script, tmp_path):
    """One epoch twice gives the same weights; another seed does not."""
    import argparse

    def first_weights(seed: int, out: Path) -> torch.Tensor:
        args = argparse.Namespace(seed=seed, epochs=1, lr=2e-3, out=out)
        images, targets = script.tensors("train")
        script.tensors = lambda split: (images[:64], targets[:64])
        script.train(args)
        return ViTForImageClassification.from_pretrained(out).classifier.weight

    whole = script.tensors
    try:
        one, two = first_weights(0, tmp_path / "a"), first_weights(0, tmp_path / "b")
        other = first_weights(1, tmp_path / "c")
    finally:
        script.tensors = whole
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert len((tmp_path / "a" / "training.log").read_text().splitlines()) == 1
