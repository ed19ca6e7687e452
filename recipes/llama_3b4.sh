#!/usr/bin/env bash
# The paper's Llama of 3.4B, pretrained with JREG or without it (arXiv 2601.18302, tables 8 and 9).
#
#   recipes/llama_3b4.sh jreg|baseline [--dry-run] [--smoke] [-- MORE MEGATRON FLAGS]
#
# All knobs are in this file. The environment can set those that are written ${NAME:-value}.
# recipes/README.md: how to start it on one node, on several nodes, with Slurm and on Kubernetes.
# A value is the paper's or the default of Meta Lingua, its training code, unless it is marked as ours.
set -euo pipefail
VARIANT=${1:-}

# JREG: the only difference between the two variants. At lambda 0 the jump is only measured.
LAMBDA=${LAMBDA:-1}
ALPHA=${ALPHA:-1}
if [[ $VARIANT == baseline ]]; then LAMBDA=0; fi

# Files
DATA=${DATA:-data/fineweb_edu_100bt}            # made by recipes/fineweb_edu.sh 100BT
TOKENIZER=${TOKENIZER:-$DATA/tokenizer.model}   # SentencePiece, 32,000 pieces
RUN=${RUN:-runs/llama_3b4_$VARIANT}             # checkpoints, TensorBoard, index cache; the same on all nodes
TEXT=(--train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/validation_text_document")
if [[ -n ${BLEND:-} ]]; then                    # or a list of datasets, which inspect --blend writes
    TEXT=(--data-args-path "$BLEND" --split "999,1,0")
fi

# Length: 200,000 steps of 524,288 tokens.
SEED=${SEED:-1234}
SEQUENCE=1024
BATCH=512               # sequences
TOKENS=${TOKENS:-104857600000}
EPOCHS=${EPOCHS:-1}     # allowed passes over the data

# Machines. Several nodes also need MASTER_ADDR, MASTER_PORT and NODE_RANK.
NODES=${NODES:-1}
GPUS=${GPUS:-8}                                 # per node; the paper had 8 H200
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1}             # the rest is data parallel, the fastest for a model that fits
MICRO_BATCH=${MICRO_BATCH:-8}                   # sequences per GPU at a time, ours for 80 GB; the paper's is 32
TFLOPS=${TFLOPS:-503}                           # speed of a GPU, for the estimated time; the paper's 159 h give this
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}    # Megatron requires it before Blackwell
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

FLAGS=(
    # Architecture: 3,594,181,632 parameters, 3,397,573,632 without embedding and output layer.
    --num-layers 30 --hidden-size 3072 --ffn-hidden-size 8192 --num-attention-heads 24
    --seq-length "$SEQUENCE" --max-position-embeddings "$SEQUENCE"
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --position-embedding-type rope --rotary-base 10000
    --untie-embeddings-and-output-weights --padded-vocab-size 32000
    --attention-dropout 0 --hidden-dropout 0 --init-fan-in

    # Optimizer and schedule: AdamW, a cosine to a tenth of the peak.
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0
    --lr 5e-4 --min-lr 5e-5 --lr-decay-style cosine --lr-warmup-iters 1000
    --global-batch-size "$BATCH" --micro-batch-size "$MICRO_BATCH" --seed "$SEED"

    # Data
    "${TEXT[@]}"
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER"
    --data-cache-path "$RUN/data_cache" --num-workers 2 --no-create-attention-mask-in-dataloader

    # Parallelism
    --tensor-model-parallel-size "$TP" --sequence-parallel --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather

    # Precision and kernels: gradients are kept and reduced in fp32, Megatron's default with bf16.
    --bf16 --transformer-impl transformer_engine --cross-entropy-loss-fusion
    --manual-gc --manual-gc-interval 100

    # Checkpoints: the last one for a resume, and eight over the run, since the jump grows over training.
    --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 1000
    --save-retain-interval 25000
    --exit-signal-handler

    # Evaluation on 11M tokens, and logging
    --eval-interval 2000 --eval-iters 21 --log-interval 10 --log-throughput
    --tensorboard-dir "$RUN/tensorboard" --tensorboard-log-interval 10

    --jreg-coeff "$LAMBDA" --jreg-alpha "$ALPHA" --jreg-log-per-layer
    --jreg-measure-interval 10  # like the log: each line shows the one measured iteration
)
exec "$(dirname "$0")/run.sh" jreg_megatron.recipe \
    --recipe "$0" --variant="$VARIANT" --run "$RUN" --nodes "$NODES" --gpus "$GPUS" --tflops "$TFLOPS" \
    --tokens "$TOKENS" --epochs "$EPOCHS" -- "${FLAGS[@]}" ::: "$@"
