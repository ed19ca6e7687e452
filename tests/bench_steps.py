"""The benchmark's ways to run a training step, observed from inside Megatron's loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jreg_megatron import UserError

TINY = "--layers 4 --width 32 --sequence 16 --micro-batch 2 --micro-batches 2".split()
UNGUARDED = ["--no-check-for-nan-in-loss-and-grad"]  # the guard knows of whole steps only


def gradients(ways: list[str]) -> dict[str, Any]:
    """The gradients of one batch in each way, one after the other on one model, and remaining attributes."""
    from jreg_megatron.bench import megatron, options
    from jreg_megatron.bench.variants import make_variants

    args = options.parser().parse_args(["step", *TINY, "--layers", "8"])
    options.complete(args, UNGUARDED, 1, on_cpu=True)
    found: dict[str, Any] = {}

    def work(
        train_step: Any,
        forward_step: Any,
        data: Any,
        model: Any,
        opt: Any,
        schedule: Any,
        config: Any,
        run: Any,
        **_: Any,
    ) -> None:
        batches = [next(data), next(data)]
        variants = make_variants(model, args.config, ways)

        def gradient(way: str) -> Tensor:
            model[0].zero_grad_buffer()
            before = _anatomy(model[0])
            with variants[way].on(1):
                found[f"touched {way}"] = _anatomy(model[0]) != before
                run(
                    forward_step_func=variants[way].forward_step(forward_step),
                    data_iterator=iter(batches),
                    model=model,
                    num_microbatches=2,
                    seq_length=16,
                    micro_batch_size=2,
                    forward_only=False,
                )
            found[f"left {way}"] = _anatomy(model[0]) != before
            variants[way].after_step(1)
            return torch.cat([p.main_grad.flatten().clone() for p in model[0].parameters()])

        gradient("unmodified")  # the first pass leaves marks of Megatron's own
        for way in ways:
            found.setdefault(way, []).append(gradient(way))

    megatron.make_ready(on_cpu=True)
    megatron.train(megatron.arguments_of(args, 3), args, work)
    return found


def skipped_alone() -> tuple[str, list[int]]:
    """How three steps in fp16, for which the loss scale is too large, end, and which of them are skipped."""
    from jreg_megatron.bench import megatron, options

    args = options.parser().parse_args(["step", *TINY, "--dtype", "fp16"])
    options.complete(args, [], 1, on_cpu=True)
    megatron.make_ready(on_cpu=True)
    from megatron.training import training

    own, skipped = training.train_step, []

    def watched(*given: Any, **named: Any) -> Any:
        result = own(*given, **named)
        skipped.append(result[1])
        return result

    training.train_step = watched
    try:
        megatron.train(megatron.arguments_of(args, 3), args, lambda *_, **__: None)
    except UserError as error:
        return str(error), skipped
    return "", skipped


def _anatomy(model: Any) -> list[Any]:
    """Hooks and own attributes of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (name, sorted(vars(module)), [len(getattr(module, kind)) for kind in hooks], _functions(module))
        for name, module in model.named_modules()
    ]


def _functions(module: Any) -> list[Any]:
    return [vars(module).get(name) for name in ("self_attn_bda", "mlp_bda")]


def counted(_: object = None) -> dict[str, Any]:
    """The counts of a step whose operations are known exactly."""
    import torch.distributed as dist

    from jreg_megatron.bench.counting import count

    def step() -> float:
        first = torch.ones(1 << 20)  # fill
        second = first + first  # add
        del first
        third = second * second  # mul
        dist.all_reduce(third)
        dist.barrier()
        return second[0].item() + third[0].item()

    return count(step)


def jreg_twice_as_slow(argv: list[str]) -> int:
    """The benchmark, where whatever JREG's way runs takes twice as long."""
    import time

    from jreg_megatron.bench import variants
    from jreg_megatron.bench.__main__ import main

    on, after = variants.Attached.on, variants.Attached.after_step

    def slow_after(self: Any, iteration: int) -> None:
        if self.config.coeff > 0:
            began = time.process_time()
            while time.process_time() < began + SECONDS:
                pass
        after(self, iteration)

    variants.Attached.after_step = slow_after  # type: ignore[method-assign]
    assert on is variants.Attached.on
    return main(argv)


SECONDS = 0.1
