"""The layers and the final norm that are found, in real families and in misleading models."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from small_models import LAYERS, VOCABULARY, small_model
from test_decoder import TOKENS, Recorder
from torch import Tensor, nn

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.hugging_face import decoder_of
from jreg_megatron.decoder.reference import Reference
from jreg_megatron.evaluate.layers import read_out_error, score_own
from jreg_megatron.measure.measurement import measure
from jreg_megatron.runtime.errors import UserError

WIDTH = 16


def found_in(model: Any, name: str = "odd") -> Decoder:
    return decoder_of(model, None, Reference(name, name))


def refused(model: Any) -> str:
    with pytest.raises(UserError, match="no list of layers found in odd ") as error:
        found_in(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Note: ")]


def seen_by(model: Any, found: Decoder) -> Recorder:
    """An observer's states. Each layer's states must equal those of a hook on this layer."""
    by_hook: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: by_hook.append(_first(out))) for layer in found.layers
    ]
    seen = Recorder(found.num_layers)
    with found.observed(seen), torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for number, state in enumerate(by_hook, start=1):
        torch.testing.assert_close(seen.states[number], state)
    assert len(by_hook) == found.num_layers
    return seen


def _first(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple | list) else output
    return state


# Families of transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [LAYERS, 1])
def test_a_list_inside_a_model_of_several_streams_is_not_its_layers(layers: int, dtype: torch.dtype) -> None:
    # With one layer there are as many of that Linear as layers.
    model = small_model("gemma3n_text", num_hidden_layers=layers, activation_sparsity_pattern=[0.0] * layers)
    assert f"{layers} layers (its configuration)" in refused(model.to(dtype))


def test_ids_that_share_an_embedding_do_not_make_a_list_pass_for_the_layers() -> None:
    model = small_model("gemma3n_text", num_hidden_layers=LAYERS, activation_sparsity_pattern=[0.0] * LAYERS)
    for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        with torch.no_grad():
            embedding.weight[4:6] = embedding.weight[3]
    assert f"{LAYERS} layers (its configuration)" in refused(model)


def test_a_model_that_gives_all_tokens_the_same_logits_is_refused() -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0]
    with pytest.raises(UserError, match="same logits"):
        found_in(model)


@pytest.mark.parametrize(
    ("family", "counted", "ran"),
    [("longcat_flash", LAYERS, LAYERS // 2), ("mllama", LAYERS, LAYERS - 1)],
)
def test_layers_that_the_configuration_counts_differently_are_found_and_noted(
    family: str, counted: int, ran: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(family)
    found = found_in(model)
    (note,) = notes(capsys)
    assert f"counts {counted} layers, but {ran} of" in note
    assert found.num_layers == ran
    with torch.no_grad():
        states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen_by(model, found).normed, states[-1])


def test_a_model_that_was_cut_off_is_measured_and_its_configuration_contradicted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = small_model("llama")
    model.model.layers = model.model.layers[:2]
    assert found_in(model).num_layers == 2
    (note,) = notes(capsys)
    assert f"counts {LAYERS} layers, but 2 of" in note


def test_layers_beyond_those_that_the_model_uses_are_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model("llama")
    model.config.num_hidden_layers = 2
    assert found_in(model).num_layers == 2
    assert notes(capsys) == []


@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_the_decoder_of_an_encoder_decoder_family_is_counted_by_itself(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(family, encoder_layers=2, decoder_layers=LAYERS)
    assert found_in(model).num_layers == LAYERS
    assert notes(capsys) == []


@pytest.mark.parametrize(
    ("family", "more", "reads_out"),
    [
        ("openai-gpt", {}, True),
        ("opt", {"do_layer_norm_before": False}, True),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, False),
        ("bert", {}, False),
        ("roberta", {}, False),
        ("bart", {}, True),
        ("inkling2_text", {}, False),
    ],
)
def test_a_model_without_a_final_norm_on_its_last_layer_has_no_state_after_it(
    family: str, more: dict[str, Any], reads_out: bool
) -> None:
    model = small_model(family, **more)
    found = found_in(model, family)
    assert found.final_norm is None
    seen = seen_by(model, found)
    assert (found.num_layers, seen.normed) == (LAYERS, None)
    error = read_out_error(found)
    assert (error is None) == reads_out
    if reads_out:
        with torch.no_grad():
            logits = model(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(found.read_out(seen.states[LAYERS]), logits)


def test_a_head_that_reads_several_states_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    found_in(small_model("inkling2_text"))
    (note,) = notes(capsys)
    assert "head of odd" in note


# Models of our own


class Layer(nn.Module):
    """Adds to each token a function of the mean over it and the tokens before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        counts = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states + torch.tanh(self.linear(hidden_states.cumsum(1) / counts))


