"""The linear layers that LoRA adapts by default. A command line reads them here without importing torch."""

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # attention in models such as Llama, Mistral and Qwen
