"""Run by torchrun on 2 gloo ranks: the vocabulary-parallel ops against the same ops on the whole weight, which each
rank holds too. Prints one line of `ok <what>` a check on rank 0; any difference raises."""

import sys

import ppomax_kernels as K
import torch
import torch.distributed as dist

from tests.kernels.contract import hold

N, D, V, SPLIT = 37, 24, 101, 33  # shards of 33 and 68 rows


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[4] = labels[20] = -100
    labels[0], labels[1], labels[2] = SPLIT - 1, SPLIT, V - 1
    return {
        "hidden": (torch.randn(N, D, generator=g) * 2).to(dtype),
        "weight": torch.randn(V, D, generator=g).to(dtype),
        "bias": torch.randn(V, generator=g).to(dtype),
        "labels": labels,
        "mask": torch.rand(N, generator=g) > 0.25,
        "old": torch.randn(N, generator=g) - 5,
        "advantages": torch.randn(N, generator=g),
        "ref": torch.randn(N, generator=g) - 5,
        "dentropy": torch.randn(N, generator=g),
    }


def run(x: dict[str, torch.Tensor], op: str, shard: K.VocabShard | None) -> list[torch.Tensor]:
    """Outputs, then gradients of hidden, and of this rank's rows of weight and bias."""
    rows = slice(None) if shard is None else slice(shard.start, shard.start + shard.size)
    hidden, weight, bias = (t.detach().requires_grad_() for t in (x["hidden"], x["weight"][rows], x["bias"][rows]))
    common = dict(bias=bias, temperature=0.7, softcap=15.0, chunk_tokens=8, shard=shard)
    if op == "linear_token_logprobs":
        logprobs, entropy = K.linear_token_logprobs(hidden, weight, x["labels"], return_entropy=True, **common)
        outputs, loss = [logprobs, entropy], (logprobs * x["advantages"] + entropy * x["dentropy"]).sum()
    elif op == "linear_nll":
        loss, metrics = K.linear_nll(hidden, weight, x["labels"], **common)
        outputs = [loss, metrics.tensor]
    else:
        loss, metrics = K.linear_ppo_loss(
            hidden, weight, x["labels"], x["old"], x["advantages"], x["mask"], ent_coef=0.05, ref_logprobs=x["ref"],
            kl_coef=0.1, dual_clip=3.0, **common,
        )  # fmt: skip
        outputs = [loss, metrics.tensor]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, (hidden, weight, bias)))


def compare(op: str, dtype: torch.dtype) -> None:
    x = inputs(dtype)
    mine = slice(0, SPLIT) if dist.get_rank() == 0 else slice(SPLIT, V)
    shard = K.VocabShard.of(x["weight"][mine], dist.group.WORLD)
    assert (shard.start, shard.size, shard.total) == (mine.start, mine.stop - mine.start, V)
    whole = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    yard, got = run(x, op, None), run(x, op, shard)
    truth = reference(whole, op)
    for i, name in enumerate(["output 0", "output 1", "dhidden", "dweight", "dbias"]):
        cut = (lambda t: t[mine]) if i > 2 else (lambda t: t)
        hold(f"{op} {dtype} {name}", got[i].float(), cut(truth[i]).numpy(), cut(yard[i]).float())


def reference(x: dict[str, torch.Tensor], op: str) -> list[torch.Tensor]:
    """The plain-torch form in float64 on the whole weight."""
    hidden, weight, bias = (x[k].detach().requires_grad_() for k in ("hidden", "weight", "bias"))
    common = dict(bias=bias, temperature=0.7, softcap=15.0, impl="ref")
    if op == "linear_token_logprobs":
        logprobs, entropy = K.linear_token_logprobs(hidden, weight, x["labels"], return_entropy=True, **common)
        outputs, loss = [logprobs, entropy], (logprobs * x["advantages"] + entropy * x["dentropy"]).sum()
    elif op == "linear_nll":
        loss, metrics = K.linear_nll(hidden, weight, x["labels"], **common)
        outputs = [loss, metrics.tensor]
    else:
        loss, metrics = K.linear_ppo_loss(
            hidden, weight, x["labels"], x["old"], x["advantages"], x["mask"], ent_coef=0.05, ref_logprobs=x["ref"],
            kl_coef=0.1, dual_clip=3.0, **common,
        )  # fmt: skip
        outputs = [loss, metrics.tensor]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, (hidden, weight, bias)))


def bad_input() -> None:
    x = inputs(torch.float32)
    rank = dist.get_rank()
    try:
        K.VocabShard.of(x["weight"][:, : D - rank], dist.group.WORLD)
    except ValueError as e:
        assert "hidden size" in str(e) and f"[{D - 1}, {D}]" in str(e), e
    else:
        raise AssertionError("shards of different hidden sizes were taken")
    shard = K.VocabShard.of(x["weight"][:SPLIT], dist.group.WORLD)
    for op in ("linear_token_logprobs", "linear_nll"):
        try:
            getattr(K, op)(x["hidden"], x["weight"], x["labels"], shard=shard)
        except ValueError as e:
            assert op in str(e) and f"{SPLIT} rows" in str(e) and f"got {V}" in str(e), e
        else:
            raise AssertionError(f"{op}: a weight that is not the shard was taken")
    labels = x["labels"].clone()
    labels[7] = 2 * SPLIT
    try:
        K.linear_nll(x["hidden"], x["weight"][:SPLIT], labels, shard=shard)
    except ValueError as e:
        assert f"[0, {2 * SPLIT})" in str(e), e
    else:
        raise AssertionError("a label outside the whole vocabulary was taken")


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for op in ("linear_token_logprobs", "linear_nll", "linear_ppo_loss"):
            compare(op, dtype)
            if dist.get_rank() == 0:
                print(f"ok {op} {dtype}")
    bad_input()
    if dist.get_rank() == 0:
        print("ok bad input")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
