"""lmms-eval on hooked vision-language models: `--model interp`, with interventions from folders.

    python -m lmms_eval --model interp --model_args pretrained=mini-llava,intervention=runs/var
        --tasks interp_scenes --include_path data/tasks/lmms
    simple_evaluate(model=InterpLMMS(model, intervention=edit), tasks=[...])

lmms-eval 0.7.3 declares torchvision, opencv, a pinned wandb and more, none of which this needs. It
installs beside what is here with

    pip install 'interp[harness]' # lm-evaluation-harness brings most of the rest
    pip install --no-deps lmms_eval==0.7.3 loguru jsonlines openpyxl et_xmlfile tenacity
    pip install 'filelock<4'

(of filelock it reaches into a private module that 4 no longer has; so best in an environment of its
own). The entry point makes the name known.

A document's images are put before its question, as in `interp.tasks.scenes`, in the chat template
where the tokenizer has one; a question that has `<image>` as often as there are images keeps them
where they are. Prompts become tokens by `interp.tasks.from_examples`, and are written or read as
`interp.evaluate` does it: left-padded, the prompt told to interventions, which may change it.

Traps of the harness: `loglikelihood` is to return a *loss*, and its multiple choice takes the
smallest one (ours is the mean over a continuation's tokens, as other models give it); 0.7.3 makes
text of whatever is not in its own wrapper, a pair of loss and greediness too; results keep
`model_args` but nothing that the model says of itself, so an intervention that is no folder is not
in them (`InterpLMMS.get_model_info()` tells it); and its response cache knows a folder by its name
only: give each intervention a cache of its own.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from interp.errors import UserError
from interp.evaluation import forced_logits, prepared, written_by
from interp.integrations.named import named_interventions, record
from interp.model.hooked import HookedModel, load
from interp.model.images import image_mark, image_token, images_of
from interp.tasks.prompts import from_examples, spans_of

try:
    from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "interp.integrations.lmms_eval needs lmms-eval: pip install --no-deps lmms_eval==0.7.3 "
        "loguru jsonlines openpyxl et_xmlfile tenacity, and pip install 'interp[harness]'"
    ) from error

MARK = "<image>"  # how tasks write where an image is to stand
MAX_NEW_TOKENS = 64  # where a task does not say
SAMPLING = ("do_sample", "temperature", "top_p", "num_beams")


class HarnessError(UserError):
    """Something that lmms-eval asked of a hooked model, and that can't be."""


def manifest():
    """What the entry point `lmms_eval.models` tells of us."""
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest("interp", simple_class_path=f"{__name__}.InterpLMMS")


