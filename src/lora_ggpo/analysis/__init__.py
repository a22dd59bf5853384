"""What a trained model looks like from nearby: its sharpness, slices of its loss, and double descent."""
