"""One model on its way into another form: folded, in standard operators, written, run again."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bnfix.building.models import build_model
from bnfix.checkpoints.loading import Loaded
from bnfix.errors import ModelError, some
from bnfix.guards import exchange_
from bnfix.layers.norms import generalized_norms
from bnfix.production import artifacts, plain_files
from bnfix.production.artifacts import Runner
from bnfix.production.dataflow import export_program
from bnfix.production.folding import Folding, optimize_
from bnfix.production.plain import ExampleNorm
from bnfix.production.verification import suspect_layer


class Making:
    """A model on its way into another form.

    Args:
        loaded: the model; left as it is.
        to: the form.
        opset: of ONNX's operators.
        example: two inputs.
        names: of the outputs.
        free_size: leave height and width free.
    """

    def __init__(
        self,
        loaded: Loaded,
        to: str,
        opset: int,
        example: Tensor,
        names: list[str],
        *,
        free_size: bool = False,
    ) -> None:
        self.loaded, self.to, self.opset, self.example, self.names = (
            loaded, to, opset, example, names,
        )  # fmt: skip
        self.free_size = free_size
        self.notes: list[str] = []
        self.operators: dict[str, int] = {}
        self.folding: Folding | None = None
        self.net = copy.deepcopy(loaded.model)

    def run(self) -> tuple[bytes, bytes | None, Runner]:
        """Make the form."""
        if self.to == "plain":
            text, weights = plain_files.plain(self.loaded)
            return text, weights, self._loaded_by(text, weights)
        try:
            self.folding = optimize_(self.net, self.example)
        except ModelError as error:
            if self.to == "folded":
                raise
            self.notes.append(f"nothing was folded: {error}")
        if self.to == "folded":
            if self.folding is None or not self.folding.folded:
                raise ModelError(self._nothing_to_fold())
            weights, text = plain_files.folded(self.loaded, self.net, self.folding)
            return weights, text, self._loaded_by(text, weights)
        standard_(self.net)
        content = self._write(self.net, self.names)
        return content, None, self._runner(content)

    def suspect(self, x: Tensor, atol: float) -> str:
        """Find the layer at which the form parts from the model."""
        if self.to not in ("onnx", "pt2"):
            return "one of those folded" if self.to == "folded" else "none, it is the loader"
        return suspect_layer(self.net, lambda net: self._runner(self._write(net, None)), x, atol)

    def _write(self, net: nn.Module, names: list[str] | None) -> bytes:
        """A model in the form wanted."""
        # Zeros, not the user's images: torch.export stores what it was shown.
        program = export_program(net, torch.zeros_like(self.example), free_size=self.free_size)
        if self.to == "pt2":
            return artifacts.pt2_bytes(program)
        content, self.operators = artifacts.onnx_bytes(program, names, self.opset)
        return content

    def _runner(self, content: bytes) -> Runner:
        """How that form runs."""
        run = artifacts.pt2_runner if self.to == "pt2" else artifacts.onnx_runner
        return run(content)

    def _loaded_by(self, text: bytes, weights: bytes) -> Runner:
        origin, tensors = self.loaded.origin, self.loaded.checkpoint.tensors
        stock = build_model(origin.spec or "", origin.arguments, tensors)
        return artifacts.torch_runner(plain_files.run_loader(text, weights, stock))

    def _nothing_to_fold(self) -> str:
        left = self.folding.left if self.folding is not None else {}
        why = some([f"{name} {reason}" for name, reason in left.items()]) or "there are no norms"
        return f"--to folded: no norm layer can be folded: {why}. Use --to plain."


def standard_(model: nn.Module) -> None:
    """Put the plain layer, which is made of standard operators only, in place of live ones.

    Changes:
        The live layers of the model.
    """
    for layer in [layer for _, layer in generalized_norms(model) if layer.live]:
        plain = ExampleNorm(layer, layer.example_weight, layer.channel_groups, layer.eps)
        exchange_(layer, plain.eval())
