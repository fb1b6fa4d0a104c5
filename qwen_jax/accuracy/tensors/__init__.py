"""Two traces tensor by tensor, and from wrong tensors to causes."""
