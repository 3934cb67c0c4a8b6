"""What can be a host: a model whose layers and weights are there to be looked at."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from modgraft.core.errors import ModgraftError
from modgraft.host.as_model import AsModel


def check_model(model: Any) -> None:
    """Refuse what cannot be a host, before anything of it is touched.

    Raises:
        ModgraftError: for a host, for what is no ``nn.Module`` or was compiled by TorchScript as a
            whole, and for a model with a weight that has no shape yet.
    """
    if isinstance(model, AsModel):
        raise ModgraftError("this is a Host already; implant in it, or wrap its .model anew")
    if not isinstance(model, nn.Module):
        raise ModgraftError(
            f"Host({model!r:.80}): a host is a model, an nn.Module, as "
            f"AutoModel.from_pretrained('bert-base-uncased') gives"
        )
    if isinstance(model, ScriptModule):
        raise ModgraftError(
            "this model was compiled by TorchScript (torch.jit), so that nothing can be put in it; "
            "make the host of the model from before torch.jit.script or trace"
        )
    for path, layer in model.named_modules():
        for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if is_lazy(tensor):
                where = f"{path}.{name}" if path else name
                raise ModgraftError(
                    f"{where} has no shape before the {type(layer).__name__} has seen an input: "
                    f"run the model once on a batch, model(x), and make the host then"
                )
