"""lm-evaluation-harness on a hooked model: `--model interp`, with interventions from folders.

    interp lm-eval --model_args pretrained=smollm2-135m,intervention=runs/act --tasks ...
    simple_evaluate(model=InterpLM(model, intervention=edit), tasks=[...])

Requests become tokens as with the harness' own `--model hf`. What follows a context is scored as
`interp.evaluate` scores an answer: left-padded with a mask, the context told to interventions as
the prompt, so that an edit of "the last token" or of "generated tokens" means the same with any
batch size. Without an intervention log-likelihoods are those of `--model hf` (but for its softmax,
which is taken in the model's own type; ours is in float32).

Contexts longer than the window lose their beginning. A rolling likelihood treats each window as a
prompt by itself: positions count anew in each, and an intervention that is not causal, or that puts
other prompts in, is refused. A context has no named spans: what needs them says so.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.errors import UserError
from interp.evaluation import check_text_has_a_loss, forced_logits
from interp.integrations.named import named_interventions, record
from interp.model.hooked import HookedModel, load

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        "interp.integrations.lm_eval needs lm-evaluation-harness: pip install 'interp[harness]'"
    ) from error

log = logging.getLogger(__name__)

STAMP = "interp"  # keys of the harness' own are hashes
# Options of the harness' model class that mean something with a model that was loaded already.
OPTIONS = (
    "max_length",
    "truncation",
    "logits_cache",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessError(UserError):
    """Something that the harness was asked to do with a hooked model, and that can't be."""


