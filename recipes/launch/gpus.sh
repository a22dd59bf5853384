#!/usr/bin/env bash
# One machine with several GPUs (DDP): a process for each. Batch sizes in the recipe are those of one process.
#   GPUS=8 recipes/launch/gpus.sh my-recipe.yaml [key=value ...]
set -euo pipefail
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node="${GPUS:-8}" \
    -m lora_ggpo.cli train "$@"
