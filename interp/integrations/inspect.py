"""inspect_ai on a hooked model: `--model interp/MODEL`, with interventions from folders.

    inspect eval task.py --model interp/smollm2-135m -M intervention=runs/act

A conversation becomes a prompt by the tokenizer's chat template; where there is none, or with
`-M chat=false`, it is the texts of its messages, one below the other. Decoding is greedy unless
`temperature`, `top_p` or `top_k` is given. Hooks serve one generation at a time, so connections
take turns.

`intervention` is one folder or several joined by ":"; the log of an evaluation keeps it, and each
output the digests. Answers that the harness keeps (`--cache`) are of one model with one set of
interventions. What the model cannot do (tools, several choices) is refused, not left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from anyio import to_thread
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import StoppingCriteria

from interp.errors import UserError
from interp.evaluation import written_by
from interp.integrations.named import named_interventions, record
from interp.model.hooked import HookedModel, load
from interp.provenance import digest_rows
from interp.tasks.prompts import encode

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        GenerateConfig,
        Logprob,
        Logprobs,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        StopReason,
        TopLogprob,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError as error:
    raise ImportError(
        "interp.integrations.inspect needs inspect_ai: pip install 'interp[harness]'"
    ) from error

MAX_TOKENS = 256
# Of the harness' settings those that would change what is written and are not done here.
REFUSED = (
    "best_of",
    "frequency_penalty",
    "logit_bias",
    "presence_penalty",
    "prompt_logprobs",
    "response_schema",
)

_turn = Lock()


class InspectError(UserError):
    """Something that inspect_ai was asked to do with a hooked model, and that can't be."""