class Stack(nn.Module):
    """A list of modules that hand a state on, as one module."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, state: Any) -> Any:
        for part in self.parts:
            state = part(*state) if isinstance(state, tuple) else part(state)
        return state


class Streams(nn.Module):
    """A layer with two streams ``[2, b, s, h]``; the chain inside it carries neither."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack(2)

    def forward(self, streams: Tensor) -> Tensor:
        return torch.stack((streams[1], streams[0] + self.inner(streams[0] - streams[1])))


class Pair(nn.Module):
    """A layer that passes on its branch and, separately, the sum of the earlier branches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(branch + residual), branch + residual


class Project(nn.Linear):
    """A norm and weights in one."""

    def forward(self, state: Tensor) -> Tensor:
        return super().forward(nn.functional.layer_norm(state, (WIDTH,)))


class Odd(nn.Module):
    """A language model of given parts; ``way`` is the path from the embedding to the head's input."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self, way: Callable[[Any, Tensor], Tensor], num_layers: int | None = LAYERS, **parts: nn.Module
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCABULARY, get_text_config=lambda decoder: self.config)
        if num_layers is not None:
            self.config.num_hidden_layers = num_layers
        self._way = way
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        for name, part in parts.items():
            setattr(self, name, part)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(self._way(self, self.embedding(input_ids))))


def stack(count: int = LAYERS, of: Callable[[], nn.Module] = Layer) -> Stack:
    return Stack(*(of() for _ in range(count)))


def linears(count: int = LAYERS) -> Stack:
    return stack(count, lambda: nn.Linear(WIDTH, WIDTH))


def two(state: Tensor) -> Tensor:
    return torch.stack((state, 2 * state))


def both(streams: Tensor) -> Tensor:
    return streams[0] + streams[1]


