"""Compares our metrics of depth with the authors' own functions, on the same states of a Llama.

    python tests/authors_code.py MODEL CLONE...

``jreg_megatron/methods/depth/README.md`` names the clones. Nothing of them is copied, and their functions run
unchanged; ``Traced`` replaces nnsight.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Optional

import numpy
import torch
from torch import nn

from jreg_megatron.data.speeches import read_speeches
from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.load import load
from jreg_megatron.decoder.reference import find_models
from jreg_megatron.evaluate.depth import depth
from jreg_megatron.measure.measurement import measure
from jreg_megatron.methods.depth.formulas import CONTRIBUTIONS, voids

LENGTHS = (41, 37, 935)
"""Tokens of the texts. The last text is too long for metrics that need a run without each layer."""


def theirs(commit: str, path: str, **names: Any) -> SimpleNamespace:
    """The functions and classes of a file; the rest of it needs data and other packages."""
    shown = (["git", "-C", clone, "show", f"{commit}:{path}"] for clone in sys.argv[2:])
    runs = [subprocess.run(words, capture_output=True, text=True, check=False) for words in shown]
    found = [run.stdout for run in runs if run.returncode == 0]
    if not found:
        sys.exit(f"No clone has {path} of commit {commit}")
    tree = ast.parse(found[0])
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in tree.body:
        node.decorator_list = []  # type: ignore[attr-defined]
    space = {"torch": torch, "F": nn.functional, "np": numpy, "math": math, "Any": Any, "Optional": Optional}
    space |= names | {"print": lambda _: None}
    exec(compile(tree, path, "exec"), space)
    return SimpleNamespace(**space)


class Seen:
    """A module's input and output; later modules get an output that is set."""

    def __init__(self, llm: Traced, module: nn.Module, is_layer: bool = False) -> None:
        self._llm, self._is_layer, self.new = llm, is_layer, None
        module.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, _: Any, given: Any, named: Any, made: Any) -> Any:
        self._given = given[0] if given else named["hidden_states"]
        self._made = made if self.new is None else self.new
        return self._made

    @property
    def inputs(self) -> Any:
        return self._llm.output and ((self._given,),)

    @property
    def output(self) -> Any:  # of a layer a tuple, as before transformers 5
        return self._llm.output and ((self._made,) if self._is_layer else self._made)

    @output.setter
    def output(self, value: Any) -> None:
        self.new, self._llm.made = value[0], None


class Traced:
    """A model of nnsight. It runs when a value is read, once after each change."""

    remote = False

    def __init__(self, model: Any) -> None:
        self._of, self.lm_head, layers = model, model.lm_head, []
        for layer in model.model.layers:
            layers.append(Seen(self, layer, is_layer=True))
            layers[-1].self_attn, layers[-1].mlp = Seen(self, layer.self_attn), Seen(self, layer.mlp)
        self.model = SimpleNamespace(**model.model._modules | {"layers": layers})

    @property
    def output(self) -> Any:
        self.made = self.made or self._of(self._ids, use_cache=False)
        return self.made

    def session(self, **_: Any) -> Any:
        return nullcontext()

    @contextmanager
    def trace(self, ids: Any, **_: Any) -> Any:
        self._ids, self.made = torch.as_tensor(ids)[None], None
        for layer in self.model.layers:
            layer.new = None
        yield


def void_layers(lac: Any, states: torch.Tensor) -> torch.Tensor:
    """Which layers are void for which token; their class watches layers that give known states."""
    model: Any = nn.Module()
    model.model, model.device = nn.Module(), "cpu"
    model.config = SimpleNamespace(num_hidden_layers=len(states) - 1)
    model.model.layers = nn.ModuleList(nn.Identity() for _ in states[1:])
    for layer, state in zip(model.model.layers, states[1:], strict=True):
        layer.forward = lambda _, state=state: (state[None],)
    watched = lac.L2AdaptiveComputation(model, SimpleNamespace(pad_token=""), skip_layers=True)
    watched.alpha = 0.8
    for layer, state in zip(model.model.layers, states[:-1], strict=True):
        layer(state[None])
    return 1 - watched.activated_layers[:, 0]


@torch.no_grad()
def main() -> None:
    """Print the largest difference of each metric over texts and layers."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    torch.Tensor.save = lambda self: self  # type: ignore[attr-defined]
    decoder: Any = load(
        find_models([sys.argv[1]])[0], Namespace(dtype="float32", device="cpu", trust_remote_code=False)
    )
    lac = theirs("3e2e830", "lac.py")
    norms, lens, effects = (
        theirs("393e5c7", f"analysis/{file}.py")
        for file in ("analyze_norms", "logitlens", "analyze_future_effects")
    )
    itl = theirs("fd0da54", "src/repitl/matrix_itl.py")
    new = theirs("d10a313", "experiments/utils/metrics/metric_functions.py", itl=itl)
    older = theirs("a6ad508", "experiments/utils/misc/metric_utils.py", itl=itl)
    llm, found, decisions, others = Traced(decoder.model), dict[str, float](), 0, 0

    def compare(name: str, ours: Any, other: Any, relative: bool = True) -> None:
        one, two = (numpy.array([*map(float, values)]) for values in (ours, other))
        apart = numpy.abs(one - two) / (numpy.abs(two) if relative else 1.0)
        found[name] = max(found.get(name, 0.0), float(apart.max()))

    for (name, speech), length in zip(read_speeches().items(), LENGTHS, strict=False):
        ids = numpy.array(decoder.encode(speech)[:length])
        with llm.trace(ids):
            layers = llm.model.layers
            states = torch.cat([layers[0].inputs[0][0], *(layer.output[0] for layer in layers)])
        void = void_layers(lac, states)
        decisions += void.numel()
        others += int((voids(states.norm(dim=-1)) != void).sum())
        ours = measure(decoder, [Text(name, ids)], depth=True)["with_first_token"]
        _, _, _, _, _, _, *ratios, _, _, of_layer, attention, mlp, _ = norms.analyze_norms(llm, [ids])
        for what, other in zip(CONTRIBUTIONS, (*ratios, attention, mlp, of_layer), strict=True):
            compare(what, ours[what]["pre_norm"], other, relative="ratio" in what)
        unit = torch.stack([new.normalize(state) for state in states])
        for what, function in {
            "matrix_entropy": new.compute_entropy,
            "curvature": new.compute_curvature,
            "curvature, older": older.compute_curvature,
        }.items():
            other = next(iter(function(unit).values()))
            compare(what, ours[what.removesuffix(", older")]["pre_norm"], other, relative="older" not in what)
        if length == LENGTHS[-1]:
            break
        used = depth(decoder, [Text(name, ids)], Namespace(max_tokens=0, batch_size=1, quiet=True))
        (kl,), (overlap,) = lens.run_logitlens(llm, [ids[:-1]])  # ours is of tokens that have a next one
        compare("kl", used["kl"][:-1], kl)
        compare("top5_overlap", used["top5_overlap"][:-1], overlap)
        later, output = effects.test_effect(llm, ids, [None], "layer")
        rows = zip(used["skip"]["later_largest"], later.tolist(), strict=True)
        for number, (mine, other) in enumerate(rows, start=1):
            compare("skipping, later layers", [0, *mine[number:]], [0, *other[number:]], relative=False)
        compare("skipping, output", used["skip"]["output_largest"], output.flatten())
    print(f"voids: {others} of {decisions:,} decisions differ")
    for name, apart in found.items():
        print(f"{name}: {apart:.1e}")


if __name__ == "__main__":
    main()
