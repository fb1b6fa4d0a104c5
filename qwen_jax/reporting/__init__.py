"""What reports of accuracy and of experiments share: pages, pictures, colours and tables."""
