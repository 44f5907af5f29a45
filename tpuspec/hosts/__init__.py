"""The processes of a run: how they find one another, what they decide together, and what they learn of failures."""
