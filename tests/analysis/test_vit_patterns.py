"""Where an encoder's heads look: against loops over plain patterns, and planted heads."""

from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from interp.analysis.vit.atlas import clustered, components, hop_profile, pattern_atlas, silhouette
from interp.analysis.vit.codes import MapCoder, MapCodes, coded, compared, map_codes, map_roots
from interp.analysis.vit.patterns import Grid, PatternError, kind_of, look_at_patterns
from interp.model import attention as attention_module
from interp.model.hooked import load
from tests.model import vision_families as vision
from tests.model.families import build

SIDE = 4


@cache
def encoder():
    return load(build("vit"))


@cache
def pixels(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@cache
def looked():
    return look_at_patterns(encoder(), pixels(), batch_size=2, progress=False)


@cache
def patterns() -> np.ndarray:
    """[layer, image, head, query, key] of plain transformers."""
    with torch.no_grad():
        out = build("vit")(pixel_values=pixels(), output_attentions=True)
    return torch.stack(out.attentions).double().numpy()


def naive(layer: int, head: int) -> dict:
    """The definitions, patch by patch."""
    n_images, g = 3, SIDE
    hops, offsets = np.zeros((n_images, g)), np.zeros((2 * g - 1, 2 * g - 1))
    special, maps = np.zeros(n_images), np.zeros((n_images, g * g, g * g))
    for image in range(n_images):
        for i in range(g * g):
            row = patterns()[layer, image, head, i + 1]
            special[image] += row[0] / g**2
            for j in range(g * g):
                share = row[j + 1] / row[1:].sum()
                down, right = j // g - i // g, j % g - i % g
                hops[image, max(abs(down), abs(right))] += share / g**2
                offsets[down + g - 1, right + g - 1] += share / g**2 / n_images
                maps[image, i, j] = share
    mean = maps.mean(0)
    variance = sum(((maps[b] - mean) ** 2).sum() for b in range(n_images)) / (n_images - 1)
    spread = variance / sum((maps[b] ** 2).sum() for b in range(n_images)) * n_images
    key_share = max(mean[:, j].mean() for j in range(g * g))
    found = {"hops": hops, "offsets": offsets, "on_special": special}
    return found | {"spread": spread, "key_share": key_share}


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (0, 3), (1, 2)])
def test_everything_is_what_the_loops_say(layer, head):
    found, wanted = looked(), naive(layer, head)
    for name in ("hops", "on_special"):
        assert_close(getattr(found, name)[:, layer, head], wanted[name], atol=1e-5, rtol=0)
    for name in ("offsets", "spread", "key_share"):
        value = np.asarray(getattr(found, name)[layer, head])
        assert_close(value, np.asarray(wanted[name]), atol=1e-5, rtol=0)


def test_blocks_of_rows_make_no_difference(monkeypatch):
    whole = looked()
    monkeypatch.setattr(attention_module, "BLOCK_ELEMENTS", 300)  # a row or two at a time
    parts = look_at_patterns(encoder(), pixels(), batch_size=3, progress=False)
    for name in ("hops", "offsets", "on_special", "spread", "key_share"):
        assert_close(getattr(parts, name), getattr(whole, name), atol=1e-6, rtol=0)


def test_shares_sum_to_one_and_rings_are_sums_of_offsets():
    found = looked()
    assert_close(found.hops.sum(-1), np.ones((3, 2, 4)), atol=1e-5, rtol=0)
    ring = found.grid.ring_of_offset
    sums = np.stack([found.offsets[..., ring == k].sum(-1) for k in range(SIDE)], axis=-1)
    assert_close(sums, found.hops.mean(0), atol=1e-6, rtol=0)


def test_the_uniform_profile_of_a_vit():
    grid = Grid(14, 1)
    assert grid.even_hops[0] == pytest.approx(1 / 196)
    assert grid.even_hops[1] == pytest.approx(1404 / 196**2)
    assert grid.even_hops.sum() == pytest.approx(1) == pytest.approx(grid.even_offsets.sum())


