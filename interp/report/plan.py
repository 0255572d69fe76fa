"""What a report runs: how long, how many, which seed."""

from dataclasses import dataclass, replace

from interp.errors import UserError
from interp.model.hooked import HookedModel
from interp.tasks import needle
from interp.tasks.prompts import PromptError


class PlanError(UserError):
    """A report that can't be run as asked."""


@dataclass(frozen=True)
class Plan:
    """The default takes about ten minutes for SmolLM2-135M on two cores.

    `lengths`, `depths`, `n`: the needle grid that heads are scored on. `ablation_n` fresh prompts of
    the shortest length measure ablation; `draws` sets of random heads are its control. `top`: how
    many heads to ablate; default those with a score above 0.1, between 3 and 5 % of all heads.
    `texts` of `text_tokens` tokens are for sinks and for what ablation breaks elsewhere; `data` is a
    file or folder of one's own texts instead of our filler.
    """

    lengths: tuple[int, ...] = (160, 256, 384)
    depths: int = 4
    n: int = 36
    ablation_n: int = 16
    draws: int = 10
    top: int | None = None
    texts: int = 6
    text_tokens: int = 128
    batch_size: int = 4
    seed: int = 0
    data: str | None = None

    def __post_init__(self):
        for name in ("depths", "n", "ablation_n", "draws", "texts", "text_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}={getattr(self, name)}: at least 1.")
        if not self.lengths:
            raise PlanError("lengths: give at least one, such as 256.")

    def fitted(self, model: HookedModel) -> "Plan":
        """The same plan with the lengths that this model and its tokenizer can take.

        Raises `PlanError` where no needle fits into the context window.
        """
        window = model.cfg.n_ctx
        wanted = sorted({min(length, window) for length in self.lengths} | {window})
        fitting = []
        for length in wanted:
            try:
                needle(model, [length], depths=1, n=1, seed=self.seed)
            except PromptError as error:
                reason = str(error)
            else:
                fitting.append(length)
        asked = tuple(length for length in fitting if length in self.lengths)
        if not fitting:
            raise PlanError(
                f"lengths: no needle fits into {window} tokens of {model.name}. {reason}"
            )
        return replace(
            self, lengths=asked or (fitting[0],), text_tokens=min(self.text_tokens, window)
        )

    def top_of(self, scores) -> int:
        """How many heads to ablate."""
        if self.top is not None:
            return self.top
        n_heads = int(scores.table["score"].notna().sum())
        return min(max(3, int((scores.table["score"] > 0.1).sum())), max(3, n_heads // 20))
