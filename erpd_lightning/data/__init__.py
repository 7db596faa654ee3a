"""Rollouts: where they are kept, how they are sampled, checked and cut into batches."""
