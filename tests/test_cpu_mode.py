"""Megatron's own training loop keeps its promises on a CPU.

The file is also the script that these tests train with: a minimal ``pretrain_gpt.py`` on
``megatron.training``. All runs share one process's import of Megatron, so they start within seconds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from harness import run_function

from jreg_megatron.cpu import FLAGS, announcement, with_cpu_flags
from jreg_megatron.runtime.errors import UserError

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 "
    "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 --mock-data "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --lr-decay-iters 8 --train-iters 4 "
    "--log-interval 1 --eval-interval 100 --eval-iters 1 --tensorboard-dir {root}/{name} "
)
TP = "--tensor-model-parallel-size 2 "
PP = "--pipeline-model-parallel-size 2 "
SP = "--sequence-parallel "
VPP = PP + "--num-layers-per-virtual-pipeline-stage 1 "
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1 "
SAVED = "--save {root}/checkpoint --save-interval 2 --load {root}/checkpoint --ckpt-format torch_dist "

RUNS: dict[str, tuple[int, str]] = {
    "one rank": (1, ""),
    "dp, distributed optimizer, overlap": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "full recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "fp16": (1, "--fp16 --initial-loss-scale 1048576 --train-iters 8"),
    "tp, pp, sp, bf16": (4, TP + PP + SP + "--bf16 --use-distributed-optimizer"),
    "vpp, dropout": (2, VPP + DROPOUT),
    "vpp, dropout, first half": (2, VPP + DROPOUT + SAVED + "--exit-interval 2"),
    "vpp, dropout, second half": (2, VPP + DROPOUT + SAVED),
}


def slug(name: str) -> str:
    """The name of a run without blanks, for a command line."""
    return name.replace(", ", "-").replace(" ", "_")


def pretrain_script() -> None:
    """Train GPT on random text with ``megatron.training``, with the arguments of ``sys.argv``."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    class Text(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            length = get_args().seq_length
            text = torch.randint(127, (length + 1,), generator=torch.Generator().manual_seed(index)) // 8
            return {"tokens": text[:-1], "labels": text[1:], "position_ids": torch.arange(length)}

    def datasets(_: Any, vp_stage: int | None = None) -> tuple[Text, Text, Text]:
        return Text(), Text(), Text()

    datasets.is_distributed = True  # type: ignore[attr-defined]

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = output.float().sum()
        count = torch.tensor(output.numel(), dtype=torch.int, device="cuda")
        return total, count, {"lm loss": torch.stack([total.detach(), count])}

    def step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = {name: value.cuda(non_blocking=True) for name, value in next(iterator).items()}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, partial(loss)

    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, step)


def run_all(root: str) -> None:
    """Run every entry of ``RUNS``, each in ranks of its own; the output goes to ``root``."""
    from jreg_megatron.cpu import enable
    from jreg_megatron.runtime.fork import fork_ranks

    enable()
    for name, (ranks, arguments) in RUNS.items():
        log = os.open(f"{root}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.argv = [
            "pretrain",
            *with_cpu_flags((MODEL + arguments).format(root=root, name=slug(name)).split()),
        ]

        def work(log: int = log) -> None:
            os.dup2(log, 1)
            os.dup2(log, 2)
            pretrain_script()

        code = fork_ranks(ranks, work)
        os.write(log, f"exit status {code}\n".encode())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the logs of all runs."""
    root = tmp_path_factory.mktemp("cpu_mode")
    # A separate process, because CPU mode changes a process until it ends.
    subprocess.run([sys.executable, "-W", "ignore", __file__, "--all", str(root)], check=True, timeout=600)
    return root


def losses(root: Path, name: str, what: str = "lm loss") -> list[float]:
    """Megatron's values in TensorBoard, once per iteration.

    The console is not enough: its second line is the mean of the first two iterations.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = (root / f"{name}.log").read_text()
    assert log.endswith("exit status 0\n"), log[-3000:]
    events = EventAccumulator(str(root / slug(name))).Reload()
    return [event.value for event in events.Scalars(what)]


def test_data_parallelism_and_overlapped_communication_do_not_change_the_losses(root: Path) -> None:
    reference = losses(root, "one rank")
    assert len(reference) == 4
    assert reference[-1] < reference[0] - 0.5, "the model learns"
    assert losses(root, "dp, distributed optimizer, overlap") == pytest.approx(reference, rel=2e-6)


