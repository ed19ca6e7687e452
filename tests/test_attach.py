"""``attach`` on a built Megatron model: what it changes, what it leaves alone, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from harness import run_function

from jreg_megatron import JRegConfig, UserError


def build_model() -> Any:
    """A two-layer GPTModel on one rank, in this process."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=8)


def step(model: Any) -> tuple[Any, dict[str, Any]]:
    """Loss and gradients of one micro-batch."""
    import torch

    tokens = torch.arange(16).view(2, 8)
    positions = torch.arange(8).expand(2, 8)
    causal = torch.ones(2, 1, 8, 8, dtype=torch.bool).triu(1)
    model.zero_grad()
    loss = model(tokens, positions, causal, labels=tokens.roll(-1, dims=1)).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def leaves_the_model_as_it_was() -> None:
    import torch

    from jreg_megatron import attach

    model = build_model()
    keys = list(model.state_dict())
    attributes = [dict(vars(layer)) for layer in model.decoder.layers]
    loss, gradients = step(model)
    handle = attach(model, JRegConfig(coeff=1.0, alpha=0.0), num_microbatches=1)
    regularized_loss, regularized = step(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(loss, regularized_loss)
    assert any(not torch.equal(gradients[name], regularized[name]) for name in gradients)
    metrics = handle.reduce_training_metrics()
    assert metrics is not None
    assert 0 < metrics.jreg_loss < 1
    handle.detach()
    assert [dict(vars(layer)) for layer in model.decoder.layers] == attributes
    _, after = step(model)
    assert all(torch.equal(gradients[name], after[name]) for name in gradients)


def only_measures_with_coeff_zero() -> None:
    import torch

    from jreg_megatron import attach

    model = build_model()
    _, gradients = step(model)
    handle = attach(model, JRegConfig(coeff=0.0), num_microbatches=1)
    _, measured = step(model)
    assert all(torch.equal(gradients[name], measured[name]) for name in gradients)
    assert handle.reduce_training_metrics() is not None
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None], None)
    assert handle.reduce_validation_metrics() is not None
    assert handle.reduce_validation_metrics() is None, "a second call starts from nothing"


def refuses_by_name() -> list[str]:
    from torch import nn

    from jreg_megatron import attach

    model = build_model()

    def refusal(*args: Any, **named: Any) -> str:
        with pytest.raises(UserError) as caught:
            attach(*args, **named)
        return str(caught.value)

    lines = [
        refusal([], JRegConfig(), num_microbatches=1),
        refusal(nn.Linear(2, 2), JRegConfig(), num_microbatches=1),
        refusal(model, JRegConfig()),
        refusal(model, JRegConfig(weights=(1, 2, 3)), num_microbatches=1),
        refusal(model, JRegConfig(coeff=1.0, warmup_iterations=5), num_microbatches=1),
    ]
    model.config.recompute_granularity = "full"
    lines.append(refusal(model, JRegConfig(final_state="post_norm"), num_microbatches=1))
    model.config.recompute_granularity = None
    attach(model, JRegConfig(), num_microbatches=1)
    lines.append(refusal(model, JRegConfig(), num_microbatches=1))
    return lines


def test_attach_changes_no_forward_value_and_no_state_dict_and_detach_undoes_it() -> None:
    run_function(leaves_the_model_as_it_was)


def test_with_coeff_zero_gradients_are_untouched_and_displacement_is_measured() -> None:
    run_function(only_measures_with_coeff_zero)


def test_attach_refuses_by_name_what_it_cannot_do() -> None:
    (lines,) = run_function(refuses_by_name)
    for line, named in zip(
        lines,
        (
            "list of model chunks is empty",
            "a Linear, which has no decoder.layers",
            "number of micro-batches is not known",
            "--jreg-weights",
            "iteration=",
            "recompute_granularity 'full'",
            "attached to this model already",
        ),
        strict=True,
    ):
        assert named in line
        assert "\n" not in line
