"""What runs around training: evaluations, exports, and early stopping."""
