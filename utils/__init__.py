"""The engine of train.py and evaluate.py: flags, processes, training, inference, checkpoints, logs, pictures."""