def test_full_recompute_gives_bit_identical_losses(root: Path) -> None:
    assert losses(root, "full recompute") == losses(root, "one rank")


def test_dynamic_loss_scale_halves_until_fp16_gradients_are_finite(root: Path) -> None:
    scales = losses(root, "fp16", "loss-scale")
    assert scales[0] == 2**20
    assert scales[-1] < scales[0]
    assert all(after in (before, before / 2) for before, after in pairwise(scales))
    trained = losses(root, "fp16")
    assert len(trained) == 8
    assert trained[-1] < trained[0] - 0.1


def test_bf16_trains_under_tensor_pipeline_and_sequence_parallelism(root: Path) -> None:
    trained = losses(root, "tp, pp, sp, bf16")
    assert trained[-1] < trained[0] - 0.5


def test_a_resumed_run_continues_bit_identically(root: Path) -> None:
    straight = losses(root, "vpp, dropout")
    assert len(straight) == 4
    assert losses(root, "vpp, dropout, first half") == straight[:2]
    assert losses(root, "vpp, dropout, second half") == straight[2:]
    assert list((root / "checkpoint" / "iter_0000004").glob("*.distcp"))


def send_and_let_go() -> bool:
    """Rank 0 frees a tensor while its send is under way, as a pipeline stage does; is rank 1's whole?"""
    import torch
    import torch.distributed as dist

    size = 1 << 20
    if dist.get_rank() == 1:
        dist.barrier()  # the sender's memory has been let go of and used again
        received = torch.empty(size)
        dist.recv(received, 0)
        return bool((received == 1).all())
    sent = torch.ones(size)
    request = dist.isend(sent, 1)
    sent.data = torch.empty(1)
    others = [torch.zeros(size) for _ in range(4)]
    dist.barrier()
    request.wait()
    return bool(others)


def test_a_stage_that_frees_its_output_while_it_is_sent_sends_it_whole() -> None:
    assert all(run_function(send_and_let_go, 2))


def pieces(dtype: Any, shapes: list[tuple[int, ...]], ranks: list[int]) -> list[Any]:
    """Each rank's input: values that identify rank and place."""
    import torch

    return [
        (torch.arange(torch.Size(shape).numel()).view(shape) + 100 * (rank + 1)).to(dtype)
        for rank, shape in zip(ranks, shapes, strict=True)
    ]


def gather_unevenly(shapes: list[tuple[int, ...]]) -> list[str]:
    """Errors of all-gathers of pieces of these shapes, one per rank, over all ranks and over two."""
    import torch
    import torch.distributed as dist

    wrong = []
    everyone, two = list(range(len(shapes))), [0, len(shapes) - 1]
    groups = [(None, everyone), (dist.new_group(two), two)]
    for group, ranks in groups:
        if dist.get_rank() not in ranks:
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            wanted = pieces(dtype, [shapes[rank] for rank in ranks], ranks)
            own = wanted[ranks.index(dist.get_rank())]
            once = [torch.zeros_like(piece) for piece in wanted]
            assert dist.all_gather(once, own, group=group) is None
            # As in Megatron: a rank's own place holds its input, and only the last gather is waited for.
            buffers = [torch.zeros(sum(map(len, wanted)), *own.shape[1:], dtype=dtype) for _ in range(20)]
            for buffer in buffers:
                slots = buffer.split([len(piece) for piece in wanted])
                slot = slots[ranks.index(dist.get_rank())]
                slot.copy_(own)
                work = dist.all_gather(list(slots), slot, group=group, async_op=True)
            work.wait()
            for name, found in (("once", torch.cat(once)), *(("of many", buffer) for buffer in buffers)):
                if not torch.equal(found, torch.cat(wanted)):
                    wrong.append(f"{name}, {dtype}, ranks {ranks}: {found}")
    weight = torch.ones(shapes[dist.get_rank()], requires_grad=True)
    filled = [torch.zeros(shape) for shape in shapes]
    dist.all_gather(filled, weight)
    wrong += ["part of the graph"] * any(piece.requires_grad for piece in filled)
    return wrong + left_under_way(filled, weight.detach())


