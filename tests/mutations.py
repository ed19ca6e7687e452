"""Do the tests bite? Each small fault below is put into a copy of the package, and a test must fail.

``make mutations`` prints, for every fault, the first test that caught it; its status is 1 if one went
through. The faults are those that users of auxiliary losses in Megatron have met, and their like.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent


def only(file: str, *names: str) -> tuple[str, ...]:
    """These tests of a file."""
    return tuple(f"tests/{file}.py::test_{name}" for name in names)


TESTS = ("tests/test_penalty.py", "tests/test_attach.py", "tests/test_equivalence.py")
BRIDGE = ("tests/test_bridge.py",)
LORA = ("tests/test_lora.py",)
PADDING = ("tests/test_equivalence.py", "-k", "padding")
LOOP = ("tests/test_launch.py", "tests/test_pretrain.py")
CUT_INTERVALS = only(
    "test_pretrain",
    "a_run_that_exits_or_ends_within_a_log_interval_logs_its_part_and_names_the_iterations",
    "sigterm_within_a_log_interval_logs_the_iterations_that_were_measured_in_it",
    "measurements_are_logged_if_a_rerun_ends_training_or_its_last_iterations_are_skipped",
)
CHANGED = ("tests/test_megatron_checkpoint.py", "-k", "that_a_method_changed_give")
LINE = only(
    "test_launch", "a_jump_rate_of_zero_or_none_is_in_the_line_of_every_megatron_after_its_own_losses"
)
APEX = ("tests/test_recipes.py::test_a_recipe_does_without_apex_where_there_is_none_and_says_so",)
CPU = ("tests/test_cpu_mode.py",)
FULL_GRAPH = ("tests/test_cuda_graphs.py", "-k", "(replayed_iteration and PP2) or (ten_steps and iteration)")
LOCAL_GRAPHS = ("tests/test_cuda_graphs.py", "-k", "replayed_graphs and local and rank and not HybridModel")
GRAPHS_OF_HYBRIDS = ("tests/test_cuda_graphs.py", "-k", "replayed_graphs and HybridModel and not local")
ASK = "changes = known_changes(arguments, str(checkpoint.folder))"
DROPPED = ("tests/test_attach.py", "tests/test_cuda_graphs.py", "-k", "is_dropped")
RERUNS = ("tests/test_cuda_graphs.py", "-k", "runs_again")
OVERLAP = ("tests/test_overlap.py", "-k", "overlapped_step_equals")
BENCH = ("tests/test_bench.py", "-k", "seconds or fp16 or waits or scatter")
BENCH_KERNEL = ("tests/test_bench_kernel.py",)
KERNELS = ("tests/test_kernels.py",)
PREPARED = ("tests/test_compiled_kernels.py", "-k", "prepared")
PENALTY = ("tests/test_penalty.py",)
MEASURE = ("tests/test_measure.py", "tests/test_decoder.py")
STRUCTURE = ("tests/test_structure.py",)
DEPTH = ("tests/test_depth.py", "-k", "(loops_on_its or use_of_layers) and llama")
DEPTH_TRAINING = ("tests/test_depth.py", "-k", "attenuation")
DEPTH_REFUSED = ("tests/test_depth.py", "-k", "layout_cannot")
DROWNED = only(
    "test_structure",
    "logits_that_are_masked_or_large_do_not_switch_a_check_off",
    "a_token_that_gives_nan_neither_switches_a_check_off_nor_makes_it_fail",
)
FORMS = only(
    "test_structure",
    "a_state_that_is_scaled_between_layers_keeps_its_angles_and_is_noted",
    "a_norm_among_the_layers_is_not_taken_for_one_of_them",
    "a_branch_whose_sum_is_kept_in_a_dict_is_refused",
    "a_model_of_another_form_is_measured_too",
    "a_short_context_and_a_scale_by_a_word_are_read_out",
)
OWN = only(
    "test_structure",
    "a_model_whose_states_depend_on_something_else_is_refused_in_one_line",
    "a_look_ahead_within_blocks_is_seen",
)
STATES = only(
    "test_structure",
    "a_norm_that_other_heads_share_is_the_final_one_on_the_last_layers_output",
    "layers_that_write_to_their_input_are_measured_and_left_out_by_what_they_were_given",
    "a_state_that_is_written_to_between_layers_is_refused",
    "a_layer_that_runs_otherwise_on_a_long_text_is_one_line",
    "a_layer_that_returns_a_named_tuple_can_be_left_out",
)
REPORT = ("tests/test_report.py",)
REPORT_JOINS = ("tests/test_report_joins.py", "-k", "figure_of_depth")
EVALUATE = ("tests/test_evaluate.py",)
PAPER = ("tests/test_paper.py",)
PAPER_TASKS = (
    "tests/test_evaluate_tasks.py::test_the_papers_nine_are_tasks_of_the_harness_zero_shot_by_its_own_metrics",
    "tests/test_evaluate_command.py::test_the_papers_nine_tasks_have_their_mean_and_that_without_boolq",
    "tests/test_evaluate_command.py::test_fewer_than_the_nine_tasks_have_no_mean_and_the_missing_ones_are_named",
)
SEEDS = ("tests/test_evaluate_seeds.py",)
REPORT_PAPER = ("tests/test_report_paper.py",)
CONVERT = ("tests/test_convert.py",)
FIRST_STEP = ("tests/test_first_step.py",)
ANATOMY = ("tests/test_residual_stream.py",)
HYBRID = ("tests/test_hybrid.py",)
EXPORT = only(
    "test_convert",
    "rows_of_padding_are_left_out_without_a_tokenizer_or_the_report_says_that_they_may_be_there",
    "arguments_by_older_names_are_exported",
    "features_that_a_llama_cannot_express_are_refused_by_name_with_a_tool_that_can_export_them",
)
TOLD = only(
    "test_megatron_checkpoint",
    "the_vocabulary_is_read_from_the_checkpoint_or_is_unknown",
    "the_vocabulary_is_the_tokenizers_if_its_padded_size_is_the_number_of_rows",
)
CHECKPOINT = only(
    "test_megatron_checkpoint",
    "hybrid_models_of_pairs_give_the_numbers_of_megatrons_own_hybrid_model",
    "a_model_that_cannot_be_run_is_refused_by_name",
    "a_model_whose_training_took_sub_layers_for_layers_is_not_measured_by_others",
    "checkpoints_of_other_megatrons_give_their_numbers_or_a_note",
    "the_vocabulary_is_read_from_the_checkpoint_or_is_unknown",
    "special_tokens_are_those_of_the_megatron_that_saved",
    "samples_that_the_decoder_would_see_otherwise_are_no_last_validation",
)
"""Those of the file that need no training."""
VARIANTS = ("tests/test_variants.py",)
PREFLIGHT = ("tests/test_preflight.py",)
INITIAL = ("tests/test_initialization.py",)
CLAIMS = ("tests/test_claims.py",)
COMPARE = ("tests/test_compare.py",)
METHODS = ("tests/test_methods.py",)
SFT = ("tests/test_sft.py",)
HELPER = ("tests/test_dataset_helper.py",)
GATHER = "tests/test_cpu_mode.py::test_an_all_gather_of_any_sizes_gives_the_plain_concatenation"
REFUSALS = "tests/test_pretrain.py::test_a_refusal_of_megatron_becomes_one_line_and_another_error_stays"
NO_PACKAGE = "test_an_optimizer_whose_package_is_missing_is_refused_and_in_a_dry_run_named"


@dataclass(frozen=True)
class Fault:
    """A change to one file of the package: each text must stand there once."""

    name: str
    changes: tuple[tuple[str, str], ...]
    tests: Sequence[str] = TESTS
    file: str = ""

    def put_into(self, text: str) -> str:
        """The file's text with the fault."""
        for old, new in self.changes:
            assert text.count(old) == 1, f"{self.name}: {self.file} holds {text.count(old)} times {old!r}"
            text = text.replace(old, new)
        return text


FACTOR = "1.0 / (state.shape[0] * state.shape[1] * self._size)"

