"""From tokens to a trained model: data, losses, optimizers, the step, the loop, checkpoints."""
