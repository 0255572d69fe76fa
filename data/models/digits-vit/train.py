"""Train and measure digits-vit: a vision transformer that reads handwritten digits.

    nice -n 19 python data/models/digits-vit/train.py --seed 0 --out data/models/digits-vit

An image is 16 x 16 pixels in 8 x 8 patches. A digit fills it, or is smaller (down to half) and
stands anywhere in it, turned and slanted a little: where a stroke is says nothing by itself, so
that heads have to look for what is beside what. The `train` split of `interp.tasks.digits` is all
that is learned from; `--measure` only measures what `--out` holds. In a checkout without an
installed `interp` put `PYTHONPATH=.` in front.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from scipy.stats import binomtest
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from interp.tasks.digits import NAMES, digits

BATCH = 64
SIZE, PATCH = 16, 2
SMALLEST = 0.5
PLAIN = 0.25  # the share of a batch that fills the image, upright
SPLITS = ("train", "validation", "test")


def build_model(seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        image_size=SIZE,
        patch_size=PATCH,
        num_channels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(NAMES)),
        label2id={name: label for label, name in enumerate(NAMES)},
    )
    model = ViTForImageClassification(config)
    embeddings = model.vit.embeddings
    with torch.no_grad():
        # at transformers' own scale (0.02) positions and pixels take long to be told apart
        torch.nn.init.normal_(embeddings.patch_embeddings.projection.weight, std=0.1)
        embeddings.position_embeddings[0, 1:] = 0.2 * waves(config.hidden_size)
    return model


def waves(width: int) -> torch.Tensor:
    """Where learned positions start from: sines and cosines of row and column, from half a wave
    across the image to one in two patches."""
    side = SIZE // PATCH
    places = torch.arange(side).float()
    rates = math.pi * torch.logspace(math.log10(1 / side), 0, width // 4)
    angles = places[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = one[:, None].expand(side, side, -1)
    columns = one[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def build_processor() -> ViTImageProcessorPil:
    """Any image to 16 x 16 and three channels, values from -1 to 1."""
    return ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )


def tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels that the processor makes of a split's images, and their digits."""
    rows = digits(split)
    pixels = build_processor()(list(rows["image"]), return_tensors="pt").pixel_values
    return pixels, torch.tensor(rows["target"])


def moved(pixels: torch.Tensor, generator: torch.Generator, plain: float = PLAIN) -> torch.Tensor:
    """Each image smaller, elsewhere, turned and slanted a little; a share `plain` as it is."""
    n = len(pixels)

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    size = between(SMALLEST, 1.0)
    angle, slant = between(-0.2, 0.2), between(-0.15, 0.15)
    right, down = (between(-1.0, 1.0) * (1 - size) for _ in range(2))
    # from where a pixel is in the new image to where it was in the old one
    rows = [
        torch.stack([angle.cos(), slant - angle.sin(), -right], dim=1) / size[:, None],
        torch.stack([angle.sin(), angle.cos(), -down], dim=1) / size[:, None],
    ]
    grid = affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    found = grid_sample(pixels + 1, grid, align_corners=False) - 1  # -1 is the background
    kept = torch.rand(n, generator=generator) < plain
    return torch.where(kept[:, None, None, None], pixels, found)


def train(args: argparse.Namespace) -> None:
    """One pass over the split is an epoch; the log has a line for each tenth of them."""
    model = build_model(args.seed)
    pixels, targets = tensors("train")
    aside = tensors("validation")
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.epochs * math.ceil(len(pixels) / BATCH)
    began, step = time.monotonic(), 0
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "training.log").open("w") as log:
        for epoch in range(1, args.epochs + 1):
            seen = []
            model.train()
            for rows in torch.randperm(len(pixels), generator=generator).split(BATCH):
                rate = (
                    args.lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                logits = model(pixel_values=moved(pixels[rows], generator)).logits
                loss = cross_entropy(logits, targets[rows], label_smoothing=0.05)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(
                    (loss.item(), (logits.argmax(1) == targets[rows]).float().mean().item())
                )
                step += 1
            if epoch % max(1, args.epochs // 20) == 0:
                loss, accuracy = (sum(column) / len(column) for column in zip(*seen, strict=True))
                line = {"epoch": epoch, "step": step, "lr": round(rate, 6)}
                line |= {"minutes": round((time.monotonic() - began) / 60, 2)}
                line |= {"loss": round(loss, 4), "train": round(accuracy, 4)}
                line |= {"validation": round(right(model, *aside) / len(aside[1]), 4)}
                log.write(json.dumps(line) + "\n")
                log.flush()
    model.save_pretrained(args.out)
    build_processor().save_pretrained(args.out)
    print(f"{step} steps in {(time.monotonic() - began) / 60:.1f} minutes")


@torch.no_grad()
def right(model: ViTForImageClassification, pixels: torch.Tensor, targets: torch.Tensor) -> int:
    """How many images it reads right."""
    model.eval()
    parts = zip(pixels.split(200), targets.split(200), strict=True)
    return sum(int((model(pixel_values=p).logits.argmax(1) == t).sum()) for p, t in parts)


def measure(folder: Path) -> dict[str, dict]:
    """Accuracy on each split, as it is and moved, with Wilson's interval."""
    model = ViTForImageClassification.from_pretrained(folder)
    found = {}
    for split in SPLITS:
        pixels, targets = tensors(split)
        elsewhere = moved(pixels, torch.Generator().manual_seed(1), plain=0.0)
        for name, images in ((split, pixels), (f"{split}, moved", elsewhere)):
            n, hits = len(targets), right(model, images, targets)
            interval = binomtest(hits, n).proportion_ci(method="wilson")
            found[name] = {"n": n, "right": hits, "accuracy": hits / n}
            found[name] |= {"low": float(interval.low), "high": float(interval.high)}
    return found


def write_measurement(folder: Path, found: dict[str, dict]) -> None:
    """`evaluation.json`, and its table in the card between the two `measured` marks."""
    (folder / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    card = folder / "README.md"
    if card.exists():
        before, _, after = card.read_text().split("<!-- measured -->")
        card.write_text("<!-- measured -->".join([before, f"\n{table(found)}\n", after]))


def table(found: dict[str, dict]) -> str:
    """The measured accuracies as a Markdown table."""
    lines = ["| images | right | accuracy | 95 % interval |", "|---|---|---|---|"]
    for split, row in found.items():
        lines.append(
            f"| {split} | {row['right']} of {row['n']} | {row['accuracy']:.3f} "
            f"| {row['low']:.3f}-{row['high']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("data/models/digits-vit"))
    parser.add_argument("--measure", action="store_true", help="do not train, only measure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.measure:
        train(args)
    found = measure(args.out)
    write_measurement(args.out, found)
    print(table(found))


if __name__ == "__main__":
    main()
