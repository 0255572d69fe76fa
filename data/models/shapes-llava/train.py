"""Train and measure shapes-llava: SmolLM2-135M, frozen, that sees pictures of coloured shapes.

    python data/models/shapes-llava/train.py --minutes 180 --seed 0 --out data/models/shapes-llava

The language model is the one that `interp models get smollm2-135m` put into the cache; not one of
its weights changes, and only the image encoder and the projector are saved. Three phases:

1. the encoder alone: a linear layer on each patch is to tell the shape in its cell, its colour and
   that of a dot on it;
2. encoder and projector through the frozen language model: captions, colours, counts, and dots on
   shapes (also with the part of the picture that shows the dot as a second picture);
3. the same with questions to be answered by yes or no, whose loss counts as much as all others'.

The projector starts from noise, only scaled to the spread of the language model's embeddings: were
it first taught to look like the words for what is seen, heads that read words would be the heads
that read images because we made them so.

Each picture is read once for all its questions: these stand behind one another in one row, none
sees the others (a mask), and each counts its positions from the picture on. What comes before a
picture is the same in every prompt, so its keys and values are computed once for all.

Minutes are those of the processor. A run that was cut off goes on from its last checkpoint in
`--scratch`. `--measure` only measures what `--out` holds. In a checkout without an installed
`interp` put `PYTHONPATH=.` in front.
"""

import argparse
import inspect
import json
import random
import runpy
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from interp import zoo
from interp.model.assembled import put_together, save_ours, tokenizer_with_image
from interp.tasks.pictures import Scene
from interp.tasks.scenes import ask, draw_scene

# how patches are told apart, and how the model is measured, is the same for the small one
mini = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "mini-llava" / "train.py")))

LANGUAGE_MODEL = "smollm2-135m"
IMAGE_TOKEN = 16  # <empty_output>, which SmolLM2 reserves
SIZE, PATCH, N_PATCHES = mini.SIZE, mini.PATCH, mini.N_PATCHES
SIZES = (48, 48, 48, 96, 192)  # pixels in which scenes are drawn before they are made 48
SCENES = 8  # in a batch
ALONE, TOLD = 0.06, 0.35  # shares of the time of the first phase, and until the second ends
WITH_CROP = 0.15  # of the batches from the second phase on
# the questions about each scene, and what their mean losses count, by phase
ASKED = {2: ("caption", "color", "count", "color", "count"), 3: ("caption", "color", "count")}
ASKED[3] += ("exists",) * 4
WEIGHTS = {2: {"caption": 1.0, "color": 0.5, "count": 0.25, "detail": 0.25, "exists": 0.0}}
WEIGHTS[3] = WEIGHTS[2] | {"exists": 2.0}


@dataclass(frozen=True)
class Batch:
    """Scenes with one or two pictures each, and rows of questions about them.

    `ids` begin where the pictures end; `branch` says which question a token belongs to (-1 is
    padding), `target` what comes next (-100 where nothing is asked), `kind` of which kind it is.
    """

    pixels: Tensor  # [scene picture channel height width]
    ids: Tensor
    branch: Tensor
    target: Tensor
    kind: Tensor


KINDS = ("caption", "exists", "color", "count", "detail")


# The model


def build_config(language) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=192,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=N_PATCHES,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def scale_projector(model: LlavaForConditionalGeneration, pixels: Tensor) -> None:
    """Have the projector's output spread as the language model's embeddings do."""
    projector = model.model.multi_modal_projector
    spread = model.model.language_model.embed_tokens.weight.float().std()
    projector.linear_2.bias.zero_()
    found = projector(mini.features_of(model, pixels)).float().std()
    projector.linear_2.weight.mul_(spread / found)


