"""LightningModules: what is trained, evaluated on fresh samples, and asked about stored rollouts."""
