"""How well the model answers and synthesises, with intervals over patients."""
