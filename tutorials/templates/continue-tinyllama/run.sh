#!/usr/bin/env bash
# Continue the pretraining of the published TinyLlama on the text in ./text; started again, the run continues.
set -euo pipefail
out=out/tinyllama-continued
if compgen -G "$out/step-*" >/dev/null; then
  set -- --resume true --initial_checkpoint_dir null "$@" # instead of the published weights
fi
litgpt pretrain --config pretrain/tinyllama --config "$(dirname "$0")/recipe.yaml" --out_dir "$out" "$@"
