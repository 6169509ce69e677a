"""Explanation: what a trained model looks at, holds and learned from. It meets models and objectives only through the protocols in core."""