@pytest.mark.parametrize("number", [LAYERS, None])  # remote code may not say it
def test_a_plain_model_is_found_without_a_note(
    number: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Odd(lambda m, x: m.norm(m.body(x)), number, body=stack(), norm=nn.LayerNorm(WIDTH))
    found = found_in(model)
    assert (list(found.layers), found.final_norm) == (list(model.body.parts), model.norm)
    assert read_out_error(found) is None and notes(capsys) == []


def test_layers_that_round_differently_in_two_runs_are_found() -> None:
    class Noisy(Layer):
        def forward(self, hidden_states: Tensor) -> Tensor:
            out = super().forward(hidden_states)
            return out + 1e-5 * torch.randn_like(out)

    model = Odd(lambda m, x: m.norm(m.body(x)), body=stack(of=Noisy), norm=nn.LayerNorm(WIDTH))
    found = found_in(model)
    assert (list(found.layers), found.final_norm) == (list(model.body.parts), model.norm)


def test_layers_of_the_configurations_number_go_before_more_of_them_inside() -> None:
    model = Odd(lambda m, x: m.body(x), 1, body=Stack(stack(6)))
    assert list(found_in(model).layers) == list(model.body.parts)


REFUSED: dict[str, Callable[[], Odd]] = {
    # Each has a list that the number fits, or that carries a part of the stream.
    "a projection of the embedding": lambda: Odd(
        lambda m, x: both(m.body(two(m.first(x)))), first=linears(), body=stack(of=Streams)
    ),
    "a projection that hardly counts": lambda: Odd(
        lambda m, x: both(m.body(torch.stack((x, 1e-9 * m.first(x))))),
        first=linears(),
        body=stack(of=Streams),
    ),
    "layers for something else": lambda: Odd(
        lambda m, x: both(m.body(two(x))) + 1e-3 * m.beside(x), body=stack(of=Streams), beside=stack()
    ),
    "a projection for the head": lambda: Odd(
        lambda m, x: m.last(both(m.body(two(x)))), body=stack(of=Streams), last=linears()
    ),
    "a chain inside each layer": lambda: Odd(lambda m, x: both(m.body(two(x))), 2, body=stack(of=Streams)),
    "two halves": lambda: Odd(lambda m, x: m.second(m.first(x)), first=stack(2), second=stack(2)),
    "two halves, the first of the number": lambda: Odd(
        lambda m, x: m.second(m.first(x)), 2, first=stack(2), second=stack(2)
    ),
    "a stream beside the layers": lambda: Odd(
        lambda m, x: m.body(x) + both(m.beside(two(x))), body=stack(3), beside=stack(of=Streams)
    ),
    "a branch and its sum": lambda: Odd(lambda m, x: sum(m.body((x, x))), body=stack(of=Pair)),
}


@pytest.mark.parametrize("model", REFUSED.values(), ids=REFUSED)
def test_a_list_that_does_not_carry_the_whole_stream_is_refused(model: Callable[[], Odd]) -> None:
    assert "layers (its configuration)" in refused(model())


Way = Callable[[Any, Tensor, Tensor], Tensor]
WAYS: dict[str, tuple[Way, bool, bool]] = {
    # From the embedding x and the last layer's output h to the head: is there a final norm, and a read-out?
    "norm": (lambda m, x, h: m.norm(h), True, True),
    "a norm for something else first": (lambda m, x, h: m.norm(h) + 0 * m.other(h), True, True),
    "weights before the norm": (lambda m, x, h: m.norm(m.linear(h)), False, False),
    "a norm of more": (lambda m, x, h: m.norm(h + x), False, False),
    "a norm beside": (lambda m, x, h: m.norm(h) + h, False, False),
    "weights behind the norm": (lambda m, x, h: m.linear(m.norm(h)), True, False),
    "norm and weights in one": (lambda m, x, h: m.project(h), False, False),
    "no norm": (lambda m, x, h: m.tanh(h), False, False),
    "weights": (lambda m, x, h: m.linear(h), False, False),
    "a norm that is no module": (lambda m, x, h: torch.layer_norm(h, (WIDTH,)), False, False),
    "nothing": (lambda m, x, h: h, False, True),
}


@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(("way", "has_norm", "reads_out"), WAYS.values(), ids=WAYS)
def test_the_final_norm_is_a_norm_of_the_last_layers_output_and_of_nothing_else(
    way: Way, has_norm: bool, reads_out: bool, norm: nn.Module
) -> None:
    model = Odd(
        lambda m, x: way(m, x, m.body(x)),
        other=nn.LayerNorm(WIDTH),
        body=stack(),
        norm=norm,
        tanh=nn.Tanh(),
        linear=nn.Linear(WIDTH, WIDTH),
        project=Project(WIDTH, WIDTH),
    )
    found = found_in(model)
    assert list(found.layers) == list(model.body.parts)
    assert found.final_norm is (norm if has_norm else None)
    assert (read_out_error(found) is None) == reads_out


def bfloat(model: Odd) -> Odd:
    model.dtype = torch.bfloat16
    return model.to(model.dtype)


def mask(value: float) -> Callable[[Tensor], Tensor]:
    ids = torch.arange(VOCABULARY)
    return lambda logits: logits.masked_fill(ids == VOCABULARY - 1, value)


# A model's change of its logits, and whether the head alone then gives other logits.
LOGITS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "masked by -Inf": (mask(-torch.inf), True),
    "masked by the least number": (mask(torch.finfo(torch.float32).min), True),
    "one id far above": (mask(1e6), True),
    "an offset of all": (lambda logits: logits + 1000, False),  # which no probability depends on
}


