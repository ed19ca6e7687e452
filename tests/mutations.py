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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_penalty.py", "tests/test_attach.py", "tests/test_equivalence.py")
BRIDGE = ("tests/test_bridge.py",)
LOOP = ("tests/test_launch.py", "tests/test_pretrain.py")
CPU = ("tests/test_cpu_mode.py",)
KERNELS = ("tests/test_kernels.py",)
MEASURE = ("tests/test_measure.py", "tests/test_decoder.py")
EVALUATE = ("tests/test_evaluate.py",)
CONVERT = ("tests/test_convert.py",)
VARIANTS = ("tests/test_variants.py",)
PREFLIGHT = ("tests/test_preflight.py",)
HELPER = ("tests/test_dataset_helper.py",)
GATHER = "tests/test_cpu_mode.py::test_an_all_gather_of_any_sizes_gives_the_plain_concatenation"
REFUSALS = "tests/test_pretrain.py::test_what_megatron_refuses_is_told_from_what_goes_wrong"
NO_PACKAGE = "test_an_optimizer_whose_package_is_missing_is_refused_and_in_a_dry_run_named"


@dataclass(frozen=True)
class Fault:
    """A change to one file of the package: each text must stand there once."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: Sequence[str] = TESTS

    def put_into(self, text: str) -> str:
        """The file's text with the fault."""
        for old, new in self.changes:
            assert text.count(old) == 1, f"{self.name}: {self.file} holds {text.count(old)} times {old!r}"
            text = text.replace(old, new)
        return text


FACTOR = "factor /= state.shape[0] * state.shape[1] * self._sequence_parallel_size"