class InterpLMMS(lmms):
    """A hooked vision-language model for lmms-eval; `intervention` is on in all it is asked.

    Args:
        pretrained: What `interp.load` takes, or a hooked model.
        intervention: Interventions, folders, or folders joined by ":" (on the command line).
        template: How images and question stand together; default as in `interp.tasks.scenes`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | Path | HookedModel,
        intervention: Any = None,
        *,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        template: str | None = None,
        **options,
    ):
        super().__init__()
        if options:
            name = next(iter(options))
            raise HarnessError(
                f"{name}={options[name]!r}: no such option; pretrained, intervention, batch_size, "
                "device, dtype, revision, trust_remote_code, template."
            )
        self.edits = named_interventions(intervention)
        if isinstance(pretrained, HookedModel):
            self.hooked = pretrained
        else:
            self.hooked = load(
                pretrained,
                dtype=None if dtype == "auto" else dtype,
                device=present(device),
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        image_token(self.hooked)  # says so of a text-only model
        with self.hooked.intervene(*self.edits):
            pass  # what does not fit this model is told now
        if not str(batch_size or 1).isdigit():
            raise HarnessError(f"batch_size={batch_size!r}: a whole number; 'auto' is not known.")
        self.batch_size = int(batch_size or 1)
        self.chat = bool(getattr(self.hooked.tokenizer, "chat_template", None))
        self.template = template or ("{image}\n{question}" if self.chat else "{image} {question}")

    # What the harness asks for

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes on behind each question."""
        written: dict[int, str] = {}
        for settings, numbers in by_settings(requests).items():
            kwargs = dict(settings)
            rows = [self._example(requests[n], *requests[n].args[2:]) for n in numbers]
            texts = self._write(rows, kwargs)
            written |= dict(zip(numbers, texts, strict=True))
        return [written[n] for n in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Each continuation's loss (mean over its tokens) and whether it is the greedy one.

        In the harness' wrapper: `.text` is the pair.
        """
        rows = []
        for request in requests:
            answer = request.args[1]
            answer = answer(self._document(*request.args[3:])) if callable(answer) else answer
            rows.append(self._example(request, *request.args[2:]) | {"answer": answer})
        found: dict[int, tuple[float, bool]] = {}
        if not rows:
            return []
        with self.hooked.intervene(*self.edits):
            prompts = self._prompts(rows)
            for batch in forced_logits(
                self.hooked,
                prompts["input_ids"],
                prompts["answer_ids"],
                spans=spans_of(prompts),
                images=images_of(prompts),
                batch_size=self.batch_size,
                desc="loglikelihoods",
            ):
                losses = (batch.losses.sum(1) / batch.real.sum(1)).tolist()
                greedy = batch.greedy.tolist()
                found |= dict(zip(batch.rows, zip(losses, greedy, strict=True), strict=True))
        return [GenerationResult(found[n]) for n in range(len(rows))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises `HarnessError`: rounds that depend on each other are not done."""
        raise HarnessError("generate_until_multi_round: not with --model interp; one round only.")

    def get_model_info(self) -> dict[str, Any]:
        """The model, and the digest of every edit (the harness itself does not ask)."""
        edits = [record(edit) for edit in (*self.hooked.applied, *self.edits)]
        return {"interp": self.hooked.provenance() | {"interventions": edits}}

    # How it is done

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _example(self, request: Any, visual, number: int, task: str, split: str) -> dict[str, Any]:
        shown = visual(self._document(number, task, split)) if visual is not None else []
        images = list(shown) if isinstance(shown, Iterable) else [shown]
        for image in images:
            if not isinstance(image, Image.Image):
                raise HarnessError(
                    f"task {task}: document {number} shows a {type(image).__name__}; hooked models "
                    "look at images only."
                )
        return {"text": self._text(request.args[0], len(images)), "image": images or None}

    def _text(self, question: str, n_images: int) -> str:
        mark = image_mark(self.hooked)
        if n_images and question.count(MARK) == n_images:
            return question.replace(MARK, mark)
        if MARK in question:
            raise HarnessError(
                f"a question has {question.count(MARK)} times {MARK}, and {n_images} images."
            )
        if not n_images:
            return question
        return self.template.format(image=mark * n_images, question=question)

    def _prompts(self, rows: list[dict[str, Any]]) -> Dataset:
        """Within the block: as what is applied wants them."""
        given = from_examples(self.hooked, rows, task="lmms-eval", chat=self.chat)
        return prepared(self.hooked, given)

    def _write(self, rows: list[dict[str, Any]], kwargs: dict[str, Any]) -> list[str]:
        until = kwargs.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        n_new = int(kwargs.get("max_new_tokens") or kwargs.get("max_gen_toks") or MAX_NEW_TOKENS)
        sampling = {name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None}
        if not sampling.get("temperature", 1) or not sampling.get("do_sample"):
            sampling = {"do_sample": False, "num_beams": sampling.get("num_beams", 1)}
        written: dict[int, str] = {}
        with self.hooked.intervene(*self.edits):
            prompts = self._prompts(rows)
            for batch in self.hooked.batches(
                prompts["input_ids"], self.batch_size, "answers", images=images_of(prompts)
            ):
                index = batch.index.tolist()
                told, lengths = prompts.select(index), batch.attention_mask.sum(1).tolist()
                with self.hooked.spans(spans_of(told), lengths):
                    new = self._continue(batch, n_new, sampling)
                for row, tokens, own in zip(index, new, written_by(self.hooked, new), strict=True):
                    text = self.hooked.tokenizer.decode(tokens[own], skip_special_tokens=True)
                    written[row] = cut(text, until)
        return [written[n] for n in range(len(rows))]

    def _continue(self, batch, n_new: int, sampling: dict[str, Any]) -> torch.Tensor:
        pad = getattr(self.hooked.tokenizer, "pad_token_id", None)
        with torch.no_grad():
            out = self.hooked.original_model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=n_new,
                pad_token_id=0 if pad is None else pad,
                **sampling,
                **batch.inputs,
            )
        return out[:, batch.input_ids.shape[1] :]


def by_settings(requests: Sequence[Any]) -> dict[tuple, list[int]]:
    """Requests that are to be written in the same way, by their numbers."""
    groups: dict[tuple, list[int]] = {}
    for number, request in enumerate(requests):
        settings = request.args[1]
        hashable = tuple(
            (name, tuple(value) if isinstance(value, list) else value)
            for name, value in sorted(settings.items())
        )
        groups.setdefault(hashable, []).append(number)
    return groups


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of `until`."""
    ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def present(device: str | None) -> str | None:
    """The device; the harness says `cuda:0` where its command line names none, CUDA or not."""
    absent = str(device).startswith("cuda") and not torch.cuda.is_available()
    return None if absent else device
