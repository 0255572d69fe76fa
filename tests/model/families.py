"""Tiny random models of each family whose attention is a trap of its own, as Hugging Face has it.

Weights are scaled up so that patterns are far from uniform and edits move the logits.
"""

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn

COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}


def gpt2():
    config = hf.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def gpt_neox():
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON, hidden_dropout=0.0))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))


def mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=5))


def qwen3():
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED))


def gemma2():
    config = GROUPED | {"attn_logit_softcapping": 5.0, "sliding_window": 5}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**config))


def gemma3():
    config = GROUPED | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**config))


def gpt_oss():
    config = GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**config))
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    return model


def bert():
    config = {key: COMMON[key] for key in COMMON if key != "attention_dropout"}
    dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return hf.BertForMaskedLM(hf.BertConfig(**config, **dropout))


def vit():
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
        num_labels=5,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def llava():
    vision = hf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=8, projection_dim=32,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**GROUPED), image_token_index=59,
        image_token_id=59, pad_token_id=0, vision_feature_select_strategy="default",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def gptj():
    config = hf.GPTJConfig(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return hf.GPTJForCausalLM(config)


def phi3():
    return hf.Phi3ForCausalLM(hf.Phi3Config(**COMMON, num_key_value_heads=2))


def olmo2():
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**COMMON, num_key_value_heads=2))


def opt():
    config = {key: COMMON[key] for key in COMMON if key != "intermediate_size"}
    return hf.OPTForCausalLM(
        hf.OPTConfig(**config, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    )


def bloom():
    config = hf.BloomConfig(
        vocab_size=60, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    return hf.BloomForCausalLM(config)


DECODERS = {
    f.__name__: f
    for f in (
        gpt2,
        gpt_neox,
        llama,
        mistral,
        qwen3,
        gemma2,
        gemma3,
        gpt_oss,
        phi3,
        olmo2,
        opt,
        gptj,
    )
}
FAMILIES = {**DECODERS, **{f.__name__: f for f in (bert, vit, llava)}}
# its modeling code calls no attention function that we could take the place of
EAGER_ONLY = {f.__name__: f for f in (bloom,)}


def build(name: str, attn: str = "eager", dtype: torch.dtype = torch.float32):
    """A tiny model of a family, the same weights each time, with Hugging Face's own attention."""
    torch.manual_seed(0)
    model = (FAMILIES | EAGER_ONLY)[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    model.config.architectures = [type(model).__name__]
    model.set_attn_implementation(attn)
    return model.to(dtype)


def inputs(name: str, batch: int = 2, n_tokens: int = 12) -> dict[str, torch.Tensor]:
    """Inputs for one forward pass: two prompts, the second left-padded by 3 (text families)."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 59, (batch, n_tokens), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :3], ids[1, :3] = 0, 0
    both = {"input_ids": ids, "attention_mask": mask}
    if name == "llava":
        ids[:, 4:8] = 59
        both["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
    if name != "bloom":
        both["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return both


def small_tokenizer(adds_bos: bool = False) -> hf.PreTrainedTokenizerFast:
    """60 words w3 ... w59 behind <pad>, <s> and </s>; "w7 w8" is two tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 60)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
