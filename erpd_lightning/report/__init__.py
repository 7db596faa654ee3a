"""What a run gained and what it cost: tables for a terminal, and a page for a browser."""
