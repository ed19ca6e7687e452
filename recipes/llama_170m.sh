#!/usr/bin/env bash
# A Llama of 170M parameters, pretrained with JREG or without it.
#
#   recipes/llama_170m.sh jreg|baseline [--dry-run] [--smoke] [-- MORE MEGATRON FLAGS]
#
# Every knob is in this file; what is written ${NAME:-value} can be set in the environment too.
# recipes/README.md tells how to start it on one node, on several, by Slurm and on Kubernetes.
# The paper publishes no shape, data, batch, learning rate or lambda that we know of: these are our choices.
set -euo pipefail
VARIANT=${1:-}

# JREG: all that the two variants differ in. At lambda 0 the jump is measured and nothing is changed.
LAMBDA=${LAMBDA:-0.1}   # not published; the best of the small sweep in the README. Sweep it: recipes/README.md
ALPHA=${ALPHA:-3}       # said to be best on most tasks
if [[ $VARIANT == baseline ]]; then LAMBDA=0; fi

# Files
DATA=${DATA:-data/fineweb_edu_10bt}             # made by recipes/fineweb_edu.sh 10BT
TOKENIZER=${TOKENIZER:-$DATA/tokenizer.model}   # SentencePiece, at most 32,000 pieces
RUN=${RUN:-runs/llama_170m_$VARIANT}            # checkpoints, TensorBoard, index cache; the same on all nodes
TEXT=(--train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/validation_text_document")
if [[ -n ${BLEND:-} ]]; then                    # or a list of datasets, which inspect --blend writes
    TEXT=(--data-args-path "$BLEND" --split "999,1,0")
fi

# Length: 10B tokens, 60 a parameter, three times compute-optimal (20, arXiv 2203.15556), since small models
# are trained beyond it in practice and the jump grows with training.
SEED=${SEED:-1234}
SEQUENCE=2048
BATCH=256               # sequences: 0.5M tokens, as GPT-3 took at this size (arXiv 2005.14165, table 2.1)
TOKENS=${TOKENS:-10000000000}
EPOCHS=${EPOCHS:-1}     # passes over the data that are allowed

# Machines. MASTER_ADDR, MASTER_PORT and NODE_RANK are asked for when there are several nodes.
NODES=${NODES:-1}
GPUS=${GPUS:-8}         # per node
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1}             # the rest is data parallel, the fastest for a model that fits
MICRO_BATCH=${MICRO_BATCH:-16}                  # sequences per GPU at a time, for 80 GB
TFLOPS=${TFLOPS:-350}   # what a GPU achieves per second, only to say how long it will take
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}    # Megatron asks for it before Blackwell
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

FLAGS=(
    # Architecture: GPT-3 small's width and depth (as Pythia-160M), with Llama's parts. 162,417,408 parameters.
    --num-layers 12 --hidden-size 768 --ffn-hidden-size 3072 --num-attention-heads 12
    --seq-length "$SEQUENCE" --max-position-embeddings "$SEQUENCE"
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --position-embedding-type rope --rotary-base 10000
    --untie-embeddings-and-output-weights --padded-vocab-size 32000
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02

    # Optimizer: AdamW with the betas, decay and clipping of Llama (arXiv 2302.13971).
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0

    # Schedule: the peak is GPT-3's for this size; 1,000 steps of warm-up, then a cosine to a tenth.
    --lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-iters 1000
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

    # Checkpoints: the last one to go on from, and ten over the run, since the jump grows over training.
    --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 500
    --save-retain-interval 2000
    --exit-signal-handler

    # Evaluation and logging
    --eval-interval 500 --eval-iters 8 --log-interval 10 --log-throughput
    --tensorboard-dir "$RUN/tensorboard" --tensorboard-log-interval 10

    --jreg-coeff "$LAMBDA" --jreg-alpha "$ALPHA" --jreg-log-per-layer
    --jreg-measure-interval 10  # as the log: each line shows the one iteration that was measured
)
exec "$(dirname "$0")/run.sh" jreg_megatron.recipe \
    --recipe "$0" --variant="$VARIANT" --run "$RUN" --nodes "$NODES" --gpus "$GPUS" --tflops "$TFLOPS" \
    --tokens "$TOKENS" --epochs "$EPOCHS" -- "${FLAGS[@]}" ::: "$@"
