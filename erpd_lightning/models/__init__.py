"""Policies: loaded, asked in bounded memory, exported."""