@pytest.mark.parametrize(("change", "shows"), LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("way", ["a norm beside", "a norm of more", "norm"])
def test_logits_that_are_masked_or_large_do_not_switch_a_check_off(
    way: str, change: Callable[[Tensor], Tensor], shows: bool
) -> None:
    leads, has_norm, _ = WAYS[way]
    model = Odd(lambda m, x: leads(m, x, m.body(x)), body=stack(), norm=nn.LayerNorm(WIDTH))
    head = model.head
    model.head = nn.Sequential(head, _Change(change))
    model.get_output_embeddings = lambda: head  # type: ignore[method-assign]
    found = found_in(model)
    assert (found.final_norm is model.norm) == has_norm
    assert (read_out_error(found) is None) == (has_norm and not shows)


class _Change(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, logits: Tensor) -> Tensor:
        return self.change(logits)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_layers_with_a_parallel_branch_are_refused_in_bfloat16_too(offset: float) -> None:
    model = bfloat(REFUSED["a projection that hardly counts"]())
    with torch.no_grad():
        model.head.bias += offset
    refused(model)


def test_a_token_that_gives_nan_neither_switches_a_check_off_nor_makes_it_fail() -> None:
    plain = Odd(lambda m, x: m.norm(m.body(x)), body=stack(), norm=nn.LayerNorm(WIDTH))
    other = REFUSED["a projection that hardly counts"]()
    with torch.no_grad():
        plain.embedding.weight[5] = other.embedding.weight[5] = torch.nan
    refused(other)
    assert found_in(plain).final_norm is plain.norm and read_out_error(found_in(plain)) is None


# States as they are, not as they were left


def by_hand(model: Odd, layers: Any, ids: Tensor) -> tuple[list[float], Tensor]:
    """Mean displacements of layers in float64, from copies that hooks of our own make; and the logits."""
    before: list[Tensor] = []
    psi: list[float] = []

    def after(_: nn.Module, __: Any, out: Any) -> None:
        cos = nn.functional.cosine_similarity(before.pop(), _first(out).double(), dim=-1)
        psi.append(float((1 - cos).mean() / 2))

    hooks = [
        layer.register_forward_pre_hook(lambda _, args: before.append(args[0].double())) for layer in layers
    ]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return psi, logits


HEADS: dict[str, Way] = {
    # Other heads that share the final norm, and run before the main one.
    "of a layer behind": lambda m, x, h: m.norm(h) + 0 * m.norm(m.tanh(h)),
    "of a layer behind, first": lambda m, x, h: 0 * m.norm(m.tanh(h)) + m.norm(h),
    "of the embedding": lambda m, x, h: 0 * m.norm(x) + m.norm(h),
    "of the mean": lambda m, x, h: 0 * m.norm(h.mean(1, keepdim=True)) + m.norm(h),
}


@pytest.mark.parametrize("way", HEADS.values(), ids=HEADS)
def test_a_norm_that_other_heads_share_is_the_final_one_on_the_last_layers_output(way: Way) -> None:
    model = Odd(lambda m, x: way(m, x, m.body(x)), body=stack(), norm=nn.LayerNorm(WIDTH), tanh=nn.Tanh())
    found, seen = found_in(model), Recorder()
    with found.observed(seen):
        found.run(TOKENS)
    _, logits = by_hand(model, [], TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(seen.normed, model.norm(model.body(model.embedding(TOKENS))))
    assert read_out_error(found) is None
    rows, columns = torch.arange(2), torch.tensor([3, 5])
    expected = nn.functional.cross_entropy(logits[rows, columns], TOKENS[rows, columns], reduction="none")
    loss, _ = score_own(found, TOKENS, (rows, columns), TOKENS[rows, columns])
    torch.testing.assert_close(loss, expected)


class InPlace(Layer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states += super().forward(hidden_states) - hidden_states
        return hidden_states


@pytest.mark.parametrize("first", [Layer, InPlace])
def test_layers_that_write_to_their_input_are_measured_and_left_out_by_what_they_were_given(
    first: Any,
) -> None:
    parts = [first(), *(InPlace() for _ in range(LAYERS - 1))]
    model = Odd(lambda m, x: m.norm(m.body(x)), body=Stack(*parts), norm=nn.LayerNorm(WIDTH))
    found = found_in(model)
    psi, _ = by_hand(model, parts, TOKENS[:1])
    measured = measure(found, [Text("a", TOKENS[0].numpy())])["with_first_token"]
    assert measured["displacement"]["pre_norm"] == pytest.approx(psi, rel=1e-5)
    with found.without_layer(2):
        logits = found.logits(TOKENS)
    model.body.parts = nn.ModuleList([parts[0], *parts[2:]])
    torch.testing.assert_close(logits, by_hand(model, [], TOKENS)[1])


def test_a_state_that_is_written_to_between_layers_is_refused() -> None:
    class Between(Stack):
        def forward(self, state: Tensor) -> Tensor:
            for part in self.parts:
                state = part(state)
                state += state.roll(1, -1)
            return state

    refused(Odd(lambda m, x: m.norm(m.body(x)), body=Between(*stack().parts), norm=nn.LayerNorm(WIDTH)))


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_runs_otherwise_on_a_long_text_is_one_line(times: int) -> None:
    class Long(Stack):
        def forward(self, state: Tensor) -> Tensor:
            for number, part in enumerate(self.parts):
                for _ in range(times if number == 2 and state.shape[1] > 20 else 1):
                    state = part(state)
            return state

    found = found_in(Odd(lambda m, x: m.norm(m.body(x)), body=Long(*stack().parts), norm=nn.LayerNorm(WIDTH)))
    ids = torch.arange(30).numpy()
    assert measure(found, [Text("short", ids[:16])])["with_first_token"]["texts"] == 1
    with pytest.raises(UserError, match=r"layer .* odd"):
        measure(found, [Text("long", ids)])


def test_a_layer_that_returns_a_named_tuple_can_be_left_out() -> None:
    class Out(NamedTuple):
        state: Tensor
        more: int

    class Named(Layer):
        def forward(self, hidden_states: Tensor) -> Any:
            return Out(super().forward(hidden_states), 1)

    class Opened(Stack):
        def forward(self, state: Tensor) -> Tensor:
            for part in self.parts:
                state = part(state).state
            return state

    model = Odd(lambda m, x: m.norm(m.body(x)), body=Opened(*stack(of=Named).parts), norm=nn.LayerNorm(WIDTH))
    found = found_in(model)
    with found.without_layer(1):
        logits = found.logits(TOKENS)
    model.body.parts = model.body.parts[1:]
    torch.testing.assert_close(logits, by_hand(model, [], TOKENS)[1])


# A model's parts, and its expected structure


class Halves(Stack):
    """Halves the state after each layer, as RWKV does in half precision."""

    def forward(self, state: Tensor) -> Tensor:
        for part in self.parts:
            state = part(state) * 0.5
        return state


def test_a_state_that_is_scaled_between_layers_keeps_its_angles_and_is_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Odd(lambda m, x: m.norm(m.body(x)), body=Halves(*stack().parts), norm=nn.LayerNorm(WIDTH))
    found, ids = found_in(model), torch.arange(20)[None]
    (note,) = notes(capsys)
    assert "odd scales its state" in note
    psi, _ = by_hand(model, model.body.parts, ids)
    measured = measure(found, [Text("a", ids[0].numpy())])["with_first_token"]["displacement"]
    assert measured["pre_norm"] == pytest.approx(psi, rel=1e-5)
    normed: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _, __, out: normed.append(out))
    last: list[Tensor] = []
    model.body.parts[-1].register_forward_pre_hook(lambda _, args: last.append(args[0]))
    by_hand(model, [], ids)
    hook.remove()
    cos = nn.functional.cosine_similarity(last[-1].double(), normed[-1].double(), dim=-1)
    assert measured["post_norm"][-1] == pytest.approx(float((1 - cos).mean() / 2), rel=1e-5)


@pytest.mark.parametrize(
    "body",
    [lambda: nn.Sequential(*stack().parts), lambda: Named(*stack().parts)],
    ids=["Sequential", "ModuleDict"],
)
def test_layers_in_other_containers_are_found(body: Callable[[], nn.Module]) -> None:
    model = Odd(lambda m, x: m.norm(m.body(x)), body=body(), norm=nn.LayerNorm(WIDTH))
    found = found_in(model)
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    assert (list(found.layers), found.final_norm) == (layers, model.norm)


class Named(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(number): part for number, part in enumerate(parts)})

    def forward(self, state: Tensor) -> Tensor:
        for part in self.parts.values():
            state = part(state)
        return state


def test_a_norm_among_the_layers_is_not_taken_for_one_of_them() -> None:
    refused(Odd(lambda m, x: m.body(x), body=nn.Sequential(*stack().parts, nn.LayerNorm(WIDTH))))


def test_a_layer_that_runs_several_times_is_refused() -> None:
    layer = Layer()
    assert "run once each" in refused(Odd(lambda m, x: m.body(x), body=Stack(*4 * [layer])))


def test_a_branch_whose_sum_is_kept_in_a_dict_is_refused() -> None:
    class Keeps(Layer):
        def forward(self, hidden_states: Tensor, kept: dict[str, Tensor]) -> Tensor:
            kept["sum"] = kept["sum"] + hidden_states
            return super().forward(kept["sum"])

    class Keeper(Stack):
        def forward(self, state: Tensor) -> Tensor:
            kept = {"sum": torch.zeros_like(state)}
            for part in self.parts:
                state = part(state, kept)
            return state + kept["sum"]

    refused(Odd(lambda m, x: m.body(x), body=Keeper(*stack(of=Keeps).parts)))


class Other(Odd):
    """Knows no cache, and gives its logits in another way."""

    gives: Callable[[Any], Any]

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        return type(self).gives(super().forward(input_ids, False).logits)


@pytest.mark.parametrize(
    "gives", [lambda logits: (logits,), lambda logits: {"logits": logits}], ids=["tuple", "dict"]
)
def test_a_model_of_another_form_is_measured_too(gives: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Other, "gives", staticmethod(gives), raising=False)
    model = Other(lambda m, x: m.norm(m.body(x)), body=stack(), norm=nn.LayerNorm(WIDTH))
    del model.config.vocab_size
    found = found_in(model)
    assert (found.final_norm, found.vocab_size) == (model.norm, VOCABULARY)
    assert read_out_error(found) is None


def test_logits_of_the_last_token_alone_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Other, "gives", staticmethod(lambda logits: (logits[:, -1:],)), raising=False)
    with pytest.raises(UserError, match=rf"\[\d+, 1, {VOCABULARY}\].* \[\d+, \d+\]"):
        found_in(Other(lambda m, x: m.body(x), body=stack()))


