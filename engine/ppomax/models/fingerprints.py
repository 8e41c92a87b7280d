"""Which models a checkpoint belongs to, without storing the frozen ones."""

from __future__ import annotations

import hashlib

from torch import nn

from ppomax.models.partitioned import gathered


def fingerprints(
    policy: nn.Module, critic: nn.Module, reference: nn.Module | None, reward_model: nn.Module | None
) -> dict[str, str | None]:
    """Shapes of what is trained; shapes and a sample of the weights of what is frozen. The same for models that are
    cut over ranks."""
    models = {"policy": policy, "critic": critic, "reference": reference, "reward model": reward_model}
    return {role: None if model is None else fingerprint(model) for role, model in models.items()}


def fingerprint(model: nn.Module) -> str:
    """Hash of the class, the parameters' names, shapes and types, and of 64 values spread over each frozen one."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(getattr(p, 'ds_shape', p.shape))} {p.dtype};".encode())
        if not p.requires_grad:
            with gathered(p):
                flat = p.detach().flatten()
                digest.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
