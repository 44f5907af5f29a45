"""Training state on disk: safetensors and JSON, committed by a rename."""
