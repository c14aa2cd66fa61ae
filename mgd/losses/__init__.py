"""Losses: pure functions of tensors; weights and temperatures live in recipes."""
