"""Networks as files for devices: one exporter a format, each verified in its own runtime."""
