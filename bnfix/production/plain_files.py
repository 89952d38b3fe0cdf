"""Files for those without bnfix: weights, and the Python file that loads them."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save
from torch import Tensor, nn

from bnfix.building.models import builder_arguments, from_file_allowed
from bnfix.checkpoints.loading import Loaded
from bnfix.checkpoints.reading import finite
from bnfix.checkpoints.saving import metadata_of, stock_tensors
from bnfix.production import plain as plain_module
from bnfix.production.folding import Folding
from bnfix.version import __version__

#: Stands in a generated file until the name of the weights is known.
_NAME: Final = "@weights@"


def plain(loaded: Loaded) -> tuple[bytes, bytes]:
    """The plain file of a model, and its weights."""
    metadata = {"bnfix": json.dumps(finite(metadata_of(loaded.model)))}
    return _python(loaded), save(_ready(stock_tensors(loaded.model)), metadata=metadata)


def folded(loaded: Loaded, net: nn.Module, folding: Folding) -> tuple[bytes, bytes]:
    """The weights of a folded model, and the plain file that loads them.

    Weights that were folded are float32 also where the checkpoint has a half type: rounded twice
    they would be off by a thousandth.
    """
    tensors = stock_tensors(net)
    state = net.state_dict()
    layers = [fold.layer for fold in folding.folded]
    for layer in layers:
        for part in ("weight", "bias"):
            tensors[f"{layer}.{part}"] = state[f"{layer}.{part}"].detach().cpu()
    entry = {
        "bnfix": __version__,
        "model": {"spec": loaded.origin.spec, "arguments": dict(loaded.origin.arguments)},
        "norms": [fold.norm for fold in folding.folded],
        "layers": layers,
    }
    return save(_ready(tensors), metadata={"bnfix_folded": json.dumps(finite(entry))}), _python(
        loaded
    )


def named(text: bytes, weights: Path) -> bytes:
    """A generated Python file that knows the name of its weights."""
    return text.replace(repr(_NAME).encode(), json.dumps(weights.name).encode())


def run_loader(text: bytes, weights: bytes, stock: nn.Module) -> nn.Module:
    """Load weights with a generated Python file, as its users will."""
    names: dict[str, Any] = {"__name__": "bnfix_plain", "__file__": "plain.py"}
    exec(compile(text, "plain.py", "exec"), names)  # our own text, written a moment ago
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(weights)
        return names["load"](stock, path)  # type: ignore[no-any-return]


def _python(loaded: Loaded) -> bytes:
    """The plain layer's own source, with what it needs to know of this model."""
    source = Path(plain_module.__file__).read_text(encoding="utf-8")
    spec, arguments = loaded.origin.spec, dict(loaded.origin.arguments)
    model: tuple[str, str, dict[str, Any]] | None = None
    if spec is not None and from_file_allowed(spec):
        library, _, name = spec.partition(":")
        model = (library, name, builder_arguments(spec, arguments, loaded.checkpoint.tensors))
    source = re.sub(r'(?m)^WEIGHTS = ""$', lambda _: f"WEIGHTS = {_NAME!r}", source)
    source = re.sub(r"(?m)^(MODEL: .*) = None$", lambda found: f"{found[1]} = {model!r}", source)
    return f"# Written by bnfix {__version__}; needs torch only.\n{source}".encode()


def _ready(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
