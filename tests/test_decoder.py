"""The structure of a model: layers, final norm, head; and the models that a user names."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import FAMILIES, LAYERS, VOCABULARY, small_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from jreg_megatron.decoder.hugging_face import decoder_of, encoder_of, load_hugging_face
from jreg_megatron.decoder.load import check_model_arguments
from jreg_megatron.decoder.reference import Reference, find_models, step_of
from jreg_megatron.runtime.errors import UserError


class Recorder:
    """Keeps the states that it sees."""

    def __init__(self, num_layers: int = LAYERS) -> None:
        self.num_layers = num_layers
        self.states: dict[int, Tensor] = {}
        self.normed: Tensor | None = None

    def __call__(self, number: int, before: Tensor, after: Tensor) -> None:
        if number <= self.num_layers:
            self.states.setdefault(number - 1, before)
            self.states[number] = after
        else:
            assert torch.equal(before, self.states[self.num_layers - 1])
            self.normed = after


def decoder(family: str, **more: Any) -> Any:
    return decoder_of(small_model(family, **more), None, Reference(family, family))


TOKENS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_every_family_are_those_that_transformers_itself_returns(family: str) -> None:
    model = small_model(family)
    found = decoder_of(model, None, Reference(family, family))
    seen = Recorder()
    with found.observed(seen):
        found.run(TOKENS)
    with torch.no_grad():
        returned = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    assert found.num_layers == LAYERS
    for number in range(LAYERS):
        torch.testing.assert_close(seen.states[number], returned[number])
    # Its last entry is after the final norm.
    assert seen.normed is not None
    torch.testing.assert_close(seen.normed, returned[LAYERS])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_seen_before_the_final_norm(family: str) -> None:
    found = decoder(family)
    seen = Recorder()
    with found.observed(seen), torch.no_grad():
        found.run(TOKENS)
        normed = found.final_norm(seen.states[LAYERS])
    torch.testing.assert_close(normed, seen.normed)
    assert not torch.allclose(normed, seen.states[LAYERS], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_out_the_last_layer_gives_the_models_own_logits(family: str) -> None:
    found = decoder(family)
    seen = Recorder()
    with found.observed(seen):
        logits = found.logits(TOKENS)
    torch.testing.assert_close(found.read_out(seen.states[LAYERS]), logits)


@pytest.mark.parametrize("family", ["llama", "mamba", "zaya"])
def test_a_stream_in_fp32_over_weights_in_bf16_is_read_out_too(family: str) -> None:
    model = small_model(family).bfloat16()
    found = decoder_of(model, None, Reference(family, family))
    assert found.num_layers == LAYERS and found.final_norm is (
        model.backbone.norm_f if family == "mamba" else model.model.norm
    )
    seen = Recorder()
    with found.observed(seen):
        logits = found.logits(TOKENS).float()
    error = (found.read_out(seen.states[LAYERS]).float() - logits).norm() / logits.norm()
    assert error < 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "deepseek_v3"])
def test_leaving_a_layer_out_is_the_model_built_without_it(family: str) -> None:
    found = decoder(family)
    with found.without_layer(LAYERS):
        logits = found.logits(TOKENS)
    shorter = small_model(family, num_hidden_layers=LAYERS - 1)
    whole = found.model.state_dict()
    shorter.load_state_dict({name: whole[name] for name in shorter.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(logits, shorter(input_ids=TOKENS).logits)
    assert not torch.allclose(found.logits(TOKENS), logits, atol=1e-2)


def test_a_text_model_inside_a_multimodal_one_is_found() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95)
    found = decoder_of(Gemma3ForConditionalGeneration(config).eval(), None, Reference("both", "both"))
    assert (found.num_layers, found.hidden_size) == (3, 32)


def test_an_encoder_is_refused_since_it_looks_ahead() -> None:
    config = AutoConfig.for_model(
        "bert",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCABULARY,
    )
    with pytest.raises(UserError, match=r"^bert .*later tokens"):
        decoder_of(AutoModelForCausalLM.from_config(config).eval(), None, Reference("bert", "bert"))


def test_a_norm_that_also_runs_before_the_layers_is_read_only_after_them() -> None:
    class Twice(nn.Module):
        """Normalizes the embedding by the final norm, as nanochat does."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.embedding, self.norm = model.model.embed_tokens, model.model.norm

        def forward(self, ids: Tensor) -> Tensor:
            normed: Tensor = self.norm(self.embedding(ids))
            return normed

    model = small_model("llama")
    found = decoder_of(model, None, Reference("twice", "twice"))
    model.model.set_input_embeddings(Twice(model))
    calls: list[Tensor] = []

    class Counter(Recorder):
        def __call__(self, number: int, before: Tensor, after: Tensor) -> None:
            super().__call__(number, before, after)
            if number > LAYERS:
                calls.append(after)

    seen = Counter()
    with found.observed(seen):
        found.run(TOKENS)
        found.run(TOKENS)
    assert len(calls) == 2
    with torch.no_grad():
        torch.testing.assert_close(calls[0], model.model.norm(seen.states[LAYERS]))


