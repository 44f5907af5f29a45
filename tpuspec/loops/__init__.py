"""The loops of train, evaluate and predict over a backend, and the hooks around them."""
