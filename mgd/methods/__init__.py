"""Methods: what one optimiser step computes. One method a file: Config, class, step."""
