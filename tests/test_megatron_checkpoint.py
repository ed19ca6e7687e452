"""Checkpoints of real trainings at several layouts, against what those trainings logged."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from checkpoint_toy import GPT2_FLAGS, LLAMA_FLAGS, logits_of, made, some_tokens
from data_toy import write_documents
from harness import TOY, read_scalars, run_function, run_ranks

from jreg_megatron import UserError
from jreg_megatron.decoder.checkpoint.folder import find_checkpoint, is_megatron, megatron_steps, step_of
from jreg_megatron.methods.jreg.regularizer import displacement_name
from jreg_megatron.stream.settings import Settings, setting

LAYERS = 4
VALIDATED = ("--eval-iters", 2, "--eval-interval", 2, "--jreg-coeff", 0.1, "--jreg-log-per-layer")
SAVED = ("--save-interval", 2)
SETTINGS = {"jreg_coeff": "0.1", "seed": "3", "global_batch_size": "8", "lr": "0.001", "train_iters": "5"}
"""Of the series of checkpoints, as text."""


class Displacements:
    """Observes a decoder: sums over tokens of (1 - cos) / 2 between a layer's input and output."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.sums: dict[int, float] = {}
        self.after_norm = 0.0
        self.tokens = 0

    def __call__(self, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if number > self.num_layers:
            self.after_norm += self.turned(self.last_input, after)
            return
        self.sums[number] = self.sums.get(number, 0.0) + self.turned(before, after)
        self.tokens += before[..., 0].numel() if number == 1 else 0
        self.last_input = before

    @staticmethod
    def turned(before: torch.Tensor, after: torch.Tensor) -> float:
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        return float(((1 - cosine) / 2).sum())


def observed(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The figures of a checkpoint's decoder on its last validation; runs in a separate process."""
    from jreg_megatron.decoder.checkpoint.model import load_megatron

    decoder = load_megatron(folder, step, dtype=torch.float32, device=torch.device("cpu"))
    assert decoder.last_validation is not None
    samples = decoder.last_validation()
    seen, loss = Displacements(decoder.num_layers), 0.0
    for tokens, labels, mask in zip(*samples.values(), strict=True):
        with decoder.observed(seen):
            logits = decoder.logits(tokens[None])[0]
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="none") @ mask)
    alone, longer = samples["tokens"][:1, :5], samples["tokens"][:1, :9]
    return {
        "decoder": (decoder.name, decoder.step, decoder.num_layers, decoder.vocab_size, decoder.max_length),
        "loss": loss / float(samples["loss_mask"].sum()),
        "pre_norm": [seen.sums[number] / seen.tokens for number in range(1, decoder.num_layers + 1)],
        "post_norm": seen.after_norm / seen.tokens,
        "later tokens": (decoder.logits(alone) - decoder.logits(longer)[:, :5]).abs().max().item(),
        "read out": _read_out_difference(decoder, longer),
        "without layer": _without_layer_difference(decoder, longer),
    }


def _read_out_difference(decoder: Any, tokens: torch.Tensor) -> float:
    states: dict[int, torch.Tensor] = {}
    with decoder.observed(lambda number, _, after: states.update({number: after})):
        decoder.run(tokens)
    return float((decoder.read_out(states[decoder.num_layers]) - decoder.logits(tokens)).abs().max())


def _without_layer_difference(decoder: Any, tokens: torch.Tensor) -> float:
    whole = decoder.logits(tokens)
    with decoder.without_layer(2):
        return float((decoder.logits(tokens) - whole).abs().max())


def train(
    folder: Path, data: Path, world_size: int, *flags: object, without: str = "", script: Path | None = None
) -> Path:
    """A short training with validation, less those flags of the toy; returns its folder of checkpoints.

    It is ``jreg_megatron.pretrain``, or a script that is launched.
    """
    toy = f" {' '.join(TOY)} "
    for group in without.split(" --") if without else []:
        toy = toy.replace(f" --{group.removeprefix('--')} ", " ")
    argv = [*toy.split(), "--data-path", data, "--split", "80,20,0", *VALIDATED, *SAVED, *flags]
    saved = folder / "checkpoints"
    argv += ["--save", saved, "--tensorboard-dir", folder / "tensorboard"]
    if script:
        run_ranks([script, *argv], world_size, entry="jreg_megatron.launch:main")
    else:
        run_ranks(argv, world_size)
    return saved


