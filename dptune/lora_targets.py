"""The linear layers that LoRA adapts by default, in a file without torch, so that a command line can show them fast."""

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # attention in models such as Llama, Mistral and Qwen
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer of the decoder, without the output head
