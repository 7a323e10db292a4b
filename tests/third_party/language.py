"""Language models of transformers: default configurations but for their sizes, called with a mask and labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.third_party.case import Calls, Case, call, each, ids, load, text

__all__ = ["LANGUAGE", "TINY", "transformer"]

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED: dict[str, Any] = {**TINY, "num_key_value_heads": 2}
GEMMA: dict[str, Any] = {**GROUPED, "head_dim": 8}
PAIR: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def transformer(architecture: str, calls: Calls, **config: Any) -> Case:
    """A model of transformers with random weights, made from its configuration."""

    def make() -> nn.Module:
        kind: Any = getattr(load("transformers"), architecture)
        model: nn.Module = kind(kind.config_class(**config))
        return model

    return Case(make, calls)


def sized(**sizes: Any) -> Callable[..., Case]:
    """Rows that have these sizes."""
    return lambda architecture, calls, **config: transformer(architecture, calls, **sizes, **config)


def one_label(batch: int, length: int) -> Tensor:
    return torch.arange(batch) % 2


def a_label_each(batch: int, length: int) -> Tensor:
    return torch.randint(0, 2, (batch, length))


def position(batch: int, length: int) -> Tensor:
    return torch.randint(0, length, (batch,))


model = text()
labelled = text(labels=ids)
classified = text(labels=one_label)
segmented = text(labels=a_label_each, token_type_ids=a_label_each)
answered = text(start_positions=position, end_positions=position)
translated = text(labels=ids)
characters = each(lambda *size: call(input_ids=ids(*size)), (2, 32), (3, 32))

bert = sized(**TINY)
gpt = sized(**GPT)
grouped = sized(**GROUPED)
gemma = sized(**GEMMA)
pair = sized(**PAIR)

LANGUAGE: dict[str, Case] = {
    "bert": bert("BertModel", model),
    "bert for masked words": bert("BertForMaskedLM", labelled),
    "bert for classes": bert("BertForSequenceClassification", text(labels=one_label, token_type_ids=a_label_each)),
    "roberta": bert("RobertaForSequenceClassification", classified),
    "distilbert": transformer(
        "DistilBertForQuestionAnswering", answered,
        vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64,
    ),
    "albert": bert("AlbertForMaskedLM", labelled, embedding_size=16),
    "electra": bert("ElectraForTokenClassification", segmented, embedding_size=16),
    "deberta": bert("DebertaForMaskedLM", labelled, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "deberta-v2": bert("DebertaV2ForMaskedLM", labelled, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": bert("ModernBertForMaskedLM", labelled, **SPECIAL, cls_token_id=1, sep_token_id=2),
    "esm": bert("EsmForMaskedLM", labelled, pad_token_id=1, mask_token_id=4, position_embedding_type="rotary"),
    "canine": transformer(
        "CanineModel", characters,
        **{k: v for k, v in TINY.items() if k != "vocab_size"}, num_hash_buckets=64,
    ),
    "xlnet": transformer("XLNetLMHeadModel", labelled, vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "gpt2": gpt("GPT2LMHeadModel", labelled),
    "gpt2 without labels": gpt("GPT2Model", model),
    "gpt-neox": bert("GPTNeoXForCausalLM", labelled),
    "gptj": gpt("GPTJForCausalLM", labelled, rotary_dim=4),
    "opt": transformer(
        "OPTForCausalLM", labelled, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32,
    ),
    "bloom": transformer("BloomForCausalLM", labelled, vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "falcon": transformer(
        "FalconForCausalLM", labelled, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    ),
    "llama": grouped("LlamaForCausalLM", labelled),
    "llama without labels": grouped("LlamaModel", model),
    "mistral": grouped("MistralForCausalLM", labelled),
    "mixtral": grouped("MixtralForCausalLM", labelled, num_local_experts=4),
    "qwen2": grouped("Qwen2ForCausalLM", labelled),
    "qwen3": gemma("Qwen3ForCausalLM", labelled),
    "gemma": gemma("GemmaForCausalLM", labelled),
    "gemma2": gemma("Gemma2ForCausalLM", labelled),
    "gemma3": gemma("Gemma3ForCausalLM", labelled),
    "phi": bert("PhiForCausalLM", labelled),
    "mamba": transformer(
        "MambaForCausalLM", labelled, vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4,
    ),
    "mamba2": transformer(
        "Mamba2ForCausalLM", labelled, vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4,
        num_heads=8, head_dim=8, n_groups=2, chunk_size=4,
    ),
    "t5": transformer(
        "T5ForConditionalGeneration", translated, vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    ),
    "bart": pair("BartForConditionalGeneration", translated),
    "pegasus": pair("PegasusForConditionalGeneration", translated),
    "marian": pair(
        "MarianMTModel", translated, **SPECIAL, decoder_start_token_id=0, forced_eos_token_id=2, decoder_vocab_size=64
    ),
    "m2m100": pair("M2M100ForConditionalGeneration", translated),
}  # fmt: skip