@pytest.fixture(scope="module")
def series(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 2, 4 and 5: grouped queries, TP2, distributed optimizer."""
    layout = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
    options = ("--group-query-attention", "--num-query-groups", 2, "--use-distributed-optimizer")
    options += ("--max-position-embeddings", 48, "--train-iters", 5, "--eod-mask-loss")
    return train(tmp_path_factory.mktemp("runs") / "grouped", toy_data, 2, *layout, *options)


def logged(folder: Path, tag: str) -> list[float]:
    return read_scalars(folder.parent / "tensorboard")[f"{tag} validation"]


def expect_as_logged(found: dict[str, Any], folder: Path, number: int, final_state: str = "pre_norm") -> None:
    """Compare a decoder's figures with the validation of this number, in the order of logging."""
    assert found["loss"] == pytest.approx(logged(folder, "lm loss")[number], abs=1e-5)
    expected = [logged(folder, displacement_name(layer, LAYERS))[number] for layer in range(1, LAYERS + 1)]
    ours = found["pre_norm"] if final_state == "pre_norm" else [*found["pre_norm"][:-1], found["post_norm"]]
    assert ours == pytest.approx(expected, abs=1e-5)
    assert found["later tokens"] < 1e-5, "a token's logits do not depend on those behind it"
    assert found["read out"] < 1e-5
    assert found["without layer"] > 1e-4


def observed_at(folder: Path, steps: list[int | None]) -> list[dict[str, Any]]:
    return [observed(folder, step) for step in steps]


def test_the_last_checkpoint_and_a_step_give_what_their_own_validations_logged(series: Path) -> None:
    ((last, step),) = run_function(observed_at, 1, series, [None, 4])
    assert last["decoder"] == ("grouped", 5, LAYERS, 256, 48)
    expect_as_logged(last, series, -1)
    assert step["decoder"][1] == 4
    expect_as_logged(step, series, 1)


def measured(output: Path, *words: object) -> list[dict[str, Any]]:
    """The models in the JSON of ``jreg-megatron measure``; runs in a process of its own."""
    from jreg_megatron.decoder.checkpoint import model
    from jreg_megatron.measure.__main__ import main

    opened, open_checkpoint = [], model.open_checkpoint

    def counted(*place: Any) -> Any:
        opened.append(place)
        return open_checkpoint(*place)

    model.open_checkpoint = counted
    main([*map(str, words), "--quiet", "--json", str(output)])
    models: list[dict[str, Any]] = json.loads(output.read_text())["models"]
    assert len(opened) == len(models), "each checkpoint is opened once"
    return models


def test_the_command_measures_a_series_as_training_logged_it(series: Path, tmp_path: Path) -> None:
    ((first, second, last),) = run_function(
        measured, 1, tmp_path / "series.json", f"{series}@all", "--last-validation"
    )
    assert [(each["name"], each["step"]) for each in (first, second, last)] == [
        *(("grouped", 2), ("grouped", 4), ("grouped", 5))
    ]
    for number, each in ((0, first), (1, second), (-1, last)):
        for layer in range(1, LAYERS + 1):
            expected = logged(series, displacement_name(layer, LAYERS))[number]
            assert each["displacement"]["pre_norm"][layer - 1] == pytest.approx(expected, abs=1e-5)
        assert each["jump_rate"]["pre_norm"] == pytest.approx(logged(series, "jump rate")[number], abs=1e-3)
        assert each["settings"].items() >= SETTINGS.items()


LATENT = (
    "--multi-latent-attention --q-lora-rank 12 --kv-lora-rank 20 --qk-head-dim 10 --qk-pos-emb-head-dim 6 "
    "--v-head-dim 14 --rope-type rope"
)
LLAMA = "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope"
RUNS: dict[str, tuple[int, str, str]] = {
    "a tied Qwen2 in virtual stages": (
        2,
        "--untie-embeddings-and-output-weights",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--jreg-final-state post_norm --add-qkv-bias",
    ),
    "latent attention": (
        2,
        "",
        f"{LATENT} --qk-layernorm --tensor-model-parallel-size 2",
    ),
    "a GPT-2 in uneven stages, TP2 x PP2": (
        4,
        f"{LLAMA} --normalization RMSNorm",
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--decoder-first-pipeline-num-layers 1",
    ),
    "a mixture of experts, one dense layer first": (
        2,
        "",
        "--expert-model-parallel-size 2 --num-experts 4 --moe-router-topk 2 --moe-layer-freq [0]+[1]*3 "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-ffn-hidden-size 48 "
        "--moe-router-enable-expert-bias --moe-router-score-function sigmoid",
    ),
    "a Llama with LayerNorm scaling in stages": (
        2,
        "",
        "--pipeline-model-parallel-size 2 --lns-power 0.5 --group-query-attention --num-query-groups 2",
    ),
    "layers that learn what they keep": (
        2,
        "",
        "--attenuation-learned 0.6 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "a Qwen3 with a layer that predicts further ahead": (1, "", "--qk-layernorm --mtp-num-layers 1"),
}
"""By name: ranks, flags of the toy that are left out, and flags that are added."""


@pytest.mark.parametrize("name", RUNS)
def test_every_model_and_layout_gives_what_its_training_logged_and_a_llama_or_qwen_is_exported(
    name: str, toy_data: Path, tmp_path: Path
) -> None:
    world_size, without, flags = RUNS[name]
    folder = train(tmp_path, toy_data, world_size, "--train-iters", 2, *flags.split(), without=without)
    ((found, export),) = run_function(observed_and_exported, 1, folder, tmp_path / "out")
    expect_as_logged(found, folder, -1, "post_norm" if "post_norm" in flags else "pre_norm")
    refused = {
        "--decoder-first-pipeline-num-layers": "--normalization",
        "--num-experts": "--num-experts",
        "--multi-latent-attention": "multi-latent attention",
        "--attenuation-learned": "--attenuation-factor 0.5 --attenuation-learned 0.6 "
        "--attenuation-layers last",
    }
    named = [what for flag, what in refused.items() if flag in flags]
    if named:
        assert str(export).startswith(f"{folder}/iter_0000002 ") and named[0] in str(export)
    else:
        assert isinstance(export, float) and export < 1e-4


def exported_logits(folder: Path, output: Path, ids: torch.Tensor) -> str | torch.Tensor:
    """The line that the export is refused with, or the logits that transformers gives for ``ids``."""
    from jreg_megatron.convert import export

    try:
        export.export(export.parser().parse_args([str(folder), str(output)]))
    except UserError as error:
        assert not output.exists()
        return str(error)
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(output)(input_ids=ids).logits
    return logits.clone()


def exported(folder: Path, output: Path) -> str | float:
    """The line that the export is refused with, or how far transformers' logits are from the decoder's."""
    from jreg_megatron.decoder.checkpoint.model import load_megatron

    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    theirs = exported_logits(folder, output, ids)
    if isinstance(theirs, str):
        return theirs
    decoder = load_megatron(folder, dtype=torch.float32, device=torch.device("cpu"))
    return float((decoder.logits(ids) - theirs).abs().max())


def observed_and_exported(folder: Path, output: Path) -> tuple[dict[str, Any], str | float]:
    return observed(folder), exported(folder, output)


PATTERN = "--hybrid-layer-pattern"
STACK = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"


def test_a_hybrid_model_of_pairs_is_measured_and_exported_as_its_training_had_it(
    toy_data: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("unmodified_pretrain.py")
    flags = (PATTERN, "*-*-|*-*-", *STACK.split(), "--pipeline-model-parallel-size", 2, "--train-iters", 2)
    folder = train(tmp_path, toy_data, 2, *flags, without="--num-layers 4", script=script)
    ((found, difference),) = run_function(observed_and_exported, 1, folder, tmp_path / "out")
    assert found["decoder"][2:] == (LAYERS, 256, 32)
    expect_as_logged(found, folder, -1)
    assert isinstance(difference, float) and difference < 1e-5
    ((model,),) = run_function(measured, 1, tmp_path / "models.json", folder, "--last-validation")
    expected = [logged(folder, displacement_name(layer, LAYERS))[-1] for layer in range(1, LAYERS + 1)]
    assert model["displacement"]["pre_norm"] == pytest.approx(expected, abs=1e-5)


HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "a Llama in stages": (
        f"{LLAMA_FLAGS} {PATTERN} *-*-*- {STACK} --group-query-attention --num-query-groups 2",
        {"hybrid_layer_pattern": "*-|*-*-"},
    ),
    "scaled positions, of which no HybridModel is told": (
        f"{LLAMA_FLAGS} {PATTERN} *-*- {STACK} --use-rope-scaling --rotary-base 500000",
        {},
    ),
    "a GPT-2 by the old flag": (
        f"{GPT2_FLAGS} --num-layers 4 --hybrid-override-pattern *-*- {STACK}",
        {
            "hybrid_layer_pattern": None,
            "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
        },
    ),
    "latent attention and experts": (
        f"{LLAMA_FLAGS} {PATTERN} +-+E {STACK} {LATENT} --num-experts 4 --moe-ffn-hidden-size 24",
        {},
    ),
    "experts behind a dense layer": (
        f"{LLAMA_FLAGS} {PATTERN} *-*E*E {STACK} --num-experts 4 --moe-ffn-hidden-size 24",
        {},
    ),
}
"""Flags, and arguments that differ in the checkpoint: the model is built in one process, by today's names."""


def states_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of each layer of a ``GPTModel``, or pair of a ``HybridModel``, and of its final norm, by
    plain hooks."""
    states: list[torch.Tensor] = []

    def hook(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        states.append((named["hidden_states"] if named else args[0]).clone())

    is_hybrid, decoder = hasattr(model.decoder, "final_norm"), model.decoder
    layers, norm = (decoder.layers[::2], "final_norm") if is_hybrid else (decoder.layers, "final_layernorm")
    with contextlib.ExitStack() as hooks:
        for module in (*layers, getattr(decoder, norm)):
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        logits_of(model, ids)
    return states


def differences_to_hybrid_models(work: Path) -> dict[str, tuple[float, float, float]]:
    """Differences of logits, displacements and an export's logits to those of ``HybridModel`` itself."""
    from jreg_megatron.decoder.checkpoint.model import load_megatron

    ids, found = some_tokens(), {}
    for name, (flags, changes) in HYBRIDS.items():
        model = made(work / name, flags.replace("--num-layers 2", ""), **changes)
        expected = logits_of(model, ids)[..., :130]
        turned = [Displacements.turned(a, b) for a, b in pairwise(states_of(model, ids))]
        decoder = load_megatron(work / name, dtype=torch.float32, device=torch.device("cpu"))
        seen = Displacements(decoder.num_layers)
        with decoder.observed(seen):
            logits = decoder.logits(ids)
        assert len(turned) == decoder.num_layers == len(seen.sums)
        off = max(abs(seen.sums[number] - value) for number, value in enumerate(turned, start=1))
        theirs = exported_logits(work / name, work / f"{name} exported", ids)
        found[name] = (
            float((logits - expected).abs().max()),
            off / ids.numel(),
            -1.0 if isinstance(theirs, str) else float((theirs - expected).abs().max()),
        )
    return found


def test_hybrid_models_of_pairs_give_the_numbers_of_megatrons_own_hybrid_model(tmp_path: Path) -> None:
    (found,) = run_function(differences_to_hybrid_models, 1, tmp_path)
    for name, (logits, displacement, export) in found.items():
        assert logits < 1e-5 and displacement < 1e-6, name
        cannot_be_exported = "GPT-2" in name or "experts" in name
        assert (export == -1.0) if cannot_be_exported else (0 <= export < 1e-4), name


GROUPED = "--num-layers 3 --group-query-attention --num-query-groups 2"
TIED = LLAMA_FLAGS.replace("--untie-embeddings-and-output-weights", "")
EXPERTS = f"{LLAMA_FLAGS} {LATENT} --num-experts 4 --moe-ffn-hidden-size 24"
CHANGED = {  # the gains of the tied ones are saved minus 1
    "a Llama, attenuated": f"{LLAMA_FLAGS} {GROUPED} --attenuation-factor 0.3 --attenuation-layers 1,3",
    "a GPT-2 that learns attenuation": f"{GPT2_FLAGS} --attenuation-learned 0.8",
    "a hybrid model that learns attenuation": (
        f"{LLAMA_FLAGS.replace('--num-layers 2', '')} {PATTERN} *-*-*- {STACK} --attenuation-learned 0.8"
    ),
    "a scaled Llama with all biases": (
        f"{LLAMA_FLAGS.replace('--disable-bias-linear', '')} {GROUPED} --lns-power 0.5"
    ),
    "a scaled, tied Qwen2": f"{TIED} {GROUPED} --add-qkv-bias --lns-power 1.5",
    "a scaled Qwen3": f"{LLAMA_FLAGS} {GROUPED} --qk-layernorm --lns-power 0.5",
    "a scaled GPT-2": f"{GPT2_FLAGS} --lns-power 1",
    "scaled, with latent attention and experts": f"{EXPERTS} --lns-power 1",
    "a tied Llama in Peri-LN": f"{TIED} {GROUPED} --periln-gain 0.7",
    "a GPT-2 in Peri-LN": f"{GPT2_FLAGS} --periln-gain 0.7 --periln-embedding",
    "in Peri-LN, with latent attention and experts": f"{EXPERTS} --periln-gain 1",
    "scaled and attenuated": f"{LLAMA_FLAGS} {GROUPED} --attenuation-factor 0.3 --lns-power 0.5",
    "a GPT-2 that three have changed": (
        f"{GPT2_FLAGS} --attenuation-learned 0.8 --lns-power 1 --periln-gain 0.7"
    ),
}


def loaded(folder: Path) -> Any:
    from jreg_megatron.decoder.checkpoint.model import load_megatron

    return load_megatron(folder, dtype=torch.float32, device=torch.device("cpu"))


def logits_without(model: Any, number: int, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model's own vocabulary where layer ``number`` does nothing, changed or not."""
    layer = model.decoder.layers[number - 1]
    layer.forward = lambda hidden_states, **_: (hidden_states, None)
    logits = logits_of(model, ids)[..., :130]
    del layer.forward
    return logits


def as_plain(model: Any, folder: Path, flags: str) -> torch.Tensor:
    """Logits of a model without LayerNorm scaling, with a scaled one's weights, its factors in the norms."""
    from jreg_megatron import LayerNormScalingConfig

    flags, power = flags.split("--lns-power")
    plain = made(folder, flags)
    plain.load_state_dict(LayerNormScalingConfig(power=float(power)).into_norms(model.state_dict()))
    return logits_of(plain, some_tokens())[..., :130]


def differences_to_changed_models(work: Path) -> dict[str, dict[str, Any]]:
    """Differences of the decoder's results to those of Megatron's model with the attached method."""
    from jreg_megatron.convert import import_

    ids, found = some_tokens(), dict[str, dict[str, Any]]()
    here: dict[str, Any]

    def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        return float((ours - theirs).abs().max())

    for name, flags in CHANGED.items():
        around_zero = "tied" in name
        model = made(work / name, flags, layernorm_zero_centered_gamma=around_zero)
        here = found[name] = {}
        for module in model.modules() if around_zero else ():
            if isinstance(module, torch.nn.RMSNorm):
                module.weight.data.add_(1)
        expected, states = logits_of(model, ids)[..., :130], states_of(model, ids)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            decoder = loaded(work / name)
        here["told"] = said.getvalue()
        seen: dict[int, torch.Tensor] = {}
        with decoder.observed(lambda number, _, after, seen=seen: seen.update({number: after.clone()})):
            here["logits"] = off(decoder.logits(ids), expected)
        ours = [seen[number].transpose(0, 1) for number in range(1, decoder.num_layers + 1)]
        here["states"] = max(off(*pair) for pair in zip(ours, states[1:], strict=True))
        if "hybrid" not in name:
            with decoder.without_layer(2):
                here["layer drop"] = off(decoder.logits(ids), logits_without(model, 2, ids))
        if "lns" in flags and "attenuation" not in flags:
            here["without the method"] = off(as_plain(model, work / f"{name} plain", flags), expected)
        out = work / f"{name} exported"
        here["exported"] = theirs = exported_logits(work / name, out, ids)
        if not isinstance(theirs, str):
            here["exported"] = off(theirs, expected)
            imported = work / f"{name} imported"
            import_.import_folder(import_.parser().parse_args([str(out), str(imported)]))
            here["imported"] = off(loaded(imported).logits(ids), expected)
    return found


def test_models_that_a_method_changed_give_the_numbers_of_megatrons_model_with_the_method(
    tmp_path: Path,
) -> None:
    (found,) = run_function(differences_to_changed_models, 1, tmp_path)
    for name, here in found.items():
        assert here.pop("told").count("Note: ") == ("hybrid" in name), name
        exported = here.pop("exported")
        for what, difference in here.items():
            assert difference < 1e-4 if what in ("imported", "without the method") else difference < 1e-5, (
                name,
                what,
                difference,
            )
        if name in ("a scaled Llama with all biases", "a scaled, tied Qwen2", "a scaled Qwen3"):
            assert exported < 1e-4 and "imported" in here, name
        else:
            assert isinstance(exported, str) and "Llama" in exported, name
            # It would leave the change out.
            assert "Bridge" not in exported, name


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(Settings):
    """A method of a user's own, which changes the model or where it is built, or neither."""

    name: ClassVar[str] = "own"
    prefix: ClassVar[str] = "own"
    title: ClassVar[str] = "own"
    about: ClassVar[str] = "own"

    kind: str = setting("", "what it changes.")

    @property
    def changes_model(self) -> bool:
        return self.kind == "model" or self.changes_modules

    @property
    def changes_modules(self) -> bool:
        return self.kind == "modules"


@pytest.mark.parametrize(
    "has",
    [
        {"own_kind": "model"},
        {"own_kind": "modules", "lns_power": 0.5},
    ],
)
def test_a_model_that_a_users_own_method_has_changed_is_refused_by_name(
    has: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jreg_megatron.decoder.checkpoint.arguments import known_changes
    from jreg_megatron.methods import known

    monkeypatch.setattr(known, "METHODS", [*known.METHODS, OwnConfig])
    for model in (
        {"lns_power": 0.5, "jreg_coeff": 1.0, "norms_measure_interval": 2},
        {"attenuation_learned": 0.9, "lns_power": 0.5, "periln_gain": 0.7},
        {"attenuation_factor": 1.0, "periln_gain": 1.0, "own_kind": "nothing"},
        {"lns_power": 0.0, "attenuation_layers": (2,)},
    ):
        known_changes(model, "runs/x")
    with pytest.raises(UserError, match="runs/x was trained with --") as caught:
        known_changes(has, "runs/x")
    assert f"--own-kind {has['own_kind']}" in str(caught.value)
    with pytest.raises(UserError, match="experimental-attention-variant") as caught:
        known_changes({"lns_power": 0.5, "experimental_attention_variant": "gated_delta_net"}, "runs/x")
    assert "Bridge" not in str(caught.value)


def evaluated(work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of ``evaluate`` for a model with attenuation, and its losses by Megatron's own model."""
    from jreg_megatron.evaluate.__main__ import main

    model = made(work / "run", CHANGED["a Llama, attenuated"])
    tokens = {"test": some_tokens(), "fit": torch.cat([some_tokens(seed=seed) for seed in range(2, 14)])}
    for name, rows in tokens.items():
        write_documents(work / name, rows)
    argv = [
        "--parts",
        "read-out,layer-drop",
        "--text",
        f"{work / 'test'}.bin",
        "--lens",
        f"{work / 'fit'}.bin",
    ]
    main([str(work / "run"), *argv, "--quiet", "--json", str(work / "found.json")])
    (found,) = json.loads((work / "found.json").read_text())["models"]

    def loss(logits: torch.Tensor) -> float:
        predicted, wanted = logits[:, :-1, :130].flatten(0, 1), tokens["test"][:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(predicted, wanted))

    @torch.inference_mode()
    def read_out(state: torch.Tensor) -> float:
        logits, _ = model.output_layer(model.decoder.final_layernorm(state))
        return loss(logits.transpose(0, 1))

    expected = {
        "drop": [loss(logits_without(model, number, tokens["test"])) for number in (1, 2, 3)],
        "whole": loss(logits_of(model, tokens["test"])),
        "read out": [read_out(state) for state in states_of(model, tokens["test"])],
    }
    return found, expected


def test_the_evaluate_command_drops_and_reads_out_layers_that_a_method_changed(tmp_path: Path) -> None:
    ((found, expected),) = run_function(evaluated, 1, tmp_path)
    assert found["layer_drop"]["loss"] == pytest.approx(expected["drop"], abs=1e-5)
    assert found["layer_drop"]["unchanged"] == pytest.approx(expected["whole"], abs=1e-5)
    assert found["read_out"]["loss"] == pytest.approx(expected["read out"], abs=1e-5)
    assert found["lens"]["loss"][-1] == pytest.approx(expected["whole"], abs=1e-5)
    assert len(found["lens"]["loss"]) == 4


def test_a_model_whose_training_took_sub_layers_for_layers_is_not_measured_by_others() -> None:
    from jreg_megatron.decoder.checkpoint.arguments import refuse_other_layers

    refuse_other_layers({"jreg_coeff": 1.0, "jreg_layer": "mixer", "norms_measure_interval": 2}, "runs/x")
    for has in ({"jreg_layer": "sublayer"}, {"jreg_coeff": 1.0, "norms_layer": "sublayer"}):
        with pytest.raises(
            UserError, match=r"runs/x was trained with --(jreg|norms)-layer sublayer, but measure"
        ):
            refuse_other_layers(has, "runs/x")


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"hybrid_layer_pattern": "M*-M*-"}, ["M*-M*-", "AutoBridge"]),
        ({"hybrid_layer_pattern": "*E*--"}, ["*E*--", "AutoBridge"]),
        ({"hybrid_layer_pattern": "MEM*EM*-", "num_experts": 4}, ["MEM*EM*-", "AutoBridge"]),
        ({"hybrid_layer_pattern": "-*-*"}, ["-*-*", "AutoBridge"]),
        ({"hybrid_override_pattern": "*-*"}, ["*-*", "AutoBridge"]),
        ({"is_hybrid_model": True}, ["hybrid", "AutoBridge"]),
        ({"hybrid_layer_pattern": "*-", "spec": ["my.specs", "stack"]}, ["--spec my.specs stack"]),
        ({"hybrid_layer_pattern": "*-*-", "no_rope_freq": [0, 0, 1, 0]}, ["--no-rope-freq [0, 0, 1, 0]"]),
        ({"hybrid_layer_pattern": "*-*-", "window_attn_skip_freq": 2}, ["--window-attn-skip-freq 2"]),
        ({"hybrid_layer_pattern": "*-*-", "multi_latent_attention": True}, ["*-*-", "'+-'", "AutoBridge"]),
        ({"hybrid_layer_pattern": "+-+-"}, ["+-+-", "'*-'", "AutoBridge"]),
        ({"spec": ["my.specs", "layer"]}, ["--spec"]),
        ({"qk_l2_norm": True}, ["--qk-l2-norm"]),
        ({"num_experts": 4, "moe_mlp_glu_interleave_size": 32}, ["--moe-mlp-glu-interleave-size"]),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_by_name(has: dict[str, Any], said: list[str]) -> None:
    from jreg_megatron.decoder.checkpoint.arguments import known_changes
    from jreg_megatron.decoder.checkpoint.model import decoder_of

    for model in ({}, {"hybrid_layer_pattern": "*-|*E/*-"}, {"qk_l2_norm": True, "num_experts": 4}):
        known_changes(model, "runs/x")
    checkpoint: Any = SimpleNamespace(arguments=has, rows=8, folder="runs/x")
    with pytest.raises(UserError) as caught:
        decoder_of(checkpoint, dtype=torch.float32, device=torch.device("cpu"), source="runs/x")
    for part in ("runs/x", *said):
        assert part in str(caught.value)


def loaded_again_and_again(folders: list[Path], times: int) -> tuple[list[list[int]], list[int]]:
    """Hidden states' shapes of several models loaded in turn, and the process's memory after each round."""
    import psutil

    from jreg_megatron.decoder.checkpoint.model import load_megatron

    tokens = torch.arange(12).reshape(2, 6)
    shapes, memory = [], []
    for _ in range(times):
        for folder in folders:
            decoder = load_megatron(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
            assert decoder.dtype == torch.bfloat16
            shapes.append(list(decoder.logits(tokens).shape))
        memory.append(psutil.Process().memory_info().rss)
    return shapes, memory


def test_many_checkpoints_load_in_one_process_and_memory_stays_flat(series: Path, tmp_path: Path) -> None:
    ((shapes, memory),) = run_function(loaded_again_and_again, 1, [series, series / "iter_0000002"], 8)
    assert shapes == [[2, 6, 256]] * 16
    assert memory[-1] - memory[3] < 4 << 20


def refusals(folders: dict[str, Path]) -> dict[str, str]:
    """The line that each folder is refused with."""
    from jreg_megatron.decoder.checkpoint.model import load_megatron

    lines = dict.fromkeys(folders, "was loaded")
    for name, folder in folders.items():
        try:
            load_megatron(folder, dtype=torch.float32, device=torch.device("cpu"))
        except UserError as error:
            lines[name] = str(error)
    return lines


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_damage_is_one_line_and_no_weight_is_made_up(series: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(series / "iter_0000005", tmp_path / name / "iter_0000005"))

    cut, gone, unlisted, evil, old = map(damaged, ("cut", "gone", "unlisted", "evil", "old"))
    for file in cut.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 20])
    min(gone.glob("*.distcp")).unlink()
    metadata = pickle.loads((unlisted / ".metadata").read_bytes())
    del metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    (unlisted / ".metadata").write_bytes(pickle.dumps(metadata))
    (evil / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    torch.save({"args": Evil(tmp_path / "executed")}, old / "common.pt")

    (lines,) = run_function(
        refusals, 1, {"cut": cut, "gone": gone, "unlisted": unlisted, "evil": evil, "old": old}
    )
    assert not any("\n" in line for line in lines.values())
    for name in ("cut", "gone", "evil", "old"):
        assert f"{tmp_path / name}/iter_0000005 cannot be read: " in lines[name]
    assert "holds no decoder.layers.mlp.linear_fc2.weight" in lines["unlisted"]
    assert not (tmp_path / "executed").exists(), "a checkpoint is data, and no code of it is run"


def test_steps_and_kinds_of_folders_are_found_without_torch(series: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path; "
        "from jreg_megatron.decoder.checkpoint.folder import is_megatron, megatron_steps; "
        f"p = Path({str(series)!r}); print(json.dumps([is_megatron(p), is_megatron(p / 'iter_0000004'), "
        "is_megatron(p.parent), megatron_steps(p), megatron_steps(p / 'iter_0000004')])); "
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, True, False, [2, 4, 5], [4]]


def test_an_unfinished_checkpoint_does_not_count(series: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(series, tmp_path / "run"))
    (folder / "iter_0000004" / "metadata.json").unlink()
    assert megatron_steps(folder) == [2, 5]
    with pytest.raises(UserError, match=r"iter_0000004 has no metadata.json"):
        find_checkpoint(folder, 4)
    with pytest.raises(UserError, match=r"--step is 3, but .* 2, 5"):
        find_checkpoint(folder, 3)
    assert step_of(find_checkpoint(folder)) == 5
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    assert step_of(find_checkpoint(folder)) == 2, "the one that Megatron would go on from"
    assert step_of(find_checkpoint(folder / "iter_0000005")) == 5


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("mp_rank_00/model_optim_rng.pt", "", "old format 'torch'"),
        ("run_config.yaml", "", "Megatron-Bridge"),
        (".metadata", "", "FSDP's format"),
        ("metadata.json", '{"sharded_backend": "zarr"}', "format zarr"),
        ("metadata.json", "{", "metadata.json cannot be read"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, file: str, text: str, line: str) -> None:
    place = tmp_path / "iter_0000010" / file
    place.parent.mkdir(parents=True)
    place.write_text(text)
    assert is_megatron(tmp_path)
    with pytest.raises(UserError, match=line):
        find_checkpoint(tmp_path)


def saved_otherwise(folder: Path, work: Path) -> float:
    """Difference of logits to the same model as other programs would save it.

    Norms have other names and lack the 1 that ``--apply-layernorm-1p`` adds, and some of Megatron's arguments
    have their older names.
    """
    from megatron.core import dist_checkpointing, parallel_state

    from jreg_megatron.decoder.checkpoint.model import load_megatron, open_checkpoint

    device = torch.device("cpu")
    decoder: Any = load_megatron(folder, dtype=torch.float32, device=device)
    args = open_checkpoint(folder, None, device).common["args"]
    args.norm_epsilon = args.layernorm_epsilon
    args.apply_layernorm_1p, args.disable_bias_linear = True, True
    for name in ("layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear"):
        delattr(args, name)
    tokens = torch.arange(20).reshape(2, 10)
    expected = decoder.logits(tokens).clone()
    for module in decoder.model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.weight.sub_(1)
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = decoder.model.sharded_state_dict(metadata=groups)
    for entry in weights.values():
        entry.key = entry.key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        entry.key = entry.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    place = work / "iter_0000005"
    place.mkdir()
    dist_checkpointing.save({"model": weights, "args": args, "iteration": 5}, str(place))
    again = load_megatron(work, dtype=torch.float32, device=device)
    return float((again.logits(tokens) - expected).abs().max())


def test_other_names_of_norms_and_norms_around_zero_are_understood(series: Path, tmp_path: Path) -> None:
    (difference,) = run_function(saved_otherwise, 1, series, tmp_path)
    assert difference < 1e-6


def test_a_lost_tokenizer_is_no_failure(tmp_path: Path) -> None:
    from jreg_megatron.decoder.checkpoint.tokenizer import TrainingTokenizer

    lost = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(tmp_path / "gone.model")}
    assert TrainingTokenizer.of(lost) is None


SINCE_0_18, SINCE_0_19 = "null_tokenizer_eod_id", "stream_ckpt_dequant"
GONE = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "gone.model"}
SAVED_BY: dict[str, dict[str, Any]] = {
    "0.16": {
        **{"async_tensor_model_parallel_allreduce": True, "enable_gloo_process_groups": True},
        **{"langrl_inference_server_type": "inplace_megatron", "rl_parallel_generation_tasks": 512},
        **{"scatter_gather_tensors_in_pipeline": True, "inference_max_batch_size": 8},
        **{"disable_chunked_prefill": True, "inference_dynamic_batching_cuda_graph_max_tokens": 16384},
    },
    "main of August 2026": {
        **{"moe_dispatch_fwd_dtype": "bf16", "moe_combine_bwd_dtype": "bf16", "mhc_num_residual_streams": 4},
        **{"mhc_sinkhorn_iterations": 20, "mhc_init_gating_factor": 0.01, "gdp_num_householder": 3},
        **{"batch_invariant_backend": "te_native", "save_tokenizer_assets": True, "megatron_fsdp_version": 1},
    },
}
"""Arguments that other versions save by default, and that 0.19 does not know."""


def saved_by_others(work: Path) -> dict[str, Any]:
    """Differences of logits to those of Megatron's model, and the user's notes, by saved arguments."""
    from jreg_megatron.decoder.checkpoint.model import load_megatron

    ids, found = some_tokens(), {}

    def loaded(name: str, model: Any) -> Any:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            decoder = load_megatron(work / name, dtype=torch.float32, device=torch.device("cpu"))
        logits = decoder.logits(ids)
        off = float((logits - logits_of(model, ids)[..., : logits.shape[-1]]).abs().max())
        found[name] = (off, decoder.vocab_size, logits.shape[-1], said.getvalue())

    loaded("gelu", made(work / "gelu", GPT2_FLAGS))
    for name, kernel in (("fused gelu", "bias_gelu_fusion"), ("gelu of TE", "use_te_activation_func")):
        model = made(work / name, GPT2_FLAGS, **{kernel: True})
        model.config.bias_activation_fusion = True
        loaded(name, model)
    name = "positions that a script of 0.18 does not scale"
    loaded(name, made(work / name, remove=(SINCE_0_19,), rotary_seq_len_interpolation_factor=4))
    name = "positions that a hybrid model of 0.18 does scale"
    hybrid = LLAMA_FLAGS.replace("--num-layers 2", f"{PATTERN} *-*- {STACK}")
    hybrid += " --rotary-seq-len-interpolation-factor 4"
    loaded(name, made(work / name, hybrid, remove=(SINCE_0_19,)))
    name = "positions that are scaled"
    loaded(name, made(work / name, f"{LLAMA_FLAGS} --rotary-seq-len-interpolation-factor 4"))
    for name, arguments in SAVED_BY.items():
        loaded(name, made(work / name, **arguments))
    experts = f"{LLAMA_FLAGS} --num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type"
    for name, flags in (
        ("experts", "aux_loss --moe-aux-loss-coeff 0.01 --qk-l2-norm"),
        ("quantiles", "quantile_balancing --moe-aux-loss-coeff 0"),
        ("dropped tokens", "none --moe-expert-capacity-factor 1.0"),
    ):
        loaded(name, made(work / name, f"{experts} {flags}"))
    loaded("a fork", made(work / "a fork", residual_scale=0.5, logit_cap=None, use_rms_gate=False))
    loaded("gone", made(work / "gone", **GONE, vocab_size=None))
    return found


def test_checkpoints_of_other_megatrons_give_their_numbers_or_a_note(tmp_path: Path) -> None:
    (found,) = run_function(saved_by_others, 1, tmp_path)
    for name, (off, vocab_size, width, said) in found.items():
        assert off < 1e-5, name
        assert vocab_size == width == (256 if name == "gone" else 130), name
        has_note = name in ("dropped tokens", "a fork", "gone") or "hybrid" in name
        assert said.count("\n") == has_note, (name, said)
    assert "--moe-expert-capacity-factor 1.0" in found["dropped tokens"][-1]
    assert "--residual-scale 0.5" in found["a fork"][-1]
    assert str(tmp_path / "gone") in found["gone"][-1] and "256 rows" in found["gone"][-1]


PADDED = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1, "vocab_size": 130}
TOLD: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "the NullTokenizer": ({"tokenizer_type": "NullTokenizer", SINCE_0_18: None}, 256, 130),
    "that before 0.18, with a token more": ({"tokenizer_type": "NullTokenizer"}, 256, 131),
    "the multimodal one, with a token more": (
        {"tokenizer_type": "NullMultimodalTokenizer", SINCE_0_18: None},
        256,
        131,
    ),
    "one with fewer rows than it should have": ({"tokenizer_type": "NullTokenizer"}, 128, 128),
    "TikTokenizer": ({"tokenizer_type": "TikTokenizer"}, 256, 130),
    "TikTokenizer by default": (
        {"tokenizer_type": "TikTokenizer", "vocab_size": None},
        2**17 + 128,
        2**17,
    ),
    "a lost tokenizer, with a size that Megatron does not read": (GONE, 256, None),
    "a lost tokenizer": (GONE | {"vocab_size": None}, 256, None),
    "no tokenizer type, and the size that was padded": ({}, 256, 130),
    "the same at two tensor ranks": ({"tensor_model_parallel_size": 2}, 256, 130),
    "no tokenizer type, and another size": ({}, 384, None),
    "no padding": (GONE | {"make_vocab_size_divisible_by": 1}, 200, 200),
    "no tokenizer type, and nothing about padding": ({"make_vocab_size_divisible_by": 0}, 256, None),
}
"""Arguments besides those of PADDED, rows of the embedding, and the vocabulary's share of them."""