_BY_FILE = {
    "bench/counting.py": [
        Fault(
            "count the work of two streams twice",
            (("covered += max(0, end - max(start, until))", "covered += end - start"),),
            BENCH,
        ),
    ],
    "bench/kernel.py": [
        Fault(
            "time the host's launches for the device's work",
            (("            if not has_begun:", "            if True:"),),
            BENCH_KERNEL,
        ),
    ],
    "bench/megatron.py": [
        Fault(
            "measure steps that fp16's loss scale skips",
            (("        is_set_up = not result[1]", "        is_set_up = True"),),
            BENCH,
        ),
    ],
    "bench/step.py": [
        Fault(
            "end a benchmark when its time is up, whatever has been seen",
            (("args.rounds, FEWEST_ROUNDS, is_over", "args.rounds, 1, is_over"),),
            BENCH,
        ),
        Fault(
            "take a benchmark's steps for sharp before they are",
            (("math.inf if limits is None else (limits[1] - limits[0]) / 2", "0.0"),),
            BENCH,
        ),
    ],
    "bridge.py": [
        Fault(
            "take a part of Bridge's configuration for all",
            (('next((value for value in values if value and value != "none"), values[0])', "values[0]"),),
            BRIDGE,
        ),
        Fault(
            "look for nothing in what Bridge gives its wrappers of the model",
            (('("model", "ddp", "dist", ', '("model", '),),
            (*BRIDGE, "-k", "refused_before"),
        ),
        Fault(
            "log nothing of a log interval that an exit of Bridge cuts off",
            (("bool(exit_interval and iteration % exit_interval == 0)", "False"),),
            BRIDGE,
        ),
        Fault(
            "log nothing of a log interval that the end of Bridge's training cuts off",
            (("metrics = self.handle.end_training()", "metrics = None"),),
            BRIDGE,
        ),
        Fault(
            "call an iteration of Bridge by the number of the one before",
            (("train_state.step) + 1", "train_state.step)"),),
            BRIDGE,
        ),
        Fault(
            "let Bridge train another model than the one with JREG",
            (("if [unwrap(chunk) for chunk in context.model] != self._chunks:", "if False:"),),
            BRIDGE,
        ),
        Fault(
            "let Bridge train where its events do not come",
            (
                (
                    "            raise UserError(_NOT_ATTACHED)\n        return int",
                    "            return 1\n        return int",
                ),
            ),
            BRIDGE,
        ),
    ],
    "claims/evidence.py": [
        Fault(
            "lay batches on unequal tokens beside each other",
            (("(seed, None) and _is_near(run.tokens, base.tokens)", "(seed, None)"),),
            CLAIMS,
        ),
        Fault(
            "pair runs of different length",
            (("        if first.steps != run.steps:", "        if False:"),),
            CLAIMS,
        ),
        Fault(
            "judge a JREG that was switched off as the paper's",
            (
                (
                    "for name in _THE_PAPERS if run.coeff > 0 else ():",
                    "for name in ():",
                ),
            ),
            CLAIMS,
        ),
    ],
    "claims/experiment.py": [
        Fault(
            "take half an evaluation for a whole one",
            (('        part = file.with_name(f".{file.name}")', "        part = file"),),
            CLAIMS,
        ),
    ],
    "claims/rules.py": [
        Fault(
            "take an interval's wrong end for the verdict",
            (("found.low > self.bar, found.high < self.bar", "found.high > self.bar, found.low < self.bar"),),
            CLAIMS,
        ),
        Fault(
            "let a claim agree with one question",
            (('return "cannot tell" if "cannot tell" in verdicts else "agrees"', 'return "agrees"'),),
            CLAIMS,
        ),
    ],
    "compare/rules.py": [
        Fault(
            "compare a way with a toy of another seed",
            (("(toy, bases[seed]) for seed, toy", "(toy, next(iter(bases.values()))) for seed, toy"),),
            COMPARE,
        ),
    ],
    "convert/export.py": [
        Fault(
            "leave the factor of LayerNorm scaling out of an export",
            (("weights = scaling.into_norms(weights)", "pass"),),
            CHANGED,
        ),
        Fault(
            "say that Megatron-Bridge exports a model that a method has changed",
            (("is_changed=scaling is not None", "is_changed=False"),),
            CHANGED,
        ),
        Fault(
            "export rows of padding where no tokenizer is wanted",
            (("rows, tokenizer or TrainingTokenizer.of(arguments)", "rows, tokenizer"),),
            EXPORT,
        ),
        Fault(
            "export rows that may be padding without a word",
            (("if not (told or options.vocab_size):", "if False:"),),
            EXPORT,
        ),
        Fault(
            "take a vocabulary that is not the checkpoint's",
            (("(0 < asked <= rows and asked == (told or asked))", "(0 < asked)"),),
            EXPORT,
        ),
        Fault(
            "export with a tokenizer of another size",
            (("if not (fits and size <= rows):", "if False:"),),
            EXPORT,
        ),
    ],
    "convert/llama.py": [
        Fault(
            "swap gate and up projection",
            (
                (
                    '_SEPARATE_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")',
                    '_SEPARATE_GATE_UP = ("mlp.up_proj", "mlp.gate_proj")',
                ),
            ),
            CONVERT,
        ),
        Fault(
            "take the norm of keys for that of queries",
            (
                ('("self_attn.q_norm",)', '("self_attn.norm",)'),
                ('("self_attn.k_norm",)', '("self_attn.q_norm",)'),
                ('("self_attn.norm",)', '("self_attn.k_norm",)'),
            ),
            CONVERT,
        ),
        Fault(
            "refuse an export without naming a tool",
            (("bridge_as(example) if example and not is_changed else AS_IT_IS", "AS_IT_IS"),),
            EXPORT,
        ),
        Fault(
            "take Megatron's numbers for those that a Llama's config leaves out",
            (("given = rope.get(name)\n", "given = rope.get(name, value)\n"),),
            ("tests/test_convert.py::test_features_that_megatron_cannot_express_are_refused_by_name",),
        ),
    ],
    "cpu/megatron.py": [
        Fault(
            "exchange tokens by numbers that are tensors",
            (
                (
                    "        tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor\n",
                    "tensor\n",
                ),
            ),
            VARIANTS,
        ),
        Fault(
            "recompute norms as if for FP8",
            (("begin(self, fp8 or None)", "begin(self, fp8 or False)"),),
            VARIANTS,
        ),
    ],
    "cpu/redirect.py": [
        Fault("free what is still being sent", (("send(tensor.detach(), ", "send(tensor, "),), CPU),
        Fault(
            "gather pieces of one size only, as gloo does",
            (("if own < 0 or len({piece.shape for piece in tensor_list}) == 1:", "if True:"),),
            (GATHER,),
        ),
        Fault(
            "wait for the last of a gather's pieces only",
            (("        for work in works:\n", "        for work in works[-1:]:\n"),),
            (GATHER,),
        ),
        Fault(
            "give a CUDA device's number to the CPU",
            (("if type(device) is int:", "if False:"),),
            ("tests/test_equivalence.py", "-k", "optim_grads and not params"),
        ),
    ],
    "data/prepare.py": [
        Fault(
            "trust what a killed run has left of a piece",
            ((" and sha256_of(file) == value", ""),),
            ("tests/test_data_kill.py::test_damaged_leftovers_of_a_killed_run_are_not_trusted",),
        ),
        Fault(
            "take the place of files that the command has not made",
            (("if name not in known and os.path.lexists(file):", "if False:"),),
            ("tests/test_data_kill.py::test_files_of_other_programs_are_not_overwritten",),
        ),
    ],
    "data/tokenizing.py": [
        Fault(
            "forget the token that an older NullTokenizer adds",
            (("return int(size) + adds_end", "return int(size)"),),
            (*CHECKPOINT, "tests/test_preflight.py::test_token_beyond_the_vocabulary"),
        ),
        Fault(
            "count a tokenizer's tokens for its ids",
            (("max(int(built.vocab_size), 1 + max(ids, default=-1))", "int(built.vocab_size)"),),
            ("tests/test_convert.py::test_every_id_is_below_the_vocabulary_of_a_tokenizer_with_gaps",),
        ),
    ],
    "decoder/checkpoint/arguments.py": [
        Fault(
            "run a model that a method of a user's own has changed",
            (("if type(of_one) not in _CHANGES]", "if False]"),),
            ("tests/test_megatron_checkpoint.py", "-k", "own_method_has_changed"),
        ),
        Fault(
            "export the defaults of arguments that have older names",
            (("if old in saved:", "if False:"), ('if "disable_bias_linear" in saved:', "if False:")),
            EXPORT,
        ),
        Fault(
            "read the MLP of a hybrid model from the attention's sub-layer",
            ((' + (not found[2].startswith(("self_attention.", "input_layernorm.")))', ""),),
            CHECKPOINT,
        ),
        Fault(
            "look for what a method added to a hybrid model's layer in its attention",
            (
                (
                    '(not found[2].startswith(("self_attention.", "input_layernorm.")))',
                    'found[2].startswith(("mlp.", "pre_mlp"))',
                ),
            ),
            CHANGED,
        ),
        Fault(
            "scale positions that a hybrid model does not scale",
            ((', "use_rope_scaling": False', ""),),
            CHECKPOINT,
        ),
        Fault(
            "run hybrid models of any sub-layers",
            (("if not pattern or not {*layers_of(pattern)} <= {*allowed}:", "if False:"),),
            CHECKPOINT,
        ),
        Fault(
            "run the MLP of a hybrid model as experts",
            (('[int(kinds[1] == "E") for kinds in layers]', "[1 for kinds in layers]"),),
            CHECKPOINT,
        ),
        Fault(
            "measure other layers than the training had",
            (("if of_one.layer_rule not in (None, LAYER_RULES[0]):", "if False:"),),
            CHECKPOINT,
        ),
        Fault(
            "run a hybrid model of its user's own layers",
            (("if spec and tuple(spec) not in HYBRID_SPECS:", "if False:"),),
            CHECKPOINT,
        ),
        Fault(
            "take a hybrid model's sub-layers for layers where those are numbered",
            (("            if arguments.get(name):\n", "            if False:\n"),),
            CHECKPOINT,
        ),
        Fault(
            "leave out norms of queries and keys that have no weights",
            (('if arguments.get("qk_l2_norm") and not arguments.get("num_experts"):', "if False:"),),
            CHECKPOINT,
        ),
        Fault(
            "run experts whose weights lie otherwise",
            (('    "moe_mlp_glu_interleave_size": ("has --moe-mlp-glu-interleave-size", None),\n', ""),),
            CHECKPOINT,
        ),
        Fault(
            "choose experts by another rule than the training",
            (
                (
                    'chooses = {"sinkhorn", "quantile_balancing"} & {*kinds}',
                    'chooses = "sinkhorn" in kinds',
                ),
            ),
            CHECKPOINT,
        ),
        Fault(
            "say nothing of tokens that the experts drop",
            (("    if factor := args.moe_expert_capacity_factor:\n", "    if factor := None:\n"),),
            CHECKPOINT,
        ),
        Fault(
            "say nothing of arguments that this Megatron does not know",
            (("    if told:\n", "    if False:\n"),),
            CHECKPOINT,
        ),
        Fault(
            "scale positions that an older script did not scale",
            (("(_SINCE_0_19 if pattern is None else _SINCE_0_18)", "_SINCE_0_18"),),
            CHECKPOINT,
        ),
    ],
    "decoder/checkpoint/model.py": [
        Fault(
            "measure an attenuated model without its attenuation",
            (
                (
                    "    for of_one in changes:\n        _change_layers",
                    "    for of_one in ():\n        _change_layers",
                ),
            ),
            CHANGED,
        ),
        Fault(
            "look at a checkpoint's model before asking whether it can run",
            (
                (f"    {ASK}  # first: it refuses what cannot run\n", ""),
                ("        model = _loaded(", f"        {ASK}\n        model = _loaded("),
            ),
            ("tests/test_megatron_checkpoint.py", "-k", "cannot_be_run_is_refused"),
        ),
        Fault(
            "take the training's sequence length for the model's longest context",
            (("max_length=args.max_position_embeddings", 'max_length=arguments["seq_length"]'),),
            ("tests/test_megatron_checkpoint.py", "-k", "last_checkpoint_and_a_step"),
        ),
        Fault("let padding have its part in the loss", (("[..., :vocab_size]", ""),), CHECKPOINT),
        Fault(
            "take padding for vocabulary without a word",
            (("    if vocab_size is None:\n", "    if False:\n"),),
            CHECKPOINT,
        ),
        Fault(
            "compute GELU otherwise than the kernels of the training",
            (("        if args.gelu_by_tanh:\n", "        if False:\n"),),
            CHECKPOINT,
        ),
    ],
    "decoder/checkpoint/tokenizer.py": [
        Fault(
            "believe a --vocab-size that was not what was padded",
            (("math.ceil(size / multiple) * multiple == rows if multiple", "size <= rows if multiple"),),
            TOLD,
        ),
        Fault("believe a --vocab-size that Megatron does not read", (("kind not in TYPES and ", ""),), TOLD),
        Fault(
            "cut the vocabulary by another tokenizer",
            ((" and pads_to(arguments, tokenizer.vocab_size, rows):", ":"),),
            TOLD,
        ),
        Fault(
            "begin texts with tokens that the training's tokenizer left out",
            (('if "legacy_tokenizer" in arguments and', "if False and"),),
            CHECKPOINT,
        ),
    ],
    "decoder/checkpoint/validation.py": [
        Fault(
            "measure samples that are cut into documents as if they were whole",
            (
                (
                    '*("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"),',
                    "",
                ),
            ),
            CHECKPOINT,
        ),
    ],
    "decoder/decoder.py": [
        Fault(
            "compare the normed state with the last layer's output",
            (
                (
                    "last_input, last = layer_input, layer_output",
                    "last_input, last = layer_output, layer_output",
                ),
            ),
            MEASURE,
        ),
        Fault(
            "take a norm before the layers for the final one",
            (("if last is not None and is_same_or_scaled(last, stream_in(args, kwargs)):", "if True:"),),
            STATES,
        ),
        Fault(
            "overlook a final norm of a state that is scaled",
            (("is_same_or_scaled(last, stream_in(args, kwargs))", "last.equal(stream_in(args, kwargs))"),),
            FORMS,
        ),
        Fault(
            "measure a model that is another one in a batch",
            (("if is_other(alone, first[:length]):", "if False:"),),
            OWN,
        ),
        Fault("try a batch without padding", (("pad(rows, (0, room))", "pad(rows, (0, 0))"),), OWN),
        Fault(
            "let a long text look ahead", (("if is_other(alone[:early], second[:early]):", "if False:"),), OWN
        ),
        Fault(
            "take the first call of a norm behind the layers for the final one",
            (("last is not None and is_same_or_scaled(last, stream_in(args, kwargs))", "last is not None"),),
            STATES,
        ),
        Fault(
            "measure a layer by what it has written to its input",
            (("state.clone() if self.in_place else state", "state"),),
            STATES,
        ),
        Fault(
            "leave a layer out by what it has written to its input",
            (("saved.append(stream_in(args, kwargs).clone())", "saved.append(stream_in(args, kwargs))"),),
            STATES,
        ),
        Fault(
            "measure a text for which a layer does not run",
            (("            if number != behind + 1:\n", "            if False:\n"),),
            STATES,
        ),
        Fault(
            "make a tuple of any kind in one way",
            (('getattr(output, "_make", type(output))', "type(output)"),),
            STATES,
        ),
        Fault(
            "let masked logits drown the others",
            (("away.clamp(-reach, reach).nan_to_num(0.0)", "away.nan_to_num(0.0)"),),
            DROWNED,
        ),
        Fault(
            "measure rounding by an offset of all logits",
            (("(wide - median, masked)", "(wide - 0 * median, masked)"),),
            DROWNED,
        ),
        Fault(
            "let a token's NaN fail a check",
            (("away.clamp(-reach, reach).nan_to_num(0.0)", "away.clamp(-reach, reach)"),),
            DROWNED,
        ),
        Fault(
            "overlook a final norm of what was rounded",
            (("torch.equal(a.to(b), b) or torch.equal(a, b.to(a))", "torch.equal(a, b)"),),
            MEASURE,
        ),
    ],
    "decoder/hugging_face.py": [
        Fault(
            "say nothing of norms of a state that is scaled",
            (("    if structure.scales:\n", "    if False:\n"),),
            FORMS,
        ),
        Fault(
            "give a model that knows no cache one",
            (('{"use_cache": False} if has_cache else {}', '{"use_cache": False}'),),
            FORMS,
        ),
        Fault("count the encoder's layers", (("decoder_layers num_decoder_layers ", ""),), STRUCTURE),
        Fault(
            "say nothing of layers that the configuration counts otherwise",
            (("if num_layers not in (None, len(structure.layers)):", "if False:"),),
            STRUCTURE,
        ),
        Fault(
            "say nothing of weights outside of layers that have no place",
            (("    if unused:\n", '    if unused and ".layers." in unused[0]:\n'),),
            MEASURE,
        ),
        Fault(
            "take closing tokens for a part of the text",
            (("(found := ids(text))[: len(found) - closing]", "ids(text)"),),
            MEASURE,
        ),
        Fault(
            "know a context by its usual name alone",
            ((" n_positions max_seq_len seq_length", " n_positions"),),
            MEASURE,
        ),
        Fault(
            "let random weights pass where the files hold none",
            (("    if missing:\n", "    if False:\n"),),
            MEASURE,
        ),
    ],
    "decoder/structure.py": [
        Fault(
            "refuse a state that is scaled between layers",
            (("handed_on = all(is_same_or_scaled(", "handed_on = all(is_same("),),
            FORMS,
        ),
        Fault(
            "take a norm among the layers for one of them",
            (("if not isinstance(modules, nn.ModuleList) and len(", "if False and len("),),
            FORMS,
        ),
        Fault(
            "measure a branch whose sum is kept in a dict",
            (("more_out += [each.clone() for each in new]", "pass"),),
            FORMS,
        ),
        Fault("probe beyond a short context", (("min(_LENGTH, max_length or _LENGTH)", "_LENGTH"),), FORMS),
        Fault("look ahead in blocks of two or three", (("length * 7 // 12", "length // 2"),), OWN),
        Fault(
            "take noise for a look ahead",
            (("if bool((again - own).norm() > max(", "if False and bool((again - own).norm() > max("),),
            OWN,
        ),
        Fault(
            "overlook what is written to a state between layers",
            (("[(state, state.clone()) for", "[(state, state) for"), ("[state.clone() for", "[state for")),
            STATES,
        ),
        Fault(
            "take a list behind the mixing of tokens for the layers",
            (("if _tells_apart(chain[0].state_in):", "if True:"),),
            STRUCTURE,
        ),
        Fault(
            "take a list that hardly counts for the layers",
            (("is_alone and bool(moved >= _MUCH * apart)", "is_alone"),),
            STRUCTURE,
        ),
        Fault(
            "look for the layers in rounding",
            (
                (
                    "state = call.state_out.clone()",
                    "state = stream_out(output).clone()",
                ),
            ),
            STRUCTURE,
        ),
        Fault("take a half of the layers for all", (("if is_last and (is_all", "if (is_all"),), STRUCTURE),
        Fault(
            "measure layers beside which another stream runs",
            (("is_all or (len(chain)", "True or (len(chain)"),),
            STRUCTURE,
        ),
        Fault(
            "measure a branch whose sum is handed on beside it",
            ((" and not _hands_on_more(chain)", ""),),
            STRUCTURE,
        ),
        Fault(
            "take a longer list inside a layer for the layers",
            (("(len(chain) != num_layers, -len(chain))", "-len(chain)"),),
            STRUCTURE,
        ),
        Fault(
            "take weights for a norm",
            (("if any(parameter.numel() > state.shape[-1]", "if any(False"),),
            STRUCTURE,
        ),
        Fault(
            "take any module without weights for a norm",
            (("return not bool((once - twice).norm()", "return True or bool((once - twice).norm()"),),
            STRUCTURE,
        ),
        Fault(
            "take a norm beside the way to the head for the final one",
            ((" and effect(call)[1])", ")"),),
            STRUCTURE,
        ),
        Fault(
            "look for layers by tokens that the model does not tell apart",
            (("        if widest > _CLEAR:\n", "        if True:\n"),),
            STRUCTURE,
        ),
    ],
    "demo/training.py": [
        Fault(
            "train a finished toy again",
            (("    left = [run for run in runs if not run.is_finished()]", "    left = list(runs)"),),
            CLAIMS,
        ),
    ],
    "evaluate/depth.py": [
        Fault(
            "skip a layer for the first token too",
            (("slice(len(ids), None), slice(1, None))", "slice(len(ids), None))"),),
            DEPTH,
        ),
        Fault(
            "give the depth of states that overflow",
            (("refuse_not_finite(decoder, torch.cat(", "(decoder, torch.cat("),),
            ("tests/test_depth.py", "-k", "overflow or no_layer_is_read"),
        ),
    ],
    "evaluate/evaluation.py": [
        Fault(
            "read out through a head that is not the model's",
            (("if (error := read_out_error(decoder)) is not None:", "if (error := None) is not None:"),),
            EVALUATE,
        ),
        Fault(
            "score the whole model by a head that is not its own",
            (('"lens"}, replace(decoder, head=None)', '"lens"}, decoder'),),
            EVALUATE,
        ),
        Fault(
            "let other tasks count in the paper's mean difference",
            (("if not has_all or name in TASKS]", "]"),),
            PAPER_TASKS,
        ),
        Fault(
            "test the lens on the texts of its fit",
            (("(both := _contents(texts) & _contents(lens_texts))", "(both := set())"),),
            EVALUATE,
        ),
    ],
    "evaluate/layers.py": [
        Fault(
            "score the token itself, not the one behind it",
            (("kept, ids[:, 1:][kept], batch", "kept, ids[:, :-1][kept], batch"),),
            EVALUATE,
        ),
        Fault(
            "fit the lens to states of any size alike",
            (
                (
                    "size = last.norm(dim=-1, keepdim=True).clamp(min=1e-30)",
                    "size = torch.ones_like(last[:, :1])",
                ),
            ),
            EVALUATE,
        ),
        Fault(
            "read out the states as they are where there is a lens",
            (("            if lens is not None:", "            if False:"),),
            EVALUATE,
        ),
    ],
    "evaluate/seeds.py": [
        Fault("let one model count as two seeds", (("        if key in seen:", "        if False:"),), SEEDS),
        Fault(
            "subtract a seed's JREG from its baseline",
            (("    if names[0] == names[1][::-1] != names[1]:", "    if False:"),),
            SEEDS,
        ),
        Fault("mix seeds of unlike limits", (("    if limits[0] != limits[1]:", "    if False:"),), SEEDS),
        Fault(
            "mix metrics and samples between seeds",
            (("if len({(score.metric, score.samples) for score in scores}) > 1:", "if False:"),),
            SEEDS,
        ),
    ],
    "evaluate/table.py": [
        Fault(
            "say nothing of a limit beside the paper's means",
            (("if not missing and limit is not None:", "if not missing and limit is None:"),),
            PAPER_TASKS,
        ),
    ],
    "launch.py": [
        Fault(
            "launch without an optimizer's package",
            (('    optimizer.package(value_of(sys.argv, "--optimizer"))\n', ""),),
            ("tests/test_launch.py::test_a_mistake_ends_every_rank_with_one_line",),
        ),
    ],
    "mcore/dataset_helper.py": [
        Fault(
            "compile in every rank",
            (('"SLURM_PROCID", "0")) != "0":', '"SLURM_PROCID", "0")) == "none":'),),
            HELPER,
        ),
        Fault(
            "compile for the python3 on PATH",
            (('"-C", str(folder), flags, name]', '"-C", str(folder)]'),),
            HELPER,
        ),
        Fault(
            "follow the flags of a make that started this one",
            (('if not name.startswith("MAKE")}', "}"),),
            HELPER,
        ),
        Fault(
            "take a compiled helper for new that is older than its source",
            (("file.stat().st_mtime >= least for", "file.stat().st_mtime >= 0 for"),),
            HELPER,
        ),
        Fault(
            "take an empty name of a compiler for a compiler",
            (('(os.environ.get("CXX") or "g++")', 'os.environ.get("CXX", "g++")'),),
            HELPER,
        ),
        Fault(
            "tell that the linker has failed, not why",
            (('"error|cannot|denied|no space|read-only"', '"error"'),),
            HELPER,
        ),
    ],
    "mcore/initialization.py": [
        Fault(
            "scale initial weights by depth as Megatron does",
            (("    config.output_layer_init_method = partial(_draw, shares)\n", ""),),
            INITIAL,
        ),
        Fault(
            "take a rank's share of a matrix's inputs for all of them",
            (("float(weight.shape[-1] * shares)", "float(weight.shape[-1])"),),
            INITIAL,
        ),
        Fault(
            "count the inputs twice where a rank draws the whole matrix",
            (("shares = 1 if args.use_cpu_initialization else ", "shares = "),),
            INITIAL,
        ),
        Fault(
            "let two rules for initial weights meet",
            (('if getattr(args, "init_fan_in", False) and value != default:', "if False:"),),
            INITIAL,
        ),
    ],
    "mcore/local_layers.py": [
        Fault(
            "let a packed sequence see the one before it",
            (("(sequence[:, None] != sequence) | ", ""),),
            PADDING,
        ),
        Fault(
            "leave the gradient of the key that heads share to a rank's own heads",
            (("        if self._width_shared:\n", "        if False:\n"),),
            VARIANTS,
        ),
        Fault(
            "sum the gradient of a norm that every rank has whole",
            (("if config.multi_latent_attention and not config.sequence_parallel:", "if False:"),),
            VARIANTS,
        ),
        Fault(
            "take values to be as wide as keys",
            (("        if v_channels is not None:\n", "        if False:\n"),),
            VARIANTS,
        ),
        Fault(
            "leave a window to Megatron's mask",
            (("self.attn_mask_type == AttnMaskType.causal and", "False and"),),
            VARIANTS,
        ),
        Fault(
            "give a window without an end one",
            (("is not None and self._looks_back >= 0:", "is not None:"),),
            VARIANTS,
        ),
        Fault(
            "hand on a norm of an fp32 residual in fp32",
            (("        if config.fp32_residual_connection:\n", "        if False:\n"),),
            VARIANTS,
        ),
    ],
    "mcore/preflight/__init__.py": [
        Fault(
            "look for an optimizer's package only where all arguments are known",
            (
                ("    optimizer.package(args.optimizer)\n", ""),
                ("        return\n    for", "        return\n    optimizer.package(args.optimizer)\n    for"),
            ),
            PREFLIGHT,
        ),
        Fault(
            "lose the optimizer's step in a resume with FSDP2",
            (("    optimizer.resuming,\n", ""),),
            PREFLIGHT,
        ),
    ],
    "mcore/preflight/optimizer.py": [
        Fault(
            "start without an optimizer's package",
            (('find_spec("emerging_optimizers") is None and', "False and"),),
            PREFLIGHT,
        ),
        Fault(
            "let ranks share an optimizer in fp32",
            (("        not args.bf16 and (", "        False and ("),),
            PREFLIGHT,
        ),
        Fault(
            "ask for a package that a tree does not use",
            ((" and _megatron_wants_it():", ":"),),
            ("tests/test_preflight.py::test_a_tree_with_an_optimizer_of_its_own_needs_no_package_for_it",),
        ),
        Fault(
            "take a package of any version for Megatron's optimizers",
            (("() < _installed() < _OLDEST", "False"),),
            ("tests/test_preflight.py::test_an_older_package_of_optimizers_is_refused_by_its_version",),
        ),
        Fault(
            "load a checkpoint of Megatron-FSDP",
            (('"load"): lambda args: args.load,', '"load"): lambda args: False,'),),
            PREFLIGHT,
        ),
    ],
    "mcore/preflight/sizes.py": [
        Fault(
            "train experts under tensor parallelism without sequence parallelism",
            (("args.tensor_model_parallel_size > 1 and not args.sequence_parallel", "False"),),
            PREFLIGHT,
        ),
        Fault(
            "build several validation sets that Megatron does not take",
            (("args.multiple_validation_sets and not args.full_validation", "False"),),
            PREFLIGHT,
        ),
    ],
    "measure/depth.py": [
        Fault(
            "take the module that runs first for attention",
            (("if mixes(one) and (is_given or not mixes(other)):", "if True:"),),
            ("tests/test_depth.py", "-k", "runs_first or mlp_first"),
        ),
        Fault(
            "let a state of norm 0 spoil the ratios of all layers",
            (("    return None if values.count(None) == len(values)", "    return None if None in values"),),
            ("tests/test_depth.py", "-k", "norm_0"),
        ),
        Fault(
            "let padding count in a sequence's entropy",
            (("[row[:length] for row, length in", "[row for row, length in"),),
            DEPTH,
        ),
    ],
    "measure/measurement.py": [
        Fault(
            "measure padding as if it were text",
            (("values = torch.where(mask, values, 0.0)", "values = values + 0 * mask"),),
            MEASURE,
        ),
        Fault(
            "measure all tokens alike, whatever text they are in",
            (("sums / weights, 0.0)", "sums, 0.0)"), ("(weights > 0).double()", "weights")),
            MEASURE,
        ),
        Fault(
            "weigh a sequence by a token that does not count",
            (("len(window.ids) - skipped)", "len(window.ids))"),),
            MEASURE,
        ),
        Fault(
            "give the state before the norm as the one after it",
            (("range(last, mean.shape[1])", "(last, mean.shape[1] - 1)"),),
            MEASURE,
        ),
        Fault(
            "say nothing of a final norm that is not there",
            (("    if decoder.final_norm is None:\n        note(", "    if False:\n        note("),),
            MEASURE,
        ),
    ],
    "methods/attenuation/attenuation.py": [
        Fault(
            "read a gate without a call, before it is gathered",
            (("GATE)()", "GATE).forward()"),),
            ("tests/test_param_gather.py",),
        ),
        Fault(
            "add what a learned gate takes",
            (("(self._kept(layer_number) - 1)", "(1 - self._kept(layer_number))"),),
            ("tests/test_equivalence.py",),
        ),
    ],
    "methods/attenuation/settings.py": [
        Fault(
            "sum a gate's gradient over no other ranks",
            (
                (
                    "gate.weight.sequence_parallel = chunk.config.sequence_parallel",
                    "gate.weight.sequence_parallel = False",
                ),
            ),
            ("tests/test_equivalence.py",),
        ),
    ],
    "methods/depth/formulas.py": [
        Fault(
            "let the layer itself count among the earlier ones where voids are told",
            (("torch.cat((torch.zeros_like(change[:1]), spread[:-1]))", "spread"),),
            DEPTH,
        ),
        Fault(
            "take the MLP's contribution relative to the layer's input",
            (("(out - between, between)", "(out - between, h)"),),
            DEPTH,
        ),
        Fault("keep entries below 0 in the Gram matrix", (("    gram = gram.clamp(min=0)\n", ""),), DEPTH),
    ],
    "methods/depth/settings.py": [
        Fault(
            "log voids of the layers of one pipeline stage",
            (('refuse(("voids",),', "refuse((),"),),
            DEPTH_REFUSED,
        ),
    ],
    "methods/jreg/formulas.py": [
        Fault(
            "let falls cancel rises in the jump rate",
            (("rises.clamp(min=0).sum(dim=-1)", "rises.sum(dim=-1).clamp(min=0)"),),
            PAPER,
        ),
        Fault(
            "weigh the first layers most",
            (("alpha * torch.arange(1, num_layers + 1,", "alpha * torch.arange(num_layers, 0, -1,"),),
            PAPER,
        ),
    ],
    "methods/jreg/kernels/eager.py": [
        Fault("turn the sign", (("(-0.5 * factor)", "(0.5 * factor)"),)),
        Fault(
            "add the part of the layer above with the wrong sign",
            (("along_both = along + along_above", "along_both = along - along_above"),),
            PENALTY,
        ),
    ],
    "methods/jreg/kernels/fused.py": [
        Fault(
            "launch the kernel for aligned states on others",
            (("        odd = addresses", "        odd = 1 if addresses % _ALIGNED else 0  # addresses"),),
            PREPARED,
        ),
        Fault(
            "launch a kernel with the strides of other states",
            (("            *[state.stride() for state in states],\n", ""),),
            PREPARED,
        ),
        Fault(
            "prepare launches on an AMD GPU",
            ((' or driver.active.get_current_target().backend != "cuda"', ""),),
            ("tests/test_compiled_kernels.py", "-k", "amd"),
        ),
    ],
    "methods/jreg/kernels/programs.py": [
        Fault("turn the sign in the fused kernel", (("(-0.5 * factor)", "(0.5 * factor)"),), KERNELS),
        Fault(
            "divide by the norm of rows that have none in the fused kernel",
            (("    return tl.where(square == 0, 0.0, inverse)", "    return inverse"),),
            KERNELS,
        ),
        Fault(
            "walk a transposed state as if it were contiguous",
            (
                (
                    "(rows % batch).to(tl.int64) * stride_b",
                    "(rows % batch).to(tl.int64) * (stride_s // batch)",
                ),
            ),
            KERNELS,
        ),
        Fault(
            "forget the tail of a row wider than a tile",
            (("for start in range(0, WIDTH, COLUMNS):", "for start in range(0, WIDTH - COLUMNS, COLUMNS):"),),
            KERNELS,
        ),
        Fault(
            "add the part of the layer above with the wrong sign in the fused kernel",
            (
                (
                    "            above = tl.load(above_rows + column, mask=used, other=0.0)",
                    "            above = -tl.load(above_rows + column, mask=used, other=0.0)",
                ),
            ),
            KERNELS,
        ),
        Fault(
            "read states of tokens without a gradient",
            (("((row // batch) % STRIDE == first)", "(row % STRIDE == first)"),),
            ("tests/test_kernels.py",),
        ),
    ],
    "methods/jreg/penalty.py": [
        Fault(
            "keep the stage output that the pipeline frees",
            (
                (
                    "        return h_out.detach()  #",
                    "        ctx.kept = h_out.clone()\n        return ctx.kept  #",
                ),
                (
                    "        grad_in, grad_total, psi, handed = strength",
                    "        h_out = ctx.kept\n        grad_in, grad_total, psi, handed = strength",
                ),
            ),
        ),
        Fault(
            "leave the layer's input out of the gradient",
            (
                (
                    "        return grad_in, grad_total, None, None, None\n",
                    "        return None, grad_total, None, None, None\n",
                ),
            ),
        ),
        Fault(
            "keep what was handed down after its use",
            (("above, ctx.handed = _handed_to(ctx), None", "above = _handed_to(ctx)"),),
            PENALTY,
        ),
        Fault(
            "take what a broken-off pass has handed down",
            (("ctx.handed[0] != torch._C._current_graph_task_id()", "False"),),
            PENALTY,
        ),
        Fault(
            "hand down past somebody who asks for the gradient of the state between",
            (("if not goes_everywhere or is_watched or", "if is_watched or"),),
            PENALTY,
        ),
        Fault(
            "let a second layer with one input overwrite what the first has handed down",
            (("return None if _handed_to(below) is not None else below", "return below"),),
            PENALTY,
        ),
        Fault(
            "drop the input's gradient of a recomputed last layer after the norm",
            (("return carried\n", "return carrier\n"),),
        ),
    ],
    "methods/jreg/regularizer.py": [
        Fault(
            "leave a layer on a frozen embedding without the regularizer",
            (
                (
                    "in self._regularized and h_out.requires_grad",
                    "in self._regularized and h_in.requires_grad",
                ),
            ),
            LORA,
        ),
        Fault(
            "say nothing where lambda counts other tokens than the loss",
            (("{_COUNTS_ALL if counts_all else ''}", ""),),
            only("test_attach", "the_start_says_if_lambda_counts_other_tokens_than_the_loss"),
        ),
        Fault(
            "measure a regularized layer in no pass",
            (
                (
                    "return add_displacement_gradient(h_in, h_out, strength, on_psi)",
                    "return add_displacement_gradient(h_in, h_out, strength)",
                ),
            ),
        ),
        Fault(
            "regularize masked tokens too",
            ((", weight, microbatch.token_weights, rows)", ", weight, None, rows)"),),
        ),
        Fault(
            "take the same tokens in each step",
            (("Rows(self._stride, iteration % self._stride)", "Rows(self._stride, 0)"),),
            ("tests/test_attach.py", "tests/test_equivalence.py"),
        ),
        Fault(
            "freeze the coefficient of the iteration that is captured",
            (("if is_regularizing and not call.in_full_graph:", "if is_regularizing:"),),
            FULL_GRAPH,
        ),
    ],
    "methods/jreg/settings.py": [
        Fault(
            "leave out the heaviest layers in place of the lightest",
            (("weights.argsort(stable=True)", "weights.argsort(stable=True, descending=True)"),),
            ("tests/test_settings.py",),
        ),
    ],
    "methods/let/let.py": [
        Fault(
            "load a teacher again whose time is over",
            (("self._is_over = not settings.measures_at(begin)", "self._is_over = False"),),
            ("tests/test_let.py", "-k", "resumed"),
        ),
        Fault(
            "look only at the first step's ids for one that the teacher does not have",
            (("        torch.maximum(self", "        self._are_ids_seen or torch.maximum(self"),),
            ("tests/test_let.py", "-k", "an_id_that"),
        ),
        Fault(
            "keep the teacher",
            (("            self._teacher = None\n", "            pass\n"),),
            ("tests/test_let.py", "-k", "alone_in"),
        ),
    ],
    "methods/let/settings.py": [
        Fault(
            "let go of a teacher an iteration early",
            (("max(0, self.stop_iterations - iteration)", "max(0, self.stop_iterations - iteration - 1)"),),
            ("tests/test_let.py", "-k", "falls_as_published"),
        ),
        Fault(
            "look at a teacher's files only once the model is built",
            (("            teacher.check(str(self", "            (lambda *_: None)(str(self"),),
            ("tests/test_let.py", "-k", "damaged"),
        ),
    ],
    "methods/let/tokens.py": [
        Fault(
            "take a tokenizer with the same number of pieces for the same",
            (("known_pieces.get(piece) != own_id", "own_id >= len(known_pieces)"),),
            ("tests/test_let.py", "-k", "another_tokenizer"),
        ),
    ],
    "methods/lns/settings.py": [
        Fault(
            "count layers from 0 in LayerNorm scaling",
            (("float(number**-self.power)", "float(max(1, number - 1) ** -self.power)"),),
            ("tests/test_equivalence.py",),
        ),
        Fault(
            "count layers from 0 where LayerNorm scaling goes into the norms",
            (("self._scale(int(at[1]) + 1)", "self._scale(int(at[1]) or 1)"),),
            CHANGED,
        ),
    ],
    "methods/norms/norms.py": [
        Fault(
            "take the norms of a state from before it was written to",
            ((", state.storage_offset(), writes\n", ", state.storage_offset()\n"),),
            ("tests/test_methods.py", "-k", "taken_once"),
        ),
        Fault(
            "take the norms of another state for those of the input",
            (
                (
                    "        return norms(state)",
                    "        return norms(state) if self._last is None else self._last[2]",
                ),
            ),
            ("tests/test_methods.py", "-k", "taken_once"),
        ),
    ],
    "methods/periln/settings.py": [
        Fault(
            "leave the norm on the embedding out of Peri-LN",
            (("if self.embedding and embedding is not None", "if False"),),
            ("tests/test_methods.py", "-k", "peri_ln_norms"),
        ),
        Fault(
            "begin a float32 residual stream in the type of Peri-LN's norm on the embedding",
            (("norm(output).to(output.dtype)", "norm(output)"),),
            ("tests/test_methods.py", "-k", "float32_as_it_is"),
        ),
        Fault(
            "add a bias behind Peri-LN's norm",
            (("(norm(added if bias is None else added + bias), None)", "(norm(added), bias)"),),
            ("tests/test_methods.py", "-k", "peri_ln_norms"),
        ),
        Fault(
            "forget that sequence parallelism shares the tokens of Peri-LN's norms",
            (
                (
                    "parameter.sequence_parallel = config.sequence_parallel",
                    "parameter.sequence_parallel = False",
                ),
            ),
            ("tests/test_equivalence.py",),
        ),
    ],
    "methods/slowqk/settings.py": [
        Fault(
            "begin to rise an iteration early",
            (("beyond = iteration - self.hold_iterations", "beyond = iteration + 1 - self.hold_iterations"),),
            ("tests/test_slowqk.py",),
        ),
        Fault(
            "take a step of slow queries and keys that a graph repeats",
            (('"optimizer_cuda_graph"', '"no_such_setting"'),),
            ("tests/test_methods.py", "-k", "not_supported"),
        ),
    ],
    "methods/slowqk/slowqk.py": [
        Fault(
            "slow the values down too",
            (("(queries + 1) * head)", "(queries + 2) * head)"),),
            ("tests/test_slowqk.py",),
        ),
        Fault(
            "forget where a shard of the optimizer begins",
            (("""["param"].start""", """["param"].start * 0"""),),
            ("tests/test_slowqk.py", "-k", "DP4"),
        ),
        Fault(
            "let queries and keys learn as fast as ever in a graph of the iteration",
            (("def before_full_graph(", "def before_no_graph("),),
            ("tests/test_cuda_graphs.py", "-k", "optimizer_steps"),
        ),
    ],
    "paper/__init__.py": [
        Fault(
            "give the paper's mean to fewer than nine tasks",
            (
                ("    if missing_tasks(scores):", "    if False:"),
                (
                    "for name in names) / len(names)",
                    "for name in names if name in scores) / len(names)",
                ),
            ),
            (*PAPER, *PAPER_TASKS),
        ),
        Fault(
            "leave the wrong task out of the mean without BoolQ",
            (('if name != "boolq")', 'if name != "piqa")'),),
            PAPER_TASKS,
        ),
        Fault(
            "take the other LAMBADA",
            (("hellaswag lambada_openai piqa", "hellaswag lambada_standard piqa"),),
            PAPER_TASKS,
        ),
    ],
    "paper/over_seeds.py": [
        Fault(
            "test over seeds on both sides",
            (("return float(stdtr(n - 1, -t))", "return 2 * float(stdtr(n - 1, -abs(t)))"),),
            SEEDS,
        ),
        Fault(
            "take the power of a two-sided test",
            (("stdtrit(n - 1, 1 - LEVEL)", "stdtrit(n - 1, 1 - LEVEL / 2)"),),
            SEEDS,
        ),
        Fault(
            "correct no p value for the other ways",
            (("max(most, min(1.0, p * (len(p_values) - rank)))", "p"),),
            COMPARE,
        ),
    ],
    "paper/paper.toml": [
        Fault("mistype a displacement of the paper", (("2.46, 0.26]", "2.46, 2.62]"),), PAPER),
        Fault("take a slip of the paper for its figure", (("base = [5.42, ", "base = [6.42, "),), PAPER),
    ],
    "recipe/__main__.py": [
        Fault("start a recipe without Apex as if it were there", (("not has_apex()", "False"),), APEX),
        Fault(
            "start a recipe without fused gradients where Apex is there", (("not has_apex()", "True"),), APEX
        ),
        Fault("add a flag to a recipe without a word", (("    if added:\n", "    if False:\n"),), APEX),
        Fault(
            "plan without an optimizer's package",
            (("        preflight.optimizer.package(args.optimizer)\n", ""),),
            ("tests/test_recipes.py::" + NO_PACKAGE,),
        ),
    ],
    "report/charts.py": [
        Fault(
            "draw the paper's lines as thick as measured ones",
            (("[label for label, style in looks.items() if style.thin]", "[]"),),
            REPORT_PAPER,
        ),
    ],
    "report/compose.py": [
        Fault(
            "lay the paper under nothing without a word",
            (
                (
                    '    if paper and not any(figure.name.startswith("displacement")',
                    "    if paper and not any(True",
                ),
            ),
            REPORT_PAPER,
        ),
    ],
    "report/figures.py": [
        Fault(
            "draw an interval that is not there",
            (("[interval or (None, None) for", "[interval or (0.0, 0.0) for"),),
            REPORT,
        ),
        Fault(
            "leave models without a final norm out without a word",
            (("for label, entry in entries if STATES[1] not in entry.states)", "for label, entry in ())"),),
            REPORT,
        ),
        Fault(
            "draw the depth of models that read different texts without a word",
            (
                (
                    "        other, convention = _about([*measured.items()]",
                    "        _about([*measured.items()]",
                ),
            ),
            REPORT_JOINS,
        ),
        Fault(
            "show the paper's last layer as one after the final norm",
            (("state=STATES[0]) if paper", "state=STATES[1]) if paper"),),
            REPORT_PAPER,
        ),
        Fault(
            "leave a value that is not finite out of its table",
            (
                (
                    '        if "y" in row and (place',
                    '        if "y" in row and row["y"] == row["y"] and (place',
                ),
            ),
            REPORT,
        ),
    ],
    "report/inputs.py": [
        Fault(
            "draw each model's depth with its own choice of the first token",
            (("getattr(self.blocks[part], name)", "getattr(self.blocks[self.first_token], name)"),),
            REPORT_JOINS,
        ),
        Fault(
            "take any number for a cosine, an angle or a share",
            (("if not least - _ROUNDING <= value <= most + _ROUNDING:", "if False:"),),
            REPORT,
        ),
        Fault(
            "refuse a mean that rounding took beyond its range",
            (("_ROUNDING = 1e-5", "_ROUNDING = 0"),),
            REPORT,
        ),
        Fault(
            "take numbers of layers before the one that is skipped",
            ((", AfterValidator(_behind)]", "]"),),
            REPORT,
        ),
        Fault(
            "count skipped layers from 0 in a report",
            (("enumerate(self.skip.later_mean, start=1)", "enumerate(self.skip.later_mean)"),),
            REPORT,
        ),
    ],
    "report/models.py": [
        Fault(
            "give a model the label of a line of the paper's",
            (("used = set(taken)", "used: set[str] = set()"),),
            REPORT_PAPER,
        ),
    ],
    "report/paper_profiles.py": [
        Fault(
            "lay the paper's profile layer on layer, whatever the depth",
            (("1 + at * (num_layers - 1) / (len(values) - 1)", "1 + at"),),
            REPORT_PAPER,
        ),
    ],
    "report/reading.py": [
        Fault(
            "call a state that a run does not name the one before the norm",
            (
                (
                    'history.settings.get("jreg_final_state")',
                    'history.settings.get("jreg_final_state", "pre_norm")',
                ),
            ),
            REPORT,
        ),
    ],
    "runtime/errors.py": [
        Fault(
            "take what goes wrong in training for a refusal",
            (("or not is_refusal or has_begun():", "or not is_refusal:"),),
            (REFUSALS,),
        ),
        Fault(
            "end with a traceback where Megatron lacks a package",
            ((" or isinstance(error.__cause__, ImportError)", ""),),
            (REFUSALS,),
        ),
        Fault(
            "take what breaks while the model is built for a refusal",
            (("        if is_building:\n", "        if False:\n"),),
            ("tests/test_pretrain.py::test_a_fault_while_megatron_builds_is_not_a_refusal_of_the_arguments",),
        ),
    ],
    "sft/__main__.py": [
        Fault(
            "count a step's conversations on one GPU alone",
            (("at_a_time = options.gpus * micro_batch", "at_a_time = micro_batch"),),
            SFT,
        ),
        Fault(
            "fine-tune with less than the batch where GPUs cannot share it",
            (("    if rest:", "    if False:"),),
            SFT,
        ),
        Fault(
            "learn from conversations with roles of another format",
            (("        and set(roles) <= set(ROLES)\n", ""),),
            SFT,
        ),
        Fault(
            "go on from a checkpoint that was cut short",
            (('run.glob("checkpoint-*/trainer_state.json")', 'run.glob("checkpoint-*/config.json")'),),
            SFT,
        ),
        Fault(
            "begin again where there is a checkpoint",
            (('["--resume_from_checkpoint", str(checkpoint)] if checkpoint else []', "[]"),),
            SFT,
        ),
        Fault(
            "go on with another seed", (('"assistant_only_loss", "seed"),', '"assistant_only_loss"),'),), SFT
        ),
        Fault(
            "let the recipe's flags win over the user's",
            (("*asked.flags, *asked.user_flags]", "*asked.user_flags, *asked.flags]"),),
            SFT,
        ),
        Fault(
            "take an end token for granted", (("    if tokenizer.eos_token is None:", "    if False:"),), SFT
        ),
    ],
    "sft/sft.jinja": [
        Fault(
            "learn the role's line before an answer",
            (
                (
                    "        {{- '<|assistant|>\\n' }}\n        {%- generation %}\n",
                    "        {%- generation %}\n",
                ),
                (
                    "{{- message['content'] | trim + eos",
                    "{{- '<|assistant|>\\n' + message['content'] | trim + eos",
                ),
            ),
            SFT,
        ),
        Fault(
            "do not learn where an answer ends",
            (
                ("trim + eos_token }}", "trim }}"),
                ("{{- '\\n' }}", "{{- eos_token + '\\n' }}"),
            ),
            SFT,
        ),
        Fault(
            "prompt otherwise than was trained",
            (("    {{- '<|assistant|>\\n' }}\n{%- endif %}", "    {{- '<|assistant|>' }}\n{%- endif %}"),),
            SFT,
        ),
    ],
    "stream/anatomy.py": [
        Fault(
            "number layers within the stage",
            (
                (
                    "[_layer(module.layer_number, [module]) for module in modules]",
                    "[_layer(i, [module]) for i, module in enumerate(modules, 1)]",
                ),
            ),
        ),
        Fault(
            "take a hybrid model's mixer for the whole layer",
            (
                (
                    "_layer(number, modules[begin:end], kinds)",
                    "_layer(number, modules[begin : begin + 1], kinds)",
                ),
            ),
        ),
        Fault(
            "take the second of two feed-forward sub-layers for a layer",
            (("[{MIXERS}][{FEED_FORWARD}]*|", "[{MIXERS}][{FEED_FORWARD}]?|"),),
            ANATOMY,
        ),
        Fault(
            "take the part of a layer that a stage holds for the layer",
            (
                ("if begin < 0 or end > len(modules):", "if False:"),
                ("modules[begin:end]", "modules[max(0, begin) : end]"),
            ),
            ANATOMY,
        ),
        Fault(
            "recompute the parts of a layer apart",
            (("if not {*range(0, ends[-1], together)} <= {*ends}:", "if False:"),),
            ANATOMY,
        ),
        Fault(
            "believe a hybrid pattern, whatever was built",
            (('if (kind in FEED_FORWARD) != (add == "mlp_bda"):', "if False:"),),
            ANATOMY,
        ),
        Fault(
            "believe the order of a hybrid model's sub-layers",
            (("    if numbers != list(", "    if False and numbers != list("),),
            ANATOMY,
        ),
        Fault(
            "count sub-layers of which nothing is known",
            (("if kind not in MIXERS + FEED_FORWARD]", "if False]"),),
            ANATOMY,
        ),
        Fault(
            "take a module for a function that adds",
            (("getattr(module, name), nn.Module)", "getattr(module, name), nn.Dropout)"),),
            ("tests/test_methods.py", "-k", "prepared_once"),
        ),
    ],
    "stream/attachment.py": [
        Fault(
            "forget the setting of what a layer is",
            (
                (
                    "    define_layers(chunks, layer_rule(settings))\n    for chunk",
                    "    for chunk",
                ),
            ),
            HYBRID,
        ),
        Fault("let layers have any numbers", (("    _refuse_other_numbers(chunks, group)\n", ""),)),
        Fault(
            "take the type of the optimizer's parameters for that of the states",
            (('getattr(p, "orig_param", p)', "p"),),
            ("tests/test_attach.py", "-k", "gets_the_type"),
        ),
    ],
    "stream/first_step.py": [
        Fault(
            "tell what the first step shows on the rank that sees it alone",
            (("ranks = of_every_rank(self._seen(), self._group)", "ranks = [self._seen()]"),),
            FIRST_STEP,
        ),
        Fault(
            "meet after the optimizer's step",
            (("                self.settle()\n            return finalize", "            return finalize"),),
            FIRST_STEP,
        ),
        Fault(
            "let a per-token loss be counted by nobody",
            (("is_uncounted and (gradient or not has_loss)", "False"),),
            FIRST_STEP,
        ),
        Fault(
            "do not look at the loss's scale",
            (
                (
                    '        raise UserError(\n            f"the loss is',
                    '        return bool(\n            f"the loss is',
                ),
            ),
            FIRST_STEP,
        ),
        Fault(
            "forget fp16's loss scale where the loss's is looked at",
            (("        if scale is not None:", "        if False:"),),
            FIRST_STEP,
        ),
        Fault(
            "take a step without tokens for a right one",
            (
                (
                    "if not gradient or not math.isfinite(gradient):\n            return False",
                    "if not gradient or not math.isfinite(gradient):\n            return True",
                ),
            ),
            FIRST_STEP,
        ),
        Fault(
            "take a mean over all tokens for right whatever number ran",
            (("as_told and (is_near(of_all)", "(is_near(of_all)"),),
            FIRST_STEP,
        ),
        Fault(
            "refuse tokens that weigh unlike",
            (("as_told and any(rank.is_weighted for rank in ranks)", "False"),),
            FIRST_STEP,
        ),
        Fault(
            "take a sum over tokens that weigh unlike for right",
            (("_MOST_WEIGHED = 16.0", "_MOST_WEIGHED = 1e9"),),
            FIRST_STEP,
        ),
        Fault(
            "refuse micro-batches that weigh unlike",
            (("is_weighted or _differ(total[has_loss], counted[has_loss])", "is_weighted"),),
            FIRST_STEP,
        ),
        Fault(
            "forget the weight of the loss that is told",
            (("(amount * self._loss_weight for amount in amounts)", "amounts"),),
            FIRST_STEP,
        ),
        Fault(
            "compare layers until the loss shows its scale",
            (
                (
                    "            self._end_layers()\n            self._steps += 1",
                    "            self._steps += 1",
                ),
            ),
            FIRST_STEP,
        ),
        Fault(
            "wait for the loss's scale for ever",
            (("elif self._steps == MOST_STEPS:", "elif False:"),),
            FIRST_STEP,
        ),
        Fault(
            "meet only the ranks whose stage is in training mode",
            (
                (
                    "        if torch.is_grad_enabled():  # the same",
                    "        if torch.is_grad_enabled() and self._chunks[0].training:  # alike",
                ),
            ),
            FIRST_STEP,
        ),
        Fault(
            "let each rank end the checks by what it saw itself",
            (("if any(rank.runs for rank in ranks):", "if self._runs:"),),
            FIRST_STEP,
        ),
        Fault(
            "ask all ranks in each step where another has wrapped what asks",
            (("            if not self.has_ended:  # if other", "            if True:  # what"),),
            FIRST_STEP,
        ),
        Fault(
            "take a weight of the loss for a second run of the model",
            (("(as_told or self._loss_weight == 1)", "True"),),
            FIRST_STEP,
        ),
    ],
    "stream/class_method.py": [
        Fault(
            "keep a model alive that was dropped without detach",
            (("_CALLED[around] = WeakMethod(ours)", "_CALLED[around] = lambda: ours"),),
            DROPPED,
        ),
        Fault(
            "restore a class's method while another model still needs its replacement",
            (("_without_what_is_over(getattr(owner, name)))", "method)"),),
            ("tests/test_attach.py", "-k", "in_any_order"),
        ),
    ],
    "stream/full_graph.py": [
        Fault(
            "keep the model of a graph alive that was dropped without detach",
            (("= WeakSet()", "= set()  # type: ignore[assignment]"),),
            DROPPED,
        ),
        Fault(
            "count what a replay measures in every iteration",
            (("            sums.copy_(before)", "            pass"),),
            FULL_GRAPH,
        ),
        Fault(
            "sum outside of the graph what waits in a meter where the capture ends",
            (
                (
                    "            result = schedule(*args, **named)\n            self._sum()",
                    "            result = schedule(*args, **named)",
                ),
            ),
            FULL_GRAPH,
        ),
        Fault(
            "ask a model before this one whether a graph may be captured",
            (("            earlier.end()", "            pass"),),
            ("tests/test_cuda_graphs.py", "-k", "anew"),
        ),
        Fault(
            "replay a graph of another model's methods",
            (("        self._wrapper.reset_cuda_graph(self._wrapper)", "        self._wrapper"),),
            ("tests/test_cuda_graphs.py", "-k", "anew"),
        ),
    ],
    "stream/handle.py": [
        Fault(
            "replay a pipeline's graphs in another order",
            (("        if count != self._first_count:", "        if False:"),),
            ("tests/test_cuda_graphs.py", "-k", "first_order"),
        ),
        Fault(
            "name the iterations of the log interval before too",
            (("            self._measured[method] = []\n", ""),),
            (*BRIDGE, *CUT_INTERVALS),
        ),
        Fault(
            "reduce in every step",
            (("(is_interval_end or is_new)", "True"),),
            (*BRIDGE, "tests/test_cost.py"),
        ),
        Fault(
            "log again what was logged before",
            (("        if is_interval_end:\n            self.reset_training_metrics()\n", ""),),
            (*BRIDGE, *LOOP),
        ),
        Fault(
            "refuse an epoch's last step, which has fewer micro-batches",
            (("if ran > self._most_ran:", "if ran != self._most_ran:"),),
            FIRST_STEP,
        ),
        Fault(
            "let the number of micro-batches become another",
            (("if ran > self._most_ran:", "if False:"),),
            FIRST_STEP,
        ),
        Fault(
            "raise for a missing mask on one stage alone",
            (("if self._first_step.has_ended or not self._first_step.ranks_meet:", "if True:"),),
            FIRST_STEP,
        ),
        Fault(
            "measure an iteration twice that Megatron runs again to validate it",
            ((".is_paused = is_rerun", ".is_paused = False"),),
            ("tests/test_attach.py", "-k", "validate_it"),
        ),
        Fault(
            "take a model that is sharded after attach",
            (("if not self._is_sharded and (", "if False and ("),),
            ("tests/test_attach.py", "-k", "after_attach"),
        ),
        Fault(
            "freeze the choices of the iteration that is captured",
            (("self._iteration is not None and not in_full_graph:", "self._iteration is not None:"),),
            FULL_GRAPH,
        ),
    ],
    "stream/layer_watch.py": [
        Fault(
            "compare a layer's values and not its memory",
            (("if is_moved and other.dtype", "if False and other.dtype"),),
            FIRST_STEP,
        ),
        Fault(
            "take a layer's state as it is after an in-place change",
            (("self._values = self._state.clone()", "self._values = self._state"),),
            FIRST_STEP,
        ),
        Fault(
            "let a layer's input be another state",
            (("not self._given.is_same(residual, self._may_copy)", "self._given is None"),),
            FIRST_STEP,
        ),
        Fault(
            "let a layer add its residual by itself",
            (
                ("if self._given is not None or self._tapped is None:", "if False:"),
                ("elif not self._tapped", "elif self._tapped and not self._tapped"),
            ),
            FIRST_STEP,
        ),
        Fault("let a layer run twice", (("if self._has_run:", "if False:"),), FIRST_STEP),
        Fault("let a layer not run", (("if not self._has_run:", "if False:"),), FIRST_STEP),
        Fault("let a layer begin and not end", (("elif self._is_running:", "elif False:"),), FIRST_STEP),
        Fault(
            "let a layer add to its input twice",
            (
                ("        if self._given is None:\n", "        if False:\n"),
                ("elif not self._given.is_same", "elif self._given and not self._given.is_same"),
            ),
            FIRST_STEP,
        ),
        Fault(
            "let a layer add its end twice",
            (("        if self._tapped is not None:\n", "        if False:\n"),),
            FIRST_STEP,
        ),
        Fault(
            "let the stream be wider than the model",
            (("if state.shape[-1] != self._hidden_size:", "if False:"),),
            FIRST_STEP,
        ),
        Fault(
            "let a layer recompute itself",
            (("elif torch.is_grad_enabled() and not", "elif False and not"),),
            FIRST_STEP,
        ),
        Fault(
            "take a forward pass that broke off for a run",
            (
                (
                    "self._has_run = self._is_running = False\n        self._given = self._tapped = None\n",
                    "pass\n",
                ),
            ),
            FIRST_STEP,
        ),
        Fault(
            "do not see what is written in place without a change",
            (("if _version(self._state) != self._version:", "if False:"),),
            FIRST_STEP,
        ),
        Fault(
            "compare what a graph behind experts is given with what the layer returns",
            (
                (
                    "            self._tapped = _Kept(state)\n\n    def returned",
                    "            pass\n\n    def returned",
                ),
            ),
            ("tests/test_cuda_graphs.py", "-k", "replayed_graphs and local and experts"),
        ),
    ],
    "stream/local_graph.py": [
        Fault(
            "let Megatron's own graphs reuse a layer's output before its backward pass",
            (
                (
                    "_tag_cudagraph_buffer_saved_for_backward(output)",
                    "_apply_cudagraph_buffer_metadata(output)",
                ),
            ),
            LOCAL_GRAPHS,
        ),
        Fault(
            "have each of Megatron's own graphs copy the state before it",
            (("if shown.data_ptr() == output.data_ptr():", "if False:"),),
            ("tests/test_cuda_graphs.py", "-k", "until_they_are_recorded"),
        ),
        Fault(
            "attach to layers whose graphs generate text already",
            ((" or record.cudagraph_inference_record", ""),),
            ("tests/test_cuda_graphs.py", "-k", "generated and block"),
        ),
        Fault(
            "replay behind detach what a method changed",
            (("(in_layers and are_captured()) or ", ""),),
            ("tests/test_cuda_graphs.py", "-k", "after_detach"),
        ),
    ],
    "stream/meter.py": [
        Fault("log what one rank saw", (("dist.all_reduce(sums, group=group)", "pass"),)),
        Fault(
            "count a micro-batch instead of its tokens",
            (("counts[:, 0] = each.shape[-1]", "counts[:, 0] = 1"),),
        ),
        Fault(
            "forget the values that wait for the other layers",
            (("        self._sum()\n        self._streams.clear()", "        self._streams.clear()"),),
            ("tests/test_attach.py",),
        ),
        Fault(
            "take the largest norm of one rank",
            (("ranks[:, sums.numel() :].amax(0)", "ranks[0, sums.numel() :]"),),
            TESTS,
        ),
        Fault(
            "take means over other tokens in some layers than in others",
            (("if times_seen.min() != times_seen.max():", "if False:"),),
        ),
        Fault(
            "let pipeline stages count other tokens",
            (("if not torch.allclose(num_tokens,", "if False and not torch.allclose(num_tokens,"),),
            FIRST_STEP,
        ),
        Fault(
            "sum in one stream what another one has still to write",
            (("            current.wait_stream(stream)", "            pass"),),
            ("tests/test_overlap.py", "-k", "two_streams"),
        ),
        Fault(
            "wait in a capture for a stream that added before it",
            (("        self._streams.clear()\n", ""),),
            ("tests/test_overlap.py", "-k", "captured_sum"),
        ),
        Fault(
            "free what another stream is summing",
            (("            tensor.record_stream(current)", "            pass"),),
            ("tests/test_overlap.py", "-k", "another_one"),
        ),
    ],
    "stream/method.py": [
        Fault(
            "let a part of a log interval pass for the whole",
            (("if self.iterations != tuple(filter(self.settings.measures_at, interval)):", "if False:"),),
            (*BRIDGE, *CUT_INTERVALS),
        ),
        Fault(
            "follow the loss mask although padding is told",
            (
                (
                    "self.loss_mask if self.padding_mask is None else",
                    "self.loss_mask if self.loss_mask is not None else",
                ),
            ),
            PADDING,
        ),
    ],
    "stream/overlap.py": [
        Fault(
            "miss that a plan begins a micro-batch",
            (("            before(chunk, given, named)\n", ""),),
            OVERLAP,
        ),
    ],
    "stream/preparation.py": [
        Fault(
            "prepare a model by another rule of what a layer is",
            (("    define_layers([unwrap(chunk) for chunk in chunks], layer_rule(settings))\n", ""),),
            HYBRID,
        ),
        Fault(
            "train a model that has gates without them",
            (("            _ask_for_attach(chunk, changing)\n", "            pass\n"),),
            ("tests/test_methods.py", "-k", "prepared_once"),
        ),
        Fault(
            "let a graph read a norm of Peri-LN before it is gathered",
            (("[*listed(), *added]", "[*listed()]"),),
            ("tests/test_param_gather.py",),
        ),
    ],
    "stream/reruns.py": [
        Fault(
            "measure an iteration twice that Megatron runs again",
            (("            sums.copy_(before)", "            pass"),),
            RERUNS,
        ),
        Fault(
            "count what waits in a meter when an iteration is run again",
            (("            meter.totals()  # sums", "            pass  # what waits"),),
            ("tests/test_cuda_graphs.py", "-k", "still_to_sum"),
        ),
    ],
    "stream/scaling.py": [
        Fault("drop the 1/M of gradient accumulation", (("coeff / self._num_microbatches()", "coeff"),)),
        Fault("forget context parallelism", ((FACTOR, f"{FACTOR} / self._config.context_parallel_size"),)),
        Fault(
            "average over each rank's own tokens under sequence parallelism",
            ((FACTOR, FACTOR.replace(" * self._size", "")),),
        ),
        Fault("forget the loss scale of fp16", (("if grad_scale is not None:", "if False:"),)),
        Fault(
            "average although the loss is per token",
            (("        if self.is_per_token:\n            return 1.0\n", ""),),
        ),
        Fault("take another rank's part of the mask", (("[self._sharing.rank()]", "[0]"),)),
        Fault(
            "take a context-parallel rank's late pieces in the order of the ranks",
            (("*reversed(late)", "*late"),),
            ("tests/test_let.py", "-k", "every_layout_on and 2"),
        ),
        Fault(
            "give every rank the teacher's first tokens under sequence parallelism",
            (("whole.chunk(self._size)[self._sharing.rank()]", "whole.chunk(self._size)[0]"),),
            ("tests/test_let.py", "-k", "every_layout_on and 4"),
        ),
        Fault(
            "count the tokens of a cut mask on each rank alone",
            (("        if is_cut:\n", "        if False:\n"),),
            PADDING,
        ),
        Fault("cut a mask that is cut already", (("len(mask) == len(state)", "False"),), PADDING),
    ],
    "stream/settings.py": [
        Fault(
            "let methods on a model have layers of their own",
            (("    if len(given) > 1:", "    if False:"),),
            ANATOMY,
        ),
        Fault(
            "do not find the added parameter in the optimizer by its module",
            (('f".{name}." in f".{parameter}."', "parameter.endswith(name)"),),
            ("tests/test_methods.py", "-k", "prepared_once"),
        ),
    ],
    "stream/support.py": [
        Fault(
            "offload the norm of an MLP with which a layer begins",
            (('layer.adds[0][1] == "mlp_bda"', "False"),),
            ("tests/test_offload.py", "-k", "refused"),
        ),
        Fault(
            "take what Megatron's own graphs do wrong",
            (("            _refuse_local_graphs(model_config)\n", "            pass\n"),),
            ("tests/test_cuda_graphs.py", "-k", "do_wrong"),
        ),
        Fault(
            "attach to layers that Megatron has recorded already",
            (("        local_graph.refuse_recorded()", "        pass"),),
            ("tests/test_cuda_graphs.py", "-k", "until_they_are_recorded"),
        ),
        Fault(
            "forget what Megatron still calls graphs of the whole iteration",
            (('self.cuda_graph_impl = "full_iteration"', "pass"),),
            ("tests/test_bridge.py", "-k", "older_name"),
        ),
        Fault(
            "allow graphs by today's name alone",
            (("                self.cuda_graph_impl = name\n", "                pass\n"),),
            ("tests/test_bridge.py", "-k", "older_name"),
        ),
        Fault(
            "know torch's FSDP2 by Megatron's name for its wrapper alone",
            (('name.endswith("TorchFullyShardedDataParallel")', 'name == "TorchFullyShardedDataParallel"'),),
            ("tests/test_variants.py", "-k", "FSDP2 and not bf16"),
        ),
        Fault(
            "take a method that nothing has compared in the overlapped schedule",
            (("if not of_one.in_overlap", "if False"),),
            ("tests/test_overlap.py", "-k", "by_name"),
        ),
        Fault(
            "take Megatron's own graphs of layers in the overlapped schedule",
            (('if model_config.cuda_graph_impl == "local":', "if False:"),),
            ("tests/test_overlap.py", "-k", "by_name"),
        ),
        Fault(
            "forget what an overlapped iteration in a graph needs",
            (('        if graphs == "full_iteration":\n', "        if False:\n"),),
            ("tests/test_overlap.py", "-k", "by_name"),
        ),
        Fault(
            "take offloading that frees a layer's input",
            ((' if _offloads(model_config, "attn_norm"):', " if False:"),),
            ("tests/test_offload.py", "-k", "refused"),
        ),
        Fault(
            "take FSDP2 with a loss per token",
            (
                (
                    '(getattr(config, "calculate_per_token_loss", False), REFUSED[name])',
                    "(False, REFUSED[name])",
                ),
            ),
            ("tests/test_attach.py::test_every_unsupported_setting_is_refused_by_its_name",),
        ),
        Fault(
            "take experts whose gradients Megatron-FSDP divides too often",
            (("and ranks > of_experts == 1", "and of_experts > ranks == 1"),),
            ("tests/test_attach.py", "-k", "divides_too_often"),
        ),
        Fault(
            "take Megatron-FSDP before 0.19",
            (("(0, minor) <= (MAJOR, MINOR)", "True"),),
            ("tests/test_attach.py", "-k", "compared_in_megatron_fsdp"),
        ),
    ],
    "stream/tap.py": [
        Fault(
            "run graphs of Transformer Engine with what a detached method changed",
            (("            undo.append(self._refuse_what_graphs_hold)\n", "            pass\n"),),
            ("tests/test_cuda_graphs.py", "-k", "transformer_engines_graphs_that_still"),
        ),
        Fault(
            "count both runs of a recomputed layer",
            (
                (
                    "self._will_be_rerun = chunk.is_training and not torch.is_grad_enabled()",
                    "self._will_be_rerun = False",
                ),
            ),
        ),
        Fault(
            "take any micro-batch for the one recomputed",
            (
                (
                    "            self.microbatch = found[1]\n",
                    "            self.microbatch = self.microbatch or found[1]\n",
                ),
            ),
        ),
        Fault(
            "take a Mamba layer's output for its input",
            (
                (
                    "self._tapped_output(functools.partial(self._tapped_input, factory)",
                    "self._tapped_output(functools.partial(self._tapped_output, factory)",
                ),
            ),
            HYBRID,
        ),
        Fault(
            "take the taps off layers that the next step needs",
            (("tap.put_on() if is_needed else tap.take_off()", "is_needed or tap.take_off()"),),
            ("tests/test_attach.py", "-k", "does_not_measure"),
        ),
        Fault(
            "leave the taps on layers with which nothing is done",
            (("tap.put_on() if is_needed else tap.take_off()", "tap.put_on()"),),
            ("tests/test_attach.py", "-k", "does_not_measure"),
        ),
        Fault(
            "attenuate in the runs that count alone",
            (
                (
                    "if self._change is None or self._input is None:",
                    "if self._change is None or self._microbatch is None or self._input is None:",
                ),
            ),
            METHODS,
        ),
        Fault(
            "ask a layer whether it is recomputed, not the block",
            (("bool(self._chunk.decoder.training)", "bool(self._chunk.decoder.layers[-1].training)"),),
        ),
        Fault(
            "compare layers in every evaluation before training",
            (("is_counted and (chunk.training or not self._was_evaluated)", "is_counted"),),
            FIRST_STEP,
        ),
        Fault(
            "let attenuation count as what the MLP adds",
            (
                (
                    "self._input, middle, layer_output)",
                    "self._input, middle, layer_output if self._change is None else "
                    "self._change(self.number, self._input, layer_output))",
                ),
            ),
            DEPTH_TRAINING,
        ),
        Fault(
            "leave a layer out whose end is in a CUDA graph",
            (
                (
                    "if module is not self._layer.last or layer_input is None or self._chunk.is_planned:",
                    "if True:",
                ),
            ),
            ("tests/test_cuda_graphs.py",),
        ),
        Fault(
            "change a layer's output again that has been changed in its CUDA graph",
            (
                (
                    "self._show(self._changed(state) if self._is_begun else state)",
                    "self._show(self._changed(state))",
                ),
            ),
            ("tests/test_cuda_graphs.py",),
        ),
        Fault(
            "leave a hybrid layer's output unchanged whose end is in a CUDA graph of its own",
            (
                (
                    "            self._is_begun = module is not self._layer.last",
                    "            self._is_begun = False",
                ),
            ),
            GRAPHS_OF_HYBRIDS,
        ),
        Fault(
            "use a state in the memory of a CUDA graph when another graph of the layer has run",
            (("            self._input = layer_input.view_as(layer_input)", "            pass"),),
            GRAPHS_OF_HYBRIDS,
        ),
        Fault(
            "take what a CUDA graph captures for a layer of a micro-batch",
            (("(None if is_captured else chunk.microbatch), None", "chunk.microbatch, None"),),
            ("tests/test_cuda_graphs.py",),
        ),
        Fault(
            "take what Megatron captures in a graph of its own for a layer that is recomputed",
            (('(chunk.graphs == "local" and not chunk.is_in_forward)', "False"),),
            LOCAL_GRAPHS,
        ),
        Fault(
            "refuse behind detach what no graph holds",
            (("self.is_changed_in_graph |= self._is_captured", "self.is_changed_in_graph = True"),),
            ("tests/test_cuda_graphs.py", "-k", "two_graphs"),
        ),
        Fault(
            "give methods the very tensor that each replay returns",
            (
                (
                    "local_graph.apart(output) if is_local and self._microbatch is not None else output",
                    "output",
                ),
            ),
            ("tests/test_cuda_graphs.py", "-k", "evaluations_between"),
        ),
        Fault(
            "measure where text is generated, and watch layers that a graph captures there",
            (("else not is_generating", "else True"),),
            ("tests/test_cuda_graphs.py", "-k", "generated"),
        ),
        Fault(
            "change a layer's output in the graph of its last module by the input of another graph",
            (("self._input = None if is_part else residual", "self._input = residual"),),
            ("tests/test_cuda_graphs.py", "-k", "replayed_graphs and local and layers and HybridModel"),
        ),
        Fault(
            "put the node into the graph of what comes behind experts",
            (("self._undo_graphs.append(local_graph.go_around_experts(module, experts))", "pass"),),
            ("tests/test_cuda_graphs.py", "-k", "replayed_graphs and local and experts"),
        ),
        Fault(
            "leave hooks on layers that Megatron replays",
            (('self.graphs == "local" and local_graph.are_captured()', "False"),),
            ("tests/test_cuda_graphs.py", "-k", "until_they_are_recorded"),
        ),
        Fault(
            "take what the final norm gives for what the last layer of a plan returns",
            (("        self._taps[-1].returned(given[0])", "        pass"),),
            OVERLAP,
        ),
        Fault(
            "take what a CUDA graph gives to a plan's next node for the layer's output",
            ((" or self._chunk.is_planned:", ":"),),
            ("tests/test_overlap.py", "-k", "replayed"),
        ),
        Fault(
            "let the last node of a layer go backward through the first one's graph",
            (("            self._input = leaf", "            pass"),),
            ("tests/test_overlap.py", "-k", "fork"),
        ),
        Fault(
            "keep the nodes of a plan that is over",
            (
                (
                    "            wrap(first, ",
                    "            self._nodes = first, last\n            wrap(first, ",
                ),
            ),
            ("tests/test_overlap.py", "-k", "freed_as_soon"),
        ),
    ],
    "sweep/queue.py": [
        Fault(
            "keep a scheduler's signal from the recipe",
            (("                os.kill(recipe, number)", "                pass"),),
            ("tests/test_sweep.py::test_sigterm_reaches_the_recipe_and_the_same_command_resumes_it",),
        ),
    ],
    "training_loop.py": [
        Fault(
            "load a teacher where nothing is trained",
            (("if get_args().skip_train else", "if False else"),),
            ("tests/test_let.py", "-k", "resumed"),
        ),
        Fault(
            "load a changed model's checkpoint into one that a script has built by itself",
            (("elif not changed_here.issuperset(saved):", "elif False:"),),
            ("tests/test_launch.py", "-k", "by_itself"),
        ),
        Fault(
            "resume a model that a method has changed without it",
            (("    if saved != own and (", "    if False and ("),),
            METHODS,
        ),
        Fault(
            "train on where nothing has attached JREG",
            (("        raise UserError(_NOT_ATTACHED)\n", "        return None\n"),),
            LOOP,
        ),
        Fault(
            "leave other modules with the functions that know nothing of JREG",
            (('if key.startswith("megatron.") and', "if other is module and"),),
            LOOP,
        ),
        Fault(
            "begin a schedule an iteration late", (("    return before + 1\n", "    return before\n"),), LOOP
        ),
        Fault(
            "log nothing of a log interval that the run's end cuts off",
            (('    _decorate(training, log_at_the_end, "checkpoint_and_decide_exit")\n', ""),),
            CUT_INTERVALS,
        ),
        Fault(
            "log a cut interval in patched trees never",
            (
                (
                    "                _decorate_the_end(training)\n                for name",
                    "                for name",
                ),
            ),
            ("tests/test_patches.py::test_a_patched_tree_trains_as_launched",),
        ),
        Fault(
            "leave a jump rate of 0 to Megatron 0.16",
            (
                (
                    "def __gt__(self, other: float) -> bool:\n        return True\n\n    __ge__ = __gt__\n",
                    "pass\n",
                ),
            ),
            LINE,
        ),
        Fault(
            "stand in front of Megatron's losses",
            (("totals.setdefault(name, torch.zeros(1, device=loss.device))", "pass"),),
            LINE,
        ),
        Fault(
            "train on nodes of which some fuse gradient accumulation",
            (("    if len(set(ranks)) > 1:\n", "    if False:\n"),),
            ("tests/test_recipes.py::test_nodes_that_differ_in_apex_are_refused_on_every_rank",),
        ),
        Fault(
            "log nothing of what a rerun's exit cuts off",
            (("if attached is not None and result[_SHOULD_EXIT]:", "if False:"),),
            CUT_INTERVALS,
        ),
        Fault(
            "log nothing where the last iterations are skipped",
            (("ends=lambda _: True", "ends=lambda _: False"),),
            CUT_INTERVALS,
        ),
        Fault(
            "let a launched script find out at a step what its optimizer does not run with",
            (("        optimizer.combination(args)\n", "        pass\n"),),
            ("tests/test_launch.py::test_a_mistake_ends_every_rank_with_one_line",),
        ),
    ],
}
FAULTS = [replace(fault, file=file) for file, faults in _BY_FILE.items() for fault in faults]


