"""What a run writes: checkpoints, model folders, the exported policy. Knows no engine."""
