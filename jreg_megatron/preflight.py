"""Look for the common mistakes in Megatron's arguments before any time is spent on them.

Megatron 0.19 finds most of them too, but by a bare assertion, after the start-up of every rank, or not at
all: without data it trains on made-up tokens, and a token id beyond the vocabulary is silently embedded
as zeros under tensor parallelism. Here each ends in one line that names the flag, the value and the fix.
The checks read arguments and local files only, so every rank comes to the same verdict on its own.
What they do not know, such as remote data and other model types, is left to Megatron.
"""

from __future__ import annotations

import json
import math
import os
import struct
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jreg_megatron.errors import UserError


def check_arguments(args: Namespace) -> None:
    """Check the arguments as ``megatron.training.arguments.parse_args`` returns them, not yet validated.

    Nothing is changed in ``args``. With ``--use-checkpoint-args``, ``--yaml-cfg`` or a configuration of
    heterogeneous layers nothing is checked, since what counts is then still to be read from elsewhere.

    Raises:
        UserError: for the first mistake found, in the order of :data:`CHECKS`.
    """
    if getattr(args, "yaml_cfg", None) is not None or args.use_checkpoint_args:
        return
    if args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json:
        return
    for check in CHECKS:
        check(args)


# Sizes that must be given


def _required_sizes(args: Namespace) -> None:
    required = ["hidden_size", "num_attention_heads", "max_position_embeddings", "micro_batch_size"]
    if args.encoder_num_layers is None and not _other_layer_plan(args):
        required.insert(0, "num_layers")
    if args.encoder_seq_length is None:
        required.append("seq_length")
    for name in required:
        value = getattr(args, name)
        if value is None:
            raise UserError(f"{_flag(name)} is missing; give it a whole number >= 1")
        if value < 1:
            raise UserError(f"{_flag(name)} is {value}; it must be >= 1")


def _parallel_sizes(args: Namespace) -> None:
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(args, name) < 1:
            raise UserError(f"{_flag(name)} is {getattr(args, name)}; it must be >= 1")


def _training_length(args: Namespace) -> None:
    if args.skip_train:
        return
    if args.train_iters is not None and args.train_samples is not None:
        raise UserError(
            f"--train-iters is {args.train_iters} and --train-samples is {args.train_samples}; give only one"
        )
    if args.train_iters is None and args.train_samples is None:
        raise UserError("--train-iters is missing; say how many iterations to train (or --train-samples)")
    for name in ("train_iters", "train_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{_flag(name)} is {value}; it must be >= 1")


def _learning_rate(args: Namespace) -> None:
    if args.skip_train:
        return
    if args.lr is None:
        raise UserError("--lr is missing; give the learning rate, for example --lr 3e-4")
    if not (math.isfinite(args.lr) and args.lr >= 0):
        raise UserError(f"--lr is {args.lr}; it must be a finite number >= 0")
    if not 0 <= args.min_lr <= args.lr:
        raise UserError(f"--min-lr is {args.min_lr}; it must be from 0 to --lr {args.lr}")


def _learning_rate_schedule(args: Namespace) -> None:
    if args.skip_train:
        return
    unit, other = ("iters", "samples") if args.train_iters is not None else ("samples", "iters")
    for name, unset in ((f"lr_decay_{other}", None), (f"lr_warmup_{other}", 0)):
        if getattr(args, name) != unset:
            raise UserError(
                f"{_flag(name)} is {getattr(args, name)}, but --train-{unit} counts in {unit}; "
                f"use {_flag(name.replace(other, unit))}"
            )
    warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}")
    length = getattr(args, f"train_{unit}") if decay is None else decay
    end = f"--train-{unit}" if decay is None else f"--lr-decay-{unit}"
    if args.lr_warmup_fraction is not None:
        if warmup:
            raise UserError(
                f"--lr-warmup-fraction is {args.lr_warmup_fraction} and --lr-warmup-{unit} is {warmup}; "
                "give only one"
            )
        if not 0 <= args.lr_warmup_fraction < 1:
            raise UserError(f"--lr-warmup-fraction is {args.lr_warmup_fraction}; it must be >= 0 and < 1")
    elif warmup >= length:
        raise UserError(f"--lr-warmup-{unit} is {warmup}; it must be below {end} {length}")


