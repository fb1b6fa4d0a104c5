"""What the kernel of few rows and that of many share."""