@pytest.mark.parametrize("name", TOLD)
def test_the_vocabulary_is_read_from_the_checkpoint_or_is_unknown(name: str) -> None:
    from jreg_megatron.decoder.checkpoint.tokenizer import vocab_size_of

    more, rows, expected = TOLD[name]
    assert vocab_size_of(PADDED | more, rows, None) == expected


@pytest.mark.parametrize(
    ("size", "rows", "expected"), [(144, 256, 144), (62, 256, None), (300, 256, None), (62, 128, 62)]
)
def test_the_vocabulary_is_the_tokenizers_if_its_padded_size_is_the_number_of_rows(
    size: int, rows: int, expected: int | None
) -> None:
    from jreg_megatron.decoder.checkpoint.tokenizer import vocab_size_of

    tokenizer: Any = SimpleNamespace(vocab_size=size)
    assert vocab_size_of(PADDED | GONE, rows, tokenizer) == expected


@pytest.mark.parametrize(
    ("saved", "without"),
    [
        ({"tokenizer_hf_no_include_special_tokens": False}, False),
        ({"tokenizer_hf_no_include_special_tokens": True}, True),
        ({"legacy_tokenizer": False, "tokenizer_hf_include_special_tokens": False}, True),
        ({"legacy_tokenizer": False, "tokenizer_hf_include_special_tokens": True}, False),
        ({"legacy_tokenizer": False}, True),
        ({"legacy_tokenizer": True}, False),
        ({}, False),
    ],
)
def test_special_tokens_are_those_of_the_megatron_that_saved(saved: dict[str, Any], without: bool) -> None:
    from jreg_megatron.decoder.checkpoint.tokenizer import settings_of

    named = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "folder"}
    settings = settings_of(named | saved)
    assert settings is not None and settings.tokenizer_hf_no_include_special_tokens is without
    for other in ({"metadata_path": "x"}, {"tokenizer_sentencepiece_ignore_extra_whitespaces": False}):
        assert settings_of(named | saved | other) is None


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"reset_position_ids": True}, "--reset-position-ids"),
        ({"reset_attention_mask": True}, "--reset-attention-mask"),
        ({"dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking"),
        ({"mock_data": True}, "--mock-data"),
        ({"train_iters": None}, "by a training"),
    ],
)
def test_samples_that_the_decoder_would_see_otherwise_are_no_last_validation(
    has: dict[str, Any], said: str
) -> None:
    from jreg_megatron.decoder.checkpoint.validation import last_samples

    plain = {"train_iters": 4, "eval_iters": 2, "eval_interval": 2, "dataloader_type": "single"}
    plain |= {"eval_global_batch_size": None, "global_batch_size": 8}
    assert last_samples(Namespace(**plain), 2, 16, "runs/x") == (0, 16)
    with pytest.raises(UserError, match=said):
        last_samples(Namespace(**(plain | has)), 2, 16, "runs/x")
