"""Run by torchrun on 2 gloo ranks: the linear ops inside other people's sharded trainers. Under FSDP2 (DTensor) and
DeepSpeed ZeRO-3, each rank with its own tokens, the head's weight gathered for the call: loss and gradients are those
of one process that sees all tokens. Prints `ok <what>` on rank 0 for each check; any difference raises."""

import gc
import os
import sys

import ppomax_kernels as K
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

N, D, V = 12, 8, 23


class Model(nn.Module):
    """A trunk of one layer and a head, whose loss is an op of ours on the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.lm_head = nn.Linear(D, D), nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, labels: Tensor, whole: object = None) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        weight = self.lm_head.weight if whole is None else whole(self.lm_head.weight)  # type: ignore[operator]
        old, advantages = torch.full((len(x),), -3.0), torch.linspace(-1, 1, len(x))
        loss, _ = K.linear_ppo_loss(hidden, weight, labels, old, advantages, normalizer=float(2 * N))
        return loss + K.linear_nll(hidden, weight, labels, normalizer=float(2 * N))[0]


def tokens() -> tuple[Tensor, Tensor]:
    """Of both ranks, one after the other; the advantages above are each rank's own."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(2 * N, D, generator=g), torch.randint(V, (2 * N,), generator=g)


def alone() -> tuple[Tensor, dict[str, Tensor]]:
    model, (x, labels) = Model(), tokens()
    loss = model(x[:N], labels[:N]) + model(x[N:], labels[N:])
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def close(what: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda words: f"{what}: {words}")


def fsdp2(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    model, (x, labels) = Model(), tokens()
    fully_shard(model.trunk, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    mine = slice(rank * N, (rank + 1) * N)
    with pytest.raises(TypeError, match=r"weight is a DTensor; pass weight\.full_tensor\(grad_placements"):
        model(x[mine], labels[mine])
    loss = model(x[mine], labels[mine], lambda weight: weight.full_tensor(grad_placements=[Partial()]))
    loss.backward()
    want_loss, want = alone()
    total = loss.detach().clone()
    dist.all_reduce(total)
    close("fsdp2 loss", total, want_loss)
    # FSDP takes the mean over ranks of what it gathers itself; a partial placement sums over them.
    for name, p in model.named_parameters():
        close(f"fsdp2 {name}", p.grad.full_tensor() * (2 if name.startswith("trunk") else 1), want[name])


def zero_3(rank: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler, and is not used
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    model, (x, labels) = Model(), tokens()
    adam = torch.optim.AdamW(model.parameters(), 1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
    deepspeed.zero.register_external_parameter(model, model.lm_head.weight)
    mine = slice(rank * N, (rank + 1) * N)
    with pytest.raises(ValueError, match="weight is cut over the ranks by ZeRO-3"):
        K.linear_nll(torch.zeros(N, D), model.lm_head.weight, labels[mine])
    loss = engine(x[mine], labels[mine])  # DeepSpeed gathers what is registered for the forward
    engine.backward(loss)
    want_loss, want = alone()
    total = loss.detach().clone()
    dist.all_reduce(total)
    close("zero-3 loss", total, want_loss)
    from deepspeed.utils import safe_get_full_grad

    for name, p in model.named_parameters():  # DeepSpeed takes the mean over ranks
        close(f"zero-3 {name}", safe_get_full_grad(p) * 2, want[name])


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, said = dist.get_rank(), []
    for check in (fsdp2, zero_3):
        check(rank)
        said.append(f"ok {check.__name__}")
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    if rank == 0:
        sys.stdout.write("\n".join(said) + "\n")


if __name__ == "__main__":
    main()
