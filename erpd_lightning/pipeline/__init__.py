"""The chain of stages, and what each leaves behind."""
