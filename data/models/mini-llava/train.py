"""Train and measure mini-llava: it describes pictures of shapes and answers questions about them.

    python data/models/mini-llava/train.py --minutes 25 --seed 0 --out data/models/mini-llava

Two phases. First the image encoder alone: a linear layer on each patch is to tell which shape lies
in its cell, and in which colour. Then the whole, on captions and questions (`interp.tasks.scenes`,
training scenes, which are biased and leave a tenth of all sets of objects out).

Every batch is made anew from a seeded stream. Minutes are those of the processor, so a pause or a
busy machine takes nothing from them; `--steps` counts steps instead, which repeats a run elsewhere.
A run that was cut off goes on from its last checkpoint in `--scratch`. `--measure` only measures
what `--out` holds. In a checkout without an installed `interp` put `PYTHONPATH=.` in front.
"""

import argparse
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import interp
from interp.evaluation import share_interval
from interp.model.images import images_of
from interp.tasks.pictures import COLORS, OBJECTS, SHAPES, Scene
from interp.tasks.scenes import NUMBERS, PARTNERS, QUESTIONS, ask, draw_scene

SIZE, PATCH = 48, 8
N_PATCHES = (SIZE // PATCH) ** 2
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
SHARES = {"caption": 4, "exists": 3, "color": 2, "count": 2}  # of the rows of a batch
OTHER_WEIGHT = 0.02  # of the loss on tokens that are no answer
SCENES, ROWS = 32, 3  # in a batch: scenes, and questions about each
# what the first phase tells of a patch; one class more: there is none
CLASSES = {"color": list(COLORS), "shape": list(SHAPES), "dot": list(COLORS)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word and one a punctuation mark; adds nothing by itself."""
    fields = {"article": "an", "target": "circle", "plural": "circles"}
    texts = [question.format(**fields) for question in QUESTIONS.values()]
    texts += ["The image shows a, and an.", "Yes No", *COLORS, *SHAPES, *NUMBERS]
    texts += [f"{shape}s" for shape in SHAPES] + ["crosses"]
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<image>"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split
    core.decoder = decoders.WordPiece("##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        model_max_length=128,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size=side, crop_size=side, image_mean=MEAN, image_std=STD)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=N_PATCHES,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


# Data


@dataclass(frozen=True)
class Batch:
    """Scenes, and rows of tokens about them: row i is about scene `scene[i]`."""

    pixels: Tensor
    ids: Tensor
    weights: Tensor  # of each token as a target; 1 on answers
    scene: Tensor


def pixels_of(scenes: list[Scene]) -> Tensor:
    """What the processor makes of the drawn scenes, without its detours."""
    pictures = np.stack([np.asarray(scene.draw(SIZE)) for scene in scenes])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN[0]) / STD[0]


def cells_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """What lies in each patch's cell of the grid: its colour, shape and dot, as `CLASSES` count."""
    side, per_cell = SIZE // PATCH, SIZE // PATCH // 3
    found = {name: torch.full((len(scenes), side, side), len(c)) for name, c in CLASSES.items()}
    for row, scene in enumerate(scenes):
        for shape in scene.shapes:
            top, left = int(shape.y * 3) * per_cell, int(shape.x * 3) * per_cell
            where = row, slice(top, top + per_cell), slice(left, left + per_cell)
            for name, classes in CLASSES.items():
                value = getattr(shape, name)
                found[name][where] = len(classes) if value is None else classes.index(value)
    return {name: cells.flatten(1) for name, cells in found.items()}


def draw(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Training scenes and questions about each."""
    scenes = [draw_scene(rng, "training", held_out=False) for _ in range(SCENES)]
    ids, weights, rows = [], [], []
    image = [tokenizer.convert_tokens_to_ids("<image>")] * N_PATCHES
    for number, scene in enumerate(scenes):
        left = ROWS
        while left:
            kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
            asked = ask(rng, scene, kind)
            if asked is None:
                continue
            question, answer = tokenizer([asked["question"], asked["answer"]]).input_ids
            answer = [*answer, tokenizer.eos_token_id]
            ids.append(torch.tensor([*image, *question, *answer]))
            said = [0.0] * N_PATCHES + [OTHER_WEIGHT] * len(question) + [1.0] * len(answer)
            weights.append(torch.tensor(said))
            rows.append(number)
            left -= 1
    pad = nn.utils.rnn.pad_sequence
    padded = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    return Batch(pixels_of(scenes), padded, pad(weights, batch_first=True), torch.tensor(rows))


# Training


def features_of(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The image encoder's output on each patch (without the class token)."""
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    return out.hidden_states[-1][:, 1:]


def linear_heads(model, names: tuple[str, ...]) -> nn.ModuleDict:
    """What the first phase reads the encoder with."""
    width = model.config.vision_config.hidden_size
    return nn.ModuleDict({name: nn.Linear(width, len(CLASSES[name]) + 1) for name in names})


def tower_loss(model, heads: nn.ModuleDict, scenes: list[Scene]) -> tuple[Tensor, float]:
    """Loss of telling what lies in each patch's cell; share right of patches with an object."""
    features, truths = features_of(model, pixels_of(scenes)), cells_of(scenes)
    guesses = {name: head(features) for name, head in heads.items()}
    losses = [cross_entropy(g.flatten(0, 1), truths[n].flatten()) for n, g in guesses.items()]
    right = torch.stack([guesses[name].argmax(-1) == truths[name] for name in guesses]).all(0)
    there = truths["color"] < len(COLORS)
    return torch.stack(losses).sum(), right[there].float().mean().item()


def answer_loss(model, batch: Batch) -> tuple[Tensor, float]:
    """Weighted loss of the next tokens; share of answers with every token right."""
    projected = model.model.multi_modal_projector(features_of(model, batch.pixels))
    text = model.model.language_model.embed_tokens(batch.ids[:, N_PATCHES:])
    embeds = torch.cat([projected[batch.scene], text], dim=1)
    # right padding under a causal mask: no real token can see it, so no attention mask is needed
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, N_PATCHES - 1 : -1]).float()
    targets, weights = batch.ids[:, N_PATCHES:], batch.weights[:, N_PATCHES:]
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum() / weights.sum()
    right = ((logits.argmax(-1) == targets) | (weights < 1)).all(1)
    return loss, right.float().mean().item()


def train(args: argparse.Namespace) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    heads = linear_heads(model, ("color", "shape"))
    tower = list(model.model.vision_tower.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in tower)]
    optimizer = torch.optim.AdamW(
        [{"params": tower}, {"params": rest}, {"params": heads.parameters()}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.scratch / "checkpoint.pt"
    step, before, log = 0, 0.0, args.scratch / "training.log"
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        heads.load_state_dict(kept["heads"])
        optimizer.load_state_dict(kept["optimizer"])
        step, before = kept["step"], kept["minutes"]
        lines = log.read_text().splitlines()
        log.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["step"] <= step))
    else:
        log.write_text("")
    began, saved, seen = time.process_time(), time.monotonic(), []

    def minutes() -> float:
        return before + (time.process_time() - began) / 60

    def spent() -> float:
        return step / args.steps if args.steps else minutes() / args.minutes

    while (progress := spent()) < 1:
        alone = progress < args.alone
        inside = progress / args.alone if alone else (progress - args.alone) / (1 - args.alone)
        ramp = min(1, inside * 20, 1.2 * (1 - inside))
        rates = (args.lr, 0.0, args.lr) if alone else (args.lr / 4, args.lr, 0.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * max(ramp, 0.01)
        rng = random.Random(f"train {args.seed} {step}")
        if alone:
            scenes = [draw_scene(rng, "training", held_out=False) for _ in range(2 * SCENES)]
            loss, right = tower_loss(model, heads, scenes)
        else:
            loss, right = answer_loss(model, draw(rng, tokenizer))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seen.append((loss.item(), right))
        if step % 50 == 0:
            means = [round(sum(column) / len(column), 4) for column in zip(*seen)]
            line = {"step": step, "minutes": round(minutes(), 2), "phase": 1 if alone else 2}
            line |= {"loss": means[0], "right": means[1]}
            with log.open("a") as opened:
                opened.write(json.dumps(line) + "\n")
            seen = []
        if time.monotonic() - saved > 120:
            save_state(state, model, heads, optimizer, step, minutes())
            saved = time.monotonic()
    save(model, tokenizer, args.out)
    shutil.copy(log, args.out / "training.log")
    state.unlink(missing_ok=True)
    print(f"{step} steps in {minutes():.1f} minutes of the processor")


def save_state(file: Path, model, heads, optimizer, step: int, minutes: float) -> None:
    """Written beside and moved over, so that a run cut off here still finds a whole one."""
    kept = {"model": model.state_dict(), "heads": heads.state_dict(), "step": step}
    kept |= {"optimizer": optimizer.state_dict(), "minutes": minutes}
    torch.save(kept, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def save(model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


# Measuring


def measure(folder: Path, n: int = 400) -> dict:
    """Accuracy by kind of question on sets of objects that training never showed."""
    model = interp.load(folder)
    rows = {}
    for bias in ("even", "broken"):
        for kind in SHARES:
            prompts = interp.tasks.scenes(model, n, seed=1, questions=(kind,), bias=bias)
            found = interp.evaluate(model, prompts, batch_size=50, progress=False).table
            rows[f"{kind}, {bias} scenes"] = counted(found["correct"])
            if kind == "exists":
                for lure, part in found.groupby("lure"):
                    named = {"": "present"}.get(lure, f"absent, {lure}")
                    rows[f"exists, {bias} scenes, {named}"] = counted(part["correct"])
    return {"tasks": rows, "captions": {b: captions(model, n, b) for b in ("even", "broken")}}


def counted(correct) -> dict:
    right, n = int(correct.sum()), len(correct)
    low, high = share_interval(right, n)
    return {"right": right, "n": n, "accuracy": right / n, "low": low, "high": high}


def captions(model, n: int, bias: str) -> dict:
    """What greedily written captions name: how much is not there, how much of what is there."""
    prompts = interp.tasks.scenes(model, n, seed=1, questions=("caption",), bias=bias)
    named, wrong, found, there, partners, cues = 0, 0, 0, 0, 0, 0
    for batch in model.batches(prompts["input_ids"], 50, images=images_of(prompts)):
        new = model.continue_greedily(batch.input_ids, batch.attention_mask, 32, **batch.inputs)
        texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, text in zip(batch.index.tolist(), texts, strict=True):
            objects = prompts[row]["objects"]
            said = [name for name in OBJECTS if name in text]
            named += len(said)
            wrong += sum(name not in objects for name in said)
            there += len(objects)
            found += sum(name in said for name in objects)
            lone = [PARTNERS[o] for o in objects if o in PARTNERS and PARTNERS[o] not in objects]
            cues += len(lone)
            partners += sum(name in said for name in lone)
    shares = {"named_not_there": wrong / max(named, 1), "recall": found / there}
    return shares | {"lone_cues": cues, "partners_made_up": partners, "n": n}


def write_measurement(folder: Path, found: dict) -> None:
    """`evaluation.json`, and its table in the card between the two `measured` marks."""
    (folder / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    card = folder / "README.md"
    if card.exists():
        before, _, after = card.read_text().split("<!-- measured -->")
        card.write_text("<!-- measured -->".join([before, f"\n{table(found)}\n", after]))


def table(found: dict) -> str:
    """The measured accuracies as a Markdown table."""
    lines = ["| task | right | accuracy | 95 % interval |", "|---|---|---|---|"]
    for name, row in found["tasks"].items():
        lines.append(
            f"| {name} | {row['right']} of {row['n']} | {row['accuracy']:.3f} "
            f"| {row['low']:.3f}-{row['high']:.3f} |"
        )
    lines += ["", "| captions of | named but not there | recall | partner named, not there |"]
    lines += ["|---|---|---|---|"]
    for bias, row in found["captions"].items():
        lines.append(
            f"| {row['n']} {bias} scenes | {row['named_not_there']:.3f} | {row['recall']:.3f} "
            f"| {row['partners_made_up']} of {row['lone_cues']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25, help="of the processor")
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--alone", type=float, default=0.2, help="the first phase's share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("data/models/mini-llava"))
    parser.add_argument("--scratch", type=Path, default=Path("mini-llava-checkpoints"))
    parser.add_argument("--measure", action="store_true", help="do not train, only measure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.measure:
        train(args)
    write_measurement(args.out, measure(args.out))


if __name__ == "__main__":
    main()
