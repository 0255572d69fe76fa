"""VAR from its definition: plain transformers, one prompt at a time, one row of one head at a time.

Nothing of interp is used: the attention function is ours, and is written row by row.
"""

from collections import Counter

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.model.vision_families import IMAGE, build

NAME = "naive_var"
STATE: dict = {}


def attend(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eager attention whose rows are redistributed."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    pattern = scores.softmax(-1)
    layer = module.layer_idx
    first = pattern.shape[3] - pattern.shape[2]
    if layer in STATE["layers"]:
        for head in range(pattern.shape[1]):
            for row in range(pattern.shape[2]):
                pattern[0, head, row] = redistribute(pattern[0, head, row], layer, first + row)
    return (pattern @ value).transpose(1, 2), pattern


def redistribute(row, layer, place):
    image, rule, counts = STATE["image"], STATE["rule"], STATE["counts"]
    sinks = STATE["sinks"][layer]
    if place in image or (rule["require_visual_sink"] and not sinks & image):
        return row
    held = sum(float(row[j]) for j in sorted(image) if j < len(row))
    receivers = [j for j in sorted(image - sinks) if j < len(row)]
    non_sink = sum(float(row[j]) for j in receivers)
    if held < rule["min_image_mass"] or non_sink < rule["min_non_sink"] * held or non_sink < 1e-6:
        counts["left"] += 1
        return row
    counts["edited"] += 1
    donors = {"all": sinks, "image": sinks & image, "text": sinks - image}[rule["donors"]]
    donors = [j for j in sorted(donors) if j < len(row)]
    given = sum(float(row[j]) for j in donors)
    new = row.clone()
    for j in donors:
        new[j] = (1 - rule["moved"]) * row[j]
    for j in receivers:
        new[j] = row[j] * (1 + rule["moved"] * given / non_sink)
    assert abs(float(new.sum()) - float(row.sum())) < 1e-5
    return new


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)


def logits_of(family, inputs, prompt, written, *, dimensions, tau, layers, **rule) -> tuple:
    """Logits of all of a prompt's tokens, then of each written one, read with the cache."""
    model = build(family)
    model.set_attn_implementation({"text_config": NAME, "vision_config": "eager"})
    decoder = model.model.language_model
    STATE.clear()
    STATE.update(
        layers=layers, rule=rule, sinks={}, counts=Counter(),
        image={j for j, token in enumerate(prompt) if token == IMAGE},
    )  # fmt: skip

    def find(module, args, kwargs, layer):
        x = args[0] if args else kwargs["hidden_states"]
        if layer in STATE["sinks"]:
            return  # those of the prompt
        found = set()
        for j, vector in enumerate(x[0].double()):
            size = max(abs(float(vector[d])) for d in dimensions)
            if size / float((vector.square().mean() + 1e-6).sqrt()) >= tau:
                found.add(j)
        STATE["sinks"][layer] = found

    for layer, block in enumerate(decoder.layers):
        block.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: find(module, args, kwargs, layer),
            with_kwargs=True,
        )
    ids = torch.tensor([prompt])
    found = stepped(model, ids, torch.ones_like(ids), inputs, [written])[0]
    return found, dict(STATE["counts"]), dict(STATE["sinks"])


def stepped(model, ids, mask, inputs, written) -> torch.Tensor:
    """Logits of a batch's prompts, and behind each of the tokens that it is made to write."""

    def force(seen, scores):
        step = seen.shape[1] - ids.shape[1]
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(written):
            forced[row, (*tokens, 3)[step]] = 0
        return forced

    with torch.no_grad():
        read = model(input_ids=ids, attention_mask=mask, **inputs).logits
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=len(written[0]) + 1, use_cache=True,
            do_sample=False, logits_processor=[force], output_logits=True, pad_token_id=0,
            return_dict_in_generate=True, **inputs,
        )  # fmt: skip
    assert out.sequences[:, ids.shape[1] : -1].tolist() == [list(tokens) for tokens in written]
    return torch.cat([read, torch.stack(out.logits[1:], dim=1)], dim=1)