class Prefix:
    """What stands before the picture in every prompt: its keys and values, computed once."""

    def __init__(self, model: LlavaForConditionalGeneration, ids: list[int]):
        self.length, self.language = len(ids), model.model.language_model
        names = inspect.signature(self.language.forward).parameters
        self.name = next(name for name in ("cache", "past_key_values") if name in names)
        with torch.no_grad():
            kept = {self.name: DynamicCache(config=self.language.config), "use_cache": True}
            self.language(input_ids=torch.tensor([ids]), **kept)
        self.layers = [(layer.keys, layer.values) for layer in kept[self.name].layers]

    def cache(self, n_rows: int) -> DynamicCache:
        fresh = DynamicCache(config=self.language.config)
        for layer, pair in enumerate(self.layers):
            fresh.update(*(part.expand(n_rows, -1, -1, -1) for part in pair), layer)
        return fresh


# Data


@dataclass(frozen=True)
class Wording:
    """The tokens of a chat: before the picture, and from it to the answer."""

    tokenizer: PreTrainedTokenizerBase

    def _around(self, question: str) -> tuple[str, str]:
        turn = [{"role": "user", "content": f"<image>\n{question}"}]
        shown = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, _, after = shown.partition("<image>")
        return before, after

    @property
    def before(self) -> list[int]:
        return self._ids(self._around("")[0])

    def asked(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens behind the picture up to the answer, and the answer with its end."""
        after = self._around(question)[1]
        head, whole = self._ids(after), self._ids(after + answer)
        assert whole[: len(head)] == head, f"{answer!r} begins with no token of its own"
        return head, [*whole[len(head) :], self.tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def picture(rng: random.Random, scene: Scene, box=(0.0, 0.0, 1.0, 1.0)) -> np.ndarray:
    """A scene as the processor gets it to see, from a picture of any size."""
    drawn = scene.draw(rng.choice(SIZES), box)
    return np.asarray(drawn.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def pixels_of(pictures: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return ((pixels - mini.MEAN[0]) / mini.STD[0]).to(dtype)


def around(rng: random.Random, scene: Scene, target: str) -> tuple[float, float, float, float]:
    """A square part of the picture that shows the target, somewhere in it."""
    shape = next(shape for shape in scene.shapes if shape.name == target)
    side = rng.uniform(0.35, 0.5)
    slack = (side - 2 * shape.radius) / 2
    left, top = (
        min(max(at - side / 2 + rng.uniform(-slack, slack), 0.0), 1.0 - side)
        for at in (shape.x, shape.y)
    )
    return left, top, left + side, top + side


def draw(rng: random.Random, wording: Wording, phase: int, dtype: torch.dtype) -> Batch:
    """Training scenes and questions about each, a part of them with a closer look."""
    cropped = rng.random() < WITH_CROP
    pictures, rows = [], []
    for _ in range(SCENES):
        dots = cropped or rng.random() < 0.25
        scene = draw_scene(rng, "training", dots=dots, held_out=False)
        kinds = [*ASKED[phase], *(["detail"] * (2 if cropped else 1) if dots else [])]
        shown, asked = [picture(rng, scene)], list(questions(rng, scene, kinds))
        if cropped:
            target = rng.choice(scene.shapes).name
            shown.append(picture(rng, scene, around(rng, scene, target)))
            shape = next(s for s in scene.shapes if s.name == target)
            asked = [one for one in asked if one[0] != "detail"]
            asked.append(("detail", f"What color is the dot on the {target}?", str(shape.dot)))
        pictures.append(shown)
        rows.append([(kind, *wording.asked(question, answer)) for kind, question, answer in asked])
    flat = pixels_of([one for shown in pictures for one in shown], dtype)
    return Batch(flat.unflatten(0, (SCENES, -1)), *padded(rows, wording.tokenizer.pad_token_id))


def questions(rng: random.Random, scene: Scene, kinds: list[str]) -> Iterator[tuple[str, str, str]]:
    for kind in kinds:
        if asked := ask(rng, scene, kind):
            yield kind, asked["question"], asked["answer"]


def padded(rows: list[list[tuple[str, list[int], list[int]]]], pad: int) -> tuple[Tensor, ...]:
    """Questions and answers of each row behind one another: ids, branch, target and kind."""
    columns = [[], [], [], []]
    for row in rows:
        ids, branch, target, kind = [], [], [], []
        for number, (name, question, answer) in enumerate(row):
            tokens = [*question, *answer]
            silent = [-100] * (len(question) - 1)
            ids += tokens
            branch += [number] * len(tokens)
            target += [*silent, *answer, -100]
            kind += [KINDS.index(name)] * len(tokens)
        for column, values in zip(columns, (ids, branch, target, kind), strict=True):
            column.append(torch.tensor(values))
    fill = (pad, -1, -100, 0)
    stack = nn.utils.rnn.pad_sequence
    return tuple(stack(c, batch_first=True, padding_value=f) for c, f in zip(columns, fill))


# Training


def layout(batch: Batch, before: int, n_image: int) -> tuple[Tensor, Tensor]:
    """Which keys each token sees, and positions: every question as if it were the only one."""
    scenes, width = batch.ids.shape
    image = torch.full((scenes, n_image), -2)  # the pictures' tokens, which every question sees
    branch = torch.cat([image, batch.branch], dim=1)
    n = n_image + width
    same = branch[:, :, None] == branch[:, None]
    seen = (same | (branch == -2)[:, None]) & torch.ones(n, n, dtype=torch.bool).tril()
    seen = torch.cat([torch.ones(scenes, n, before, dtype=torch.bool), seen], dim=2)
    place = torch.arange(n).expand(scenes, -1)
    begins = branch[:, 1:] != branch[:, :-1]
    first = torch.where(nn.functional.pad(begins, (1, 0)), place, 0).cummax(1).values
    positions = torch.where(branch == -2, place, place - first + n_image)
    return seen[:, None], before + positions


def hidden_of(model: LlavaForConditionalGeneration, prefix: Prefix, batch: Batch) -> Tensor:
    """The language model's output on the questions."""
    n_pictures = batch.pixels.shape[1]
    features = mini.features_of(model, batch.pixels.flatten(0, 1))
    image = model.model.multi_modal_projector(features).unflatten(0, (-1, n_pictures)).flatten(1, 2)
    text = prefix.language.embed_tokens(batch.ids)
    embeds = torch.cat([image.to(text.dtype), text], dim=1)
    seen, positions = layout(batch, prefix.length, image.shape[1])
    mask = torch.zeros(seen.shape, dtype=embeds.dtype)
    mask.masked_fill_(~seen, torch.finfo(embeds.dtype).min)
    out = prefix.language(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **{prefix.name: prefix.cache(len(batch.ids))},
    )
    return out.last_hidden_state[:, image.shape[1] :]


def answer_loss(
    model: LlavaForConditionalGeneration, prefix: Prefix, batch: Batch, weights: dict[str, float]
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """The weighted sum of the kinds' mean losses; each kind's loss and share of tokens right."""
    asked = batch.target >= 0
    logits = model.lm_head(hidden_of(model, prefix, batch)[asked]).float()
    target, kinds = batch.target[asked], batch.kind[asked]
    losses = cross_entropy(logits, target, reduction="none")
    right, total, seen = logits.argmax(-1) == target, losses.new_zeros(()), {}
    for index, kind in enumerate(KINDS):
        of_kind = kinds == index
        if of_kind.any():
            mean = losses[of_kind].mean()
            total = total + weights[kind] * mean
            seen[kind] = (mean.item(), right[of_kind].float().mean().item())
    return total / sum(weights.values()), seen


def train(args: argparse.Namespace) -> None:
    folder = zoo.get(LANGUAGE_MODEL)
    torch.manual_seed(args.seed)
    language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    language.requires_grad_(False)
    model = put_together(build_config(language), language)
    # ours in float32: AdamW's small steps would be lost in bfloat16
    model.model.vision_tower.float()
    ours = model.model.multi_modal_projector.float()
    heads = mini.linear_heads(model, ("color", "shape", "dot"))
    wording = Wording(tokenizer_with_image(folder, IMAGE_TOKEN))
    prefix = Prefix(model, wording.before)
    parts = [model.model.vision_tower, ours, heads]
    optimizer = torch.optim.AdamW(
        [{"params": list(part.parameters())} for part in parts],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    args.scratch.mkdir(parents=True, exist_ok=True)
    state, log = args.scratch / "checkpoint.pt", args.scratch / "training.log"
    step, before, phase = 0, 0.0, 1
    if state.exists():
        kept = torch.load(state, weights_only=True)
        for part, values in zip(parts, kept["parts"], strict=True):
            part.load_state_dict(values)
        optimizer.load_state_dict(kept["optimizer"])
        step, before, phase = kept["step"], kept["minutes"], kept["phase"]
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
        rng = random.Random(f"train {args.seed} {step}")
        now = 1 if progress < ALONE else 2 if progress < TOLD else 3
        if now > phase == 1:
            scenes = [draw_scene(rng, "training", held_out=False) for _ in range(64)]
            scale_projector(model, mini.pixels_of(scenes))
        phase = now
        rest = max(progress - ALONE, 0) / (1 - ALONE)
        slope = min(1, rest * 30 + 0.02, 1.25 * (1 - rest))
        rates = (1e-3, 0.0, 1e-3) if phase == 1 else (args.lr / 8 * slope, args.lr * slope, 0.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if phase == 1:
            scenes = [
                draw_scene(rng, "training", dots=i % 2 == 1, held_out=False) for i in range(64)
            ]
            loss, right = mini.tower_loss(model, heads, scenes)
            told = {"patches": (loss.item(), right)}
        else:
            batch = draw(rng, wording, phase, torch.float32)
            loss, told = answer_loss(model, prefix, batch, WEIGHTS[phase])
        loss.backward()
        for part in parts:
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seen.append(told)
        if step % args.every == 0:
            line = {"step": step, "minutes": round(minutes(), 2), "phase": phase}
            line |= means(seen)
            with log.open("a") as opened:
                opened.write(json.dumps(line) + "\n")
            seen = []
        if time.monotonic() - saved > 300:
            keep(state, parts, optimizer, step, minutes(), phase)
            saved = time.monotonic()
    save(model, args.out)
    shutil.copy(log, args.out / "training.log")
    state.unlink(missing_ok=True)
    print(f"{step} steps in {minutes():.1f} minutes of the processor")


def means(seen: list[dict[str, tuple[float, float]]]) -> dict[str, list[float]]:
    """[loss, share right] by kind over the last steps."""
    kinds = dict.fromkeys(kind for told in seen for kind in told)
    return {
        kind: [
            round(sum(column) / len(column), 4)
            for column in zip(*(told[kind] for told in seen if kind in told))
        ]
        for kind in kinds
    }


def keep(file: Path, parts, optimizer, step: int, minutes: float, phase: int) -> None:
    """Written beside and moved over, so that a run cut off here still finds a whole one."""
    kept = {"parts": [part.state_dict() for part in parts], "optimizer": optimizer.state_dict()}
    torch.save(kept | {"step": step, "minutes": minutes, "phase": phase}, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """What we trained, and how images become pixels; the language model stays where it is."""
    save_ours(model, folder, LANGUAGE_MODEL)
    side = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=mini.MEAN, image_std=mini.STD
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=180, help="of the processor")
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the projector")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=25, help="steps between lines of the log")
    parser.add_argument("--n", type=int, default=200, help="prompts of each kind to measure")
    parser.add_argument("--out", type=Path, default=Path("data/models/shapes-llava"))
    parser.add_argument("--scratch", type=Path, default=Path("shapes-llava-checkpoints"))
    parser.add_argument("--measure", action="store_true", help="do not train, only measure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.measure:
        train(args)
    mini.write_measurement(args.out, mini.measure(args.out, args.n))


if __name__ == "__main__":
    main()
