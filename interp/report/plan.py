"""What a report measures, and on how much: the plan, and how it is fitted to a model."""

from dataclasses import dataclass, replace

from datasets import Dataset

from interp import tasks
from interp.errors import UserError
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from interp.model.images import reads_images
from interp.report.passages import passages
from interp.tasks import filler
from interp.tasks.needle import NeedleError
from interp.tasks.prompts import PromptError, as_prompts, context_window

LENGTHS = (128, 256, 384)
STEP = 16
RETRIEVAL_SCORE = 0.1  # from which the paper calls a head a retrieval head
MOST_HEADS, FEWEST_HEADS = 0.05, 3


class PlanError(UserError):
    """A plan that cannot be carried out."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. The default takes some minutes for 135M parameters on two cores.

    `lengths`: of the needle prompts, in tokens (None: chosen for the model). `n`: needle prompts
    that score the heads. `n_ablation`, `draws`: held-out prompts of the ablation, and its random
    controls. `ks`: how many heads to ablate (None: chosen from the scores). `n_texts`, `tokens`:
    texts for sinks and for the control. `data`: a text file or folder that takes the place of our
    own texts and of the haystack. `n_pairs`: pairs of prompts that circuits are found and tested on
    (0: no circuits). `n_scenes`: pictures that a model which sees any describes (0: none).
    """

    task: str = "needle"
    lengths: tuple[int, ...] | None = None
    depths: int = 5
    n: int = 45
    n_ablation: int = 24
    draws: int = 10
    ks: tuple[int, ...] | None = None
    how: str = "zero"
    n_texts: int = 8
    tokens: int = 128
    n_pairs: int = 24
    n_scenes: int = 24
    data: str | None = None
    seed: int = 0
    batch_size: int = 4

    def __post_init__(self):
        if self.task != "needle":
            raise PlanError(f"task={self.task!r}: a report can be written on 'needle'.")
        least = {"depths": 1, "n": 4, "n_ablation": 2, "draws": 1, "n_texts": 1, "tokens": 16}
        for name, low in (least | {"batch_size": 1}).items():
            if getattr(self, name) < low:
                raise PlanError(f"{name}={getattr(self, name)}: at least {low}.")
        if self.n_pairs and self.n_pairs < 4:
            raise PlanError(f"n_pairs={self.n_pairs}: 0, or at least 4.")
        if self.lengths is not None:
            object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))

    @classmethod
    def quick(cls, **changes) -> "Plan":
        """A look: a minute or two for 135M parameters, and intervals to match."""
        sizes = {"n": 15, "n_ablation": 10, "draws": 4, "n_texts": 3, "tokens": 64}
        return cls(**sizes | {"n_pairs": 8, "n_scenes": 8} | changes)

    @classmethod
    def full(cls, **changes) -> "Plan":
        """For a paper: some ten times the default."""
        return cls(
            **{"n": 300, "n_ablation": 100, "draws": 30, "n_pairs": 128, "n_scenes": 200} | changes
        )

    def fitted(self, model: HookedModel) -> "Plan":
        """The plan with lengths that suit the model's tokens and context window.

        Without any for a model that sees pictures and whose tokenizer has none of our words.
        """
        window = context_window(model) or self.tokens
        if reads_images(model) and not (self.data or reads(model, filler.text(64, self.seed))):
            if not self.n_scenes:
                raise PlanError(
                    f"n_scenes=0: pictures are all that {model.name} can be asked about; its "
                    "tokenizer has no tokens for our texts. Give 4 or so, or texts with data=..."
                )
            return replace(self, lengths=None)
        lengths = self.lengths or lengths_for(model, self.seed)
        return replace(self, lengths=lengths, tokens=min(self.tokens, window))

    def needles(self, model: HookedModel) -> Dataset:
        """The grid that accuracy and head scores come from."""
        lengths = list(self.lengths or LENGTHS)
        return tasks.needle(
            model, lengths, self.depths, n=self.n, seed=self.seed, haystack=self.data
        )

    def held_out(self, model: HookedModel) -> Dataset:
        """Other needles, of the shortest length, for the ablation."""
        shortest, seed = (self.lengths or LENGTHS)[0], self.seed + 1
        return tasks.needle(
            model, shortest, self.depths, n=self.n_ablation, seed=seed, haystack=self.data
        )

    def scenes(self, model: HookedModel) -> Dataset:
        """Pictures to be described."""
        return tasks.scenes(model, self.n_scenes, self.seed, questions=("caption",))

    def questions(self, model: HookedModel) -> Dataset:
        """Questions about other pictures."""
        asked = ("exists", "color", "count")
        return tasks.scenes(model, 2 * self.n_scenes, self.seed + 1, questions=asked)


