"""What stands beside the training loop: checkpoints, optimizers and moving averages, stop signals, metrics."""
