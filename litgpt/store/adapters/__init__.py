"""Adapter folders: PEFT's, ours where PEFT has no format for a tuner, and those of LitGPT's LoRA runs.

Read `folder.py` first: it saves and loads a folder. `peft_lora.py` converts the tensors and settings of LoRA, with
`lora_pairs.py` for layers that are published as one, `peft_experts.py` for stacks of experts, and `lora_config.py` for
`adapter_config.json`. `vllm_lora.py` gives LoRA the shape that vLLM applies. `peft_tuners.py` converts other
tuners, and `litgpt_lora.py` reads LitGPT's files.
"""
