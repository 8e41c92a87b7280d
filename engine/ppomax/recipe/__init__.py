"""PPO-max itself: rollout, experience and update, with the three shapes that a sequence takes on its way."""