@dataclass(frozen=True, eq=False)
class Texts:
    """Plain texts of one length; `kinds` says of each whether it is prose, filler or the user's."""

    prompts: Dataset
    kinds: list[str]

    @classmethod
    def of(cls, model: HookedModel, plan: Plan) -> "Texts":
        """The user's texts, or our prose and some filler; only filler where prose has no tokens."""
        if plan.data is not None:
            windows = tasks.text(model, plan.data, max_tokens=plan.tokens)
            n = min(plan.n_texts, len(windows))
            chosen = [i * len(windows) // n for i in range(n)]
            return cls(windows.select(chosen), ["data"] * n)
        prose = [text for text in passages()[: plan.n_texts] if reads(model, text)]
        n_filler = max(2, plan.n_texts // 2) if prose else plan.n_texts
        plain = [filler.text(plan.tokens, seed=plan.seed + i) for i in range(n_filler)]
        prompts = as_prompts(model, [*prose, *plain], max_tokens=plan.tokens)
        return cls(prompts, ["prose"] * len(prose) + ["filler"] * n_filler)

    @property
    def control(self) -> Dataset:
        """What the ablation must not break: texts that do not repeat, filler only if need be."""
        own = [i for i, kind in enumerate(self.kinds) if kind != "filler"]
        return self.prompts.select(own or range(len(self.kinds)))


def reads(model: HookedModel, text: str) -> bool:
    """Does the tokenizer have tokens for (nearly) all of the text?"""
    unknown = model.tokenizer.unk_token_id
    ids = model.tokenizer(text).input_ids
    return unknown is None or ids.count(unknown) <= 0.02 * len(ids)


def lengths_for(model: HookedModel, seed: int = 0) -> tuple[int, ...]:
    """Three prompt lengths: 128, 256, 384 where the tokens allow it, longer ones where they do not.

    Raises `NeedleError` where even the shortest needle prompt exceeds the context window.
    """
    window = context_window(model) or LENGTHS[-1]
    shortest = next((n for n in range(4 * STEP, window + 1, STEP) if fits(model, n, seed)), None)
    if shortest is None:
        raise NeedleError(
            f"lengths: no needle prompt fits in {window} tokens, the context window of "
            f"{model.name}. Take a model with a longer one."
        )
    low = min(window, max(LENGTHS[0], shortest + STEP))  # other names and words are a bit longer
    high = min(window, max(LENGTHS[-1], low + 8 * STEP))
    middle = (low + high) // (2 * STEP) * STEP
    return tuple(sorted({low, middle, high}))


def fits(model: HookedModel, length: int, seed: int) -> bool:
    """Can needle prompts of this length be built?"""
    try:
        tasks.needle(model, length, depths=1, n=20, seed=seed)
    except PromptError:
        return False
    return True


def heads_to_ablate(scores: HeadScores, plan: Plan) -> tuple[int, ...]:
    """How many top heads: those with a score from 0.1 on, at least 3, at most 5 % of all."""
    if plan.ks is not None:
        return plan.ks
    table = scores.table
    strong = int((table["score"] >= RETRIEVAL_SCORE).sum())
    most = max(FEWEST_HEADS, int(MOST_HEADS * len(table)))
    return (min(max(strong, FEWEST_HEADS), most),)