def test_uniform_attention_has_the_uniform_profile():
    plain = build("vit")
    for block in plain.vit.layers:
        torch.nn.init.zeros_(block.attention.q_proj.weight)
        torch.nn.init.zeros_(block.attention.q_proj.bias)
    model = load(plain)
    found = look_at_patterns(model, pixels(), progress=False)
    even = np.broadcast_to(found.grid.even_hops, found.hops.shape)
    assert_close(found.hops, even.copy(), atol=1e-6, rtol=0)
    assert_close(found.spread, np.zeros((2, 4)), atol=1e-5, rtol=0)
    assert_close(found.on_special, np.full((3, 2, 4), 1 / 17), atol=1e-6, rtol=0)
    assert found.kinds == ["even"] * 8
    profile = hop_profile(model, pixels(), progress=False).table
    assert_close(profile["excess"].to_numpy(), np.ones(len(profile)), atol=1e-5, rtol=0)


def planted(offset: tuple[int, int]):
    """A layer whose heads look from each patch to the one at `offset` by position alone.

    Each token's embedding is its own direction (the image weighs nothing), and q of token i is k
    of its neighbour; at the border it is its own.
    """
    g, width = SIDE, 32
    config = hf.ViTConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=16, patch_size=4, num_labels=3,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config).eval()
    embeddings, attention = model.vit.embeddings, model.vit.layers[0].attention
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.zero_()
        embeddings.patch_embeddings.projection.bias.zero_()
        embeddings.cls_token.zero_()
        embeddings.position_embeddings.zero_()
        for i in range(g * g + 1):
            embeddings.position_embeddings[0, i, i] = 1
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.copy_(30 * torch.eye(width))
        attention.q_proj.bias.zero_()
        attention.k_proj.bias.zero_()
        attention.q_proj.weight[0, 0] = 30
        for i in range(g * g):
            down, right = i // g + offset[0], i % g + offset[1]
            inside = 0 <= down < g and 0 <= right < g
            to = down * g + right if inside else i
            attention.q_proj.weight[to + 1, i + 1] = 30
    model.config.architectures = ["ViTForImageClassification"]
    return load(model)


@pytest.mark.parametrize(
    ("offset", "kind"),
    [((0, 1), "neighbour right"), ((-1, 0), "neighbour up"), ((1, -1), "neighbour down left"),
     ((0, 0), "self")],
)  # fmt: skip
def test_a_planted_neighbour_head_is_found(offset, kind):
    found = look_at_patterns(planted(offset), pixels(), progress=False)
    down, right = offset
    inside = (SIDE - abs(down)) * (SIDE - abs(right)) / SIDE**2
    at = (0, 0, SIDE - 1 + down, SIDE - 1 + right)
    assert found.offsets[at] == pytest.approx(inside, abs=1e-4)
    assert found.offsets[0, 0, SIDE - 1, SIDE - 1] == pytest.approx(
        1 if offset == (0, 0) else 1 - inside, abs=1e-4
    )  # the border looks at itself
    assert found.spread[0, 0] == pytest.approx(0, abs=1e-5)
    assert found.kinds == [kind]


def test_turning_image_and_positions_turns_the_offsets():
    plain, turned = build("vit"), build("vit")
    with torch.no_grad():
        positions = turned.vit.embeddings.position_embeddings
        grid = positions[0, 1:].reshape(SIDE, SIDE, -1).clone()
        positions[0, 1:] = grid.transpose(0, 1).reshape(SIDE**2, -1)
        projection = turned.vit.embeddings.patch_embeddings.projection.weight
        projection.copy_(projection.clone().transpose(2, 3))
    before = look_at_patterns(load(plain), pixels(), progress=False).offsets
    after = look_at_patterns(load(turned), pixels().transpose(2, 3), progress=False).offsets
    assert_close(after, before.swapaxes(2, 3).copy(), atol=1e-5, rtol=0)


def offsets_with(share: float, *cells: tuple[int, int]) -> np.ndarray:
    """`share` split over some offsets of an 8 x 8 grid, the rest as an even head has it."""
    found = Grid(8, 1).even_offsets * (1 - share)
    for down, right in cells:
        found[7 + down, 7 + right] += share / len(cells)
    return found


