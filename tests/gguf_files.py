"""Writes tiny models as GGUF files, as llama.cpp stores them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny import tiny_llama, tiny_tokenizer

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def save_gguf(path: Path, kind: gguf.GGMLQuantizationType = F32) -> Path:
    """The tiny Llama of `tests.tiny` with its tokenizer, its matrices quantised."""
    tokenizer = tiny_tokenizer()
    write_gguf(path, tiny_llama(vocab_size=len(tokenizer)), tokenizer, kind)
    return path


def write_gguf(
    path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: gguf.GGMLQuantizationType = F32
) -> None:
    """The tiny Llama as llama.cpp stores it: its own tensor names, and rotary halves interleaved in q and k."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_types(
        [3 if bpe["vocab"][token] < 3 else 1 for token in sorted(bpe["vocab"], key=bpe["vocab"].get)]
    )
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        if heads:
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        values, stored = weight.contiguous().numpy(), kind if weight.ndim == 2 else F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