def left_under_way(pieces: list[Any], own: Any) -> list[str]:
    """Gathers that are in flight when an asynchronous all-gather returns. One must not overtake another."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    under_way: list[Any] = []
    broadcast = distributed_c10d.broadcast

    def noted(*given: Any) -> Any:
        work = broadcast(*given)
        under_way.append(work)
        return SimpleNamespace(wait=lambda: under_way.remove(work) if work.wait() else None)

    with mock.patch.object(distributed_c10d, "broadcast", noted):
        dist.all_gather(pieces, own, async_op=True)
    return ["a piece was not waited for"] * len(under_way)


@pytest.mark.parametrize(
    "shapes",
    [[(3,), (5,)], [(1 << 16,), (3,)], [(4,), (0,), (7,)], [(2, 3), (5, 3), (2, 3)], [(6,), (6,), (6,)]],
    ids=str,
)
def test_an_all_gather_of_any_sizes_gives_the_plain_concatenation(shapes: list[tuple[int, ...]]) -> None:
    assert run_function(gather_unevenly, len(shapes), shapes) == [[]] * len(shapes)


def test_evaluation_follows_training(root: Path) -> None:
    assert re.search(
        r"validation loss at iteration 4 .*lm loss value: \d", (root / "vpp, dropout.log").read_text()
    )


def test_the_redirection_adds_no_warnings(root: Path) -> None:
    log = (root / "vpp, dropout.log").read_text()
    assert "RNG state changed" not in log
    assert "pin_memory' argument" not in log


def what_stays_on_cuda() -> list[str]:
    """Results that are not on the CPU although they name a CUDA device, and functions that are not tried."""
    import torch
    from torch.utils._device import _device_constructors

    from jreg_megatron import cpu

    takes_a_device = _device_constructors()
    cpu.enable()
    one = torch.ones(1)
    made = {
        **{name: getattr(torch, name)(one, device="cuda") for name in ("as_tensor", "asarray", "tensor")},
        **{
            name: getattr(torch, name)(2, device="cuda:0", pin_memory=True)
            for name in (
                "arange",
                "empty",
                "eye",
                "hann_window",
                "ones",
                "rand",
                "randn",
                "randperm",
                "zeros",
            )
        },
        **{
            name: getattr(torch, name)(one, device=torch.device("cuda"))
            for name in ("empty_like", "ones_like", "rand_like", "randn_like", "zeros_like")
        },
        "full": torch.full((2,), 1.0, device="cuda"),
        "full_like": torch.full_like(one, 2, device="cuda"),
        "linspace": torch.linspace(0, 1, 3, device="cuda"),
        "randint_like": torch.randint_like(one, 4, device="cuda"),
        "fftfreq": torch.fft.fftfreq(4, device="cuda"),
        "nested_tensor": torch.nested.nested_tensor([one], device="cuda"),
        "normal": torch.normal(0.0, 1.0, (2,), device="cuda"),
        **{name: getattr(one, name)((2,), device="cuda") for name in ("new_empty", "new_ones", "new_zeros")},
        "new_full": one.new_full((2,), 1.0, device="cuda"),
        "new_tensor": one.new_tensor([2.0], device="cuda"),
        "to, by place": one.to("cuda", torch.float64),
        "to, by name": one.to(device="cuda", dtype=torch.float64),
        "to, of another": one.to(torch.empty(0, dtype=torch.float64)),
        "cuda": one.cuda(),
        "pin_memory": one.pin_memory(),
        "a module": torch.nn.Linear(2, 2, device="cuda").weight,
        "a module's to": torch.nn.Linear(2, 2).to("cuda").weight,
        "a module's cuda": torch.nn.Linear(2, 2).cuda().weight,
    }
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
        assert torch.zeros(2, device="cuda").device.type == "cpu"
    unknown = [
        function.__name__
        for function in takes_a_device
        if getattr(torch, function.__name__, None) is function  # as before
    ]
    return [name for name, tensor in made.items() if tensor.device.type != "cpu"] + unknown


def test_every_name_of_a_cuda_device_means_the_cpu() -> None:
    assert run_function(what_stays_on_cuda) == [[]]


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m jreg_megatron.cpu`` with these arguments."""
    command = [sys.executable, "-W", "ignore", "-m", "jreg_megatron.cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_any_script_runs_with_the_cpu_flags_after_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, torch, neighbour\n"
        "import jreg_megatron.cpu\n"
        "jreg_megatron.cpu.enable()\n"
        "assert __name__ == '__main__'\n"
        "there = torch.ones(2, device='cuda').cuda().to('cuda:0', non_blocking=True)\n"
        "line = json.dumps([os.environ['RANK'], sys.argv, str(there.device), there.type()])\n"
        "os.write(1, f'{line}\\n'.encode())  # at once: the ranks share the pipe\n"
        "sys.exit(3 if '--fail' in sys.argv else 0)\n"
    )
    (tmp_path / "neighbour.py").write_text("")
    done = run_module("--nproc", "2", str(script), "--use-flash-attn", "--lr", "1", "--fail")
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("CPU mode: ")
    for line in done.stdout.splitlines()[1:]:
        rank, argv, device, kind = json.loads(line)
        assert rank in "01"
        assert argv == [str(script), "--lr", "1", "--fail", *FLAGS]
        assert (device, kind) == ("cpu", "torch.cuda.FloatTensor")