@pytest.mark.parametrize(
    ("family", "more"),
    [("gpt2", {"n_positions": 4}), ("mpt", {"logit_scale": "inv_sqrt_d_model", "d_model": 32})],
)
def test_a_short_context_and_a_scale_by_a_word_are_read_out(family: str, more: dict[str, Any]) -> None:
    found = found_in(small_model(family, **more))
    assert found.num_layers == LAYERS and read_out_error(found) is None


# A text's states are its own


class Blocks(Layer):
    """Looks ahead to the end of a block of ``size`` tokens."""

    size = 2

    def forward(self, hidden_states: Tensor) -> Tensor:
        length = hidden_states.shape[1]
        ends = torch.arange(length) // self.size * self.size + self.size - 1
        return hidden_states + super().forward(hidden_states)[:, ends.clamp(max=length - 1)]


def ran(model: Odd, batch_size: int = 8) -> Any:
    ids = numpy.random.default_rng(0).integers(0, VOCABULARY, 30)
    measured = measure(found_in(model), [Text("a", ids)], batch_size=batch_size)
    return measured["with_first_token"]["displacement"]["pre_norm"], torch.from_numpy(ids)[None]


DEPENDENT: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "the batch": (lambda m, x: m.body(x - 0.5 * x.mean(0) * (len(x) > 2)), "--batch-size 1"),
    "padding": (lambda m, x: m.body(x + torch.arange(x.shape[1]).flip(0)[:, None]), "--batch-size 1"),
    "a long prefix": (
        lambda m, x: m.body(x + x[:, :16].mean(1, keepdim=True) * (x.shape[1] > 12)),
        "later tokens in",
    ),
    "noise": (lambda m, x: m.body(nn.functional.dropout(x, 0.1)), "different logits"),
    "noise behind": (lambda m, x: nn.functional.dropout(m.body(x), 0.1), "different logits"),
}