def _evaluation(args: Namespace) -> None:
    if args.skip_train or args.full_validation or args.perform_rl_step:
        return
    # Megatron divides by it even where nothing is evaluated.
    if not args.eval_interval or args.eval_interval < 0:
        found = "is missing" if args.eval_interval is None else f"is {args.eval_interval}"
        raise UserError(
            f"--eval-interval {found}; say every how many iterations to evaluate "
            "(with --eval-iters 0 nothing is evaluated)"
        )


def _saving(args: Namespace) -> None:
    if args.save is not None and (args.save_interval is None or args.save_interval < 1):
        found = "is missing" if args.save_interval is None else f"is {args.save_interval}"
        raise UserError(f"--save is {args.save}, but --save-interval {found}; give it in iterations, >= 1")


# How the model is divided


def _world_size(args: Namespace) -> None:
    tp, pp, cp = _tp(args), args.pipeline_model_parallel_size, args.context_parallel_size
    shards = args.tensor_parallel_num_weight_shards
    if shards is not None and (shards < tp or shards % tp):
        raise UserError(
            f"--tensor-parallel-num-weight-shards is {shards}; it must be a multiple of "
            f"--tensor-model-parallel-size {tp}"
        )
    size = tp * pp * cp * _weight_replicas(args)
    if args.world_size % size:
        extra = f" x {_weight_replicas(args)} weight shards" if _weight_replicas(args) > 1 else ""
        raise UserError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x "
            f"--context-parallel-size {cp}{extra} is {size}, which does not divide the {args.world_size} "
            f"started processes (WORLD_SIZE); start a multiple of {size} or lower one of them"
        )


def _heads(args: Namespace) -> None:
    hidden, heads, tp = args.hidden_size, args.num_attention_heads, _tp(args)
    if args.kv_channels is None and hidden % heads:
        raise UserError(
            f"--hidden-size {hidden} is not divisible by --num-attention-heads {heads}; "
            "change one of them or give --kv-channels"
        )
    if heads % tp:
        raise UserError(
            f"--num-attention-heads {heads} is not divisible by --tensor-model-parallel-size {tp}; "
            "change one of them"
        )
    groups = args.num_query_groups
    if args.group_query_attention and not args.multi_latent_attention:
        if groups < 1 or heads % groups:
            raise UserError(f"--num-query-groups is {groups}; it must divide --num-attention-heads {heads}")
        if groups % tp and tp % groups:
            raise UserError(
                f"--num-query-groups is {groups}; it must be a multiple or a divisor of "
                f"--tensor-model-parallel-size {tp}"
            )


def _feed_forward(args: Namespace) -> None:
    if args.ffn_hidden_size is not None and args.ffn_hidden_size % _tp(args):
        raise UserError(
            f"--ffn-hidden-size {args.ffn_hidden_size} is not divisible by "
            f"--tensor-model-parallel-size {_tp(args)}; change one of them"
        )


def _pipeline_options(args: Namespace) -> None:
    """Options that Megatron does not take together."""
    if _other_layer_plan(args):
        return
    ways = _given(
        args,
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
    )
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} exclude each other; give only one")
    uneven = _given(args, "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    counted = [
        _flag(name)
        for name in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
        if getattr(args, name)
    ]
    layout = _given(args, "pipeline_model_parallel_layout")
    for one, others in ((layout, uneven + counted), (uneven, counted)):
        if one and others:
            raise UserError(f"{one[0]} and {others[0]} exclude each other; drop one")
    if uneven and args.num_layers_per_virtual_pipeline_stage is not None:
        raise UserError(
            f"{uneven[0]} and --num-layers-per-virtual-pipeline-stage "
            f"{args.num_layers_per_virtual_pipeline_stage} exclude each other; give "
            "--num-virtual-stages-per-pipeline-rank instead"
        )


