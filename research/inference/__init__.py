"""What a trained model does: scores of a split, predictions, text."""
