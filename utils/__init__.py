"""What training and evaluation share: losses, metrics, inference, schedule, checkpoints, pictures, logs."""
