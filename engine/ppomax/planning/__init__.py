"""What a job will take before it is started: its memory, its seconds, and which knobs make it fit."""