@pytest.mark.parametrize(("way", "said"), DEPENDENT.values(), ids=DEPENDENT)
def test_a_model_whose_states_depend_on_something_else_is_refused_in_one_line(
    way: Callable[[Any, Tensor], Tensor], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        ran(Odd(way, body=stack()))
    assert "\n" not in str(error.value)
    if said == "--batch-size 1":
        model = Odd(way, body=stack())
        psi, ids = ran(model, batch_size=1)
        assert psi == pytest.approx(by_hand(model, model.body.parts, ids)[0], rel=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_a_look_ahead_within_blocks_is_seen(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blocks, "size", size)
    with pytest.raises(UserError, match="later tokens"):
        found_in(Odd(lambda m, x: m.body(x), body=stack(of=Blocks)))


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_layers_are_observed_without_the_head(is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd(lambda m, x: m.norm(m.body(x)), body=stack(), norm=nn.LayerNorm(WIDTH))
    if is_tied:  # one module for both ends; the model reads its weights itself
        monkeypatch.setattr(model, "get_output_embeddings", lambda: model.embedding)
    found, seen, ends = found_in(model), Recorder(), list[str]()
    model.head.register_forward_hook(lambda *_: ends.append("head"))
    with found.observed(seen):
        found.run(TOKENS)
    assert seen.normed is not None and (is_tied or not ends)
