"""Each mutant is caught by the checks that the real ops pass. One that survives fails here: then a case or a check is
missing."""

import ppomax_kernels as K
import pytest

from . import linear, sampling, verify
from .backends import Backend
from .cases import KL, LOGITS, PACKED, POLICY, REWARDS, SPREADS, VALUE
from .linear import LINEAR_LOGPROBS, LINEAR_NLL, LINEAR_PPO
from .mutants import MUTANTS, mutate
from .sampling import DRAWS

CASES = {
    "token_logprobs": [(c,) for c in LOGITS if c.vocab < 10000],
    "kl_penalty": [(c,) for c in KL],
    "token_rewards": list(REWARDS),
    "gae": [(c,) for c in PACKED],
    "whiten": [(c,) for c in SPREADS],
    "ppo_loss": [(c,) for c in POLICY],
    "value_loss": [(c,) for c in VALUE],
}
CASES |= {
    "linear_token_logprobs": [(c,) for c in LINEAR_LOGPROBS],
    "linear_ppo_loss": [(c,) for c in LINEAR_PPO],
    "linear_nll": [(c,) for c in LINEAR_NLL],
    "sample": [(c,) for c in DRAWS],
}
EVERY = [(op, name) for op, some in MUTANTS.items() for name in some]


@pytest.mark.parametrize(("op", "name"), EVERY, ids=lambda x: x.replace(" ", "_"))
def test_caught(op: str, name: str) -> None:
    home = linear if op.startswith("linear") else sampling if op == "sample" else verify
    check, run = getattr(home, op), Backend("ref", "cpu").bind(getattr(K, op))
    wrong = mutate(MUTANTS[op][name], run)
    for case in reversed(CASES[op]):  # the later ones use more of the arguments
        try:
            check(wrong, *case)
        except AssertionError:
            check(run, *case)  # it is the mutant that is caught, not the op
            return
    pytest.fail(f"{op}: the mutant {name!r} survived all {len(CASES[op])} cases")


def test_every_op_has_mutants() -> None:
    ops = {name for name in K.__all__ if name[0].islower()}
    assert ops == set(MUTANTS), "an op without mutants (or mutants without an op)"
