#!/usr/bin/env bash
# Pretrain TinyLlama with 1.1 billion parameters on the tokens in ./data; started again, the run continues.
set -euo pipefail
litgpt pretrain --config pretrain/tinyllama --config "$(dirname "$0")/recipe.yaml" "$@"
