"""What the types of a quantised file cost: in weights, in outputs and in what the model says."""
