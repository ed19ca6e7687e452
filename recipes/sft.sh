#!/usr/bin/env bash
# The paper's fine-tuning of its 3.4B model on instructions, for its last claim (arXiv 2601.18302).
#
#   jreg-megatron export runs/llama_3b4_jreg/checkpoints hf/3b4_jreg
#   recipes/sft.sh hf/3b4_jreg [--dry-run] [-- MORE FLAGS OF TRL]
#   recipes/sft.sh --smoke                      # a toy on sums, on this machine's CPU
#
# All knobs are in this file. The environment can set those that are written ${NAME:-value}.
# It needs pip install .[sft]. recipes/README.md: why TRL, and how to judge the result.
# The paper has: all weights, Tulu's first mixture, batch 512, 957 steps, peak 2e-5, linear. The rest is marked as ours.
set -euo pipefail
MODEL=${1:-toy}
if [[ $MODEL == -* ]]; then MODEL=toy; fi

# Files
DATA=${DATA:-allenai/tulu-v1-sft-mixture}       # on the hub; or a JSON-lines file or a folder of your own
SEED=${SEED:-1}                                 # the paper has five, on one pretrained pair
RUN=${RUN:-runs/sft/tulu_$(basename "$MODEL")_$SEED}     # checkpoints, TensorBoard, the model

# Length: 957 steps of 512 are 489,984 conversations, one pass over the mixture's 489,818.
BATCH=512               # conversations a step, over all GPUs
STEPS=${STEPS:-957}
LENGTH=${LENGTH:-1024}                          # tokens of a conversation, ours: the length of pretraining; the rest is cut

# Machine: one node. Gradients are accumulated BATCH / (GPUS x MICRO_BATCH) times.
GPUS=${GPUS:-8}                                 # the paper's node for this size, 8 H200
MICRO_BATCH=${MICRO_BATCH:-8}                   # conversations per GPU at a time, ours; it changes only the rounding
WORKERS=${WORKERS:-$(nproc)}                    # processes that tokenize the text, once
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Memory: GPUs share weights, gradients and optimizer (FSDP2). Full recompute in the backward pass.
SHARING=(--fsdp --fsdp_config '{"activation_checkpointing": true}' --activation_checkpointing false)
if [[ $GPUS == 1 ]]; then SHARING=(--activation_checkpointing true); fi

FLAGS=(
    # Optimizer and schedule. The second line is ours: warm-up and decay of Tulu's own scripts, Adam's defaults.
    --learning_rate 2e-5 --lr_scheduler_type linear --max_steps "$STEPS"
    --warmup_steps 0.03 --weight_decay 0 --adam_beta1 0.9 --adam_beta2 0.999 --adam_epsilon 1e-8 --max_grad_norm 1
    --per_device_train_batch_size "$MICRO_BATCH" --seed "$SEED"

    # Text, all ours: Tulu's format (jreg_megatron/sft/sft.jinja), loss on the answers alone as in Tulu's scripts, each
    # answer's token with the same weight in the batch. Not packed: with packing, 957 steps would be several passes.
    --max_length "$LENGTH" --packing false --assistant_only_loss true --dataset_num_proc "$WORKERS"

    # Precision: weights and optimizer in fp32, arithmetic in bf16.
    --bf16 true "${SHARING[@]}"

    # Checkpoints for a resume, and logging
    --output_dir "$RUN" --save_strategy steps --save_steps 100 --save_total_limit 2
    --logging_steps 10 --report_to tensorboard
)
exec "$(dirname "$0")/run.sh" jreg_megatron.sft \
    --recipe "$0" --gpus "$GPUS" --batch "$BATCH" --data "$DATA" -- "${FLAGS[@]}" ::: "$@"
