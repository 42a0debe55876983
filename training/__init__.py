"""Training of capsule networks with PyTorch: model, losses, data, and the trainer."""