FAULTS = [
    Fault(
        "drop the 1/M of gradient accumulation",
        "attachment.py",
        (("coeff / self._num_microbatches()", "coeff"),),
    ),
    Fault(
        "count both runs of a recomputed layer",
        "residual_stream.py",
        (
            (
                "self._will_be_rerun = chunk.is_training and not torch.is_grad_enabled()",
                "self._will_be_rerun = False",
            ),
        ),
    ),
    Fault(
        "take any micro-batch for the one recomputed",
        "residual_stream.py",
        (
            (
                "            self.microbatch = found[1]\n",
                "            self.microbatch = self.microbatch or found[1]\n",
            ),
        ),
    ),
    Fault(
        "forget context parallelism",
        "attachment.py",
        ((FACTOR, f"{FACTOR} * self._model_config.context_parallel_size"),),
    ),
    Fault(
        "average over each rank's own tokens under sequence parallelism",
        "attachment.py",
        ((FACTOR, FACTOR.replace(" * self._sequence_parallel_size", "")),),
    ),
    Fault(
        "number layers within the stage",
        "residual_stream.py",
        (
            (
                "[ResidualLayer(module.layer_number, module, module) for module in modules]",
                "[ResidualLayer(i, module, module) for i, module in enumerate(modules, 1)]",
            ),
        ),
    ),
    Fault("turn the sign", "kernels/eager.py", (("(-0.5 * factor)", "(0.5 * factor)"),)),
    Fault(
        "turn the sign in the fused kernel",
        "kernels/programs.py",
        (("(-0.5 * factor)", "(0.5 * factor)"),),
        KERNELS,
    ),
    Fault(
        "divide by the norm of rows that have none in the fused kernel",
        "kernels/programs.py",
        (("    return tl.where(square == 0, 0.0, inverse)", "    return inverse"),),
        KERNELS,
    ),
    Fault(
        "walk a transposed state as if it were contiguous",
        "kernels/programs.py",
        (("(rows % batch).to(tl.int64) * stride_b", "(rows % batch).to(tl.int64) * (stride_s // batch)"),),
        KERNELS,
    ),
    Fault(
        "forget the tail of a row wider than a tile",
        "kernels/programs.py",
        (("for start in range(0, WIDTH, COLUMNS):", "for start in range(0, WIDTH - COLUMNS, COLUMNS):"),),
        KERNELS,
    ),
    Fault(
        "leave out the heaviest layers in place of the lightest",
        "settings.py",
        (("weights.argsort(stable=True)", "weights.argsort(stable=True, descending=True)"),),
        ("tests/test_settings.py",),
    ),
    Fault(
        "measure a regularized layer in no pass",
        "attachment.py",
        (
            (
                "return add_displacement_gradient(h_in, h_out, strength, on_psi)",
                "return add_displacement_gradient(h_in, h_out, strength)",
            ),
        ),
    ),
    Fault(
        "keep the stage output that the pipeline frees",
        "penalty.py",
        (
            (
                "        return h_out.detach()  #",
                "        ctx.kept = h_out.clone()\n        return ctx.kept  #",
            ),
            (
                "        grad_in, grad_total, psi = strength",
                "        h_out = ctx.kept\n        grad_in, grad_total, psi = strength",
            ),
        ),
    ),
    Fault(
        "forget the loss scale of fp16",
        "attachment.py",
        (("if grad_scale is not None:", "if False:"),),
    ),
    Fault(
        "average although the loss is per token",
        "attachment.py",
        (
            (
                "microbatch.token_weights is None and not self._model_config.calculate_per_token_loss",
                "microbatch.token_weights is None",
            ),
        ),
    ),
    Fault(
        "take another rank's part of the mask",
        "attachment.py",
        (("x.chunk(size)[rank]", "x.chunk(size)[0]"),),
    ),
    Fault(
        "regularize masked tokens too",
        "attachment.py",
        (
            (
                "Strength(self._kernels, self._coefficient, factor, microbatch.token_weights)",
                "Strength(self._kernels, self._coefficient, factor, None)",
            ),
        ),
    ),
    Fault(
        "leave the layer's input out of the gradient",
        "penalty.py",
        (
            (
                "        return grad_in, grad_total, None, None\n",
                "        return None, grad_total, None, None\n",
            ),
        ),
    ),
    Fault(
        "drop the input's gradient of a recomputed last layer after the norm",
        "penalty.py",
        (("return carried\n", "return carrier\n"),),
    ),
    Fault(
        "pair a hybrid model's sub-layers one off",
        "residual_stream.py",
        (("mlp.layer_number // 2, attention, mlp", "mlp.layer_number // 2, mlp, mlp"),),
    ),
    Fault(
        "log what one rank saw",
        "metrics.py",
        (("dist.all_reduce(total, group=group)", "pass"),),
    ),
    Fault(
        "count a micro-batch instead of its tokens",
        "metrics.py",
        (("self._counts(psi.numel())", "self._counts(1)"),),
    ),
    Fault(
        "ask a layer whether it is recomputed, not the block",
        "residual_stream.py",
        (("bool(self._chunk.decoder.training)", "bool(self._chunk.decoder.layers[-1].training)"),),
    ),
    Fault(
        "take means over other tokens in some layers than in others",
        "metrics.py",
        (("if times_seen.min() != times_seen.max():", "if False:"),),
    ),
    Fault(
        "train on where nothing has attached JREG",
        "training_loop.py",
        (("        raise UserError(_NOT_ATTACHED)\n", "        return None\n"),),
        LOOP,
    ),
    Fault(
        "leave other modules with the functions that know nothing of JREG",
        "training_loop.py",
        (('if key.startswith("megatron.") and', "if other is module and"),),
        LOOP,
    ),
    Fault(
        "begin a schedule an iteration late",
        "training_loop.py",
        (("    return before + 1\n", "    return before\n"),),
        LOOP,
    ),
    Fault(
        "free what is still being sent",
        "cpu/redirect.py",
        (("send(tensor.detach(), ", "send(tensor, "),),
        CPU,
    ),
    Fault(
        "call an iteration of Bridge by the number of the one before",
        "bridge.py",
        (("train_state.step) + 1", "train_state.step)"),),
        BRIDGE,
    ),
    Fault(
        "reduce in every step",
        "attachment.py",
        (("if not (is_interval_end or (self._has_measured and not self._is_seen_whole)):", "if False:"),),
        (*BRIDGE, "tests/test_cost.py"),
    ),
    Fault(
        "log again what was logged before",
        "attachment.py",
        (
            (
                "        if is_interval_end:\n            self.reset_training_metrics()\n",
                "        if is_interval_end:\n",
            ),
        ),
        (*BRIDGE, *LOOP),
    ),
    Fault(
        "let Bridge train another model than the one with JREG",
        "bridge.py",
        (("if [unwrap(chunk) for chunk in context.model] != self._chunks:", "if False:"),),
        BRIDGE,
    ),
    Fault(
        "let Bridge train where its events do not come",
        "bridge.py",
        (
            (
                "            raise UserError(_NOT_ATTACHED)\n        return int",
                "            return 1\n        return int",
            ),
        ),
        BRIDGE,
    ),
    Fault(
        "measure padding as if it were text",
        "measure/statistics.py",
        (("values = torch.where(self._mask, values, 0.0)", "values = values + 0 * self._mask"),),
        MEASURE,
    ),
    Fault(
        "compare the normed state with the last layer's output",
        "measure/statistics.py",
        (("self._before = before if number == self.num_layers else after", "self._before = after"),),
        MEASURE,
    ),
    Fault(
        "measure all tokens alike, whatever text they are in",
        "measure/statistics.py",
        (("self.total = self.total + sums / tokens", "self.total = self.total + sums"),),
        MEASURE,
    ),
    Fault(
        "leave out the first token of a text, not of each sequence",
        "measure/statistics.py",
        (
            (
                "self.without_first.add(self._rest, self._tokens - self._windows)",
                "self.without_first.add(self._rest, self._tokens - 1)",
            ),
        ),
        MEASURE,
    ),
    Fault(
        "take a norm before the layers for the final one",
        "decoder/decoder.py",
        (("            if is_through:\n", "            if True:\n"),),
        MEASURE,
    ),
    Fault(
        "take the norm in front of the head for a layer's own",
        "decoder/structure.py",
        (("return None if has_matrix else call.module", "return call.module"),),
        MEASURE,
    ),
    Fault(
        "let random weights pass where the files hold none",
        "decoder/hugging_face.py",
        (('    if missing := sorted(map(str, info["missing_keys"])):', "    if missing := []:"),),
        MEASURE,
    ),
    Fault(
        "score the token itself, not the one behind it",
        "evaluate/layers.py",
        (("targets = ids[:, 1:][kept]", "targets = ids[:, :-1][kept]"),),
        EVALUATE,
    ),
    Fault(
        "swap gate and up projection",
        "convert/weights.py",
        (
            (
                '_SEPARATE_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")',
                '_SEPARATE_GATE_UP = ("mlp.up_proj", "mlp.gate_proj")',
            ),
        ),
        CONVERT,
    ),
    Fault(
        "gather pieces of one size only, as gloo does",
        "cpu/redirect.py",
        (("if own < 0 or len({piece.shape for piece in tensor_list}) == 1:", "if True:"),),
        (GATHER,),
    ),
    Fault(
        "wait for the last of a gather's pieces only",
        "cpu/redirect.py",
        (("        for work in works:\n", "        for work in works[-1:]:\n"),),
        (GATHER,),
    ),
    Fault(
        "leave the gradient of the key that heads share to a rank's own heads",
        "cpu/attention.py",
        (("        if self._width_shared:\n", "        if False:\n"),),
        VARIANTS,
    ),
    Fault(
        "sum the gradient of a norm that every rank has whole",
        "cpu/megatron.py",
        (("if config.multi_latent_attention and not config.sequence_parallel:", "if False:"),),
        VARIANTS,
    ),
    Fault(
        "take values to be as wide as keys",
        "cpu/attention.py",
        (("        if v_channels is not None:\n", "        if False:\n"),),
        VARIANTS,
    ),
    Fault(
        "leave a window to Megatron's mask",
        "cpu/attention.py",
        (("self.attn_mask_type == AttnMaskType.causal and", "False and"),),
        VARIANTS,
    ),
    Fault(
        "give a window without an end one",
        "cpu/attention.py",
        (("is not None and self._looks_back >= 0:", "is not None:"),),
        VARIANTS,
    ),
    Fault(
        "exchange tokens by numbers that are tensors",
        "cpu/megatron.py",
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
        "cpu/megatron.py",
        (("begin(self, fp8 or None)", "begin(self, fp8 or False)"),),
        VARIANTS,
    ),
    Fault(
        "hand on a norm of an fp32 residual in fp32",
        "cpu/megatron.py",
        (("        if config.fp32_residual_connection:\n", "        if False:\n"),),
        VARIANTS,
    ),
    Fault(
        "start without an optimizer's package",
        "preflight/optimizer.py",
        (('find_spec("emerging_optimizers") is None:', "False:"),),
        PREFLIGHT,
    ),
    Fault(
        "look for an optimizer's package only where all arguments are known",
        "preflight/__init__.py",
        (
            (
                "    optimizer.package(args.optimizer)\n    if _is_read_elsewhere(args):\n        return\n",
                "    if _is_read_elsewhere(args):\n        return\n    optimizer.package(args.optimizer)\n",
            ),
        ),
        PREFLIGHT,
    ),
    Fault(
        "let ranks share an optimizer in fp32",
        "preflight/optimizer.py",
        (("if not args.bf16 and (", "if False and ("),),
        PREFLIGHT,
    ),
    Fault(
        "launch without an optimizer's package",
        "launch.py",
        (('    optimizer.package(value_of(sys.argv, "--optimizer"))\n', ""),),
        ("tests/test_launch.py::test_a_mistake_ends_every_rank_with_one_line",),
    ),
    Fault(
        "plan without an optimizer's package",
        "recipe/__main__.py",
        (("        preflight.optimizer.package(asked.optimizer)\n", ""),),
        ("tests/test_recipes.py::" + NO_PACKAGE,),
    ),
    Fault(
        "take what goes wrong in training for a refusal",
        "errors.py",
        (("or not is_refusal or has_begun():", "or not is_refusal:"),),
        (REFUSALS,),
    ),
    Fault(
        "end with a traceback where Megatron lacks a package",
        "errors.py",
        ((" or isinstance(error.__cause__, ImportError)", ""),),
        (REFUSALS,),
    ),
    Fault(
        "compile in every rank",
        "dataset_helper.py",
        (('if os.environ.get("RANK", "0") == "0":', "if True:"),),
        HELPER,
    ),
    Fault(
        "let make find out that there is no pybind11",
        "dataset_helper.py",
        (('"--includes").returncode:', '"--includes").returncode < 0:'),),
        HELPER,
    ),
    Fault(
        "take a compiled helper for new that is older than its source",
        "dataset_helper.py",
        (("file.stat().st_mtime >= least for", "file.stat().st_mtime >= 0 for"),),
        HELPER,
    ),
]


def first_failure(fault: Fault, folder: Path) -> str | None:
    """The first test that fails with the fault in the package, or None if all pass."""
    package = folder / "jreg_megatron"
    shutil.copytree(ROOT / "jreg_megatron", package, ignore=shutil.ignore_patterns("__pycache__"))
    file = package / fault.file
    file.write_text(fault.put_into(file.read_text()))
    # -P: not the working folder, which holds the package without the fault.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *fault.tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S*?::(.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    assert run.returncode == 1 and found, run.stdout[-3000:] + run.stderr[-3000:]
    return found[1]


def main() -> int:
    """Try the faults whose name holds the words of the command line, or all."""
    words = " ".join(sys.argv[1:])
    faults = [fault for fault in FAULTS if words in fault.name]
    missed = 0
    for fault in faults:
        with tempfile.TemporaryDirectory() as folder:
            caught_by = first_failure(fault, Path(folder))
        missed += caught_by is None
        print(f"{fault.name}\n    {'caught by ' + caught_by if caught_by else 'NOT CAUGHT'}", flush=True)
    print(f"{len(faults)} faults: {len(faults) - missed} caught, {missed} not")
    return 1 if missed or not faults else 0


if __name__ == "__main__":
    sys.exit(main())
