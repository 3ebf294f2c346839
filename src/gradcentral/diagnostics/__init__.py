"""What Gradient Centralization does to a model, measured: before training, along it, and as the paper's theorems."""