@pytest.mark.parametrize(
    ("offsets", "key_share", "kind"),
    [
        (offsets_with(0.8, (0, 0)), 0.1, "self"),
        (offsets_with(0.8, (1, 0)), 0.1, "neighbour down"),
        (offsets_with(0.8, (1, 0), (-1, 0), (0, 1)), 0.1, "ring 1"),
        (offsets_with(0.8, (0, 3), (0, -3), (0, 2)), 0.1, "row"),
        (offsets_with(0.8, (3, 0), (-3, 0)), 0.1, "column"),
        (offsets_with(0.0), 0.1, "even"),
        (offsets_with(0.6, (2, 2), (-2, 2), (2, -2), (0, 0)), 0.1, "near"),
        (offsets_with(0.6, (7, 7), (-7, 7), (7, -7)), 0.1, "far"),
        (offsets_with(0.8, (0, 0)), 0.7, "few keys"),
    ],
)
def test_kinds(offsets, key_share, kind):
    assert kind_of(offsets, key_share, Grid(8, 1)) == kind


def test_the_atlas_puts_like_heads_together():
    rng = np.random.default_rng(0)
    cells = [(0, 1)] * 5 + [(0, 0)] * 4 + [(3, 3)] * 3
    offsets = np.stack([offsets_with(0.6 + 0.1 * rng.random(), cell) for cell in cells])
    codes = components(offsets[None])
    found = clustered(codes, most=6, seed=0)
    assert found.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert silhouette(codes, found) > 0.8
    roots = np.sqrt(offsets.reshape(12, -1))
    apart = np.linalg.norm(roots[:, None] - roots[None], axis=-1)
    near = np.linalg.norm(codes[:, None] - codes[None], axis=-1)
    assert np.abs(apart - near).max() < 0.1  # 95 % of the variance


@given(st.integers(4, 9), st.integers(2, 3), st.integers(0, 50))
def test_silhouette_is_that_of_the_definition(n, k, seed):
    rng = np.random.default_rng(seed)
    codes, labels = rng.normal(size=(n, 2)), rng.integers(0, k, n)
    if len(set(labels)) < 2:
        assert silhouette(codes, labels) == -1
        return
    values = []
    for i in range(n):
        mean = {
            c: np.mean([np.linalg.norm(codes[i] - codes[j]) for j in range(n)
                        if labels[j] == c and j != i])
            for c in set(labels) if (labels == c).sum() > (c == labels[i])
        }  # fmt: skip
        if labels[i] not in mean:
            values.append(0.0)
            continue
        a, b = mean[labels[i]], min(v for c, v in mean.items() if c != labels[i])
        values.append((b - a) / max(a, b))
    assert silhouette(codes, labels) == pytest.approx(np.mean(values))


def test_profile_and_atlas_have_a_row_a_head_and_figures():
    profile = hop_profile(encoder(), pixels(), progress=False)
    assert len(profile.table) == 2 * 4 * SIDE
    one = profile.table.query("layer == 1 and head == 2")
    assert_close(one["share"].to_numpy(), looked().hops.mean(0)[1, 2], atol=1e-6, rtol=0)
    assert ((one["low"] <= one["share"]) & (one["share"] <= one["high"])).all()
    atlas = pattern_atlas(encoder(), pixels(), progress=False)
    assert len(atlas.table) == 8 and set(atlas.table["cluster"]) >= {0, 1}
    lines = profile.plot().data
    assert [line.name for line in lines][-1] == "uniform"
    figure = atlas.plot(mark=["vision:L1H2"])
    mosaic = np.asarray(figure.data[0].z, float)
    width = 2 * SIDE - 1
    own = mosaic[width + 1 :, 2 * (width + 1) : 3 * (width + 1) - 1] ** 2
    assert_close(own, atlas.offsets[1, 2], atol=1e-5, rtol=0)
    assert len(figure.layout.shapes) == 9
    assert len(atlas.plot_map().data[0].x) == 8


