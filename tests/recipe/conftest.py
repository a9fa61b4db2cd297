"""A recipe file with every key of LitGPT's pretrain command."""

from pathlib import Path

import pytest

EVERY_KEY = """
model_name: pythia-14m
model_config:
out_dir: out/mine
precision: bf16-mixed
initial_checkpoint_dir:
resume: false
data:
train:
  save_interval: 10
  log_interval: 2
  global_batch_size: 16
  micro_batch_size: 2
  lr_warmup_steps: 5
  lr_warmup_fraction:
  epochs:
  max_tokens: 3000
  max_steps:
  max_time:
  max_seq_length: 64
  tie_embeddings:
  max_norm: 1.0
  min_lr: 6e-5
eval:
  interval: 3
  max_new_tokens:
  max_iters: 7
  initial_validation: true
  final_validation: false
  evaluate_example: first
log:
  project: p
  run: r
  group:
  teamspace:
  metadata:
  log_model: false
  save_logs: true
  checkpoint_name:
optimizer:
  class_path: AdamW
  init_args:
    lr: 4e-4
    weight_decay: 0.1
    betas: [0.9, 0.95]
devices: auto
num_nodes: 1
tokenizer_dir: checkpoints/x
logger_name: csv
seed: 7
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A recipe file with every key that LitGPT's pretrain has."""
    path = tmp_path / "mine.yaml"
    path.write_text(EVERY_KEY)
    return str(path)
