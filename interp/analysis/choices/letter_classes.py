"""Which heads say the right letter, and how: classes from weights, effects and nothing else.

T is the prompt's last token, n an option, c the right one, A the last query's weights on n (at its
label, or at the end of its text), d_c the head's direct effect on the answer where c is right, and
D the positive net direct effects of all nodes, added up. E[.|c] is the mean over prompts where c is
right, and a mean over c counts every c alike. With the thresholds of `LetterRule`, at either place:

- "correct letter": mean over c of E[A_c|c] >= share * that of E[sum_n A_n|c], and E[A_c|c] >=
  every * E[sum_n A_n|c] and d_c > 0 for each c.
- "single letter": E[A_n|c=n] >= mass and >= times * its mean over the other c, for exactly one n,
  and d_n >= concentrated * sum_c |d_c|.
- "uniform": entropy of the weights on the labels >= even * log(number of options), on average, and
  their sum >= much; |mean of d| < small * D.
- "amplification": mass on the last `window` tokens >= near, below `mass` on labels and on ends, and
  at least `passed_on` of the effect comes by way of the first two classes in earlier layers.
- "none" of these.

But for "uniform", mean of d >= small * D; the first two, sum_n A_n >= mass on average. The first
class that fits is taken.

Source: the classes are those of Lieberum et al. 2023 (arXiv 2307.09458), which gives no rule; rules
and thresholds are ours.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from interp.errors import UserError

SITES = ("label", "end")
CLASSES = ("correct letter", "single letter", "uniform", "amplification", "none")


class LetterError(UserError):
    """Prompts without lettered options, or thresholds that are none."""


@dataclass(frozen=True)
class LetterRule:
    """Thresholds of the classes, as in the module's docstring; 1/n is chance for the shares."""

    share: float = 0.5
    every: float = 0.3
    mass: float = 0.1
    times: float = 3.0
    concentrated: float = 0.5
    even: float = 0.9
    much: float = 0.5
    near: float = 0.5
    passed_on: float = 0.5
    small: float = 0.01
    window: int = 3

    def __post_init__(self):
        for field in fields(self):
            value, bounded = getattr(self, field.name), field.name not in ("times", "window")
            if not 0 < value <= (1 if bounded else np.inf):
                raise LetterError(f"{field.name}={value}: above 0{' and at most 1' * bounded}.")

    def scaled(self, factor: float) -> "LetterRule":
        """All thresholds moved by one factor; `even` goes by its distance from 1."""
        names = [field.name for field in fields(self) if field.name not in ("even", "window")]
        moved = {name: getattr(self, name) * factor for name in names}
        bounded = {k: v if k == "times" else min(v, 1.0) for k, v in moved.items()}
        return replace(self, **bounded, even=1 - (1 - self.even) / factor)