class InterpAPI(ModelAPI):
    """A hooked model as a provider; `intervention` is on in all that it writes.

    In Python, `get_model("interp/NAME", hooked=model, intervention=edit)` takes objects: `hooked`
    is used instead of loading the model that is named.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        *,
        hooked: HookedModel | None = None,
        intervention: Any = None,
        chat: bool | None = None,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.edits = named_interventions(intervention)
        self.hooked = hooked or load(
            model_name,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self.tokenizer = self.hooked.tokenizer
        if self.tokenizer is None:
            raise InspectError(f"{model_name}: has no tokenizer.")
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if chat and not has_template:
            raise InspectError(f"chat=true: the tokenizer of {model_name} has no chat template.")
        self.chat = has_template if chat is None else chat
        with self.hooked.intervene(*self.edits):  # what does not fit this model is told now
            about = self.hooked.provenance() | {"chat": self.chat}
        # keys of the harness' cache have the address and no arguments: let it stand for these
        super().__init__(model_name, f"interp:{digest_rows([about])}", api_key, [], config)

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """What the model writes, in a thread, one generation at a time."""
        if tools:
            raise InspectError(f"tools: {tools[0].name!r}; a hooked model is given no tools.")
        asked = [name for name in REFUSED if getattr(config, name, None) is not None]
        if (config.num_choices or 1) > 1:
            asked.append("num_choices")
        if asked:
            raise InspectError(f"{asked[0]}: not done on a hooked model; leave it out.")
        return await to_thread.run_sync(self._answer, self._text(input), config)

    def max_connections(self) -> int:
        """Hooks serve one generation at a time."""
        return 1

    def max_tokens(self) -> int:
        """Where a task does not say."""
        return MAX_TOKENS

    def collapse_user_messages(self) -> bool:
        """Chat templates want turns that alternate."""
        return True

    def close(self) -> None:
        """Nothing is open."""

    def _text(self, messages: list[ChatMessage]) -> str:
        for message in messages:
            parts = [] if isinstance(message.content, str) else message.content
            other = [part.type for part in parts if part.type not in ("text", "reasoning")]
            if other:
                raise InspectError(f"input: a message with {other[0]}; a hooked model reads text.")
        if not self.chat:
            return "\n".join(message.text for message in messages)
        turns = [{"role": message.role, "content": message.text} for message in messages]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _answer(self, text: str, config: GenerateConfig) -> ModelOutput:
        encoded = encode(self.tokenizer, text, special=not self.chat)
        row = {"text": text, "input_ids": encoded.ids[: encoded.stop], "spans": {}}
        with _turn, self.hooked.intervene(*self.edits):
            prompt = list(self.hooked.prepare(row)["input_ids"])
            written = write(self.hooked, prompt, config)
        message = ChatMessageAssistant(
            content=written.text, model=self.model_name, source="generate"
        )
        logprobs = None
        if config.logprobs:
            logprobs = Logprobs(content=written.logprobs(self.tokenizer, config.top_logprobs or 0))
        choice = ChatCompletionChoice(
            message=message, stop_reason=written.stop_reason, logprobs=logprobs
        )
        n_in, n_out = len(prompt), len(written.tokens)
        return ModelOutput(
            model=self.model_name,
            choices=[choice],
            usage=ModelUsage(input_tokens=n_in, output_tokens=n_out, total_tokens=n_in + n_out),
            metadata={"interventions": [record(edit) for edit in self.edits]},
        )


@dataclass(frozen=True, eq=False)
class Written:
    """What a model wrote: its tokens (an end token is one), text, why it stopped, and logits."""

    tokens: list[int]
    text: str
    stop_reason: StopReason
    logits: Float[Tensor, "token vocab"] | None

    def logprobs(self, tokenizer, top: int) -> list[Logprob]:
        """Log-probability of each token, and of the `top` likeliest in its place."""
        if self.logits is None:
            return []
        log_probs = self.logits.float().log_softmax(-1)
        best = log_probs.topk(top)
        names = tokenizer.convert_ids_to_tokens
        return [
            Logprob(
                token=names(token),
                logprob=float(log_probs[n, token]),
                top_logprobs=[
                    TopLogprob(token=names(other), logprob=value)
                    for value, other in zip(best.values[n].tolist(), best.indices[n].tolist())
                ],
            )
            for n, token in enumerate(self.tokens)
        ]


@torch.no_grad()
def write(model: HookedModel, prompt: list[int], config: GenerateConfig) -> Written:
    """What the model writes behind `prompt`, interventions and all.

    Raises `InspectError` where the prompt leaves no room in the model's window.
    """
    batch, tokenizer = model.batch([prompt]), model.tokenizer
    wanted = MAX_TOKENS if config.max_tokens is None else config.max_tokens
    room = min(wanted, model.cfg.n_ctx - len(prompt))
    if room < 1:
        raise InspectError(
            f"input: {len(prompt)} tokens, and the window of {model.name} has {model.cfg.n_ctx}."
        )
    stops, pad = config.stop_seqs or [], tokenizer.pad_token_id
    with seeded(config.seed):
        out = model.original_model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=room,
            pad_token_id=0 if pad is None else pad,
            return_dict_in_generate=True,
            output_logits=bool(config.logprobs),
            stopping_criteria=[Stops(tokenizer, len(prompt), stops)],
            **sampling(config),
        )
    new = out.sequences[:, len(prompt) :]
    text = tokenizer.decode(new[0][written_by(model, new)[0]], skip_special_tokens=True)
    found = [text.index(stop) for stop in stops if stop in text]
    ended = bool(found) or not bool(written_by(model, new).all())
    reason = "stop" if ended else "max_tokens" if room == wanted else "model_length"
    logits = torch.cat(out.logits) if config.logprobs else None
    return Written(new[0].tolist(), text[: min(found, default=len(text))], reason, logits)


class Stops(StoppingCriteria):
    """Stop once what was written holds one of some texts.

    That of transformers looks into the vocabulary, and can't read every tokenizer's.
    """

    def __init__(self, tokenizer, prompt: int, stops: Sequence[str]):
        self.tokenizer, self.prompt, self.stops = tokenizer, prompt, stops

    def __call__(self, input_ids: Int[Tensor, "batch pos"], scores, **_) -> Bool[Tensor, " batch"]:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def sampling(config: GenerateConfig) -> dict[str, Any]:
    """Greedy unless a temperature above 0, top_p or top_k is asked for."""
    asked = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked or asked.get("temperature") == 0:
        return {"do_sample": False}
    # what the model's own generation config has is not what was asked for
    return {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | asked | {"do_sample": True}


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws by `seed` in the block; others go on after it as they would have."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