def test_towers_of_vision_language_models_have_profiles_too():
    images = [vision.picture(n) for n in range(2)]
    found = look_at_patterns(vision.tiny("llava"), images, progress=False)
    assert found.grid == Grid(2, 1) and found.hops.shape == (2, 3, 2, 2)
    # an image that is cut into crops counts as several
    found = look_at_patterns(vision.tiny("llava_next"), images, progress=False)
    assert found.hops.shape[0] > 2
    with pytest.raises(PatternError, match="no grid of patches"):
        hop_profile(vision.tiny("qwen2_5_vl"), images, progress=False)


def test_maps_are_the_shares_of_patches():
    roots = map_roots(encoder(), pixels(), batch_size=2, progress=False)
    wanted = patterns()[..., 1:, 1:].swapaxes(0, 1)
    wanted = np.sqrt(wanted / wanted.sum(-1, keepdims=True))
    assert_close(roots.numpy(), wanted.astype(np.float32), atol=1e-5, rtol=0)


def drawn_maps(n_images: int = 20) -> torch.Tensor:
    """[image, layer, head]: to oneself, to the next, to all, three heads each, a little noisy."""
    size = SIDE**2
    plain = torch.stack([torch.eye(size), torch.eye(size).roll(1, 1), torch.ones(size, size)])
    noise = 0.1 * torch.rand(n_images, 3, 3, size, size, generator=torch.Generator().manual_seed(0))
    maps = plain[:, None] / plain.sum(-1)[:, None, :, None] + noise
    return (maps / maps.sum(-1, keepdim=True)).sqrt()


def test_codes_tell_apart_what_heads_draw():
    roots = drawn_maps()
    coder, codes, explained = coded(roots, latent=4, epochs=40, seed=0)
    _, again, _ = coded(roots, latent=4, epochs=40, seed=0)
    assert_close(codes, again)
    assert explained > 0.7  # the rest is noise
    found = MapCodes(codes.numpy(), coder, explained, {})
    kinds = np.repeat([0, 1, 2], 3)
    assert compared(found.clusters(), kinds) == 1
    assert found.spread.max() < 0.1  # the same on every image, but for the noise
    mean = roots.mean(0).pow(2)[:, 0].numpy()
    for row, map_ in zip(found.drawn(found.by_head[::3]), mean):
        assert_close(row.sum(-1), np.ones(SIDE**2, np.float32), atol=1e-5, rtol=0)
        assert np.corrcoef(row.ravel(), map_.ravel())[0, 1] > 0.9 or map_.std() < 0.01


def test_the_spread_of_codes_is_the_share_within_heads():
    codes = np.random.default_rng(0).normal(size=(6, 2, 3, 4)).astype(np.float32)
    found = MapCodes(codes, MapCoder(16, 4), 0.0, {})
    own = ((codes - codes.mean(0)) ** 2).sum(-1).mean(0)
    everything = ((codes - codes.reshape(-1, 4).mean(0)) ** 2).sum(-1).mean()
    assert_close(found.spread, own / everything, atol=1e-5, rtol=1e-4)


def test_codes_of_a_model():
    found = map_codes(encoder(), pixels(), latent=3, epochs=1, progress=False)
    assert found.codes.shape == (3, 2, 4, 3) and found.metadata["latent"] == 3
    assert np.isfinite(found.codes).all()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=9))
def test_the_adjusted_rand_index_counts_pairs(labels):
    one, other = (np.array(column) for column in zip(*labels))
    pairs = [(i, j) for i in range(len(one)) for j in range(i)]
    in_one = [one[i] == one[j] for i, j in pairs]
    in_other = [other[i] == other[j] for i, j in pairs]
    both = sum(a and b for a, b in zip(in_one, in_other))
    expected = sum(in_one) * sum(in_other) / len(pairs)
    most = (sum(in_one) + sum(in_other)) / 2
    wanted = 1.0 if most == expected else (both - expected) / (most - expected)
    assert compared(one, other) == pytest.approx(wanted)