@dataclass(frozen=True, eq=False)
class Profile:
    """What the classes are told by, one row a head, as means over the prompts where c is right.

    `weights[site][h, c, n]` is head h's weight on option n, `effect[h, c]` its direct effect.
    """

    weights: dict[str, Float[np.ndarray, "head right option"]]
    entropy: dict[str, Float[np.ndarray, " head"]]
    near: Float[np.ndarray, " head"]
    effect: Float[np.ndarray, "head right"]
    passed_on: Float[np.ndarray, " head"]

    @classmethod
    def of(
        cls,
        weights: dict[str, Float[np.ndarray, "prompt head option"]],
        near: Float[np.ndarray, "prompt head"],
        effect: Float[np.ndarray, "prompt head"],
        right: Int[np.ndarray, " prompt"],
    ) -> "Profile":
        """From single prompts. Raises `LetterError` where an option is never right."""
        n = next(iter(weights.values())).shape[-1]
        absent = sorted(set(range(n)) - set(right.tolist()))
        if absent:
            raise LetterError(
                f"pairs: option {absent[0] + 1} is never the right one; give more pairs."
            )

        def by_right(values: np.ndarray) -> np.ndarray:
            return np.stack([values[right == c].mean(0) for c in range(n)], axis=1)

        unknown = np.full(effect.shape[1], np.nan)
        return cls(
            {site: by_right(values) for site, values in weights.items()},
            {site: _entropy(values).mean(0) for site, values in weights.items()},
            near.mean(0),
            by_right(effect),
            unknown,
        )

    def own(self, site: str) -> Float[np.ndarray, "head option"]:
        """The weight on each option where it is the right one."""
        return self.weights[site].diagonal(axis1=1, axis2=2)

    def other(self, site: str) -> Float[np.ndarray, "head option"]:
        """The weight on each option where another is right."""
        n = self.weights[site].shape[-1]
        return (self.weights[site].sum(1) - self.own(site)) / (n - 1)

    def mass(self, site: str) -> Float[np.ndarray, "head right"]:
        """The weight on all options."""
        return self.weights[site].sum(-1)

    def table(self) -> pd.DataFrame:
        """`effect`; for both sites `_mass`, `_share` (of the right option in it), `_least_share`,
        `_entropy`; `near`, `passed_on`; `looks_at`: for each c the place with the largest weight
        (`p2`: label 2, `e2`: the end of option 2; `-`: below 0.1); `effect_1`, ..."""
        columns = {"effect": self.effect.mean(-1)}
        for site in self.weights:
            own, mass = self.own(site), self.mass(site)
            columns[f"{site}_mass"] = mass.mean(-1)
            columns[f"{site}_share"] = own.mean(-1) / mass.mean(-1).clip(1e-12)
            columns[f"{site}_least_share"] = (own / mass.clip(1e-12)).min(-1)
            columns[f"{site}_entropy"] = self.entropy[site]
        columns |= {"near": self.near, "passed_on": self.passed_on, "looks_at": self._looks_at()}
        columns |= {f"effect_{c + 1}": d for c, d in enumerate(self.effect.T)}
        return pd.DataFrame(columns)

    def _looks_at(self) -> list[str]:
        names = [
            f"{'pe'[i]}{n + 1}"
            for i, w in enumerate(self.weights.values())
            for n in range(w.shape[-1])
        ]
        both = np.concatenate(list(self.weights.values()), axis=-1)
        return [
            " ".join(names[row.argmax()] if row.max() >= 0.1 else "-" for row in head)
            for head in both
        ]


def classes_of(
    profile: Profile, positive: float, rule: LetterRule = LetterRule()
) -> tuple[list[str], list[str]]:
    """Each head's class and, for the first two, what it reads ("label", "option end", or "").

    `positive`: D of the module's docstring.
    """
    effect, table, sites = profile.effect.mean(-1), profile.table(), list(profile.weights)
    speaks = (effect > 0) & (effect >= rule.small * positive)
    looks = np.stack([table[f"{site}_mass"] >= rule.mass for site in sites])
    correct = np.stack([
        (table[f"{site}_share"] >= rule.share) & (table[f"{site}_least_share"] >= rule.every)
        for site in sites
    ])  # fmt: skip
    correct = correct & looks & speaks & (profile.effect > 0).all(-1)
    single = np.stack([_single(profile, site, rule) for site in sites]) & looks & speaks
    even = (profile.entropy["label"] >= rule.even) & (table["label_mass"] >= rule.much)
    silent = abs(effect) < rule.small * positive
    passes = (profile.near >= rule.near) & (profile.passed_on >= rule.passed_on)
    found = np.select(
        [correct.any(0), single.any(0), even & silent, passes & speaks & ~looks.any(0)],
        CLASSES[:-1],
        CLASSES[-1],
    )
    reads = np.where(correct.any(0), correct, single)
    weight = np.stack([profile.own(site).mean(-1) for site in sites])
    names = np.array(["label", "option end"])[np.where(reads, weight, -1).argmax(0)]
    return found.tolist(), np.where(reads.any(0), names, "").tolist()


def _single(profile: Profile, site: str, rule: LetterRule) -> np.ndarray:
    """Does the head look at exactly one option when that is right, and speak for it?"""
    own, other = profile.own(site), profile.other(site)
    one = (own >= rule.mass) & (own >= rule.times * other)
    total = np.abs(profile.effect).sum(-1, keepdims=True)
    moved = profile.effect >= rule.concentrated * total
    return (one.sum(-1) == 1) & (one & moved).any(-1)


def _entropy(weights: Float[np.ndarray, "prompt head option"]) -> Float[np.ndarray, "prompt head"]:
    """Of the weights on the options, over its maximum."""
    share = weights / weights.sum(-1, keepdims=True).clip(1e-12)
    return -(share * np.log(share.clip(1e-12))).sum(-1) / np.log(weights.shape[-1])
