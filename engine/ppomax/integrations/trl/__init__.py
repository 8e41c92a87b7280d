"""TRL, by four ways in, of which the last two need TRL installed.

    from ppomax.integrations.trl import PPOConfig, PPOTrainer        TRL's PPOTrainer and models, on our engine
    from ppomax.integrations.trl.step import PPOTrainer              the older generate() and step(queries, ...)
    from ppomax.integrations.trl import patch_ppo; patch_ppo()       TRL's own PPOTrainer, up to 1.10, on our ops
    from ppomax.integrations.trl import patch_logprobs; patch_logprobs()       GRPO's and RLOO's logprobs on our ops
COMING_FROM_TRL.md, beside this file, maps every field of PPOConfig."""

from ppomax.integrations.trl.config import PPOConfig
from ppomax.integrations.trl.logprobs import patch_logprobs
from ppomax.integrations.trl.patched_ppo import patch_ppo
from ppomax.integrations.trl.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "patch_logprobs", "patch_ppo"]