def _pipeline_layout(args: Namespace) -> None:
    layout, stages = args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size
    # A layout given from Python as a list is left to Megatron.
    if not isinstance(layout, str) or _other_layer_plan(args):
        return
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    name = "--pipeline-model-parallel-layout"
    try:
        rows = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError as error:
        raise UserError(f"{name} is {layout}; {_one_line(error)}") from error
    if len(rows) % stages:
        raise UserError(
            f"{name} {layout} has {len(rows)} stages; it must be a multiple of "
            f"--pipeline-model-parallel-size {stages}"
        )
    layers = sum(row.count(LayerType.decoder) for row in rows)
    if layers != _layers(args):
        raise UserError(f"{name} {layout} places {layers} layers (t), but --num-layers is {_layers(args)}")
    flat = [layer for row in rows for layer in row]
    if flat.count(LayerType.embedding) != 1 or flat[0] != LayerType.embedding:
        raise UserError(f"{name} is {layout}; it must begin with the only E (embedding)")
    if flat.count(LayerType.loss) != 1 or flat[-1] != LayerType.loss:
        raise UserError(f"{name} is {layout}; it must end with the only L (loss)")


def _uneven_pipeline(args: Namespace) -> None:
    """Layers left for the middle stages, where the first or the last stage has its own number."""
    ends = {
        name: getattr(args, name)
        for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        if getattr(args, name) is not None
    }
    if not ends or _other_layer_plan(args):
        return
    stages, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank or 1
    for name, number in ends.items():
        if number < 1 or number % virtual:
            multiple = f" and a multiple of {virtual} virtual stages" if virtual > 1 else ""
            raise UserError(f"{_flag(name)} is {number}; it must be >= 1{multiple}")
    middle, middle_stages = _layers(args) - sum(ends.values()), stages - len(ends)
    given = " and ".join(f"{_flag(name)} {number}" for name, number in ends.items())
    fits = middle == 0 if middle_stages == 0 else middle > 0 and middle % (middle_stages * virtual) == 0
    if not fits or middle_stages < 0:
        among = f"{max(middle_stages, 0)} middle stages" + (
            f" of {virtual} virtual stages" if virtual > 1 else ""
        )
        raise UserError(
            f"--num-layers {_layers(args)} with {given} leaves {middle} layers for {among} "
            f"(--pipeline-model-parallel-size {stages}); choose numbers that leave each as many"
        )


