"""Read-out and skipping of layers, against plain torch; and differences of two models, computed by hand."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_toy import CONTEXT, VOCABULARY, toy_model, toy_tokenizer
from small_models import small_model
from torch import Tensor

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.hugging_face import decoder_of
from jreg_megatron.decoder.reference import Reference
from jreg_megatron.evaluate import layers, paired
from jreg_megatron.evaluate.evaluation import compare, evaluate
from jreg_megatron.evaluate.layers import PerText, fit_lens, layer_drop, read_out
from jreg_megatron.evaluate.paired import compare as compare_figures
from jreg_megatron.runtime.errors import UserError

LENGTHS = (5, 40, 17, 2, 23, 9, 31)


def options(**more: Any) -> Namespace:
    usual = {"max_tokens": 0, "batch_size": 3, "quiet": True, "limit": None, "lens": None}
    return Namespace(**usual | more)


OPTIONS = options()


def toy(layers: int = 3, seed: int = 0, tokenizer: Any = None) -> Decoder:
    return decoder_of(toy_model(layers, seed), tokenizer, Reference(f"toy {seed}", "toy"))


def ids(length: int, below: int = VOCABULARY, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, below, length).tolist()


def token_texts(below: int = VOCABULARY) -> list[Text]:
    return [Text(f"text {length}", ids(length, below)) for length in LENGTHS]


def cross_entropy(logits: Tensor, tokens: list[int]) -> list[float]:
    """Nats of each token but the first, in float64, of logits ``[s, V]``."""
    log_probabilities = logits.double().log_softmax(-1)
    return [-float(log_probabilities[at, token]) for at, token in enumerate(tokens[1:])]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_read_out_is_the_cross_entropy_of_each_layers_state_by_final_norm_and_head(family: str) -> None:
    model = small_model(family)
    vocabulary = model.config.vocab_size
    texts = token_texts(vocabulary)
    found = read_out(decoder_of(model, None, Reference(family, family)), texts, OPTIONS)

    backbone = model.base_model
    layers, norm = (backbone.h, backbone.ln_f) if family == "gpt2" else (backbone.layers, backbone.norm)
    for number, text in enumerate(texts):
        states: list[Tensor] = []
        hooks = [layers[0].register_forward_pre_hook(lambda _, args, states=states: states.append(args[0]))]
        for layer in layers:
            hooks.append(
                layer.register_forward_hook(
                    lambda _, __, out, states=states: states.append(out[0] if isinstance(out, tuple) else out)
                )
            )
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([text.content]), use_cache=False).logits[0]
            for hook in hooks:
                hook.remove()
            logits = [model.lm_head(norm(state))[0] for state in states]
        logits[-1] = whole
        for layer, of_layer in enumerate(logits):
            expected = cross_entropy(of_layer, text.content)
            assert found.loss[number, layer] == pytest.approx(sum(expected), rel=1e-5)
            top = of_layer[:-1].argmax(-1)
            assert found.correct[number, layer] == int((top == torch.tensor(text.content[1:])).sum())
            assert found.agreed[number, layer] == int((top == whole[:-1].argmax(-1)).sum())
    assert found.tokens.tolist() == [length - 1 for length in LENGTHS]


def test_reading_out_the_last_layer_gives_the_loss_that_transformers_itself_computes() -> None:
    model = toy_model()
    found = read_out(decoder_of(model, None, Reference("toy", "toy")), token_texts(), OPTIONS)
    for number, text in enumerate(token_texts()):
        tokens = torch.tensor([text.content])
        with torch.no_grad():
            loss = float(model(input_ids=tokens, labels=tokens).loss)
        assert found.loss[number, -1] / found.tokens[number] == pytest.approx(loss, rel=1e-5)
    assert found.agreed[:, -1].tolist() == found.tokens.tolist()


def test_leaving_a_layer_out_gives_the_loss_of_the_model_built_without_it() -> None:
    whole = toy(layers=3)
    found = layer_drop(whole, token_texts(), OPTIONS)
    weights = whole.model.state_dict()
    for dropped in range(3):
        kept = [layer for layer in range(3) if layer != dropped]
        shorter = toy(layers=2)
        new = {name: value for name, value in weights.items() if ".layers." not in name}
        for to, layer in enumerate(kept):
            for name, value in weights.items():
                if f".layers.{layer}." in name:
                    new[name.replace(f".layers.{layer}.", f".layers.{to}.")] = value
        shorter.model.load_state_dict(new)
        expected = read_out(shorter, token_texts(), OPTIONS)
        np.testing.assert_allclose(found.loss[:, dropped], expected.loss[:, -1], rtol=1e-5)
    np.testing.assert_allclose(found.loss[:, -1], read_out(whole, token_texts(), OPTIONS).loss[:, -1])
    assert abs(found.loss[:, 0] - found.loss[:, -1]).max() > 0.1


def test_neither_batches_nor_pieces_of_the_logits_change_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    one = read_out(toy(), token_texts(), options(batch_size=1))
    monkeypatch.setattr(layers, "MAX_LOGITS", 3 * VOCABULARY)
    other = read_out(toy(), token_texts(), options(batch_size=7))
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
    assert (one.correct == other.correct).all() and one.ids == other.ids


def test_logits_are_never_held_for_more_than_a_few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, widths = toy(), []

    def head(states: Tensor) -> Tensor:
        widths.append(states.shape[0] * states.shape[1])
        return head_of(whole, states)

    monkeypatch.setattr(layers, "MAX_LOGITS", 16 * VOCABULARY)
    read_out(replace(whole, head=head), token_texts(), options(batch_size=7))
    assert max(widths) == 16


def test_a_text_longer_than_the_models_context_is_read_in_windows() -> None:
    text = ids(2 * CONTEXT + 10)
    found = read_out(toy(), [Text("long", text)], OPTIONS)
    windows = [text[:CONTEXT], text[CONTEXT : 2 * CONTEXT], text[2 * CONTEXT :]]
    apart = read_out(toy(), [Text(f"{n}", window) for n, window in enumerate(windows)], OPTIONS)
    np.testing.assert_allclose(found.loss[0], apart.loss.sum(0), rtol=1e-6)
    assert found.tokens.tolist() == [2 * CONTEXT + 10 - 3]


def test_only_the_first_tokens_of_each_text_are_read_if_asked() -> None:
    short = read_out(toy(), [Text("a", ids(40)[:12])], OPTIONS)
    cut = read_out(toy(), [Text("a", ids(40))], options(max_tokens=12))
    np.testing.assert_allclose(short.loss, cut.loss)


def test_texts_without_a_second_token_are_left_out() -> None:
    texts = [Text("empty", []), Text("one", [3]), *token_texts(), Text("last", [4])]
    found = read_out(toy(), texts, OPTIONS)
    assert found.tokens.tolist() == [length - 1 for length in LENGTHS]
    np.testing.assert_allclose(found.loss, read_out(toy(), token_texts(), OPTIONS).loss, rtol=1e-5)


def test_no_text_with_a_second_token_is_refused() -> None:
    with pytest.raises(UserError, match="--text"):
        read_out(toy(), [Text("one", [3])], OPTIONS)


def test_weights_that_are_not_numbers_are_refused_by_the_models_name() -> None:
    broken = toy()
    broken.model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(UserError, match=r"toy 0 .*logits"):
        read_out(broken, token_texts(), OPTIONS)
    with pytest.raises(UserError, match=r"toy 0 .*logits"):
        evaluated(broken)


def head_of(model: Decoder, states: Tensor) -> Tensor:
    assert model.head is not None
    return model.head(states)


def lens_texts(count: int = 12) -> list[Text]:
    return [Text(f"fit {number}", ids(30, seed=number + 1)) for number in range(count)]


@torch.no_grad()
def test_the_lens_is_the_weighted_least_squares_map_to_the_last_layer_fitted_on_its_own_texts() -> None:
    decoder = toy()
    lens = fit_lens(decoder, lens_texts(), OPTIONS)
    states: list[list[Tensor]] = [[] for _ in range(decoder.num_layers + 1)]
    for text in lens_texts():
        tokens = torch.tensor(text.content)[None]
        found = decoder.model(tokens, output_hidden_states=True)
        seen: list[Tensor] = []
        hook = decoder.layers[-1].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        decoder.model(tokens)
        hook.remove()
        last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        for kept, state in zip(states, (*found.hidden_states[:-1], last), strict=True):
            kept.append(state[0, :-1].detach().double())
    of_layer = [torch.cat(kept).numpy() for kept in states]
    weight = 1 / np.linalg.norm(of_layer[-1], axis=1, keepdims=True)
    for number, state in enumerate(of_layer[:-1]):
        rows = np.concatenate([state, np.ones((len(state), 1))], axis=1)
        expected = rows @ np.linalg.lstsq(rows * weight, of_layer[-1] * weight, rcond=None)[0]
        mapped = lens(number, torch.tensor(state)).numpy()
        np.testing.assert_allclose(mapped, expected, atol=2e-3 * np.abs(expected).max())

    as_it_is = read_out(decoder, token_texts(), OPTIONS)
    through = read_out(decoder, token_texts(), OPTIONS, lens)
    np.testing.assert_allclose(through.loss[:, -1], as_it_is.loss[:, -1])
    head = decoder.model.lm_head
    norm = decoder.model.base_model.norm
    for number, text in enumerate(token_texts()):
        tokens = list(text.content)
        state = decoder.model(torch.tensor(tokens)[None], output_hidden_states=True).hidden_states[1][0]
        expected = cross_entropy(head(norm(lens(1, state))), tokens)
        assert through.loss[number, 1] == pytest.approx(sum(expected), rel=1e-4)


def test_a_lens_on_the_texts_that_it_is_tested_on_or_on_too_few_is_refused() -> None:
    few = lens_texts(1)
    with pytest.raises(UserError, match=r"--lens .*\b29\b.* toy 0 .*\d+"):
        fit_lens(toy(), few, OPTIONS)
    args, how = options(parts=[], lens=[]), {"tasks": {}, "texts": token_texts()}
    (found,) = evaluate(toy(), args, **how, lens_texts=lens_texts())
    assert found.lens is not None and found.lens_tokens == 12 * 29
    with pytest.raises(UserError, match=r"--lens .*\b1\b"):
        list(evaluate(toy(), args, **how, lens_texts=[*lens_texts(), token_texts()[1]]))


def test_a_model_whose_head_does_more_than_is_known_cannot_be_read_out() -> None:
    model = toy()
    for wrong in (
        replace(model, head=lambda states: 1.01 * head_of(model, states)),
        replace(model, logits=lambda tokens: torch.tanh(model.logits(tokens) / 30) * 30),
        replace(model, final_norm=None),
        replace(model, head=None),
    ):
        with pytest.raises(UserError, match=r"toy 0 \(LlamaForCausalLM\)"):
            evaluated(wrong)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("bert", {}),
        ("granite", {"logits_scaling": 1.0}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ],
)
def test_read_out_is_left_out_by_name_where_it_would_be_wrong_and_the_rest_stays(
    family: str, more: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(family, **more)
    decoder = decoder_of(model, None, Reference(family, family))
    if family == "granite":
        model.config.logits_scaling = 4.0  # in place of one by a name that is not known
    parts, texts = ["read-out", "layer-drop"], token_texts(model.config.vocab_size)
    (found,) = evaluate(decoder, options(parts=parts), tasks={}, texts=texts)
    err = capsys.readouterr().err
    assert f"Note: {family} (" in err and "read-out" in err and "left out" in err
    assert found.read_out is None
    for number, text in enumerate(texts):
        ids = torch.tensor([text.content])
        for index, layer in enumerate([*decoder.layers, None]):
            hook = layer and layer.register_forward_hook(
                lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0]
            )
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0]
            if hook:
                hook.remove()
            expected = sum(cross_entropy(logits, text.content))
            assert found.layer_drop.loss[number, index] == pytest.approx(expected, rel=1e-5)


def test_a_model_without_a_final_norm_is_read_out_by_its_head_alone() -> None:
    model = small_model("openai-gpt")
    found = read_out(decoder_of(model, None, Reference("gpt", "gpt")), token_texts(96), OPTIONS)
    for number, text in enumerate(token_texts(96)):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([text.content]), output_hidden_states=True).hidden_states
            for layer, state in enumerate(states):
                expected = cross_entropy(model.lm_head(state)[0], text.content)
                assert found.loss[number, layer] == pytest.approx(sum(expected), rel=1e-5)


def evaluated(decoder: Decoder, texts: list[Text] | None = None) -> Any:
    texts = token_texts() if texts is None else texts
    (found,) = evaluate(decoder, options(parts=["read-out"]), tasks={}, texts=texts)
    return found


def test_results_of_a_finished_part_are_known_before_the_next_begins() -> None:
    parts = evaluate(toy(), options(parts=["read-out", "layer-drop"]), tasks={}, texts=token_texts())
    first = next(parts)
    assert first.read_out is not None and first.layer_drop is None
    second = next(parts)
    assert second.read_out is first.read_out and second.layer_drop is not None


def test_bad_texts_are_found_before_anything_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("tasks ran")

    monkeypatch.setattr("jreg_megatron.evaluate.evaluation.run_tasks", never)
    texts = [*token_texts(), Text("odd", [1, 10**6])]
    with pytest.raises(UserError, match=r"odd .*\b1000000\b"):
        next(evaluate(toy(), options(parts=["tasks", "read-out"]), tasks={}, texts=texts))


def test_models_of_which_one_lacks_a_part_are_compared_in_the_rest() -> None:
    whole = evaluated(toy())
    found = compare(whole, replace(whole, read_out=None, model=whole.model | {"step": 7}))
    assert (found["read_out"], found["tasks"], found["overall"]) == (None, {}, None)
    assert found["notes"] == ["Read-out is not compared: toy 0@7 has none."]


def test_a_model_compared_with_itself_differs_by_nothing() -> None:
    found = compare(evaluated(toy()), evaluated(toy()))["read_out"]
    assert (found["difference"], found["interval"], found["p_value"]) == (
        [0.0] * 4,
        [(0.0, 0.0)] * 4,
        [1.0] * 4,
    )


def test_models_are_compared_layer_by_layer_over_texts() -> None:
    a, b = evaluated(toy(seed=0)), evaluated(toy(seed=1))
    found = compare(a, b)["read_out"]
    assert found["texts"] == len(LENGTHS)
    assert len(found["difference"]) == 4
    for layer, (low, high) in enumerate(found["interval"]):
        expected = (b.read_out.loss[:, layer] - a.read_out.loss[:, layer]).sum() / a.read_out.tokens.sum()
        assert found["difference"][layer] == pytest.approx(expected)
        assert low <= expected <= high


def test_read_outs_that_cannot_be_compared_are_refused_by_name() -> None:
    a = evaluated(toy())
    deeper = compare(a, evaluated(toy(layers=4)))
    assert deeper["read_out"] is None and "toy 0 has 3 layers, toy 0 has 4" in deeper["notes"][0]
    few = compare(*[evaluated(toy(), token_texts()[:3])] * 2)
    assert few["read_out"] is None and "Too few texts" in few["notes"][0]
    text = [Text(f"text {n}", f"Fellow citizens, number {n}") for n in range(7)]
    plain, begun = (evaluated(toy(tokenizer=toy_tokenizer(begins)), text) for begins in (False, True))
    assert compare(plain, plain)["read_out"] is not None
    different = compare(plain, begun)
    assert different["read_out"] is None and "speeches_bits_per_byte" in different["notes"][0]


ONES = np.ones(40)


def shares(*, both: int, only_a: int, only_b: int) -> tuple[Any, Any]:
    neither = 40 - both - only_a - only_b
    a = np.repeat([1.0, 1.0, 0.0, 0.0], [both, only_a, only_b, neither])
    b = np.repeat([1.0, 0.0, 1.0, 0.0], [both, only_a, only_b, neither])
    return a, b


def test_the_test_of_two_accuracies_is_mcnemars_exact_one() -> None:
    found = compare_figures(*shares(both=20, only_a=1, only_b=9), ONES)
    assert found.difference == pytest.approx(8 / 40)
    assert found.p_value == pytest.approx(2 * (comb(10, 0) + comb(10, 1)) / 2**10)


def test_accuracies_of_the_same_samples_have_a_p_value_of_one() -> None:
    a, _ = shares(both=20, only_a=0, only_b=0)
    found = compare_figures(a, a, ONES)
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_the_permutation_test_of_a_few_samples_is_exact() -> None:
    a = np.arange(8.0)
    # All eight differ in one direction: of the 256 swaps only this one and its mirror are as extreme.
    assert compare_figures(a, a + np.linspace(0.1, 0.9, 8), np.ones(8)).p_value == pytest.approx(2 / 256)


def test_fewer_than_six_samples_get_neither_interval_nor_test() -> None:
    found = compare_figures(np.arange(5.0), np.arange(5.0) + 1, np.ones(5))
    assert (found.difference, found.interval, found.p_value) == (1.0, None, None)
    assert paired.interval(np.ones(5), np.ones(5)) is None


def test_samples_are_drawn_together_with_their_weights() -> None:
    weights = np.array([1.0, 100.0, 3.0, 50.0, 7.0, 900.0, 2.0])
    assert paired.interval(0.25 * weights, weights) == pytest.approx((0.25, 0.25))


def test_an_accuracy_of_one_still_has_an_interval_with_a_width() -> None:
    # Wilson's: n / (n + z^2).
    assert paired.interval(np.ones(10), np.ones(10)) == pytest.approx((10 / (10 + 1.959964**2), 1.0))


def test_the_interval_covers_a_known_difference_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(100):
        a = rng.normal(size=50)
        b = a + 0.3 + rng.normal(scale=0.5, size=50)
        low, high = compare_figures(a, b, np.ones(50)).interval or (0, 0)
        hits += low <= 0.3 <= high
    assert 90 <= hits <= 99


def test_every_task_has_the_same_weight_in_the_overall_difference() -> None:
    a, b = shares(both=10, only_a=0, only_b=8)
    short_a, short_b = np.array([1.0, 1.0, 1, 1, 0, 0, 0, 0]), np.array([1.0, 1.0, 1, 0, 0, 0, 0, 0])
    found = paired.compare_mean([(a, b), (short_a, short_b)])
    assert found.difference == pytest.approx((8 / 40 - 1 / 8) / 2)
    assert found.interval is not None and found.interval[0] < found.difference < found.interval[1]
    same = paired.compare_mean([(a, a), (short_a, short_a)])
    assert (same.difference, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_the_overall_test_weighs_samples_as_the_overall_difference_does() -> None:
    small = np.array([0.0] * 6), np.array([1.0, 1, 0, 0, 0, 0])
    large = np.array([1.0, 1, *[0.0] * 10]), np.zeros(12)
    found = paired.compare_mean([small, large])
    assert found.difference == pytest.approx((2 / 6 - 2 / 12) / 2)
    # Swapped at random, two of 1/6 and two of 1/12 come to 1/6 or more in 6 cases of 16; both ways, in 12.
    assert found.p_value == pytest.approx(12 / 16, abs=0.03)


def test_p_values_of_several_tests_are_adjusted_as_benjamini_and_hochberg_say() -> None:
    # Sorted: 0.01 * 3 / 1, 0.03 * 3 / 2, 0.04 * 3 / 3; none above the next larger one's.
    found = paired.adjusted([paired.Difference(0.0, None, p, 9) for p in (0.01, 0.04, None, 0.03)])
    assert [each["p_adjusted"] for each in found] == [
        *(pytest.approx(0.03), pytest.approx(0.04), None, pytest.approx(0.04))
    ]


def test_every_token_has_the_same_weight_in_a_mean() -> None:
    found = PerText(np.array([1.0, 3.0]), [0, 0], *[np.array([[4.0], [0.0]])] * 3)
    assert found.mean(found.loss) == [1.0]