def test_a_missing_script_is_one_line() -> None:
    done = run_module("no_such_script.py")
    assert done.returncode == 2
    assert "no_such_script.py" in done.stderr
    assert done.stderr.count("\n") == 1


def test_importing_the_package_imports_no_megatron() -> None:
    code = "import sys, jreg_megatron.cpu; sys.exit('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def local_parts_where_transformer_engine_and_apex_are_installed() -> bool:
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.models import backends
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from jreg_megatron.mcore import local_layers

    gpt_layer_specs.LNImpl = backends.LNImpl = transformer_block.LayerNormImpl = FusedLayerNorm
    moe_utils.te_general_gemm = lambda *_: None
    local_layers.install()
    norms = backends.LocalSpecProvider().layer_norm(), gpt_layer_specs.LNImpl, transformer_block.LayerNormImpl
    return {*norms} == {WrappedTorchNorm} and moe_utils.te_general_gemm is None


def test_local_layers_use_nothing_of_transformer_engine_and_apex_even_if_they_are_installed() -> None:
    assert run_function(local_parts_where_transformer_engine_and_apex_are_installed, 1) == [True]


def test_the_cpu_flags_come_last_and_once() -> None:
    argv = with_cpu_flags(["--lr", "1"])
    assert argv == ["--lr", "1", *FLAGS]
    assert with_cpu_flags(argv) == argv


def test_a_hybrid_models_spec_is_exchanged_for_one_without_transformer_engine() -> None:
    theirs = ["--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec", "--lr", "1"]
    local = ("--spec", "jreg_megatron.cpu.hybrid", "stack_spec")
    assert with_cpu_flags(theirs) == [*theirs, *local, *FLAGS]
    assert "--spec" in announcement(theirs)
    own = ["--spec", "my.specs", "stack_spec"]
    assert with_cpu_flags(own) == [*own, *FLAGS]


def test_a_gpus_flags_are_removed_from_the_command_line_and_named() -> None:
    argv = [
        "--fp8-format",
        "hybrid",
        "--tp-comm-overlap",
        "--lr",
        "1",
        "--transformer-impl=transformer_engine",
        "--gpu-sniff-test-interval",
        "5",
        "--use-ring-exchange-p2p",
    ]
    assert with_cpu_flags(argv) == ["--lr", "1", "--transformer-impl=transformer_engine", *FLAGS]
    line = announcement(argv)
    assert "\n" not in line
    for ignored in ("--fp8-format hybrid", "--tp-comm-overlap", "--transformer-impl transformer_engine"):
        assert ignored in line
    assert "ignored" not in announcement(["--lr", "1", "--distributed-backend", "gloo"])


@pytest.mark.parametrize(
    "flags",
    [
        "--apply-layernorm-1p",
        *("--experimental-attention-variant dsa", "--experimental-attention-variant=gated_delta_net"),
    ],
)
def test_flags_without_a_counterpart_on_a_cpu_are_refused_by_name(flags: str) -> None:
    with pytest.raises(UserError, match=re.split("[ =]", flags)[0]):
        with_cpu_flags(flags.split())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--all"]:
        run_all(sys.argv[2])
    else:
        pretrain_script()
