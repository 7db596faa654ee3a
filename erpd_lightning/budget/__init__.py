"""KL budgets: solved for, corrected, and kept by going between two policies' weights."""
