"""What a run would need on TPU chips that are not there: memory, arithmetic, and bounds of its speed."""
