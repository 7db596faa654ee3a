"""What tests share: policies, runs of the chain, processes, and an independent reference."""
