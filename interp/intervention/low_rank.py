"""Keep only a few dimensions of what chosen heads ask, offer and copy at lettered options.

T is the prompt's last token, p_n a place that stands for option n: its label, or the end of its
text. For the heads chosen, before rotation,

    q_T   -> q0 + P_q (q_T - q0)                    q0: the mean over the prompts of the fit
    k_p_n -> k0 + P_k (k_p_n - k0), v the same      k0: the mean over this prompt's own places

with P = U U^T onto r dimensions, or onto all others (`complement`). So r = d_head changes nothing,
and at r = 0 all options look alike but for where they stand.

`LowRank.fit` takes U from an SVD of these differences, over prompts (q) or over prompts and places
(k, v). A subspace that keeps the behaviour is *sufficient*; whether it is needed, its complement
tells. Fit on some prompts and test on others: with `class_means` (the mean q for each right option,
the mean k and v of each option) three dimensions hold four options whatever the model does.

Keys and values belong to key-value heads: where several query heads share one, all of them meet the
edit, and so do all tokens after the places, not T alone.

Source: Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?" (arXiv 2307.09458),
which does it at labels and publishes no code: which means are taken off is a choice of ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from interp.heads import HeadsLike, heads_of
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.subspaces import (
    LABELS,
    PARTS,
    Basis,
    class_means_of,
    collect,
    heads_per_kv_head,
    option_columns,
    principal,
    right_options,
)
from interp.model.call import When
from interp.model.hooked import HookedModel


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Intervention):
    """Project q at T, k and v at one place for each option, as in the module's docstring.

    `q_basis[i]`, `k_basis[i]`, `v_basis[i]` hold orthonormal rows for `heads[i]` as given (k and v:
    for its key-value head); None leaves that part as it is. `at` names spans of the prompts that
    run, whose last tokens are meant (`interp.evaluate` tells them, or `with model.spans(...)`), or
    gives numbers: places in the prompt's own tokens. `when="generated"` projects the queries of
    generated tokens instead of T's; the places are in prompts.

    Give prompts whole, not in chunks. Hugging Face's `generate` without the KV cache passes what it
    wrote as part of a longer prompt, whose last token is then the only T: the tokens before it are
    not projected again, and the result is another than with the cache.
    """

    heads: HeadsLike
    q_mean: Float[Tensor, "head d_head"] | None = None
    q_basis: Basis | None = None
    k_basis: Basis | None = None
    v_basis: Basis | None = None
    at: Sequence[str | int] = LABELS
    complement: bool = False
    when: When = "prompt"

    def __post_init__(self):
        heads = heads_of(self.heads)
        object.__setattr__(self, "heads", tuple(sorted(heads)))
        object.__setattr__(self, "at", tuple(self.at))
        if self.when not in ("prompt", "generated", "both"):
            raise InterventionError(f"when={self.when!r}: one of prompt, generated, both.")
        if len(set(self.at)) < 2:
            raise InterventionError(f"at={self.at}: two or more places, each once.")
        if (self.q_basis is None) != (self.q_mean is None):
            raise InterventionError("q_mean, q_basis: give both or neither.")
        order = sorted(range(len(heads)), key=heads.__getitem__)
        for name in ("q_mean", *(f"{part}_basis" for part in PARTS)):
            value = getattr(self, name)
            if value is not None:
                self._check(name, value, len(heads))
                object.__setattr__(self, name, value[order])

    @staticmethod
    def _check(name: str, value: Tensor, n_heads: int) -> None:
        form = "[heads, d_head]" if name == "q_mean" else "[heads, rank, d_head]"
        if value.dim() != form.count(",") + 1 or len(value) != n_heads:
            shape = list(value.shape)
            raise InterventionError(f"{name}: {shape}, and should be {form} with {n_heads} heads.")
        if not torch.isfinite(value).all():
            raise InterventionError(f"{name}: holds NaN or infinite numbers.")
        if name == "q_mean":
            return
        gram = value.double() @ value.double().transpose(1, 2)
        if not torch.allclose(gram, torch.eye(gram.shape[1]).to(gram), atol=1e-4):
            raise InterventionError(f"{name}: its rows are not orthonormal; see LowRank.fit.")

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.heads[:4])) + (", ..." if len(self.heads) > 4 else "")
        kept = ", ".join(f"{part} to {basis.shape[1]}" for part, basis in self._bases.items())
        kind = "all but these dimensions" if self.complement else "dimensions"
        when = {
            "prompt": "the prompt's last token",
            "generated": "generated tokens",
            "both": "the prompt's last token, generated tokens",
        }[self.when]
        return (
            f"LowRank({len(self.heads)} heads: {shown}; {kept or 'nothing'} {kind}; at {when} (q) "
            f"and {len(self.at)} places (k, v))"
        )

    @classmethod
    def fit(
        cls,
        model: HookedModel,
        prompts,
        heads,
        rank: int = 3,
        *,
        at: Sequence[str | int] = LABELS,
        parts: str = "qkv",
        class_means: bool = False,
        permute: int | None = None,
        when: When = "prompt",
        batch_size: int = 16,
    ) -> "LowRank":
        """Subspaces from an SVD of the heads' own q, k and v on `prompts`.

        Args:
            prompts: With the spans `at`, and for `class_means` with `choices` and answers.
            at: One place an option, in their order: `LABELS`, `ENDS`, or others (see the class).
            rank: How many dimensions to keep; `.of_rank(r)` gives fewer without another fit.
            parts: Which of q, k and v to project.
            class_means: From the mean of each option instead of every prompt by itself.
            permute: Control for `class_means`: options shuffled by this seed, within each prompt
                for k and v, between prompts for q.

        Raises:
            InterventionError: A rank that the samples cannot have, places that prompts lack.
        """
        from interp.tasks.prompts import as_prompts

        heads = tuple(sorted(heads_of(heads)))
        model.check_heads(heads)
        if not heads or not parts or not set(parts) <= set(PARTS):
            raise InterventionError(f"heads={heads}, parts={parts!r}: some heads, of q, k, v some.")
        if permute is not None and not class_means:
            raise InterventionError("permute: shuffles options, which only class_means looks at.")
        prompts = as_prompts(model, prompts)
        seen = collect(model, prompts, heads, tuple(at), parts, batch_size)
        right = right_options(prompts) if class_means else None
        bases = {}
        for part in parts:
            x = seen[part]
            x = x - x.mean(1, keepdim=True) if part == "q" else x - x.mean(2, keepdim=True)
            if right is not None:
                x = class_means_of(x, right, len(at), permute)
            n_means = 1 if part == "q" or class_means else x.shape[1]
            bases[f"{part}_basis"] = principal(x.flatten(1, -2), n_means, rank, part)
        q_mean = seen["q"].mean(1).float() if "q" in parts else None
        return cls(heads, q_mean, **bases, at=at, when=when)

    def of_rank(self, rank: int) -> "LowRank":
        """The same with only the first `rank` dimensions."""
        most = min((basis.shape[1] for basis in self._bases.values()), default=0)
        if not 0 <= rank <= most:
            raise InterventionError(f"rank={rank}: it holds 0 to {most}; fit it with a higher one.")
        return self._with(lambda basis: basis[:, :rank])

    def random(self, seed: int) -> "LowRank":
        """As many dimensions drawn at random, the same for heads that share keys and values."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(basis: Basis) -> Basis:
            draws: list[Tensor] = []
            for index, own in enumerate(basis):
                same = [i for i in range(index) if torch.equal(own, basis[i])]
                noise = torch.randn(*own.shape[::-1], generator=generator, dtype=torch.float64)
                draws.append(draws[same[0]] if same else torch.linalg.qr(noise).Q.T.to(own))
            return torch.stack(draws)

        return self._with(drawn)

    def others(self) -> "LowRank":
        """All dimensions but these: what they leave over."""
        return replace(self, complement=not self.complement)

    def only(self, parts: str) -> "LowRank":
        """The same for some of q, k and v, the others left as they are."""
        dropped = {f"{part}_basis": None for part in PARTS if part not in parts}
        if "q" not in parts:
            dropped["q_mean"] = None
        return replace(self, **dropped)

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """Up to three hooks per layer touched.

        Raises `HeadError` where the model lacks a head, `InterventionError` where its heads are of
        another width.
        """
        model.check_heads(self.heads)
        self._check_width(model)
        group = heads_per_kv_head(model)
        for layer, layer_heads in groupby(enumerate(self.heads), key=lambda item: item[1].layer):
            rows, heads = zip(*layer_heads)
            heads = [head.head for head in heads]
            if self.q_basis is not None:
                mean = self.q_mean[list(rows)]  # pyright: ignore[reportOptionalSubscript]
                project = partial(self._at_end, model, heads, mean, self.q_basis[list(rows)])
                yield f"blocks.{layer}.attn.hook_q", project
            # the first of the heads that share keys and values speaks for all of them
            first = {head // group: row for row, head in reversed(list(zip(rows, heads)))}
            kv_heads = sorted(first)
            for part, basis in (("k", self.k_basis), ("v", self.v_basis)):
                if basis is not None and self.when != "generated":
                    own = basis[[first[kv] for kv in kv_heads]]
                    project = partial(self._at_options, model, kv_heads, own)
                    yield f"blocks.{layer}.attn.hook_{part}", project

    @property
    def _bases(self) -> dict[str, Tensor]:
        bases = {part: getattr(self, f"{part}_basis") for part in PARTS}
        return {part: basis for part, basis in bases.items() if basis is not None}

    def _with(self, change) -> "LowRank":
        return replace(self, **{f"{part}_basis": change(b) for part, b in self._bases.items()})

    def _check_width(self, model: HookedModel) -> None:
        for part, basis in self._bases.items():
            if basis.shape[2] != model.cfg.d_head:
                raise InterventionError(
                    f"{part}_basis: for heads of width {basis.shape[2]}, and {model.name} has "
                    f"{model.cfg.d_head}. Fit it on this model."
                )

    def _at_end(
        self,
        model: HookedModel,
        heads: list[int],
        mean: Float[Tensor, "some d_head"],
        basis: Float[Tensor, "some rank d_head"],
        q: Float[Tensor, "batch pos head d_head"],
        hook,
    ) -> Float[Tensor, "batch pos head d_head"] | None:
        call = model.call
        rows = call.rows(self.when) & (call.positions >= call.prompt_lengths[:, None] - 1)
        if not rows.any():
            return None
        old, mean = q[:, :, heads], mean.to(q.device)
        new = mean + self._projected(old.float() - mean, basis)
        index = torch.tensor(heads, device=q.device)
        return q.index_copy(2, index, torch.where(rows[:, :, None, None], new.to(q), old))

    def _at_options(
        self,
        model: HookedModel,
        kv_heads: list[int],
        basis: Float[Tensor, "some rank d_head"],
        x: Float[Tensor, "batch pos kv_head d_head"],
        hook,
    ) -> Float[Tensor, "batch pos kv_head d_head"] | None:
        columns = option_columns(model.call, self.at)
        if columns is None:
            return None
        rows = torch.arange(len(x), device=x.device)[:, None]
        old = x[rows, columns][:, :, kv_heads].float()
        mean = old.mean(1, keepdim=True)
        new = mean + self._projected(old - mean, basis)
        edited = x.clone()
        index = torch.tensor(kv_heads, device=x.device)
        edited[rows[..., None], columns[..., None], index] = new.to(x)
        return edited

    def _projected(
        self, x: Float[Tensor, "batch some head d_head"], basis: Basis
    ) -> Float[Tensor, "batch some head d_head"]:
        basis = basis.to(x)
        kept = torch.einsum("bphd,hrd,hre->bphe", x, basis, basis)
        return x - kept if self.complement else kept
