"""The reference model of preference training: weights that take the place of the policy's while it is computed."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from litgpt.parallel.apply import full_tensor, reshard_parameters
from litgpt.parallel.exchange import exchange_parameters, get_local_tensor
from litgpt.parallel.reduce import all_gather_objects
from litgpt.store.safetensors_files import iter_byte_blocks


@dataclass(frozen=True)
class Reference:
    """The weights of the reference, as far as they are not the policy's.

    Attributes:
        values: this rank's local tensors of the parameters that are trained, or differ from the policy's, by name.
        sync_steps: number of optimizer steps between moves towards the policy; None for a reference that never moves.
        mixup_alpha: share of the policy in the reference after a move.
    """

    values: Mapping[str, Tensor]
    sync_steps: int | None = None
    mixup_alpha: float = 1.0

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Compute with the weights of the reference within the context, without dropout and gradients.

        Args:
            model: the policy, without a DDP wrapper; it has its own weights again when the context ends.
        """
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), exchange_parameters(model, self.values):
                yield
        finally:
            model.train(was_training)

    @torch.no_grad()
    def move(self, model: nn.Module, step: int) -> None:
        """Mix the policy's weights into the reference if that is due before step `step`, counted from 0.

        The soft update of TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656), or the hard one if `mixup_alpha` is 1.
        The factors of an adapter are mixed one by one.
        """
        if self.sync_steps is None or step == 0 or step % self.sync_steps:
            return
        reshard_parameters(model)
        parameters = dict(model.named_parameters())
        for name, value in self.values.items():
            policy = get_local_tensor(parameters[name]).to(value.device)
            value.mul_(1 - self.mixup_alpha).add_(policy, alpha=self.mixup_alpha)


def copy_values(model: nn.Module, names: Iterable[str], *, in_host_memory: bool = False) -> dict[str, Tensor]:
    """Copies of this rank's local tensors of the parameters with some names, those that it has."""
    reshard_parameters(model)
    parameters = dict(model.named_parameters())
    local = {name: get_local_tensor(parameters[name]) for name in names if name in parameters}
    return {name: copy_tensor(tensor, in_host_memory=in_host_memory) for name, tensor in local.items()}


def copy_tensor(tensor: Tensor, *, in_host_memory: bool) -> Tensor:
    """A copy of a tensor, on its device or in host memory."""
    return allocate_copy(tensor, in_host_memory=in_host_memory).copy_(tensor)


def allocate_copy(tensor: Tensor, *, in_host_memory: bool) -> Tensor:
    """Memory for a copy of a tensor, on its device or in host memory, which is pinned if the tensor is on a GPU."""
    if not in_host_memory:
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")


def hash_parameters(model: nn.Module) -> str:
    """The SHA-256 of all parameters of a model, by name; the same under every layout. All ranks call it together."""
    reshard_parameters(model)
    digests = {}
    for name, parameter in model.named_parameters():
        value = full_tensor(parameter.detach()).cpu()
        digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
        for block in iter_byte_blocks(value):
            digest.update(block)
        digests[name] = digest.hexdigest()
    merged: dict[str, str] = {}
    for local in all_gather_objects(digests):  # of all stages of a pipeline
        merged |= local
    return hashlib.sha256(repr(sorted(merged.items())).encode()).hexdigest()