def first_failure(fault: Fault) -> str | None:
    """The first test that fails with the fault in the package, or None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        # All that git knows, so that each process of a test has the fault, wherever it starts.
        listed = subprocess.check_output("git ls-files -co --exclude-standard".split(), cwd=ROOT, text=True)
        for name in (name for name in listed.splitlines() if (ROOT / name).is_file()):
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
        file = Path(folder, "jreg_megatron", fault.file)
        file.write_text(fault.put_into(file.read_text()))
        words = "-m pytest -x -q -n 0 --no-header -p no:cacheprovider".split()
        run = subprocess.run(
            [sys.executable, *words, *fault.tests],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S*?::(.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    assert run.returncode == 1 and found, fault.name + run.stdout[-3000:] + run.stderr[-3000:]
    return found[1]


def main() -> int:
    """Try the faults whose name holds the words of the command line, or all."""
    words = " ".join(sys.argv[1:])
    faults = [fault for fault in FAULTS if words in fault.name]
    missed = 0
    with ThreadPoolExecutor(2) as two_at_a_time:
        for fault, caught_by in zip(faults, two_at_a_time.map(first_failure, faults), strict=True):
            missed += caught_by is None
            print(f"{fault.name}\n    {'caught by ' + caught_by if caught_by else 'NOT CAUGHT'}", flush=True)
    print(f"{len(faults)} faults: {len(faults) - missed} caught, {missed} not")
    return 1 if missed or not faults else 0


if __name__ == "__main__":
    sys.exit(main())