@register_model("interp")
class InterpLM(HFLM):
    """A hooked model for the harness; `intervention` is on in all that it is asked.

    Args:
        pretrained: What `interp.load` takes, or a hooked model.
        intervention: Interventions, folders, or folders joined by ":" (on the command line).
        options: Those of the harness' `hf` that remain with a loaded model (see `OPTIONS`).
    """

    def __init__(
        self,
        pretrained: str | Path | HookedModel,
        intervention: Any = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        **options,
    ):
        check_options(options)
        self.edits = named_interventions(intervention)
        if isinstance(pretrained, HookedModel):
            self.hooked = pretrained
        else:
            self.hooked = load(
                pretrained,
                dtype=None if dtype == "auto" else dtype,
                device=None if device_map is not None else present(device),
                device_map=device_map,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        if self.hooked.tokenizer is None:
            raise HarnessError(
                f"pretrained: {self.hooked.name} has no tokenizer; give a model that has one, "
                "interp.load(..., tokenizer=...)."
            )
        with self.hooked.intervene(*self.edits):
            pass  # what does not fit this model is told now
        with quiet(HFLM.__module__):  # it warns of a model that was not loaded by itself
            super().__init__(
                pretrained=self.hooked.original_model,
                tokenizer=deepcopy(self.hooked.tokenizer),  # the harness may give it a pad token
                batch_size=batch_size or 1,
                max_batch_size=max_batch_size or 64,
                **options,
            )

    # What the harness asks for

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding writes."""
        with self.hooked.intervene(*self.edits):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts.

        Raises `EvaluationError` where an intervention leaves them none.
        """
        with self.hooked.intervene(*self.edits):
            texts = [request.args[0] for request in requests]
            check_text_has_a_loss(self.hooked, any(self._changes(text) for text in texts))
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes on behind each context."""
        with self.hooked.intervene(*self.edits):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to a result's config: the model, and the digest of every edit."""
        about = self.hooked.provenance()
        edits = [record(edit) for edit in (*self.hooked.applied, *self.edits)]
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": about["dtype"],
            "model_revision": about["revision"] or "",
            "model_sha": "",
            "interp": about | {"interventions": edits},
        }

    def set_cache_hook(self, cache_hook) -> None:
        """The harness is about to look answers up: its keys know neither model nor intervention.

        Raises `HarnessError` where the answers kept there are not those of this model and edits.
        """
        kept = cache_hook.dbdict
        if kept is not None:
            about = self.get_model_info()["interp"]
            mine = {name: about[name] for name in ("model", "revision", "dtype", "interventions")}
            if kept.get(STAMP, None if len(kept) else mine) != mine:
                raise HarnessError(
                    "use_cache: it holds the answers of another model, or of one under other "
                    "interventions; give each its own --use_cache."
                )
            kept[STAMP] = mine
        super().set_cache_hook(cache_hook)

    # How it is done

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ids, answer_ids = super()._encode_pair(context, continuation)
        text = context.rstrip()  # as it does: spaces belong to the continuation's first token
        answer = context[len(text) :] + continuation
        ids = ids or [self.prefix_token_id]
        return self._prepared(text, ids, answer=answer, answer_ids=answer_ids), answer_ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Contexts to write on from, as tokens; interventions may put others in their place."""
        settings = {"padding_side": padding_side, "truncation": truncation}
        if not any(self._changes(text) for text in strings):
            return super().tok_batch_encode(
                strings, left_truncate_len=left_truncate_len, **settings
            )
        ids, mask = super().tok_batch_encode(strings, **settings)
        lists = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        lists = [self._prepared(text, own) for text, own in zip(strings, lists, strict=True)]
        batch = self.hooked.batch([own[-(left_truncate_len or len(own)) :] for own in lists])
        return batch.input_ids, batch.attention_mask

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        requests = [(key, *self._within_window(context, own)) for key, context, own in requests]
        # continuations that differ in their last token only are read in one pass
        sharing: dict[tuple, list[int]] = {}
        for number, (key, context, own) in enumerate(requests):
            same = (key is None, tuple(context), tuple(own[:-1]))
            sharing.setdefault(same if self.logits_cache else (number,), []).append(number)
        groups = list(sharing.values())
        firsts = [requests[group[0]] for group in groups]
        passes = forced_logits(
            self.hooked,
            [context for _, context, _ in firsts],
            [own for _, _, own in firsts],
            # of a rolling window (it has no key) all tokens are the text's own
            lengths=[len(c) + (len(own) - 1) * (key is None) for key, c, own in firsts],
            batch_size=override_bs or self._rows_at_once(requests),
            desc=None if disable_tqdm else "loglikelihoods",
        )
        found: dict[int, tuple[float, bool]] = {}
        for batch in passes:
            for row, index in enumerate(batch.rows):
                logits = batch.logits[row].log_softmax(-1)
                for number in groups[index]:
                    key, _, own = requests[number]
                    found[number] = _score(logits[-len(own) :], own)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, found[number])
        return [found[number] for number in range(len(requests))]

    def _within_window(
        self, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        """Without the beginning of a context that is too long (the last token is not read)."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise HarnessError(
                f"requests: a continuation of {len(continuation)} tokens, and the window has "
                f"{self.max_length}."
            )
        if len(context) > room:
            log.warning("a context of %d tokens was cut to its last %d", len(context), room)
        return context[-room:], continuation

    def _rows_at_once(self, requests: Sequence[Request]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        return self._detect_batch_size([longest])

    def _prepared(self, text: str, ids: list[int], **more) -> list[int]:
        row = {"text": text, "input_ids": list(ids), "spans": {}, **more}
        return list(self.hooked.prepare(row)["input_ids"])

    def _changes(self, text: str) -> bool:
        """Do the interventions that are on put another prompt in the place of this one?"""
        if not self.hooked.applied:
            return False
        row = {"text": text, "input_ids": self.tok_encode(text), "spans": {}}
        return self.hooked.prepare(row) is not row


def check_options(options: dict[str, Any]) -> None:
    """Raises `HarnessError` for one that the harness would silently ignore."""
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        known = ("pretrained", "intervention", "dtype", "device", "device_map", "revision")
        known += ("trust_remote_code", "batch_size", "max_batch_size", *OPTIONS)
        near = ", ".join(get_close_matches(unknown[0], known, n=3) or known)
        raise HarnessError(f"{unknown[0]}={options[unknown[0]]!r}: no such option; {near}.")


def present(device: str | None) -> str | None:
    """The device; the harness says `cuda:0` where its command line names none, CUDA or not."""
    absent = str(device).startswith("cuda") and not torch.cuda.is_available()
    return None if absent else device


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """A logger that tells of errors only, in the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _score(log_probs: Tensor, tokens: list[int]) -> tuple[float, bool]:
    target = torch.tensor(tokens, device=log_probs.device)
    chosen = log_probs.gather(1, target[:, None])
    return float(chosen.sum()), bool((log_probs.argmax(1) == target).all())