def _even_pipeline(args: Namespace) -> None:
    if _other_layer_plan(args) or _given(
        args,
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
    ):
        return
    stages = args.pipeline_model_parallel_size
    counted = [
        word for word in ("embedding", "loss") if getattr(args, f"account_for_{word}_in_pipeline_split")
    ]
    total = _layers(args) + len(counted)
    what = " plus ".join([f"--num-layers {_layers(args)}", *counted])
    if total % stages:
        raise UserError(
            f"{what} is not divisible by --pipeline-model-parallel-size {stages}; change one of them or give "
            "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers"
        )
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        number = getattr(args, name)
        if number is not None and (number < 1 or (total // stages) % number):
            raise UserError(
                f"{_flag(name)} is {number}; it must divide the {total // stages} layers of a pipeline stage "
                f"({what}, --pipeline-model-parallel-size {stages})"
            )


def _interleaving(args: Namespace) -> None:
    stages = args.pipeline_model_parallel_size
    if _other_layer_plan(args) or _virtual_stages(args) == 1:
        return
    least = 2 if args.overlap_p2p_comm else 3
    if stages < least:
        raise UserError(
            f"--pipeline-model-parallel-size is {stages}; with {_virtual_stages(args)} virtual stages each "
            f"it must be >= {least}"
        )


def _sequence_length(args: Namespace) -> None:
    length = args.seq_length if args.seq_length is not None else args.encoder_seq_length
    cp, tp = args.context_parallel_size, _tp(args)
    multiple, why = 1, []
    if cp > 1:
        multiple, why = 2 * cp, [f"2 x --context-parallel-size {cp}"]
    if args.sequence_parallel and tp > 1:
        multiple = math.lcm(multiple, cp * tp)
        why.append(f"--sequence-parallel over --tensor-model-parallel-size {tp}")
    if length % multiple:
        raise UserError(f"--seq-length is {length}; it must be a multiple of {multiple} ({', '.join(why)})")
    if args.max_position_embeddings < length:
        raise UserError(
            f"--max-position-embeddings is {args.max_position_embeddings}; "
            f"it must be >= --seq-length {length}"
        )


def _batch_sizes(args: Namespace) -> None:
    micro = args.micro_batch_size
    replicas = args.world_size // (_tp(args) * args.pipeline_model_parallel_size * args.context_parallel_size)
    if args.step_batch_size_schedule is not None:
        if args.global_batch_size is not None:
            raise UserError(
                f"--step-batch-size-schedule is {args.step_batch_size_schedule} and --global-batch-size is "
                f"{args.global_batch_size}; give only one"
            )
        return
    total = args.global_batch_size if args.global_batch_size is not None else micro * replicas
    step = micro * replicas
    named = f"--micro-batch-size {micro} x {replicas} data-parallel replicas = {step}"
    # With --decrease-batch-size-if-needed a remainder is allowed, but not less than one micro-batch each.
    if total < step or (total % step and not args.decrease_batch_size_if_needed):
        raise UserError(f"--global-batch-size is {total}; it must be a multiple of {named}")
    eval_micro, eval_total = args.eval_micro_batch_size or micro, args.eval_global_batch_size or total
    eval_replicas = replicas // _weight_replicas(args)
    if eval_total % (eval_micro * eval_replicas):
        raise UserError(
            f"--eval-global-batch-size is {eval_total}; it must be a multiple of --eval-micro-batch-size "
            f"{eval_micro} x {eval_replicas} data-parallel replicas = {eval_micro * eval_replicas}"
        )


# Data

_SPLITS = ("train", "valid", "test")
_SPLIT_FLAGS = ("train_data_path", "valid_data_path", "test_data_path")


def _data_source(args: Namespace) -> None:
    if args.perform_rl_step:
        return
    sources = _given(args, "data_path", "data_args_path")
    sources += _given(args, *_SPLIT_FLAGS)[:1] + _given(args, "per_split_data_args_path")
    sources += ["--mock-data"] if args.mock_data else []
    if not sources:
        raise UserError(
            "--data-path is missing; give the prefix of .bin/.idx files (or --train-data-path, "
            "--valid-data-path), or --mock-data for made-up tokens"
        )
    if len(sources) > 1:
        raise UserError(f"{sources[0]} and {sources[1]} exclude each other; give one source of data")
    if sources[0] == "--data-args-path" and args.split is None:
        raise UserError("--split is missing; --data-args-path needs it, for example --split 99,1,0")
    split_by_file = sources[0] not in ("--data-path", "--data-args-path", "--mock-data")
    if split_by_file and args.split is not None:
        raise UserError(f"--split is {args.split}, but {sources[0]} gives the splits by file; drop --split")
    if any(_given(args, *_SPLIT_FLAGS)) and args.train_data_path is None and not args.skip_train:
        raise UserError(f"--train-data-path is missing beside {sources[0]}; add it")


def _data_files(args: Namespace) -> None:
    for flag, prefix in _local_prefixes(args):
        _read_index(flag, prefix)


def _local_prefixes(args: Namespace) -> Iterator[tuple[str, str]]:
    """Each local dataset with the flag that names it, without the weights, each dataset once."""
    # Fine-tuning data are JSON lines, mock data have no files.
    if args.mock_data or args.sft:
        return
    seen = set()
    for flag, entries in _blends(args):
        for prefix in _without_weights(flag, entries):
            if "://" not in prefix and prefix not in seen:
                seen.add(prefix)
                yield flag, prefix


def _blends(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    for name in ("data_path", *_SPLIT_FLAGS):
        if getattr(args, name) is not None:
            yield _flag(name), getattr(args, name)
    if args.data_args_path is not None and "://" not in args.data_args_path:
        flag = f"--data-args-path {args.data_args_path}"
        yield flag, _read_text(flag, args.data_args_path).split()
    if args.per_split_data_args_path is not None and "://" not in args.per_split_data_args_path:
        flag = f"--per-split-data-args-path {args.per_split_data_args_path}"
        try:
            splits = json.loads(_read_text(flag, args.per_split_data_args_path))
        except ValueError as error:
            raise UserError(f"{flag} is not JSON ({_one_line(error)}); correct the file") from error
        missing = [split for split in _SPLITS if not isinstance(splits, dict) or split not in splits]
        if missing:
            raise UserError(f"{flag} has no key {missing[0]}; it must have train, valid and test")
        for split in _SPLITS:
            entries = splits[split].split() if isinstance(splits[split], str) else splits[split]
            if entries is not None:
                yield f"{flag} ({split})", [str(entry) for entry in entries]


def _without_weights(flag: str, entries: list[str]) -> list[str]:
    """The prefixes of a blend: all entries, or every second one behind its weight."""
    if not entries:
        raise UserError(f"{flag} is empty; name the prefix of .bin/.idx files behind it")
    if len(entries) % 2 == 0:
        weights = [_is_number(entry) for entry in entries[::2]]
        if all(weights):
            return [entry.strip() for entry in entries[1::2]]
        if any(weights):
            raise UserError(
                f"{flag} is {' '.join(entries)}; give a weight before every prefix or before none"
            )
    return [entry.strip() for entry in entries]


@dataclass(frozen=True)
class _Index:
    """What an ``.idx`` file says of its ``.bin``: the NumPy type of a token and the number of tokens."""

    dtype: str
    tokens: int


# Megatron's codes for the type of a token, in its .idx format of version 1.
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"


def _read_index(flag: str, prefix: str) -> _Index:
    """Read the header and the end of ``prefix.idx`` and hold the size of ``prefix.bin`` against it.

    Megatron's own reader would do, but it fails by assertion or past the end of a file that was cut short.
    """
    import numpy

    for ending in (".idx", ".bin"):
        if not os.path.isfile(prefix + ending):
            raise UserError(
                f"{flag} names {prefix}, but {prefix}{ending} is not a file; {_prefix_hint(prefix)}"
            )
    try:
        with open(f"{prefix}.idx", "rb") as stream:
            header = stream.read(_HEADER.size)
        size, bin_size = os.path.getsize(f"{prefix}.idx"), os.path.getsize(f"{prefix}.bin")
        with open(f"{prefix}.bin", "rb"):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} names {prefix}, which cannot be read ({error.strerror}); fix its access"
        ) from error
    if header[:9] != _MAGIC:
        raise UserError(
            f"{flag} names {prefix}, but {prefix}.idx is not a Megatron index; make the data again"
        )
    if len(header) < _HEADER.size:
        raise UserError(f"{flag} names {prefix}, but {prefix}.idx is cut short; make the data again")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{flag} names {prefix}, but {prefix}.idx has version {version} and token type {code}, "
            "which Megatron does not read; make the data again"
        )
    # Per sequence a length (int32) and a position (int64), per document a sequence number (int64).
    if size < _HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"{flag} names {prefix}, but {prefix}.idx is cut short; make the data again")
    if sequences == 0:
        raise UserError(f"{flag} names {prefix}, which holds no text; make the data again from a filled file")
    with open(f"{prefix}.idx", "rb") as stream:
        stream.seek(_HEADER.size + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (position,) = struct.unpack("<q", stream.read(8))
    item = numpy.dtype(_DTYPES[code]).itemsize
    end = position + length * item
    if bin_size < end:
        raise UserError(
            f"{flag} names {prefix}, but {prefix}.bin is cut short: {bin_size} bytes of the {end} that "
            f"{prefix}.idx lists; copy or make it again"
        )
    return _Index(dtype=_DTYPES[code], tokens=end // item)


def _prefix_hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"leave {prefix[-4:]} out"
    if _is_number(prefix):
        return "give a weight before every prefix or before none"
    return "correct the prefix (the path without .bin/.idx)"


# Vocabulary

_SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_NULL_TYPES = ("NullTokenizer", "NullMultimodalTokenizer")
_TIKTOKEN_DEFAULT_VOCAB = 2**17


def _tokenizer(args: Namespace) -> None:
    if args.tokenizer_type is None:
        raise UserError(
            "--tokenizer-type is missing; for example SentencePieceTokenizer with --tokenizer-model"
        )
    if args.tokenizer_type in _NULL_TYPES and not args.vocab_size:
        raise UserError(f"--vocab-size is missing; --tokenizer-type {args.tokenizer_type} needs it")
    if args.tokenizer_type in (*_SENTENCEPIECE_TYPES, "TikTokenizer", "HuggingFaceTokenizer", "SFTTokenizer"):
        if args.tokenizer_model is None:
            raise UserError(f"--tokenizer-model is missing; --tokenizer-type {args.tokenizer_type} needs it")
        # For the other two types it may also be the name of a model on the hub.
        must_be_file = args.tokenizer_type in (*_SENTENCEPIECE_TYPES, "TikTokenizer")
        if must_be_file and not os.path.isfile(args.tokenizer_model):
            raise UserError(
                f"--tokenizer-model is {args.tokenizer_model}, which is not a file; correct the path"
            )
    for name in ("vocab_file", "merge_file", "metadata_path"):
        path = getattr(args, name)
        if path is not None and not os.path.isfile(path):
            flag = "--tokenizer-metadata" if name == "metadata_path" else _flag(name)
            raise UserError(f"{flag} is {path}, which is not a file; correct the path")


def _vocabulary_sizes(args: Namespace) -> None:
    for name in ("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{_flag(name)} is {value}; it must be >= 1")
    if args.padded_vocab_size is not None and args.padded_vocab_size % _tp(args):
        raise UserError(
            f"--padded-vocab-size {args.padded_vocab_size} is not divisible by "
            f"--tensor-model-parallel-size {_tp(args)}; round it up"
        )
    if args.padded_vocab_size is None and not args.pad_vocab_size and args.vocab_size is None:
        raise UserError("--vocab-size is missing; --no-pad-vocab-size needs it (or --padded-vocab-size)")
    size = _exact_tokenizer_size(args)
    for name in ("vocab_size", "padded_vocab_size"):
        value = getattr(args, name)
        if size is not None and value is not None and value < size:
            raise UserError(
                f"{_flag(name)} is {value}, but the tokenizer has {size} tokens; "
                f"leave it out or give >= {size}"
            )


def _token_ids(args: Namespace) -> None:
    vocabulary = _model_vocabulary(args)
    if vocabulary is None:
        return
    prefixes = list(_local_prefixes(args))
    for flag, prefix in prefixes:
        index = _read_index(flag, prefix)
        if index.dtype.startswith("float"):
            continue
        least, most = _extreme_ids(prefix, index, windows=max(8, min(64, 1024 // len(prefixes))))
        if least < 0 or most >= vocabulary:
            raise UserError(
                f"{flag} names {prefix}, which holds the token id {most if least >= 0 else least}, but the "
                f"model's vocabulary is {vocabulary} (ids 0 to {vocabulary - 1}); give the tokenizer "
                "that made the data or a larger --padded-vocab-size"
            )


def _extreme_ids(prefix: str, index: _Index, windows: int, width: int = 1 << 14) -> tuple[int, int]:
    """Least and greatest token id in up to ``windows`` evenly spaced pieces of ``width`` tokens.

    All tokens are read if the pieces cover them; the first and the last token always are.
    """
    import numpy

    tokens = numpy.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r", shape=(index.tokens,))
    if index.tokens <= windows * width:
        starts, width = [0], index.tokens
    else:
        starts = [piece * (index.tokens - width) // (windows - 1) for piece in range(windows)]
    pieces = [tokens[start : start + width] for start in starts]
    return min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)


def _model_vocabulary(args: Namespace) -> int | None:
    """Rows of the embedding as Megatron derives them, or None where that is not known here."""
    if args.padded_vocab_size is not None:
        return int(args.padded_vocab_size)
    size = args.vocab_size
    if args.pad_vocab_size:
        size = _exact_tokenizer_size(args) or _hugging_face_size(args)
    if size is None:
        return None
    multiple = args.make_vocab_size_divisible_by * _tp(args)
    return int(math.ceil(size / multiple) * multiple)


def _exact_tokenizer_size(args: Namespace) -> int | None:
    """Number of tokens that Megatron's tokenizer will report, for the types where it is cheap to know."""
    if args.metadata_path is not None:
        return None  # it may name another tokenizer class
    if args.tokenizer_type in _NULL_TYPES:
        return int(args.vocab_size)
    if args.tokenizer_type == "TikTokenizer":
        return int(args.vocab_size or _TIKTOKEN_DEFAULT_VOCAB)
    if args.tokenizer_type not in _SENTENCEPIECE_TYPES:
        return None
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(args.tokenizer_model)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--tokenizer-model is {args.tokenizer_model}, which is not a SentencePiece model; "
            "correct the path"
        ) from error
    added = args.special_tokens if args.tokenizer_sentencepiece_legacy and args.special_tokens else []
    return int(model.get_piece_size()) + len({t for t in added if model.piece_to_id(t) == model.unk_id()})


def _hugging_face_size(args: Namespace) -> int | None:
    """Upper bound on the size of a Hugging Face tokenizer that lies in a local folder."""
    path = os.path.join(args.tokenizer_model or "", "tokenizer.json")
    if args.tokenizer_type != "HuggingFaceTokenizer" or args.metadata_path is not None:
        return None
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in content.get("added_tokens") or []]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return max([*ids, *added], default=-1) + 1 + len(args.special_tokens or [])


# Small helpers


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(args: Namespace, *names: str) -> list[str]:
    return [_flag(name) for name in names if getattr(args, name) is not None]


def _tp(args: Namespace) -> int:
    return int(args.tensor_model_parallel_size)


def _weight_replicas(args: Namespace) -> int:
    """Ranks that share one tensor-parallel slice of the weights; 1 without weight shards."""
    return int(args.tensor_parallel_num_weight_shards or _tp(args)) // _tp(args)


def _layers(args: Namespace) -> int:
    return int(args.num_layers if args.num_layers is not None else args.encoder_num_layers)


def _virtual_stages(args: Namespace) -> int:
    stages = int(args.pipeline_model_parallel_size)
    if isinstance(args.pipeline_model_parallel_layout, str):
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        return (
            int(PipelineParallelLayerLayout.get_num_stages_from_str(args.pipeline_model_parallel_layout))
            // stages
        )
    if args.num_layers_per_virtual_pipeline_stage is not None:
        counted = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        return (_layers(args) + int(counted)) // stages // int(args.num_layers_per_virtual_pipeline_stage)
    return int(args.num_virtual_stages_per_pipeline_rank or 1)


def _other_layer_plan(args: Namespace) -> bool:
    """Whether the layers come from a pattern, which only Megatron knows how to count."""
    return bool(_given(args, "hybrid_layer_pattern", "hybrid_override_pattern"))


def _read_text(flag: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} cannot be read ({_one_line(error)}); correct the path") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())


CHECKS: tuple[Callable[[Namespace], None], ...] = (
    _required_sizes,
    _parallel_sizes,
    _training_length,
    _learning_rate,
    _learning_rate_schedule,
    _evaluation,
    _saving,
    _world_size,
    _heads,
    _feed_forward,
    _pipeline_options,
    _pipeline_layout,
    _uneven_pipeline,
    _even_pipeline,
    _interleaving,
    _sequence_length,
    _batch_sizes,
    _data_source,
    _tokenizer,
    _vocabulary_sizes,
    _data_files,
    _token_ids,
)
"""The checks in their order: cheap before dear, and each may rely on those before it."""
