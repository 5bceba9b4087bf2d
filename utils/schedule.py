"""The learning-rate schedule."""


def poly_learning_rate(base: float, step: int, num_steps: int, power: float) -> float:
    """base * (1 - step / num_steps) ** power, for step in 0..num_steps-1 (paper, section 4.2)."""
    return base * (1 - step / num_steps) ** power
