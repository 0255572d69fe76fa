"""Make `scenes.parquet`: 48 held-out scenes, each asked about (yes or no, a colour, a number).

python data/tasks/lmms/make.py
"""

import random
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

from interp.tasks.scenes import ask, draw_scene

KINDS = ("exists", "color", "count")
FEATURES = Features(
    {
        "image": Image(),
        "question": Value("string"),
        "answer": Value("string"),
        "choices": List(Value("string")),
        "kind": Value("string"),
        "target": Value("string"),
        "lure": Value("string"),
        "objects": List(Value("string")),
    }
)


def rows(n: int = 48, seed: int = 0) -> list[dict]:
    """Scenes as training draws them, so that what goes together there can be named wrongly."""
    rng, made = random.Random(f"lmms scenes {seed}"), []
    while len(made) < n:
        kind = KINDS[len(made) % len(KINDS)]
        scene = draw_scene(rng, "broken" if len(made) % 2 else "even", held_out=True)
        asked = ask(rng, scene, kind)
        if asked is not None:
            made.append({"image": scene.draw(), "kind": kind, "objects": scene.objects, **asked})
    return made


if __name__ == "__main__":
    Dataset.from_list(rows(), features=FEATURES).to_parquet(
        Path(__file__).with_name("scenes.parquet")
    )
