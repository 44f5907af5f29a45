"""The contract: what model_fn returns, what it is called with, and the seams between the layers."""