def test_a_model_without_layers_is_refused_by_name() -> None:
    model = small_model("llama")
    model.model.layers = nn.ModuleList([nn.ModuleList(list(model.model.layers))])
    model.model.layers.__class__ = _Nested
    with pytest.raises(UserError, match=r"odd .*ModuleList") as refused:
        decoder_of(_Flat(model), None, Reference("odd", "odd"))
    assert "\n" not in str(refused.value)


class _Nested(nn.ModuleList):
    def __getitem__(self, index: Any) -> Any:
        return list(super().__getitem__(0))[index]


class _Flat(nn.Module):
    """A model whose only list of modules is never called."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.config, self.device, self.dtype = like.config, like.device, like.dtype
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.unused = nn.ModuleList([nn.Linear(8, 8)])
        self.base_model = self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        class Out:
            logits = self.embedding(input_ids)

        return Out


def test_a_saved_folder_loads_in_the_type_asked_for(tmp_path: Path) -> None:
    small_model("qwen3").save_pretrained(tmp_path / "small")
    loaded = load_hugging_face(Reference("small", str(tmp_path / "small")), torch.bfloat16)
    assert (loaded.dtype, loaded.num_layers, loaded.encode) == (torch.bfloat16, LAYERS, None)
    assert loaded.logits(TOKENS).dtype == torch.bfloat16


def test_code_that_comes_with_a_model_does_not_run_unless_asked(tmp_path: Path) -> None:
    folder, witness = tmp_path / "own_code", tmp_path / "it_ran"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "own_kind", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}'
    )
    (folder / "own.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    with pytest.raises(UserError, match="--trust-remote-code"):
        _load(folder)
    assert not witness.exists()


def _load(source: Path | str) -> Any:
    return load_hugging_face(Reference("x", str(source)), torch.float32)


def _change_weights(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()},
            r"hold no lm_head\.weight and \d+ more, .*; they hold _orig_mod\.",
        ),
        (
            lambda weights: {name: weight for name, weight in weights.items() if ".layers.3." not in name},
            r"hold no model\.layers\.3\.",
        ),
        (
            lambda weights: {name: weight for name, weight in weights.items() if name != "model.norm.weight"},
            r"hold no model\.norm\.weight, which its config\.json needs",
        ),
        (
            lambda weights: weights | {"model.norm.weight": torch.ones(7)},
            r"hold model\.norm\.weight of size \[7\], but its config\.json needs \[32\]",
        ),
    ],
)
def test_weights_that_are_not_in_the_files_are_refused_and_never_random(
    tmp_path: Path, change: Any, said: str
) -> None:
    small_model("llama").save_pretrained(tmp_path)
    _change_weights(tmp_path, change)
    with pytest.raises(UserError, match=said) as refused:
        _load(tmp_path)
    assert "\n" not in str(refused.value)


def test_tied_weights_that_are_saved_once_are_no_missing_weights(tmp_path: Path) -> None:
    small_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert _load(tmp_path).num_layers == LAYERS


@pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "model.norm.bias", "lm_head.bias"])
def test_weights_that_the_config_leaves_out_are_noted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model("llama").save_pretrained(tmp_path)
    _change_weights(tmp_path, lambda weights: weights | {name: torch.ones(2)})
    assert _load(tmp_path).num_layers == LAYERS
    told = capsys.readouterr().err
    assert told.startswith("Note: ") and f" {name};" in told


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", [3, 4]),
        ("<s> $A", [1, 3, 4]),
        ("<s> $A </s>", [1, 3, 4]),
        ("$A </s> </s>", [3, 4]),
        ("<s> <s> $A", [1, 1, 3, 4]),
    ],
)
def test_special_tokens_begin_a_text_and_never_end_it(template: str, expected: list[int]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "x": 3, "y": 4}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    encode = encoder_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert encode("x y") == expected
    assert encode("") == expected[:-2]


@pytest.mark.parametrize(
    ("family", "more", "length"),
    [("mpt", {"max_seq_len": 48, "d_model": 32}, 48), ("whisper", {"max_target_positions": 48}, 48)],
)
def test_a_context_is_known_by_other_names_too(family: str, more: dict[str, Any], length: int) -> None:
    assert decoder(family, **more).max_length == length


@pytest.mark.parametrize(
    "config",
    ["{", *(f'{{"model_type": "{kind}"}}' for kind in ("t5", "nothing_known", "llama"))],
)
def test_a_folder_that_is_not_a_causal_model_is_one_line(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} cannot be loaded")) as refused:
        _load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_broken_gguf_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(UserError, match=r"broken\.gguf") as refused:
        _load(tmp_path / "broken.gguf")
    assert "\n" not in str(refused.value)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_names_are_short_and_those_that_collide_are_the_whole_path(tmp_path: Path) -> None:
    one, other = _folder(tmp_path / "a" / "same"), _folder(tmp_path / "b" / "same")
    third = _folder(tmp_path / "c")
    found = find_models([str(one), str(other), f"mine={third}", "Qwen/Qwen3-0.6B@main"])
    assert [each.name for each in found] == [str(one), str(other), "mine", "Qwen/Qwen3-0.6B"]
    assert [each.revision for each in found] == [None, None, None, "main"]


def test_checkpoints_of_a_trainer_are_a_series_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (1000, 200, 50):
        _folder(tmp_path / "run" / f"checkpoint-{step}")
    assert [each.step for each in find_models([f"{tmp_path / 'run'}@all"])] == [50, 200, 1000]
    assert [each.step for each in find_models([f"{tmp_path / 'run'}@200,50"])] == [200, 50]
    (latest,) = find_models([str(tmp_path / "run")])
    assert (latest.step, latest.name) == (1000, "run")


def test_all_revisions_of_a_model_on_the_hub_are_its_branches_by_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("main", "step512", "step1000", "step1", "float16")
    refs = SimpleNamespace(branches=[SimpleNamespace(name=name) for name in names])
    monkeypatch.setattr("huggingface_hub.list_repo_refs", lambda _: refs)
    found = find_models(["EleutherAI/pythia-70m@all"])
    assert [each.revision for each in found] == ["step1", "step512", "step1000"]
    assert {each.name for each in found} == {"EleutherAI/pythia-70m"}


def test_a_hub_that_does_not_answer_is_one_line_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(_: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.list_repo_refs", unreachable)
    with pytest.raises(UserError, match=r"\(no network\)"):
        find_models(["EleutherAI/pythia-70m@all"])


def test_a_path_may_hold_the_marks_of_names_and_revisions(tmp_path: Path) -> None:
    _folder(tmp_path / "lr=0.1" / "run" / "checkpoint-5")
    _folder(tmp_path / "a@b=c")
    series, plain = find_models([f"{tmp_path}/lr=0.1/run@5", f"{tmp_path}/a@b=c"])
    assert (series.name, series.step) == ("run", 5)
    assert plain.name == "a@b=c"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("model.gguf", "does not exist"),
        ("name=", "MODEL is empty"),
        ("", "MODEL is empty"),
        ("what is this", "'what is this'.* hub"),
        ("{tmp}/run@7", "@7 .*/run;.* 50, 200"),
        ("{tmp}/run@x", "@x .*/run;.* 50, 200"),
        ("{tmp}/begun@all", "@all .*/begun;.* none"),
        ("{tmp}/empty", r"/empty .*config\.json"),
        ("{tmp}/plain@all", "@all .*/plain is one model"),
        ("{tmp}/weights.pt", r"/weights\.pt .*\.gguf"),
    ],
)
def test_a_missing_model_is_named(tmp_path: Path, model: str, said: str) -> None:
    for step in (50, 200):
        _folder(tmp_path / "run" / f"checkpoint-{step}")
    _folder(tmp_path / "plain")
    (tmp_path / "begun" / "iter_0000005").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(UserError, match=said):
        find_models([model.replace("{tmp}", str(tmp_path))])


@pytest.mark.parametrize(
    ("text", "step"),
    [("step1000", 1000), ("stage1-step500-tokens2B", 500), ("/x/checkpoint-20", 20), ("main", None)],
)
def test_the_step_of_a_revision_is_read_from_its_name(text: str, step: int | None) -> None:
    assert step_of(text) == step


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "hpu", "meta"])
def test_a_missing_device_is_one_line(device: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--device is {device}")):
        check_model_arguments(Namespace(batch_size=1, device=device))
