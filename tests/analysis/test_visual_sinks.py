"""Visual sinks against their definition by loops, and what is said where there are none."""

import numpy as np
import pytest
import torch

from interp.analysis.sink_dimensions import VisualSinkError, scaled_tau, sink_dimensions
from interp.analysis.visual_sinks import visual_sinks
from interp.model.images import ImageError, images_of
from tests import tiny as text_models
from tests.analysis.image_prompts import plain, prompts_of
from tests.model import vision_families as vision
from tests.model.vision_families import IMAGE

QUIET = {"progress": False, "batch_size": 2}
DIMENSIONS = {
    "llava": (3, 16, 19),
    "llava_next": (21, 22, 26),
    "qwen2_5_vl": (6, 8, 9),
    "qwen3_vl": (10, 13, 19),
}
TAU = 1.6

pytestmark = pytest.mark.filterwarnings("ignore:visual_sinks. in:UserWarning")


@pytest.fixture(params=vision.FAMILIES)
def family(request) -> str:
    return request.param


def by_hand(family, model, prompts, row) -> dict[str, np.ndarray]:
    """One prompt by itself, in loops over layers, heads, rows and keys."""
    answer = prompts["answer_ids"][row]
    out, _ = plain(family, model, prompts, row, answer[:-1])
    one = prompts.select([row])
    ids, n = [*one["input_ids"][0], *answer[:-1]], len(one["input_ids"][0])
    batch = model.batch([ids], images=images_of(one))
    with torch.no_grad():
        _, cache = model.run_with_cache(
            batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs
        )
    image = [j for j in range(n) if ids[j] == IMAGE]
    text = [i for i in range(image[0], len(ids)) if i not in image]
    found = {name: [] for name in ("phi", "chosen", "image", "visual", "text", "said")}
    for layer, pattern in enumerate(out.attentions):
        x = cache[f"blocks.{layer}.hook_resid_pre"][0].double()
        rms = (x.square().mean(-1) + 1e-6).sqrt()
        size = (x[:, list(DIMENSIONS[family])].abs() / rms[:, None]).amax(-1)
        sinks = {j for j in range(n) if size[j] >= TAU}
        v = cache[f"blocks.{layer}.attn.hook_v"][0]
        w_o = model.blocks[layer].attn.W_O
        rows = {name: [] for name in ("chosen", "image", "visual", "text")}
        said = np.zeros((4, n))
        for head in range(4):
            masses = []
            for i in text:
                a = pattern[0, head, i]
                on_image = sum(float(a[j]) for j in image)
                visual = sum(float(a[j]) for j in image if j in sinks)
                on_text = sum(float(a[j]) for j in sinks if j not in image and j < len(a))
                good = on_image >= 0.2 and on_image - visual >= 0.5 * on_image
                masses.append((good, on_image, visual, on_text))
                for j in range(n):
                    out_vector = float(a[j]) * v[j, head // 2] @ w_o[head]
                    said[head, j] += float(out_vector.norm()) / len(text)
            for name, values in zip(rows, np.mean(masses, axis=0), strict=True):
                rows[name].append(values)
        for name, values in rows.items():
            found[name].append(values)
        found["phi"].append(size[:n].numpy())
        found["said"].append(said.mean(0))
    return {name: np.array(values) for name, values in found.items()}


def test_everything_is_as_loops_have_it(family):
    model = vision.tiny(family)
    prompts = prompts_of(model, several=True)
    found = visual_sinks(model, prompts, dimensions=DIMENSIONS[family], tau=TAU, **QUIET)
    hand = [by_hand(family, model, prompts, row) for row in range(len(prompts))]
    names = {"chosen": "score", "image": "image_mass", "visual": "visual_sink_mass"}
    for name, column in (names | {"text": "text_sink_mass"}).items():
        expected = np.mean([one[name] for one in hand], axis=0).reshape(-1)
        np.testing.assert_allclose(found.heads.table[column], expected, atol=1e-4)
        assert expected.max() > 0
    assert found.heads.samples.shape == (4, 8)
    for row, one in enumerate(hand):
        rows = found.tokens[found.tokens["prompt"] == row]
        np.testing.assert_allclose(rows["phi"], one["phi"].reshape(-1), atol=1e-4)
        np.testing.assert_allclose(rows["contribution"], one["said"].reshape(-1), atol=1e-4)
        assert rows["sink"].tolist() == (one["phi"].reshape(-1) >= TAU).tolist()
        ids = prompts["input_ids"][row]
        assert rows["image"].tolist() == [token == IMAGE for token in ids] * 2
        where = {j for j, token in enumerate(ids) if token == IMAGE}
        expected = {j for layer in one["phi"] for j in np.flatnonzero(layer >= TAU)} & where
        assert found.positions(row) == sorted(expected)
    of_image = found.tokens.loc[found.tokens["image"] & (found.tokens["layer"] == 1)]
    line = found.layers.set_index("layer").loc[1].to_dict()
    assert line["image_sinks"] == pytest.approx(of_image["sink"].sum() / 4)
    assert line["share_of_image"] == pytest.approx(of_image["sink"].mean())
    assert line["share_of_mass"] == pytest.approx(
        np.mean([one["visual"][1] for one in hand]) / np.mean([one["image"][1] for one in hand]),
        rel=1e-4,
    )
    own = of_image[of_image["sink"]]["contribution"].mean()
    assert line["contribution"] == pytest.approx(own)


def test_planted_dimensions_are_found_and_random_ones_are_not():
    """Two coordinates are made huge in the embedding of the first token, and of the image's."""
    model = vision.fresh("llava")
    prompts = prompts_of(model)
    with torch.no_grad():
        weight = model.original_model.get_input_embeddings().weight
        weight[[5, 3], 9] += 200
        weight[[5, 3], 20] -= 200
    prompts = prompts.select([0, 1])
    found = sink_dimensions(model, prompts)
    assert found.found == (9, 20) == found.needed() and found.tau == scaled_tau(32)
    assert repr(found) == "SinkDimensions(9, 20; tau 1.77)"
    seen = visual_sinks(model, prompts, **QUIET)
    assert seen.dimensions == (9, 20) and seen.candidates is not None
    assert seen.layers["text_sinks"].min() >= 1
    assert seen.tokens[seen.tokens["position"] == 0]["phi"].min() > 3
    assert "dimensions 9, 20" in repr(seen) and len(seen.plot().data) == 4


def test_what_is_large_everywhere_marks_no_sink():
    """As patches of one image may share a coordinate, and a prompt may begin with an image."""
    model = vision.fresh("llava")
    prompts = prompts_of(model).select([0, 1])
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[:, 9] += 200
    found = sink_dimensions(model, prompts)
    line = found.table.set_index("dimension").loc[9].to_dict()
    assert line["share"] == 1 and line["elsewhere"] > 0.3 and 9 not in found.found


def test_a_model_without_them_says_so():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    found = sink_dimensions(model, prompts, tau=5.0)
    assert found.found == () and "no sink dimensions" in repr(found)
    with pytest.raises(VisualSinkError, match="no sink dimensions: .* tau = 5.00"):
        found.needed()
    with pytest.warns(UserWarning, match="no sink dimensions in Llava"):
        seen = visual_sinks(model, prompts, tau=5.0, **QUIET)
    assert "no sink dimensions" in repr(seen) and not seen.tokens["sink"].any()
    assert seen.layers["share_of_mass"].max() == 0 and seen.positions(0) == []
    # what heads spend on the image is known all the same
    assert seen.heads.table["image_mass"].min() > 0.1


def test_many_sinks_are_a_warning():
    model = vision.tiny("llava")
    with pytest.warns(UserWarning, match="in 2 layers more than 5% of the image's tokens"):
        visual_sinks(model, prompts_of(model), dimensions=(3, 16), tau=TAU, **QUIET)


def test_a_killed_run_goes_on(tmp_path):
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    settings = {"dimensions": (3, 16), "tau": TAU, **QUIET}
    whole = visual_sinks(model, prompts, **settings)
    visual_sinks(model, prompts, out=tmp_path, **settings)
    next((tmp_path / "shards").glob("shard-00001*")).unlink()
    again = visual_sinks(model, prompts, out=tmp_path, **settings)
    np.testing.assert_array_equal(again.heads.matrix, whole.heads.matrix)
    assert again.tokens.equals(whole.tokens) and (tmp_path / "heads.parquet").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tau": 20.0}, "at most sqrt.32. = 5.7"),
        ({"dimensions": [40]}, "has 0-31"),
        ({"min_non_sink": 2.0}, "from 0 to 1"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(settings, said):
    model = vision.tiny("llava")
    with pytest.raises(VisualSinkError, match=said):
        visual_sinks(model, prompts_of(model), **settings, **QUIET)


@pytest.mark.parametrize("look", [visual_sinks, sink_dimensions], ids=lambda look: look.__name__)
def test_text_alone_is_refused(look):
    with pytest.raises(ImageError, match="takes no images"):
        look(text_models.tiny("llama"), "w5 w6")
    with pytest.raises(ImageError, match="prompt 0: it has no image"):
        look(vision.tiny("llava"), "w5 w6")
