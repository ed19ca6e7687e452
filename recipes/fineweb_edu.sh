#!/usr/bin/env bash
# FineWeb-Edu as Megatron's token files, for the recipes in this folder.
#
#   recipes/fineweb_edu.sh 100BT    the data of the recipes, which train on 104.9 billion tokens of it
#   recipes/fineweb_edu.sh 10BT     a tenth of it, for shorter runs
#
# $DATA gets all files: tokenizer.model, train_text_document.bin/.idx and validation_text_document.bin/.idx, each with
# a manifest of its sources. The text is read from the Hugging Face hub range by range, so it takes no disk space.
# After a kill, start the same command again: it resumes.
#
# Disk: 2 bytes per token, so 20 GB or 200 GB. Time: a core makes 0.6 to 0.9 million tokens a second
# (tests/preprocess_comparison.py measures yours), so 10BT takes 3 to 5 core hours and 100BT 31 to 46. Network: a core
# reads 2 to 3 MB of Parquet a second. If the network is slower, download a copy first and name it as SOURCE:
#   hf download HuggingFaceFW/fineweb-edu --repo-type dataset --include 'sample/10BT/*' --local-dir fineweb
#   SOURCE=fineweb/sample/10BT recipes/fineweb_edu.sh 10BT
#
# The paper names no tokenizer, only 32,000 pieces, as in Llama 2. Llama 2's tokenizer needs a licence. Mistral's first
# one is free and similar: a SentencePiece model of 32,000 pieces with byte fallback, in the package mistral-common
# (Apache-2.0, 37 MB). TOKENIZER=train trains one on the corpus instead.
set -euo pipefail
SAMPLE=${1:-}
if [[ $SAMPLE != 10BT && $SAMPLE != 100BT ]] || (($# > 1)); then
    echo "jreg_megatron: error: the sample is '$*'; give 10BT or 100BT" >&2
    exit 2
fi
DATA=${DATA:-data/fineweb_edu_${SAMPLE,,}}      # the default of the recipes
SOURCE=${SOURCE:-}                              # a folder of the sample's Parquet files, instead of the hub
TOKENIZER=${TOKENIZER:-mistral}                 # or train, or your own SentencePiece model
VOCABULARY=${VOCABULARY:-32000}                 # pieces of a trained one; the recipes' models have as many rows
SAMPLED=${SAMPLED:-268435456}                   # bytes of text to train it on, from 256 places in the corpus
VALIDATION=${VALIDATION:-0.0001}                # share of documents held out: of 100BT about 11M tokens, as in the paper
MAX_REFUSED=${MAX_REFUSED:-0}                   # stop after more bad records than this
WORKERS=${WORKERS:-$(nproc)}

export OMP_NUM_THREADS=1
data=("$(dirname "$0")/run.sh" jreg_megatron.data)

if [[ -n $SOURCE ]]; then
    input=("$SOURCE")
else
    input=(--hub HuggingFaceFW/fineweb-edu --subset "sample-$SAMPLE")
fi
if [[ $TOKENIZER == mistral ]]; then
    package=$DATA/mistral-common
    TOKENIZER=$package/mistral_common/data/tokenizer.model.v1
    if [[ ! -f $TOKENIZER ]]; then
        "$(dirname "$0")/run.sh" pip install --quiet --upgrade --no-deps --target "$package" mistral-common==1.13.1
    fi
fi
if [[ $TOKENIZER == train ]]; then
    "${data[@]}" tokenizer "${input[@]}" --output "$DATA/tokenizer.model" \
        --vocab-size "$VOCABULARY" --sample-bytes "$SAMPLED"
elif [[ ! -f $TOKENIZER ]]; then
    echo "jreg_megatron: error: TOKENIZER is $TOKENIZER, which is not a file; correct the path" >&2
    exit 2
elif [[ ! -f $DATA/tokenizer.model ]]; then
    mkdir -p "$DATA"
    cp "$TOKENIZER" "$DATA/tokenizer.model"
elif ! cmp -s "$TOKENIZER" "$DATA/tokenizer.model"; then
    echo "jreg_megatron: error: TOKENIZER is $TOKENIZER, and $DATA/tokenizer.model is another one;" \
        "set TOKENIZER to that file, or DATA to another folder" >&2
    exit 2
fi
"${data[@]}" prepare "${input[@]}" --tokenizer-model "$DATA/tokenizer.model" \
    --output "$DATA/train" --validation-share "$VALIDATION" --validation-output "$DATA/validation" \
    --workers "$WORKERS" --max-refused "$MAX_REFUSED"
"${data[@]}" inspect --quick "$DATA/train_text_document" "$DATA/validation_text_document"
