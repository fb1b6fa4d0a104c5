"""The step for so few rows that a product's whole input fits in shared memory: up to 16."""
